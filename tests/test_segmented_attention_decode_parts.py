"""Few queries whose keys are shared by programs, in Triton's interpreter."""

import pytest
import torch
from operator_contract import check
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from memattn.bench import retune
from memattn.bench.inputs import make_segmented_inputs
from memattn.ops import segmented_attention
from memattn_kernels import configs
from memattn_kernels.segmented_attention import decode_parts, forward

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tiles are the interpreter's")
PART = 2 * configs.INTERPRETED["BLOCK_N"]


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A table that asks for parts, and how many the keys of each call had."""
    counts: list[int] = []
    shipped, launch = configs.lookup, forward.launch_decode_parts

    def lookup(kernel: str, *arguments) -> dict[str, int]:
        config = shipped(kernel, *arguments)
        return config | {"BLOCK_M": 16, "part": PART} if kernel == configs.WITH_PARTS else config

    def spy(inputs: dict, config: dict) -> None:
        counts.append(decode_parts.n_parts_of(inputs, config["part"]))
        launch(inputs, config)

    monkeypatch.setattr(configs, "lookup", lookup)
    monkeypatch.setattr(forward, "launch_decode_parts", spy)
    return counts


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("sizes", "options", "n_parts"),
    [
        (dict(T=1, H=3, Hkv=1, S=70), dict(query_offset=69), 3),
        # more rows than a tile, some without a key, and sources besides tokens
        (
            dict(T=9, H=4, Hkv=2, S=100, P=3, M=2, segment_len=20),
            dict(query_offset=91, segment_len=20, window_size=40, seq_end=[95, 60]),
            3,
        ),
        (
            dict(T=3, H=4, Hkv=2, S=100),
            dict(query_offset=97, window_size=60, num_sink_tokens=20, seq_end=[100, 98]),
            4,
        ),
        (dict(T=2, S=33, dtype=torch.float16, Dv=8), dict(is_causal=False), 2),
        (dict(T=1, S=0), dict(), 1),
    ],
)
def test_parts(launched: list[int], sizes: dict, options: dict, n_parts: int):
    tensors = make_segmented_inputs(**sizes)
    if "seq_end" in options:
        options = options | {"seq_end": torch.tensor(options["seq_end"], dtype=torch.int32)}
    check(segmented_attention, tensors, options | {"backend": "triton"})
    assert launched == [n_parts]


def test_neither_batch_nor_room_changes_a_bit():
    tensors = make_segmented_inputs(B=3, H=2, Hkv=2, T=1, S=80)
    run = lambda inputs, **options: segmented_attention(**inputs, **options, backend="triton")
    whole = run(tensors, query_offset=79)
    one = run({name: tensor[1:2] for name, tensor in tensors.items()}, query_offset=79)
    assert torch.equal(one.out[0], whole.out[1]) and torch.equal(one.lse[0], whole.lse[1])
    behind = {n: x if n == "query" else F.pad(x, (0, 0, 0, 50)) for n, x in tensors.items()}
    assert torch.equal(run(behind, query_offset=79).out, whole.out)
    before = {n: x if n == "query" else F.pad(x, (0, 0, 23, 0)) for n, x in tensors.items()}
    bounds = torch.full([3], 23, dtype=torch.int32)
    assert torch.equal(run(before, query_offset=102, seq_start=bounds).out, whole.out)


def test_retune_offers_parts():
    present = configs.table("sm_90")[configs.WITH_PARTS]["64"]
    for kind, expected in (("half", list(decode_parts.CANDIDATES)), ("float", [])):
        trials = retune.trials(configs.WITH_PARTS, 64, kind, present[kind])
        assert [trial.config for trial in trials if "part" in trial.config] == expected
