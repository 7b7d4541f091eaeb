"""Split feature vectors, images and sequences into tokens for a task graph."""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.checks import check_int, check_like, check_tensor, check_type, must


class TokenProjection(nn.Module):
    """Split an input into tokens and project each to ``hidden_size`` features.

    One matrix ``W [hidden_size, F]`` projects all ``F`` features of the input. A token is the part
    of the product that comes from its own features: ``token_g = W[:, g] x_g + b``. So each token
    has its own columns of ``W``, which encode its position, and the number of parameters does not
    depend on the number of tokens. Features of a token:

    - ``[B, F]``: consecutive groups of ``ceil(F / n_tokens)``; the last one may be smaller.
    - ``[B, C, H, W]``, or any input where ``input_dim`` is ``(H, W)`` or ``(C, H, W)``: square
      patches, row by row. An image that does not divide is padded with zeros at the right and at
      the bottom.
    - ``[B, L, F]``, where ``input_dim`` is an integer: the L tokens of the input, each projected by
    all of ``W``; with ``positions``, sines and cosines of its position are added.

    Args:
        input_dim: Features F of an input, or the axes of an image, ``(H, W)`` or ``(C, H, W)``.
        hidden_size: Features of a token, ``E``.
        n_tokens: Desired number of tokens of a vector or an image. Sizes are rounded up, so there
            may be fewer; 1 makes the whole input one token.
        patch_size: Side of a patch; None means the longer side of the image over
            ``sqrt(n_tokens)``, rounded up.
        positions: Whether sequences get positions.

    Raises:
        TypeError: If an argument has the wrong Python type.
        ValueError: If a size is below 1.

    Attributes:
        image: The axes of an image with its channels, ``(C, H, W)``; None for a vector.

    Example:
        >>> tokens = TokenProjection(784, 64)
        >>> tokens(torch.randn(2, 784)).shape
        torch.Size([2, 16, 64])
        >>> tokens(torch.randn(2, 1, 28, 28)).shape
        torch.Size([2, 16, 64])
        >>> tokens(torch.randn(2, 5, 784)).shape
        torch.Size([2, 5, 64])
    """

    def __init__(
        self,
        input_dim: int | Sequence[int],
        hidden_size: int,
        *,
        n_tokens: int = 16,
        patch_size: int | None = None,
        positions: bool = False,
    ) -> None:
        super().__init__()
        wanted = "be an integer, (H, W) or (C, H, W)"
        check_type("input_dim", input_dim, (int, Sequence), wanted)
        axes = (input_dim,) if isinstance(input_dim, int) else tuple(input_dim)
        if len(axes) not in (1, 2, 3):
            must("input_dim", wanted, input_dim)
        for axis in axes:
            check_int("input_dim", axis, 1)
        check_int("hidden_size", hidden_size, 1)
        check_int("n_tokens", n_tokens, 1)
        if patch_size is not None:
            check_int("patch_size", patch_size, 1)
        self.input_dim = math.prod(axes)
        self.image = None if len(axes) == 1 else (*(1,) * (3 - len(axes)), *axes)
        self.n_tokens, self.patch_size = n_tokens, patch_size
        self.positions = positions
        self.projection = nn.Linear(self.input_dim, hidden_size)

    @property
    def n_image_tokens(self) -> int | None:
        """Number of tokens of an image; None if ``input_dim`` is an integer."""
        if self.image is None:
            return None
        if self.n_tokens == 1 and self.patch_size is None:
            return 1
        _, height, width = self.image
        side = self._side(height, width)
        return math.ceil(height / side) * math.ceil(width / side)

    def is_sequence(self, x: Tensor) -> bool:
        """Whether an input is ``[B, L, F]``, already split into tokens."""
        return self.image is None and x.dim() == 3 and x.shape[-1] == self.input_dim

    def forward(self, x: Tensor) -> Tensor:
        """Map an input to tokens ``[B, L, E]``.

        Raises:
            TypeError: If ``x`` is no tensor.
            ValueError: If its dtype or device differs from the projection's, or its shape is none
                of the above.
        """
        check_tensor("x", x)
        weight, bias = self.projection.weight, self.projection.bias
        check_like("x", x, "the projection", weight)
        if self.is_sequence(x):
            tokens = self.projection(x)
            return tokens + _sinusoids(tokens) if self.positions else tokens
        image = tuple(x.shape[1:]) if self.image is None and x.dim() == 4 else self.image
        if x.dim() < 2 or x.shape[1:].numel() != self.input_dim:
            wanted = f"[B, {self.input_dim}]" if self.image is None else f"[B, *{self.image}]"
            or_tokens = f" or [B, L, {self.input_dim}]" if self.image is None else ""
            must("x", f"have shape {wanted}{or_tokens}", list(x.shape))
        if self.n_tokens == 1 and self.patch_size is None:
            return self.projection(x.flatten(1))[:, None]
        x, columns = self._split(x, image), self._split(weight, image)
        return torch.einsum("blp,elp->ble", x, columns) + bias

    def _split(self, x: Tensor, image: Sequence[int] | None) -> Tensor:
        """Features by token: ``[n, L, P]``."""
        n = x.shape[0]
        if image is None or len(image) != 3:
            size = math.ceil(self.input_dim / self.n_tokens)
            x = x.reshape(n, self.input_dim)
            return rearrange(F.pad(x, (0, -self.input_dim % size)), "n (l p) -> n l p", p=size)
        _, height, width = image
        side = self._side(height, width)
        x = F.pad(x.reshape(n, *image), (0, -width % side, 0, -height % side))
        return F.unfold(x, side, stride=side).mT

    def _side(self, height: int, width: int) -> int:
        """The side of a patch of an image."""
        return self.patch_size or math.ceil(max(height, width) / math.isqrt(self.n_tokens))

    def extra_repr(self) -> str:
        return f"n_tokens={self.n_tokens}, patch_size={self.patch_size}, positions={self.positions}"


def _sinusoids(tokens: Tensor) -> Tensor:
    """Sines and cosines of positions 0, 1, ..., ``[L, E]``, as in Vaswani et al. (2017)."""
    L, E = tokens.shape[-2:]
    at = torch.arange(L, device=tokens.device, dtype=torch.float32)
    feature = torch.arange(E, device=tokens.device, dtype=torch.float32)
    angle = at[:, None] * 10_000.0 ** (-(feature // 2 * 2) / E)
    return torch.where(feature % 2 == 0, angle.sin(), angle.cos()).to(tokens.dtype)
