"""Plain attention by tensor descriptors: candidates of the tables, run in Triton's interpreter."""

import json
from pathlib import Path

import pytest
import torch
from operator_contract import check

pytest.importorskip("triton", reason="Triton is not installed")

from memattn.bench import retune
from memattn.bench.inputs import make_segmented_inputs
from memattn.ops import segmented_attention
from memattn_kernels import configs
from memattn_kernels.segmented_attention import backward, forward, forward_plain, plain

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tiles are the interpreter's")
BLOCK_M, BLOCK_N = configs.INTERPRETED["BLOCK_M"], configs.INTERPRETED["BLOCK_N"]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A table whose entries ask for descriptors, and which of its kernels were launched."""
    names: list[str] = []
    shipped = configs.lookup

    def lookup(kernel: str, *arguments) -> dict[str, int]:
        config = shipped(kernel, *arguments)
        asks = kernel.endswith(configs.PLAIN_FORMS)
        return config | {"descriptors": 1, "specialized": 1} if asks else config

    def spy(module, function: str) -> None:
        original = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *a: (names.append(function), original(*a)))

    monkeypatch.setattr(configs, "lookup", lookup)
    spy(forward, "launch_forward_plain")
    spy(backward, "launch_dkdv_plain")
    return names


def check_triton(tensors: dict[str, torch.Tensor], **options) -> None:
    """The error rule, forward and backward."""
    check(segmented_attention, tensors, options | {"backend": "triton"})


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("T", "S", "options"),
    [
        (2 * BLOCK_M, 5 * BLOCK_N, {"is_causal": False}),
        (2 * BLOCK_M, 2 * BLOCK_M, {}),
        # the last tile of keys is cut, and no query sees the keys after it
        (BLOCK_M, 60, {"query_offset": 23}),
    ],
)
def test_descriptors(launched: list[str], T: int, S: int, options: dict):
    sizes = dict(B=2, H=2, Hkv=2, D=24, T=T, S=S)
    tensors = make_segmented_inputs(**sizes, dtype=torch.float16)
    if "query_offset" in options:
        for name in ("key", "value"):
            tensors[name][:, :, options["query_offset"] + T :] = torch.nan
    # tokens outside of heads, as a projection leaves them
    tensors = {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in tensors.items()}
    check_triton(tensors, **options)
    assert launched == ["launch_forward_plain", "launch_dkdv_plain"]


def test_groups_of_heads_have_descriptors_in_the_forward(launched: list[str]):
    tensors = make_segmented_inputs(B=1, H=4, Hkv=2, T=40, D=16, dtype=torch.float16)
    check_triton(tensors)
    assert launched == ["launch_forward_plain"]


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"dtype": torch.float32}, {}),
        ({"D": 20}, {}),
        ({"S": 30}, {"is_causal": False}),
        ({}, {"window_size": 8}),
        ({"P": 2}, {}),
    ],
)
def test_pointers_serve_all_else(launched: list[str], sizes: dict, options: dict):
    usual = dict(B=1, H=1, Hkv=1, T=24, D=16, dtype=torch.float16)
    check_triton(make_segmented_inputs(**usual | sizes), **options)
    assert launched == []


def test_what_descriptors_can_read():
    rows = torch.zeros(2, 3, 8, 24, dtype=torch.float16)
    assert plain.can_use_descriptors(rows, rows.transpose(1, 2))
    assert not plain.can_use_descriptors(rows, rows.float())
    assert not plain.can_use_descriptors(rows[..., 1:17])  # begins between
    assert not plain.can_use_descriptors(rows[..., :20].contiguous())  # rows of 40 bytes
    assert not plain.can_use_descriptors(rows[..., ::2])
    assert not plain.can_use_descriptors(rows[:, :1].expand(-1, 3, -1, -1))
    assert not plain.can_use_descriptors(rows[:0])


@pytest.mark.parametrize("kernel", plain.CANDIDATES["sm_90"])
def test_retune_offers_descriptors(kernel: str):
    offered = {
        (width, kind): [
            trial.config
            for trial in retune.trials(
                kernel, width, kind, configs.table("sm_90")[kernel]["64"][kind]
            )
            if "descriptors" in trial.config
        ]
        for width in configs.WIDTHS
        for kind in configs.DTYPE_CLASSES
    }
    for width in (64, 128):
        assert offered.pop((width, "half")) == list(plain.CANDIDATES["sm_90"][kernel][width])
    assert not any(offered.values())


def test_a_table_may_ask_for_descriptors(tmp_path: Path):
    kernel = "segmented_attention_fwd_dense"
    path = tmp_path / "table.json"

    def read(entry: dict, name: str = "sm_90", of: str = kernel) -> dict:
        content = json.loads(json.dumps(configs.table("sm_90")))
        content[of]["64"]["half"] = entry
        if name != "sm_90":
            text = json.dumps(content).replace('"maxnreg": 128', '"num_stages": 3')
            content = json.loads(text)
        path.write_text(json.dumps({"architecture": name, "kernels": content}))
        return configs.read(path)

    config = plain.CANDIDATES["sm_90"][kernel][64][1]
    assert read(config)[kernel]["64"]["half"] == config
    for wrong, name, of in (
        (config, "gfx942", kernel),
        (config, "sm_90", "segmented_attention_fwd"),
    ):
        with pytest.raises(ValueError, match=f"{of}, 64, half must have BLOCK_M"):
            read(wrong, name, of)
    with pytest.raises(ValueError, match="specialized must have descriptors and 4 warps"):
        read(config | {"num_warps": 8})


def test_heads_in_groups(launched: list[str], monkeypatch: pytest.MonkeyPatch):
    # two heads run together, then the third alone
    monkeypatch.setattr(forward_plain, "CACHED_BYTES", 2 * 40 * (16 + 16) * 2)
    check_triton(make_segmented_inputs(B=3, H=1, Hkv=1, T=40, D=16, dtype=torch.float16))
    assert launched == ["launch_forward_plain"]
