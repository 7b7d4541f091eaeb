"""Packed rows: several documents in one row, in the formats of transformers and its collators."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from memattn.checks import check_int, check_tensor, is_traced, must, values_to_check
from memattn.parts.padding import check_mask
from memattn.parts.token_order import repeat_last

LENGTHS = ("max_length_q", "max_length_k")
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k")
KEYWORDS = (*BOUNDS, *LENGTHS, "seq_idx")  # arguments that collators without padding give


@dataclass(frozen=True)
class PackedRows:
    """The documents of a call, as one row that holds the tokens of all rows.

    Attributes:
        cu_seqlens: int32 ``[n+1]``, bounds of the documents in that row of ``N`` tokens.
        present: bool ``[B, T]``, which columns of the call hold a token.
        index: int64 ``[N]``, the tokens' indices in ``[B * T]``; None means all.
    """

    cu_seqlens: Tensor
    present: Tensor
    index: Tensor | None = None

    def put(self, x: Tensor) -> Tensor:
        """``[B or 1, T, ...]`` as one row ``[1, N, ...]``."""
        x = x.expand(*self.present.shape, *x.shape[2:]).flatten(0, 1)
        return (x if self.index is None else x.index_select(0, self.index))[None]

    def columns(self, x: Tensor) -> Tensor:
        """The reverse of ``put``; 0 in columns without a token."""
        x = x[0]
        if self.index is not None:
            x = x.new_zeros(self.present.numel(), *x.shape[1:]).index_copy(0, self.index, x)
        return torch.unflatten(x, 0, self.present.shape)

    def put_keys(self, x: Tensor) -> Tensor:
        """``put`` for ``[B or 1, H, T, D]``."""
        return self.put(x.transpose(1, 2)).transpose(1, 2)

    def put_input(self, name: str, x: Tensor) -> Tensor:
        """An extra tensor from the caller; tensors for all samples are unchanged.

        Raises:
            ValueError: If it has one entry per row instead of one per token.
        """
        (B, T), shape = self.present.shape, x.shape
        if x.dim() >= 2 and shape[0] == B and shape[1] in (1, T):
            return self.put(x)
        if x.dim() >= 2 and B > 1 and shape[0] == B:
            must(name, f"be of all rows or of each token, [{B}, {T}, ...], in packed rows", shape)
        return x

    def next_labels(self, labels: Tensor, ignored: int = -100) -> Tensor:
        """Label of each column, ``[B, T]``: the next token of its document."""
        packed = self.put(labels)
        begins = document_marks(self.cu_seqlens, packed.shape[1])
        ahead = torch.where(begins[1:], ignored, packed.roll(-1, 1))
        return torch.where(self.present, self.columns(ahead), ignored)

    def repeat_last(self, x: Tensor) -> Tensor:
        """``[B, T, E]`` in which a column without a token repeats the token before it."""
        return x if self.index is None else repeat_last(x, self.present)

    def to(self, device: torch.device) -> "PackedRows":
        """The same on another device."""
        index = None if self.index is None else self.index.to(device)
        return PackedRows(self.cu_seqlens.to(device), self.present.to(device), index)


def take_keywords(arguments: dict[str, Any]) -> dict[str, Any]:
    """Remove and return the arguments by which collators without padding describe documents."""
    found = find_keywords(arguments)
    for name in KEYWORDS:
        arguments.pop(name, None)
    return found


def find_keywords(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by which collators without padding describe documents."""
    return {name: arguments[name] for name in KEYWORDS if arguments.get(name) is not None}


def read_rows(
    shape: tuple[int, int],
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    keywords: Mapping[str, Any],
    device: torch.device,
) -> PackedRows | None:
    """The documents of rows that start in this call; None if each row is one document.

    Positions are first compared with those of unpacked rows, which waits for the device; if they
    agree, nothing more is read. While a graph is traced, the documents are taken from
    ``cu_seq_lens_q``.

    Args:
        shape: ``(B, T)``.
        position_ids: ``[B or 1, T]``, starting at 0 in each document, or None.
        attention_mask: ``[B, T]``, 0 in columns without a token, or None.
        keywords: The result of ``take_keywords``.
        device: Device of the tokens.

    Raises:
        ValueError: If shapes do not fit, positions count differently, or descriptions contradict
            each other.
    """
    B, T = shape
    if position_ids is not None:
        check_table("position_ids", position_ids, (B, 1), T)
    if attention_mask is not None:
        check_mask(attention_mask, B, (T,))
        present = attention_mask != 0
    else:
        present = torch.ones(1, 1, dtype=torch.bool, device=device).expand(B, T)
    bounds = document_bounds(keywords, shape)
    seq_idx = keywords.get("seq_idx")
    if seq_idx is not None:
        check_table("seq_idx", seq_idx, (B,), T)
    traced = is_traced(present) or (position_ids is not None and is_traced(position_ids))
    if bounds is None and seq_idx is None:
        if position_ids is None or _count_rows(position_ids, present, traced):
            return None
        begins = _begins(position_ids, present)
    else:
        if bounds is None and traced:
            must("cu_seq_lens_q", "be given with seq_idx in a compiled program", "None")
        if bounds is not None:
            begins = document_marks(bounds, B * T)[:-1].view(B, T)
        else:
            assert seq_idx is not None
            begins = columns_that_change(seq_idx)
        name = "seq_idx" if bounds is None else "cu_seq_lens_q"
        if seq_idx is not None and bounds is not None:
            same = (columns_that_change(seq_idx) == begins) | ~present
            _agree("seq_idx", f"change where {name} begins documents", same, traced)
        if position_ids is not None:
            same = (position_ids == _places(begins, present)) | ~present
            _agree("position_ids", f"begin with 0 where {name} begins documents", same, traced)
    if attention_mask is None and bounds is not None:
        return PackedRows(bounds.to(torch.int32), present)
    if traced:
        must("attention_mask", "be None with cu_seq_lens_q in a compiled program", "a tensor")
    return _gathered(begins, present)


def rows_where_positions_jump(
    shape: tuple[int, int], position_ids: Tensor | None, keywords: Mapping[str, Any]
) -> PackedRows | None:
    """The documents of rows by transformers' rule; None if each row is one document.

    A document starts at each row, and wherever positions do not increase by 1.

    Args:
        shape: ``(B, T)``.
        position_ids: ``[B or 1, T]``; None or another shape is ignored.
        keywords: The result of ``take_keywords``; it must describe the same documents.

    Raises:
        ValueError: If ``keywords`` describe other documents.
    """
    if position_ids is None or position_ids.dim() != 2:
        if keywords:
            must("position_ids", f"be given with {next(iter(keywords))}, [B, T]", "none")
        return None
    position_ids = position_ids.expand(shape)
    begins = columns_that_change(position_ids, by=1)
    traced = is_traced(position_ids)
    if traced:
        _agree("position_ids", "rise by 1 in each row", begins[:, 1:].logical_not(), traced)
        return None
    bounds, seq_idx = document_bounds(keywords, shape), keywords.get("seq_idx")
    for name, other in (
        ("cu_seq_lens_q", None if bounds is None else document_marks(bounds, begins.numel())[:-1]),
        ("seq_idx", None if seq_idx is None else columns_that_change(seq_idx)),
    ):
        if other is not None:
            same = begins == other.view(shape)
            _agree(name, "begin documents where position_ids do", same, traced)
    if not begins[:, 1:].any():
        return None
    return _gathered(begins, torch.ones_like(begins))


def document_bounds(keywords: Mapping[str, Any], shape: tuple[int, int]) -> Tensor | None:
    """``cu_seq_lens_q`` after checking that it bounds documents in ``(B, T)`` columns, or None."""
    for name in (*BOUNDS[1:], *LENGTHS):
        if BOUNDS[0] not in keywords and name in keywords:
            must(BOUNDS[0], f"be given together with {name}", "None")
    if BOUNDS[0] not in keywords:
        return None
    (B, T), bounds, keys = shape, keywords[BOUNDS[0]], keywords.get(BOUNDS[1])
    for name, given in zip(BOUNDS, (bounds, keys), strict=True):
        if given is not None:
            check_tensor(name, given)
            if given.dim() != 1 or given.numel() < 2 or given.is_floating_point():
                must(name, "be integers [n+1] with n of 1 or more", f"{given.dtype} {given.shape}")
    if is_traced(bounds):
        return bounds
    longest = {name: int(keywords[name]) for name in LENGTHS if name in keywords}
    values = values_to_check(bounds, B, T, *longest.values())
    if values is None:
        return bounds
    if keys is not None and keys is not bounds and not torch.equal(bounds, keys):
        must(BOUNDS[1], f"be {BOUNDS[0]}, {values}", keys.tolist())
    if values[0] != 0 or values[-1] != B * T or values != sorted(values):
        must(BOUNDS[0], f"rise from 0 to B * T = {B * T}", values)
    if not set(range(0, B * T, T or 1)) <= set(values):
        must(BOUNDS[0], f"begin a document with each row of {T} tokens", values)
    for name, given in longest.items():
        check_int(name, given, max(b - a for a, b in zip(values, values[1:], strict=False)))
    return bounds


def check_table(name: str, table: Tensor, rows: tuple[int, ...], T: int) -> None:
    """Raise unless the shape is ``[B, T]`` with B from ``rows``."""
    check_tensor(name, table)
    if table.dim() != 2 or table.shape[0] not in rows or table.shape[1] != T:
        must(name, f"have shape [B, T={T}]", list(table.shape))


def _count_rows(position_ids: Tensor, present: Tensor, traced: bool) -> bool:
    """Whether positions count through whole rows, so that no row is packed."""
    same = (position_ids == present.cumsum(1) - 1) | ~present
    if traced:
        _agree(
            "position_ids",
            "begin with 0 in each row alone, or cu_seq_lens_q be given,",
            same,
            traced,
        )
        return True
    return bool(same.all())


def _begins(position_ids: Tensor, present: Tensor) -> Tensor:
    """Where documents start, bool ``[B, T]``: at position 0."""
    begins = (position_ids == 0) & present
    wrong = (position_ids != _places(begins, present)) & present
    if wrong.any():
        row = int(wrong.any(1).nonzero()[0, 0])
        must("position_ids", "count from 0 in each document", f"others in row {row}")
    return begins


def _places(begins: Tensor, present: Tensor) -> Tensor:
    """Number of earlier tokens in each token's document; -1 before the first document."""
    count = present.cumsum(1)
    before = torch.where(begins, count - present.long(), -1).cummax(1).values
    return torch.where(before < 0, -1, count - 1 - before)


def document_marks(bounds: Tensor, size: int) -> Tensor:
    """bool ``[size + 1]``, True at the bounds."""
    marks = torch.zeros(size + 1, dtype=torch.bool, device=bounds.device)
    return marks.index_fill(0, bounds.long(), True)


def columns_that_change(table: Tensor, by: int = 0) -> Tensor:
    """Where ``[B, T]`` differs from the previous column plus ``by``."""
    first = torch.ones_like(table[:, :1], dtype=torch.bool)
    return torch.cat([first, table.diff(dim=1) != by], 1)


def _agree(name: str, requirement: str, same: Tensor, traced: bool) -> None:
    """Raise unless all of ``same`` are True; a traced graph raises when it runs."""
    if traced:
        check = torch._assert_async  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
        check(same.all(), f"{name} must {requirement} in a compiled program")
    elif not same.all():
        row = int((~same).any(1).nonzero()[0, 0])
        must(name, requirement, f"others in row {row}")


def _gathered(begins: Tensor, present: Tensor) -> PackedRows | None:
    """The documents without columns that hold no token; None if there are no documents."""
    index = present.flatten().nonzero()[:, 0]
    # a document that starts in a column without a token starts with its next token
    document = (begins.flatten().cumsum(0) - 1)[index]
    sizes = torch.bincount(document, minlength=int(begins.sum()))
    sizes = sizes[sizes > 0]
    if not len(sizes):
        return None
    cu_seqlens = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).to(torch.int32)
    return PackedRows(cu_seqlens, present, None if len(index) == present.numel() else index)


def refuse_continuous_batching(model: Any) -> NoReturn:
    """Raise NotImplementedError for ``generate_batch`` and other uses of a paged cache."""
    must(
        "model",
        "read a paged cache for continuous batching (generate takes a padded batch instead)",
        f"{type(model).__name__} with attention of memattn",
        NotImplementedError,
    )
