"""Every shipped Triton configuration, compiled ahead of time: no GPU is needed.

``python -m memattn_kernels.aot`` prints the same as a table.
"""

import faulthandler
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from memattn_kernels import aot, configs
from memattn_kernels.aot import SHARED_LIMITS, TARGETS, TENSOR_MEMORY_LIMIT

KERNELS = Path(configs.__file__).parents[2]
TITLES = {kernel.title for kernel in aot.declared()}
TENSOR_CORES = {
    "sm_80": {"mma.sync"},
    "sm_90": {"wgmma.mma_async", "mma.sync"},
    "sm_100": {"tcgen05.mma", "mma.sync"},
    "gfx942": {"v_mfma"},
}


def compile_ahead(folder: Path, *arguments: str) -> list[dict]:
    """The reports of ``python -m memattn_kernels.aot``, in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = folder / "reports.json"
    subprocess.run(
        [sys.executable, "-m", "memattn_kernels.aot", "--json", str(path), *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        env=environment | {"PYTHONPATH": str(KERNELS)},
    )
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """All half-precision variants, with the small key sources at one head dimension."""
    folder = tmp_path_factory.mktemp("aot")
    small = ("*-persistent", "*-memory")
    large = [title for title in TITLES if not title.endswith(("-persistent", "-memory"))]
    reports = compile_ahead(folder, "--dtype", "bfloat16", "--kernel", *large)
    reports += compile_ahead(folder, "--dtype", "bfloat16", "--head-dim", "128", "--kernel", *small)
    return reports + compile_ahead(
        folder, "--dtype", "float16", "--head-dim", "128", "--arch", "sm_90", "--kernel", *large
    )


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The float32 variants of one head dimension: they take long to compile."""
    folder = tmp_path_factory.mktemp("aot")
    return compile_ahead(folder, "--dtype", "float32", "--head-dim", "64")


def check(report: dict) -> None:
    """Compiled without spills, and within the memory of the card."""
    name = report["name"]
    assert report["error"] is None, f"{name}: {report['error']}"
    limit = SHARED_LIMITS[report["arch"]]
    assert report["shared"] <= limit, f"{name}: {report['shared']} B shared, {limit} B are there"
    assert report["tensor_memory"] <= TENSOR_MEMORY_LIMIT, f"{name}: {report['tensor_memory']}"
    assert report["spilled"] == 0, f"{name}: spills {report['spilled']} B"


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
def test_half_precision_compiles_to_tensor_cores(half: list[dict], arch: str):
    chosen = [report for report in half if report["arch"] == arch]
    kernels = {report["kernel"] for report in chosen}
    assert kernels == TITLES
    for report in chosen:
        check(report)
        found = report["tensor_cores"].keys()
        assert found and found <= TENSOR_CORES[arch], f"{report['name']}: {found}"


@pytest.mark.slow
def test_training_kernels_use_the_newest_tensor_cores(half: list[dict]):
    for report in half:
        tiled = not report["kernel"].endswith(("decode", "-persistent", "-memory"))
        if report["arch"] == "sm_90" and tiled and report["head_dim"] <= 128:
            assert "wgmma.mma_async" in report["tensor_cores"], report["name"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
def test_float32_compiles(single: list[dict], arch: str):
    chosen = [report for report in single if report["arch"] == arch]
    assert {report["kernel"] for report in chosen} == TITLES
    for report in chosen:
        check(report)


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_every_table_has_every_kernel(arch: str):
    assert configs.table(arch).keys() == {kernel.name for kernel in aot.declared()}


def test_a_compiler_fault_is_reported(monkeypatch: pytest.MonkeyPatch):
    def fault(variant: aot.Variant) -> None:
        faulthandler.disable()  # the abort is meant: no trace in the test's output
        os.abort()

    variant = next(aot.variants())
    with monkeypatch.context() as patch:
        patch.setattr(aot, "inspect", fault)
        report = aot.inspect_all([variant])[variant.name]
    assert report.error is not None and "aborted" in report.error
    assert variant.name.startswith("sm_80-segmented_attention_fwd-64")
    assert "aborted" in aot.markdown([variant], {variant.name: report})
