"""Run Triton's kernels in its interpreter where there is no GPU, and poison fresh memory."""

import os
from collections.abc import Callable

import pytest
import torch
from quick_interpreter import make_quick
from torch import Tensor

if not torch.cuda.is_available():
    # read when a kernel is defined, so it must be set before any is imported
    os.environ["TRITON_INTERPRET"] = "1"
    make_quick()


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what ``empty``, ``empty_like`` and ``new_empty`` return with NaN.

    A result that a kernel forgot to write, or read before it wrote it, is then NaN.
    """

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_nan(*args, **kwargs) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return allocate_nan

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))


@pytest.fixture
def one_thread():
    """For sizes that are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
