"""Memory banks: learned rows in chapters of equal length; full-rank, low-rank or quantised."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.checks import check_bool, check_int, must
from memattn.reference.chapter_quantization import LARGEST, dequantize_rows, quantize_rows


class MemoryBank(nn.Module):
    """Base of all banks: ``rows [N_m, F]``; a chapter is a block of consecutive rows.

    Args:
        num_tokens: Memory tokens, ``N_m``, divisible by ``num_chapters``.
        num_features: Features of a stored row, ``F``.
        width: Features of a memory token as layers read it.
        num_chapters: Chapters, ``C``.
        init_std: Standard deviation of new rows.
    """

    rows: nn.Parameter | None

    def __init__(
        self, num_tokens: int, num_features: int, width: int, num_chapters: int, init_std: float
    ) -> None:
        super().__init__()
        sizes = (("num_tokens", num_tokens), ("width", width), ("num_chapters", num_chapters))
        for name, size in (*sizes, ("num_features", num_features)):
            check_int(name, size, 1)
        if num_tokens % num_chapters:
            must("num_tokens", f"be divisible by num_chapters={num_chapters}", num_tokens)
        if not 0.0 <= init_std < math.inf:
            must("init_std", "be finite and at least 0", init_std)
        self.num_tokens = num_tokens
        self.num_features = num_features
        self.width = width
        self.num_chapters = num_chapters
        self.init_std = init_std
        self.rows = nn.Parameter(torch.empty(num_tokens, num_features))
        nn.init.normal_(self.rows, std=init_std)

    @property
    def tokens_per_chapter(self) -> int:
        """Memory tokens in a chapter, ``M``."""
        return self.num_tokens // self.num_chapters

    def reset_parameters(self) -> None:
        """Give new values to the parameters."""
        if self.rows is not None:
            nn.init.normal_(self.rows, std=self.init_std)

    def stored(self, chapters: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Stored rows ``[U, M, F]`` of the chapters ``[U]``, or of all.

        ``dtype`` is the result's dtype for quantised rows; parameters keep their own.
        """
        assert self.rows is not None
        return self.take(self.rows, chapters)

    def take(self, rows: Tensor, chapters: Tensor | None) -> Tensor:
        """Chapters ``[U, M, ...]`` of a tensor with one entry for each memory token."""
        by_chapter = torch.unflatten(rows, 0, (self.num_chapters, self.tokens_per_chapter))
        return by_chapter if chapters is None else by_chapter.index_select(0, chapters)

    def expand_rows(self, rows: Tensor) -> Tensor:
        """Memory tokens ``[..., width]`` of stored rows ``[..., F]``."""
        return rows

    def project_rows(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Projected memory tokens ``[..., out]`` of stored rows ``[..., F]``."""
        return F.linear(rows, weight)

    def forward(self, chapters: Tensor | None = None) -> Tensor:
        """Memory tokens ``[U, M, width]``.

        Args:
            chapters: int64 ``[U]``, indices of the chapters; None means all.
        """
        return self.expand_rows(self.stored(chapters))

    def project(self, weight: Tensor, chapters: Tensor | None = None) -> Tensor:
        """The same as ``F.linear(bank(chapters), weight)``, ``[U, M, out]``.

        Args:
            weight: ``[out, width]``.
            chapters: int64 ``[U]``, indices of the chapters; None means all.
        """
        return self.project_rows(self.stored(chapters, weight.dtype), weight)

    def extra_repr(self) -> str:
        return f"{self.num_tokens} x {self.width}, num_chapters={self.num_chapters}"


class StandardMemoryBank(MemoryBank):
    """A bank of full rank, ``rows [N_m, d]``.

    Args:
        num_tokens: Memory tokens, ``N_m``, divisible by ``num_chapters``.
        memory_dim: Features of a memory token, ``d``.
        num_chapters: Chapters, ``C``.
        init_std: Standard deviation of new rows.

    Example:
        >>> bank = StandardMemoryBank(num_tokens=64, memory_dim=32, num_chapters=4)
        >>> bank().shape
        torch.Size([4, 16, 32])
    """

    def __init__(
        self, num_tokens: int, memory_dim: int, num_chapters: int = 1, init_std: float = 0.02
    ) -> None:
        super().__init__(num_tokens, memory_dim, memory_dim, num_chapters, init_std)


class FactorizedMemoryBank(MemoryBank):
    """A bank of rank ``r``: ``rows [N_m, r]`` times the transpose of ``basis [d, r]``.

    New rows have standard deviation ``init_std`` and a new basis ``1/sqrt(r)``, so that memory
    tokens start as large as those of ``StandardMemoryBank``. ``project`` multiplies the basis into
    the weight first, and nothing of size ``N_m x d`` is computed.

    Args:
        num_tokens: Memory tokens, ``N_m``, divisible by ``num_chapters``.
        memory_dim: Features of a memory token, ``d``.
        rank: ``r``.
        num_chapters: Chapters, ``C``.
        init_std: Standard deviation of new rows.
    """

    def __init__(
        self,
        num_tokens: int,
        memory_dim: int,
        rank: int,
        num_chapters: int = 1,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(num_tokens, rank, memory_dim, num_chapters, init_std)
        self.basis = nn.Parameter(torch.empty(memory_dim, rank))
        nn.init.normal_(self.basis, std=rank**-0.5)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.basis, std=self.num_features**-0.5)

    def expand_rows(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.basis)

    def project_rows(self, rows: Tensor, weight: Tensor) -> Tensor:
        return F.linear(rows, weight @ self.basis)


class ReducedDimMemoryBank(MemoryBank):
    """A bank of ``rows [N_m, r]``; layers attend in ``r`` features.

    Args:
        num_tokens: Memory tokens, ``N_m``, divisible by ``num_chapters``.
        rank: ``r``, the width that layers see.
        num_chapters: Chapters, ``C``.
        init_std: Standard deviation of new rows.
    """

    def __init__(
        self, num_tokens: int, rank: int, num_chapters: int = 1, init_std: float = 0.02
    ) -> None:
        super().__init__(num_tokens, rank, rank, num_chapters, init_std)


class QuantizedMemoryBank(MemoryBank):
    """The rows of another bank in 8 or 4 bits, with a scale for each row.

    ``scale = max(max|x| / 127, 1e-8)`` (7 for four bits), and a row is read as ``scale`` times
    ``x / scale``, rounded half to even and clipped. Layers dequantise rows once per step, when they
    project them.

    Args:
        bank: The bank whose rows are quantised; it becomes part of this one.
        bits: 8, or 4 (two numbers in a byte; needs an even number of stored features).
        trainable: Quantisation-aware training: rows stay a float parameter, the forward pass
            quantises them, and the gradient is passed straight through. Otherwise only codes and
            scales are kept, and the rows are not trained.

    Example:
        >>> bank = QuantizedMemoryBank(StandardMemoryBank(64, 32, num_chapters=4), bits=8)
        >>> bank().shape, bank.codes.dtype
        (torch.Size([4, 16, 32]), torch.int8)

    Note:
        Source: Tasmay Tibrewal, Mixture of Chapters, https://github.com/Tasmay-Tibrewal/Memory.
        Differs: quantised rows can be trained; there quantisation is for inference only.
    """

    codes: Tensor | None
    scale_bits: Tensor | None

    def __init__(self, bank: MemoryBank, bits: int = 8, *, trainable: bool = False) -> None:
        if bits not in LARGEST:
            must("bits", f"be one of {', '.join(map(str, LARGEST))}", bits)
        if bits == 4 and bank.num_features % 2:
            must("bank", "have an even number of stored features for 4 bits", bank.num_features)
        check_bool("trainable", trainable)
        nn.Module.__init__(self)
        for name in ("num_tokens", "num_features", "width", "num_chapters", "init_std"):
            setattr(self, name, getattr(bank, name))
        self.bits = bits
        self.rows, bank.rows = bank.rows, None
        self.bank = bank
        self.register_buffer("codes", None)
        # float32 bits stored as int32, so that casting a model's floats does not round them
        self.register_buffer("scale_bits", None)
        if not trainable:
            self.pack()

    @torch.no_grad()
    def pack(self) -> None:
        """Drop the float rows and keep only codes and scales."""
        if self.rows is not None:
            self.codes, scale = quantize_rows(self.rows, self.bits)
            self.scale_bits = scale.view(torch.int32)
            self.rows = None

    @property
    def scale(self) -> Tensor:
        """Scales of the codes, float32 ``[N_m]``."""
        assert self.scale_bits is not None
        return self.scale_bits.view(torch.float32)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.rows is not None:
            nn.init.normal_(self.rows, std=self.init_std)
        self.bank.reset_parameters()

    def stored(self, chapters: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        if self.rows is not None:
            rows = self.take(self.rows, chapters)
            seen = dequantize_rows(*quantize_rows(rows, self.bits), rows.dtype)
            return rows + (seen - rows).detach()
        assert self.codes is not None
        codes, scale = self.take(self.codes, chapters), self.take(self.scale, chapters)
        return dequantize_rows(codes, scale, dtype or torch.float32)

    def expand_rows(self, rows: Tensor) -> Tensor:
        return self.bank.expand_rows(rows)

    def project_rows(self, rows: Tensor, weight: Tensor) -> Tensor:
        return self.bank.project_rows(rows, weight)

    def forward(self, chapters: Tensor | None = None) -> Tensor:
        first = next(self.parameters(), None)
        return self.expand_rows(self.stored(chapters, None if first is None else first.dtype))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, trainable={self.rows is not None}"
