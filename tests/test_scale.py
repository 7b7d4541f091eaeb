"""Memory and communication on many devices: as four processes count them, and by hand."""

import json

import pytest
import torch
from forked_processes import ROOT, results_of
from scale_cases import SYSTEMS, WORLD, make_config

from memattn.cli import main
from memattn.evaluate.scale import exchanged_bytes, fsdp_traffic, fsdp_units, scale, scale_line
from memattn.models import MemAttnForCausalLM
from memattn.nn.neural_memory_parameters import MemoryWeights
from memattn.parts.base import Exchange


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each of four processes counted."""
    return results_of("scale_cases.py", tmp_path_factory.mktemp("scale"), WORLD)


@pytest.mark.parametrize("system", SYSTEMS)
def test_fsdp_sends_what_is_predicted(found, system):
    with torch.device("meta"):
        units = fsdp_units(MemAttnForCausalLM(make_config(system)))
    traffic = fsdp_traffic(units, WORLD, param_size=2, reduce_size=4)
    kept = scale_line(units, WORLD, None, None).kept
    for rank, counted in enumerate(found):
        assert (counted[system]["gathered"], counted[system]["reduced"]) == traffic
        # weights, gradients and two moments alike; the first process has the most rows
        assert 4 * counted[system]["kept"] <= kept
        assert rank or 4 * counted[system]["kept"] == kept


def test_traffic_by_hand():
    # outside of blocks 5 x 3, in the block 8 x 2 and a frozen bias of 3
    frozen = torch.empty(3, requires_grad=False)
    units = [
        [torch.empty(5, 3, requires_grad=True)],
        [torch.empty(8, 2, requires_grad=True), frozen],
    ]
    # on 4 devices 5 rows become 8, and 3 become 4
    assert fsdp_traffic(units, 4, param_size=2, reduce_size=4) == (
        2 * (24 + 2 * (16 + 4)),
        4 * (24 + 16),
    )
    line = scale_line(units, 4, 7, 8)
    assert line.kept == 4 * (4 * 6 + 4 * 4 + 1)
    assert (line.whole, line.activations, line.exchanged) == (2 * (24 + 20), 7, 8)
    assert (line.received, line.reduced) == (128 * 3 // 4, 160 * 3 // 4)
    assert scale_line(units, 1, 0, 0).received == 0


def test_exchange_by_hand():
    window = Exchange(features=6, spans=(None, 5))
    assert exchanged_bytes([window], 40, 4, 2) == 6 * 4 * 2
    assert exchanged_bytes([Exchange(features=6)], 40, 4, 2) == 6 * 30 * 2
    assert exchanged_bytes([Exchange(features=6, ahead=3)], 40, 4, 2) == 6 * 33 * 2
    assert exchanged_bytes([window._replace(state=9)] * 2, 40, 4, 2) == 2 * (6 * 4 * 2 + 9 * 4)
    assert exchanged_bytes([window], 40, 1, 2) == 0


def test_parts_say_what_they_need():
    keys = 2 * 2 * 12  # heads of 12 features
    needs = {
        name: [
            part.exchange(config.sizes)
            for part in config.layer_parts(1).values()
            if part.exchange(config.sizes) != Exchange()
        ]
        for name in SYSTEMS
        for config in [make_config(name)]
    }
    assert needs["vanilla"] == needs["memory_transformer"] == [Exchange(features=keys)]
    assert needs["segmented"] == [Exchange(features=keys, spans=(None, 5))]
    assert needs["future"] == [Exchange(features=keys, ahead=4)]
    assert needs["shiftable"] == [Exchange(features=keys), Exchange(features=3 * keys)]
    (titans,) = needs["titans"]
    config = make_config("titans")
    memory = config.attention.build(config.sizes, 1)
    own = [module for module in memory.modules() if isinstance(module, MemoryWeights)]
    weights = sum(p.numel() for module in own for p in module)
    assert titans.spans == (None, 6) and titans.state == 2 * weights > 0


def test_the_command_prints_a_model_and_writes_the_page(capsys, tmp_path):
    sizes = dict(vocab_size=37, hidden_size=24, num_hidden_layers=2, num_attention_heads=2)
    words = ["estimate", "vanilla", "--options", json.dumps(sizes), "--seq_len", "64"]
    assert main([*words, "--scale", "1", "8"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("| devices | kept |") and printed[2].startswith("| 1 |")
    assert printed[2].endswith("| 0 B |") and "KiB" in printed[3]
    path = tmp_path / "scaling.md"
    assert main(["estimate", "--scale", "8", "64", "256", "1024", "--out", str(path)]) == 0
    assert path.read_text() == (ROOT.parent / "docs" / "scaling.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scale", "0"], "scale must be at least 1, got 0"),
        (["--scale", "8", "--seq_len", "9"], "total_len must give each of 8 processes a token"),
        (["--scale", "8", "--config", "run.yaml"], "config must be left out with --scale"),
        (["vanilla", "--scale", "8", "--json", "x"], "json must be left out with --scale"),
        (["vanilla", "--out", "x.md"], "out must be left out without --scale"),
    ],
    ids=str,
)
def test_names_the_wrong_argument(words, message, capsys):
    assert main(["estimate", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_short_sequence_is_refused_by_the_model_itself():
    with pytest.raises(ValueError, match="total_len must give each of 16 processes a token"):
        list(scale(make_config("vanilla"), [16], 8))
