"""Float32 products by three TF32 products: what a table may ask for, what a launch passes on."""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from memattn.bench import retune
from memattn_kernels import _launch, _products, configs, tf32_candidates

OPTION = "default_dot_input_precision"


def table(path: Path, kind: str, architecture: str = "sm_00", **entry: object) -> Path:
    """A copy of a shipped table, for another architecture, with one entry changed."""
    content = {"architecture": architecture, "kernels": configs.table("sm_90")}
    content = json.loads(json.dumps(content))
    content["kernels"]["segmented_attention_fwd"]["64"][kind] |= entry
    for widths in content["kernels"].values() if architecture.startswith("gfx") else ():
        for kinds in widths.values():
            for config in kinds.values():
                config.pop("maxnreg", None)
    path.write_text(json.dumps(content))
    return path


def test_a_table_may_ask_for_them_in_float32(tmp_path: Path):
    kernels = configs.read(table(tmp_path / "table.json", "float", tf32_products=3))
    assert kernels["segmented_attention_fwd"]["64"]["float"]["tf32_products"] == 3


@pytest.mark.parametrize(
    ("kind", "architecture", "n", "message"),
    [
        ("half", "sm_00", 3, "half must have BLOCK_M, .* and perhaps maxnreg, got"),
        ("float", "gfx942", 3, "float must have BLOCK_M, BLOCK_N, num_warps, num_stages, got"),
        ("float", "sm_00", 1, "tf32_products must be an integer in 3 ... 3, got 1"),
    ],
)
def test_a_table_may_ask_nothing_else(
    tmp_path: Path, kind: str, architecture: str, n: int, message: str
):
    with pytest.raises(ValueError, match=message):
        configs.read(table(tmp_path / "table.json", kind, architecture, tf32_products=n))


@pytest.mark.parametrize(("config", "precision"), [({}, "ieee"), ({"tf32_products": 3}, "tf32x3")])
def test_a_launch_always_says_how(config: dict, precision: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_products, "CAN_CHOOSE", True)
    passed = {}

    class Kernel:
        arg_names = ("BLOCK_M",)

        def __getitem__(self, grid: tuple[int, ...]):
            return lambda *values, **options: passed.update(options)

    given = dict(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1) | config
    _launch.run(Kernel(), (1,), given)
    assert passed == {"num_warps": 4, "num_stages": 1, OPTION: precision}


@pytest.mark.parametrize("kernel", configs.table("sm_90"))
def test_retune_offers_them_in_float32(kernel: str):
    def offered(kind: str) -> list[dict]:
        present = configs.table("sm_90")[kernel]["64"][kind]
        trials = retune.trials(kernel, 64, kind, present)
        return [trial.config for trial in trials if "tf32_products" in trial.config]

    is_other = kernel.startswith(configs.WITH_PRODUCTS) or kernel.endswith("decode")
    assert bool(offered("float")) != is_other
    assert not offered("half")


@pytest.mark.parametrize("arch", [arch for arch in configs.ARCHITECTURES if arch != "gfx942"])
def test_a_table_can_ship_every_candidate(arch: str, tmp_path: Path):
    for kernel in configs.table(arch):
        for width in configs.WIDTHS:
            for config in tf32_candidates.candidates(arch, kernel, width):
                kernels = json.loads(json.dumps(configs.table(arch)))
                kernels[kernel][str(width)]["float"] = config
                path = tmp_path / "table.json"
                path.write_text(json.dumps({"architecture": arch, "kernels": kernels}))
                assert configs.read(path)[kernel][str(width)]["float"] == config
