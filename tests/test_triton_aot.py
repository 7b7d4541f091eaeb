"""The shipped Triton configurations, compiled ahead of time: no GPU is needed.

An ordinary run compiles the plain forms for one architecture; ``-m slow`` compiles all forms of all
kernels. ``python -m memattn_kernels.aot`` prints all as a table. Reports are kept in ``build/aot``.
"""

import faulthandler
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from memattn_kernels import aot, configs, machine_code
from memattn_kernels.aot import TARGETS
from memattn_kernels.aot_checks import faults, read_counts, worse, write_counts
from memattn_kernels.aot_kernel import Report
from memattn_kernels.machine_code import HotLoop

ROOT = Path(__file__).parents[1]
KERNELS = Path(configs.__file__).parents[2]
COUNTS = ROOT / "docs/kernels/counts.json"
DECLARED = list(aot.declared())
PLAIN = ("*_fwd-*plain", "*_bwd_dq-*plain", "*_bwd_dkdv-*plain", "segmented*_causal-*plain")
# kernels whose tiles are too small for the newest tensor cores, as are those of the gradient of the
# neural memory
SMALL_SOURCES = ("-persistent", "-memory")
# kernels that sort or add, and multiply no matrices
WITHOUT_PRODUCTS = {
    "chapter_attention_bwd_lists",
    "chapter_attention_bwd_sum",
    "segmented_attention_decode_sum",
}
TENSOR_CORES = {
    "sm_80": {"mma.sync"},
    "sm_90": {"wgmma.mma_async", "mma.sync"},
    "sm_100": {"tcgen05.mma", "mma.sync"},
    "gfx942": {"v_mfma"},
}


def run_python(*arguments: str) -> str:
    """What ``python`` prints, in a process without the interpreter of Triton."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": str(KERNELS)},
    ).stdout


def compile_ahead(folder: Path, *arguments: str, cache: Path = ROOT / "build/aot") -> list[dict]:
    """The reports of ``python -m memattn_kernels.aot``."""
    path = folder / "reports.json"
    run_python(
        *("-m", "memattn_kernels.aot", "--json", str(path), "--cache", str(cache), *arguments)
    )
    return json.loads(path.read_text())


def load(report: dict) -> Report:
    """A report as it was before it was JSON."""
    values = {name: report[name] for name in Report.__dataclass_fields__}
    return Report(**values | {"loops": [HotLoop(**loop) for loop in report["loops"]]})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The plain forms that most calls run, on one architecture."""
    filters = ("--arch", "sm_90", "--dtype", "bfloat16", "--head-dim", "128", "--kernel", *PLAIN)
    return compile_ahead(tmp_path_factory.mktemp("aot"), *filters)


def check(report: dict) -> None:
    """Compiled without a fault: see ``aot_checks``."""
    assert not report["faults"], f"{report['name']}: {'; '.join(report['faults'])}"


def check_counts(reports: list[dict]) -> None:
    """No hot loop is longer than the committed count, and as many programs fit."""
    old = read_counts(COUNTS)
    if not old:
        pytest.skip(f"{COUNTS.name} is of another version of Triton")
    found = worse(old, {report["name"]: load(report) for report in reports})
    update = "python -m memattn_kernels.aot --arch sm_90 --dtype bfloat16 --update docs/kernels/"
    assert not found, f"{found}; if that is meant: {update}{COUNTS.name}"


def check_tensor_cores(report: dict) -> None:
    """Products of half precision run on tensor cores, those of training on the newest."""
    found, arch = report["tensor_cores"].keys(), report["arch"]
    if report["kernel"] in WITHOUT_PRODUCTS:
        assert not found
        return
    assert found and found <= TENSOR_CORES[arch], f"{report['name']}: {found}"
    kernel = report["kernel"]
    tiled = "_decode" not in kernel and not kernel.endswith(SMALL_SOURCES)
    tiled &= not kernel.startswith("neural_memory_bwd")
    if arch == "sm_90" and tiled and report["head_dim"] <= 128:
        assert "wgmma.mma_async" in found, report["name"]


def test_plain_forms_compile_without_a_fault(plain: list[dict]):
    assert len(plain) == 12
    for report in plain:
        check(report)
        check_tensor_cores(report)
        assert report["programs"] >= 1 and len(report["loops"]) >= 2
        # masked tiles come first and cost more
        assert report["loops"][0]["instructions"] > report["loops"][1]["instructions"]
    check_counts(plain)


def test_float32_runs_on_tensor_cores_where_a_table_asks_for_tf32(tmp_path: Path):
    kernels = ("segmented_attention_fwd", "segmented_attention_fwd_causal-plain-tf32-1")
    filters = ("--arch", "sm_90", "--dtype", "float32", "--head-dim", "64")
    reports = compile_ahead(tmp_path, *filters, "--kernel", *kernels)
    assert [report["kernel"] for report in reports] == list(kernels)
    assert not reports[0]["tensor_cores"] and reports[1]["tensor_cores"] == {"wgmma.mma_async": 72}


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
def test_every_configuration_compiles(pytestconfig: pytest.Config, tmp_path: Path, arch: str):
    if pytestconfig.getoption("markexpr") != "slow":
        pytest.skip("compiles for many minutes, so it runs with -m slow only")
    # a worker of pytest-xdist has one architecture at a time
    n_jobs = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
    chosen = compile_ahead(tmp_path, "--arch", arch, "--jobs", n_jobs)
    here = [k for k in DECLARED if k.candidates is None or k.candidates.get(arch)]
    assert {report["kernel"] for report in chosen} == {kernel.title for kernel in here}
    in_tables = [k for k in DECLARED if k.pinned is None and k.candidates is None]
    n_forms = sum((1 + kernel.in_float32) * len(kernel.widths) for kernel in in_tables)
    n_pinned = sum(len(kernel.pinned) for kernel in DECLARED if kernel.pinned is not None)
    candidates = [k.candidates[arch] for k in here if k.candidates is not None]
    assert len(chosen) == n_forms + n_pinned + sum(map(len, candidates))
    for report in chosen:
        check(report)
        if report["dtype"] != "float32" or "tf32_products" in report["config"]:
            check_tensor_cores(report)
    check_counts(chosen)


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_every_table_has_every_kernel(arch: str):
    in_tables = {kernel.name for kernel in DECLARED if kernel.pinned is None}
    assert configs.table(arch).keys() == in_tables


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


LOOP = HotLoop(instructions=300, products=8, waits=1, spills=0)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"error": "no"}, "no"),
        ({"shared": 300_000}, "needs 300000 B of shared memory, 232448 are there"),
        ({"tensor_memory": 1024}, "needs 1024 columns of tensor memory"),
        ({"is_serialised": True}, "ptxas serialises its matrix products"),
        ({"spilled": 40}, "spills 40 B, 32 may be"),
        ({"loops": [LOOP, replace(LOOP, spills=4)]}, "4 of 300 instructions of a hot loop spill"),
        ({"programs": 1}, "1 programs on a multiprocessor, 2 were promised"),
    ],
)
def test_names_the_fault(changes: dict, fault: str):
    variant = next(aot.variants(("sm_90",), (64,), ("bfloat16",), ("segmented_attention_fwd",)))
    assert variant.config["maxnreg"] == 128
    report = Report(
        registers=128, shared=65536, programs=2, loops=[replace(LOOP, spills=3)], spilled=32
    )
    assert faults(variant, report) == []
    (found,) = faults(variant, replace(report, **changes))
    assert found.startswith(fault)


def test_names_a_specialisation_that_triton_left_out():
    name = "segmented_attention_fwd_dense-specialized"
    (variant,) = aot.variants(("sm_90",), (128,), ("bfloat16",), (name,))
    report = Report(registers=168, shared=180384, programs=1, loops=[LOOP], warps=12)
    assert faults(variant, report) == []
    assert faults(variant, replace(report, warps=4)) == ["Triton left out its warp specialisation"]


def test_a_longer_loop_and_fewer_programs_are_worse(tmp_path: Path):
    path = tmp_path / "counts.json"
    report = Report(registers=128, programs=2, loops=[LOOP])
    write_counts(path, {"a": report, "b": report})
    old = read_counts(path)
    assert worse(old, {"a": report, "new": report}) == []
    longer = replace(report, spilled=8, programs=1, loops=[replace(LOOP, instructions=307), LOOP])
    assert worse(old, {"b": longer}) == [
        "b: spills 8 B, not 0",
        "b: 1 programs on a multiprocessor, not 2",
        "b: 2 hot loops, not 1",
        "b: 307 instructions in a hot loop, not 300",
    ]
    write_counts(path, {"b": longer})
    assert read_counts(path) == old | {"b": [128, 8, 1, [307, 300]]}
    path.write_text(path.read_text().replace(triton.__version__, "0.0"))
    assert read_counts(path) == {}


def test_programs_of_a_multiprocessor():
    assert machine_code.programs_per_core("sm_90", 256, 128, 65536) == 2
    assert machine_code.programs_per_core("sm_90", 256, 129, 65536) == 1
    assert machine_code.programs_per_core("sm_90", 256, 64, 120_000) == 1
    assert machine_code.programs_per_core("sm_100", 128, 32, 1024, tensor_memory=256) == 2


def test_waits_behind_the_end_are_no_loops():
    code = """
.LBB0_1:
    v_mfma_f32_32x32x8f16 a[0:15], v[0:1], v[2:3], a[0:15]
    s_cbranch_scc1 .LBB0_1
    s_endpgm
    s_nop 0
    s_branch .LBB0_1
"""
    (loop,) = machine_code.hot_loops(code.replace("s_branch .LBB0_1", "s_branch .LBB0_2"))
    assert loop.instructions == 2
    # a branch to the same place does not make the loop longer
    assert machine_code.hot_loops(code) == [loop]


def test_reads_the_loops_of_assembly():
    code = """
    s_mov_b32 s0, 0
.LBB0_1:
    v_add_u32 v0, v0, 1
.LBB0_2: ; inner
    v_mfma_f32_32x32x8f16 a[0:15], v[0:1], v[2:3], a[0:15]
    scratch_load_dword v1, off, s32
    s_cbranch_scc1 .LBB0_2
    s_cbranch_scc1 .LBB0_1
"""
    (loop,) = machine_code.hot_loops(code)
    assert loop == HotLoop(instructions=3, products=1, waits=0, spills=1)


SERIALISED = """
from dataclasses import replace
from memattn_kernels import aot
name = "task_masked_attention_bwd_dkdv-dense-plain"
variant = next(aot.variants(("sm_90",), (64,), ("bfloat16",), (name,)))
of_g = lambda *arguments: variant.kernel.constants(*arguments) | {"G": 1}
serial = replace(variant, kernel=replace(variant.kernel, constants=of_g))
print([aot.inspect(v).is_serialised for v in (variant, serial)])
"""


def test_sees_that_ptxas_serialises_products():
    assert run_python("-c", SERIALISED).strip() == "[False, True]"


def test_reports_are_kept(tmp_path: Path):
    filters = ("--arch", "sm_90", "--dtype", "bfloat16", "--head-dim", "64")
    filters += ("--kernel", "segmented_attention_decode-plain")
    cache = tmp_path / "cache"
    (first,) = compile_ahead(tmp_path, *filters, cache=cache)
    (path,) = cache.glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"registers": 7}))
    (kept,) = compile_ahead(tmp_path, *filters, cache=cache)
    assert kept == first | {"registers": 7}
