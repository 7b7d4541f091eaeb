"""segmented_attention in Triton: what the test file of all backends does not reach."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from memattn.bench import retune, retune_workloads
from memattn.bench.inputs import make_segmented_inputs
from memattn.ops import segmented_attention
from memattn.testing import assert_results_within_budget, run_with_gradients
from memattn_kernels import _launch, configs
from memattn_kernels.segmented_attention import segmented_attention as triton_attention
from memattn_kernels.signatures import SegmentedAttentionArgs

SMALL = {"B": 1, "H": 2, "Hkv": 1}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(tensors: dict[str, torch.Tensor], **options) -> dict[str, torch.Tensor]:
    """Triton's results, within the error budget of the reference."""
    low, high = (
        run_with_gradients(
            segmented_attention, tensors, options | {"backend": "reference"}, dtype=dtype
        )
        for dtype in (None, torch.float64)
    )
    actual = run_with_gradients(segmented_attention, tensors, options | {"backend": "triton"})
    assert_results_within_budget(actual, low, high)
    return actual


def arguments(tensors: dict[str, torch.Tensor], **options) -> SegmentedAttentionArgs:
    """Arguments of the kernels' own function, for causal attention."""
    empty = dict.fromkeys(SegmentedAttentionArgs._fields)
    usual = dict(is_causal=True, memory_is_causal=False, query_offset=0, scale=0.25)
    return SegmentedAttentionArgs(**{**empty, **usual, **tensors, **options})


def test_persistent_gradient_over_several_chunks(monkeypatch: pytest.MonkeyPatch):
    tensors = make_segmented_inputs(**SMALL | {"B": 2}, T=21, P=3, device=DEVICE)
    bounds = torch.tensor([0, 9], dtype=torch.int32, device=DEVICE)
    whole = check(tensors, window_size=4, seq_start=bounds)
    monkeypatch.setattr(_launch, "MIN_PART", 8)
    parts = check(tensors, window_size=4, seq_start=bounds)
    # added in another order
    torch.testing.assert_close(parts["d_persistent_key"], whole["d_persistent_key"])
    torch.testing.assert_close(parts["d_query"], whole["d_query"], rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offsets_beyond_32_bits():
    # the last sequence begins after 2**31 elements
    tensors = make_segmented_inputs(B=1, H=4, Hkv=4, T=2048, D=128, dtype=torch.bfloat16)
    expected = segmented_attention(
        **{name: tensor.cuda() for name, tensor in tensors.items()},
        window_size=256,
        backend="triton",
    )
    many = {
        name: torch.cat([torch.zeros_like(tensor).expand(2049, -1, -1, -1), tensor]).cuda()
        for name, tensor in tensors.items()
    }
    actual = segmented_attention(**many, window_size=256, backend="triton")
    assert torch.equal(actual.out[-1], expected.out[0])
    assert torch.equal(actual.lse[-1], expected.lse[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_packed_documents_in_a_cuda_graph():
    tensors = make_segmented_inputs(B=1, T=300, D=64, dtype=torch.bfloat16, device="cuda")
    cu_seqlens = torch.tensor([0, 100, 300], dtype=torch.int32, device="cuda")
    args = arguments(tensors, window_size=64, cu_seqlens=cu_seqlens)
    expected = triton_attention(args)[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = triton_attention(args)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


def test_retune_knows_kernels_of_the_tables():
    assert retune.CANDIDATES["half"].keys() == retune.CANDIDATES["float"].keys()
    assert retune.CANDIDATES["half"].keys() == configs.table("sm_90").keys()
    assert retune.CAPPED_CANDIDATES.keys() == configs.table("sm_90").keys()


@pytest.mark.parametrize("kernel", configs.table("sm_90"))
def test_retune_has_work_for_every_kernel(kernel: str):
    operator, make_inputs, passes = retune_workloads.workload(kernel)
    assert kernel.startswith(operator.__name__.removesuffix("_loss"))
    tensors = make_inputs(B=1, T=7, S=140, D=8)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    for options in passes:
        assert operator(**leaves, **options, backend="reference").out.requires_grad


def changed_table(path: Path, **entry: object) -> Path:
    """A copy of a shipped table, for another architecture, with one entry changed."""
    content = {"architecture": "sm_00", "kernels": configs.table("sm_90")}
    content = json.loads(json.dumps(content))
    content["kernels"]["segmented_attention_fwd"]["64"]["half"] |= entry
    path.write_text(json.dumps(content))
    return path


def test_a_table_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(configs, "_loaded", {})
    path = changed_table(tmp_path / "table.json", BLOCK_M=32)
    assert configs.load(path) == "sm_00"
    assert configs.table("sm_00")["segmented_attention_fwd"]["64"]["half"]["BLOCK_M"] == 32


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"BLOCK_M": 48}, "BLOCK_M must be a power of two in 16 ... 256, got 48"),
        ({"BLOCK_N": 8}, "BLOCK_N must be a power of two in 16 ... 256, got 8"),
        ({"num_stages": "2"}, "num_stages must be an integer in 1 ... 16, got 2"),
        ({"maxnreg": 256}, "maxnreg must be an integer in 32 ... 255, got 256"),
        ({"warps": 4}, "half must have BLOCK_M, .* num_stages and perhaps maxnreg, got"),
    ],
)
def test_names_the_wrong_entry_of_a_table(tmp_path: Path, entry: dict, message: str):
    with pytest.raises(ValueError, match=message):
        configs.read(changed_table(tmp_path / "table.json", **entry))


def test_a_cap_on_registers_is_for_nvidia_only(tmp_path: Path):
    path = changed_table(tmp_path / "table.json", maxnreg=128)
    assert configs.read(path)["segmented_attention_fwd"]["64"]["half"]["maxnreg"] == 128
    path.write_text(path.read_text().replace("sm_00", "gfx942"))
    with pytest.raises(ValueError, match=r"must have BLOCK_M, BLOCK_N, num_warps, num_stages, got"):
        configs.read(path)


def test_names_the_file_that_is_no_table(tmp_path: Path):
    path = tmp_path / "table.json"
    with pytest.raises(FileNotFoundError, match=r"table\.json"):
        configs.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"table\.json must be a JSON file"):
        configs.load(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match='must hold an object "kernels", got NoneType'):
        configs.load(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_retune_needs_a_gpu(tmp_path: Path):
    with pytest.raises(RuntimeError, match="retune needs a CUDA device"):
        retune.retune(tmp_path / "table.json")
    assert not list(tmp_path.iterdir())


def test_retune_chooses_the_fastest_that_runs():
    present = configs.table("sm_90")["segmented_attention_fwd"]["128"]["half"]
    trials = list(retune.trials("segmented_attention_fwd", 128, "half", present))
    assert trials[0].config == present
    assert all(trial.config != present for trial in trials[1:])
    results = {1: 2.0, 2: 1.0, 3: 3.0}
    seen = []
    best = retune.choose(
        iter(trials),
        lambda trial: results.get(trials.index(trial), "out of shared memory"),
        lambda trial, result: seen.append(result),
    )
    assert best == (trials[2], 1.0)
    assert seen[:3] == ["out of shared memory", 2.0, 1.0] and len(seen) == len(trials)


@pytest.mark.parametrize("kernel", configs.table("sm_90"))
def test_retune_offers_a_cap_on_registers_at_head_dimension_64(kernel: str):
    caps = {}
    for width, kind in ((64, "half"), (64, "float"), (128, "half")):
        present = configs.table("sm_90")[kernel][str(width)][kind]
        others = list(retune.trials(kernel, width, kind, present))[1:]
        caps[width, kind] = {trial.config.get("maxnreg") for trial in others}
    is_free = kernel.endswith("decode") or kernel.startswith(configs.WITH_PRODUCTS)
    expected = {None} if is_free else {None, 128}
    assert caps == {(64, "half"): expected, (64, "float"): {None}, (128, "half"): {None}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_trial_that_fails_says_why():
    result = retune.measure(retune.Trial("segmented_attention_fwd", 64, "half", {}))
    assert isinstance(result, str) and "CUDA" in result
