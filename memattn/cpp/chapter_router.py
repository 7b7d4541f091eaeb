"""The router of chapters of the C++ extension."""

from torch import Tensor

from memattn.cpp._register import register_cpp
from memattn_kernels._router import REGISTRATION, without_saved
from memattn_kernels.signatures import ChapterRouterArgs

_operator = register_cpp("chapter_router", ChapterRouterArgs, **REGISTRATION)


def chapter_router(args: ChapterRouterArgs) -> tuple[Tensor, ...]:
    """Return indices, weights, the three losses, count, load and entropy."""
    return without_saved(_operator(*args))
