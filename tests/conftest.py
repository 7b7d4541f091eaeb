"""Triton's interpreter where there is no GPU, fresh memory that is poisoned, long tests first."""

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
def new_programs():
    """Forget what was compiled before: PyTorch keeps a few programs of each function, no more."""
    from torch import _dynamo  # not above: it imports Triton

    _dynamo.reset()
    yield
    _dynamo.reset()


@pytest.fixture
def one_thread():
    """For sizes that are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def is_foreign(item: pytest.Item) -> bool:
    """Whether a shared test is about what its operator does not have: a backend, for one."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    spec = params.get("spec")
    if spec is None or not hasattr(spec, "backends"):
        return False
    backend, name = params.get("backend", spec.backends[0]), getattr(item, "originalname", "")
    return backend not in spec.backends or not {name, f"{name}-{backend}"}.isdisjoint(spec.lacks)


# tests of a file here share what takes minutes to make
TOGETHER = ("test_triton_aot.py", "test_train_distributed.py")


# of the test classes of transformers, where those are fetched
MARKS = [
    "all_of_transformers",
    "accelerate_tests",
    "executorch_export_test",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "generate",
    "is_agent_test",
    "is_expert_parallel_test",
    "is_fsdp_test",
    "is_pipeline_test",
    "is_staging_test",
    "is_tensor_parallel_test",
    "is_training_test",
    "onnx_export_test",
    "order",
    "timeout",
    "torch_compile_test",
    "torch_export_test",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--all-of-transformers``: its tests for each of our models, not for two of them."""
    parser.addoption("--all-of-transformers", action="store_true")


def pytest_configure(config: pytest.Config) -> None:
    """Know the marks of the test classes of transformers."""
    for name in MARKS:
        config.addinivalue_line("markers", f"{name}: of transformers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first, and none of what an operator lacks.

    At the end of a run a long one would leave the other workers idle, which take each other's last
    tests, and with them what tests of a file share a second time.
    """

    def is_short(item: pytest.Item) -> bool:
        return item.path.name not in TOGETHER and item.get_closest_marker("slow") is None

    def is_wanted(item: pytest.Item) -> bool:
        whole = item.config.getoption("--all-of-transformers")
        return (whole or not item.get_closest_marker("all_of_transformers")) and not is_foreign(
            item
        )

    items[:] = sorted(filter(is_wanted, items), key=is_short)
