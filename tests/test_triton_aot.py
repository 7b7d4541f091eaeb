"""The shipped Triton configurations, compiled ahead of time: no GPU is needed.

An ordinary run compiles every kernel for every architecture at one head dimension, and the widest
in float32; ``-m slow`` compiles all. ``python -m memattn_kernels.aot`` prints all as a table.
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
# bytes of a thread: eight registers, stored and loaded once by a program and in no loop
MAX_SPILLED = 32
# kernels whose tiles are too small for the newest tensor cores
SMALL_SOURCES = ("-persistent", "-memory")
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
    """Every kernel on every architecture in half precision, at one head dimension."""
    folder = tmp_path_factory.mktemp("aot")
    return compile_ahead(folder, "--dtype", "bfloat16", "--head-dim", "128")


@pytest.fixture(scope="module")
def whole(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Every kernel with every shipped configuration, on every architecture."""
    if pytestconfig.getoption("markexpr") != "slow":
        pytest.skip("compiles for many minutes, so it runs with -m slow only")
    return compile_ahead(tmp_path_factory.mktemp("aot"))


def check(report: dict) -> None:
    """Compiled without spills, and within the memory of the card."""
    name = report["name"]
    assert report["error"] is None, f"{name}: {report['error']}"
    limit = SHARED_LIMITS[report["arch"]]
    assert report["shared"] <= limit, f"{name}: {report['shared']} B shared, {limit} B are there"
    assert report["tensor_memory"] <= TENSOR_MEMORY_LIMIT, f"{name}: {report['tensor_memory']}"
    assert report["spilled"] <= MAX_SPILLED, f"{name}: spills {report['spilled']} B"


def check_tensor_cores(report: dict) -> None:
    """Products of half precision run on tensor cores, those of training on the newest."""
    found, arch = report["tensor_cores"].keys(), report["arch"]
    assert found and found <= TENSOR_CORES[arch], f"{report['name']}: {found}"
    tiled = not report["kernel"].endswith(("decode", *SMALL_SOURCES))
    if arch == "sm_90" and tiled and report["head_dim"] <= 128:
        assert "wgmma.mma_async" in found, report["name"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
def test_half_precision_compiles_to_tensor_cores(half: list[dict], arch: str):
    chosen = [report for report in half if report["arch"] == arch]
    assert {report["kernel"] for report in chosen} == TITLES
    for report in chosen:
        check(report)
        check_tensor_cores(report)


@pytest.mark.slow
def test_the_widest_float32_compiles(tmp_path: Path):
    """The tightest in registers and shared memory."""
    reports = compile_ahead(tmp_path, "--dtype", "float32", "--head-dim", "256", "--arch", "sm_90")
    assert {report["kernel"] for report in reports} == TITLES
    for report in reports:
        check(report)


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
def test_every_configuration_compiles(whole: list[dict], arch: str):
    chosen = [report for report in whole if report["arch"] == arch]
    assert len(chosen) == len(TITLES) * len(configs.WIDTHS) * len(configs.DTYPE_CLASSES)
    for report in chosen:
        check(report)
        if report["dtype"] != "float32":
            check_tensor_cores(report)


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_every_table_has_every_kernel(arch: str):
    assert configs.table(arch).keys() == {kernel.name for kernel in aot.declared()}


def test_a_compiler_fault_is_reported(monkeypatch: pytest.MonkeyPatch):
    def fault(variant: aot.Variant) -> None:
        faulthandler.disable()  # the abort is meant: no trace in the test's output
        os.abort()

    variant = next(aot.variants(kernels=("segmented_attention_fwd",)))
    with monkeypatch.context() as patch:
        patch.setattr(aot, "inspect", fault)
        report = aot.inspect_all([variant])[variant.name]
    assert report.error is not None and "aborted" in report.error
    assert variant.name.startswith("sm_80-segmented_attention_fwd-64")
    assert "aborted" in aot.markdown([variant], {variant.name: report})
