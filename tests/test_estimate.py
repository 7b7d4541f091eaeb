"""Parameters and FLOPs, part by part."""

import json
from pathlib import Path

import pytest
import torch
from adapter_factories import make_base
from model_factories import SYSTEMS, make_config, make_model
from transformers import Qwen2Config

from memattn.adapters import attach_memory
from memattn.cli import main
from memattn.evaluate import estimate
from memattn.evaluate.estimate_attached import estimate_attached
from memattn.evaluate.published import published_model
from memattn.models import MemAttnConfig


@pytest.mark.parametrize("system", SYSTEMS)
def test_parameters_are_those_of_the_model_and_flops_those_of_its_parts(system):
    config, model, length = make_config(system), make_model(system), 11
    result = estimate(config, length)
    assert result.parameters == sum(p.numel() for p in model.parameters())
    lines = {line.name: line for line in result.lines}
    for name, part in config.named_parts().items():
        costs = [
            own.cost(config.sizes, length, i)
            for i in range(config.num_hidden_layers)
            if (own := config.layer_parts(i).get(name)) is not None
        ]
        assert lines[name].flops == sum(cost.flops for cost in costs)
        assert lines[name].parameters == sum(cost.parameters for cost in costs)
        assert lines[name].layers == len(costs)
        shared = part.shared_cost(config.sizes, length)
        assert (f"{name}, shared" in lines) == (shared.parameters > 0)
    mlp = sum(p.numel() for n, p in model.named_parameters() if ".mlp." in n)
    assert (lines["mlp"].parameters, lines["mlp"].flops) == (mlp, 2 * length * mlp)
    head = 2 * length * config.hidden_size * config.vocab_size
    assert lines["output layer"].flops == head
    assert result.flops == sum(line.flops for line in result.lines)


def test_nothing_of_the_models_size_is_allocated():
    sizes = dict(hidden_size=4096, num_hidden_layers=80, num_attention_heads=32)
    before = torch.get_rng_state()
    result = estimate(MemAttnConfig.vanilla(vocab_size=10**6, **sizes), 8192)
    assert result.parameters > 10**10 and torch.equal(before, torch.get_rng_state())


def test_attention_counts_the_pairs_that_are_seen():
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=10)
    whole = estimate(MemAttnConfig.vanilla(**sizes), 64)
    windows = estimate(MemAttnConfig.segmented(segment_len=None, window_size=8, **sizes), 64)
    products = 2 * 64 * 4 * 32 * 32
    pairs = {
        name: (e.lines[1].flops - products) / (4 * 32)
        for name, e in (("whole", whole), ("windows", windows))
    }
    persistent = 4 * 64
    assert pairs["whole"] == 64 * 65 / 2
    assert pairs["windows"] == 8 * 9 / 2 + (64 - 8) * 8 + persistent


def test_names_a_length_that_does_not_fit():
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        estimate(make_config("vanilla"), 0)
    config = make_config("learned")
    limit = config.position_limit
    assert limit is not None
    with pytest.raises(ValueError, match=f"length must be at most position_limit={limit}, got"):
        estimate(config, limit + 1)


def run(capsys, *arguments):
    code = main(["estimate", *arguments])
    return code, *capsys.readouterr()


def test_the_command_takes_presets_folders_and_configurations(capsys, tmp_path):
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=300)
    config = MemAttnConfig.vanilla(**sizes)
    config.save_pretrained(tmp_path)
    (tmp_path / "run.yaml").write_text(
        f"model:\n  preset: vanilla\n  options: {json.dumps(sizes)}\ndata:\n  seq_len: 16\n"
    )
    wanted = estimate(config, 16).to_dict()
    specialists = {"names": ["law"], "rank": 2}
    (tmp_path / "more.yaml").write_text(
        f"model:\n  model_path: {tmp_path}\n  specialists: {json.dumps(specialists)}\n"
        "  freeze_base_model: true\n"
    )
    for arguments in (
        ("vanilla", "--seq_len", "16", "--options", json.dumps(sizes)),
        (str(tmp_path), "--seq_len", "16"),
        ("--config", str(tmp_path / "run.yaml")),
    ):
        code, out, err = run(capsys, *arguments, "--json", str(tmp_path / "out.json"))
        assert (code, err) == (0, "") and f"{wanted['flops']:,}" in out
        assert json.loads((tmp_path / "out.json").read_text()) == wanted
    more = MemAttnConfig.vanilla(**sizes, parts=[{"kind": "specialists", **specialists}])
    code, out, err = run(
        *(capsys, "--config", str(tmp_path / "more.yaml"), "--seq_len", "16"),
        *("--base_model", str(tmp_path)),
    )
    assert (code, err) == (0, "") and f"{estimate(more, 16).flops:,}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model must be given, or --config, but not both, got neither"),
        (["vanilla", "--config", "x"], "model must be given, or --config, but not both, got both"),
        (["vanilla", "--dense_layers", "3"], "dense_layers must be left out for a model without"),
        (["vanilla", "--options", '{"no": 1}'], "options: no must be a field of MemAttnConfig"),
        (["no/such/folder/here"], "model must be a folder with a saved model"),
    ],
)
def test_the_command_names_what_is_wrong(capsys, arguments, message):
    code, _, err = run(capsys, *arguments)
    assert code == 2 and message in err and err.count("\n") == 1


def test_the_published_mixture_of_chapters_stands_beside_ours(capsys):
    file = Path(__file__).parents[1] / "configs" / "mixture_of_chapters.yaml"
    code, out, _ = run(capsys, "--config", str(file), "--dense_layers", "24")
    assert code == 0
    for figure in (
        *("371,289,856", "371,292,932", "201,375,744", "147,874,560", "202,937,088"),
        *("356,363,685,888", "495,763,542,016", "459,171,802,488"),
        *("17,424,982,016", "25,702,029,150", "25,674,645,504", "77,563,973,632"),
        *("7,124,491", "331,859", "15,991,040", "3,149,824", "786,432"),
    ):
        assert figure in out, figure
    reason = "has 3,076 parameters more: 4 layers x 1 shared x (768 + 1)"
    assert reason in " ".join(out.split())


def test_only_the_published_form_stands_beside_the_published_count():
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=10)
    chapters = dict(num_memory_tokens=16, use_chapters=True, num_chapters=4, top_k_chapters=2)
    make = lambda **options: MemAttnConfig.memory_transformer(**sizes, **chapters | options)
    assert published_model(make()) is not None
    for options in (
        dict(use_chapters=False),
        dict(memory_block_variant="B"),
        dict(use_low_rank_memory=True, memory_rank=4),
        dict(use_low_rank_projections=True, projection_rank=4),
        dict(vanilla_mode=True),
        dict(norm="layer"),
        dict(position_embedding="learned"),
    ):
        assert published_model(make(**options)) is None, options
    assert published_model(MemAttnConfig.vanilla(**sizes)) is None


def test_a_memory_inside_a_pretrained_model(capsys, tmp_path):
    """The sizes of Qwen2.5-1.5B, of which nothing is allocated."""
    sizes = dict(vocab_size=151936, hidden_size=1536, intermediate_size=8960)
    sizes |= dict(num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2)
    Qwen2Config(tie_word_embeddings=True, **sizes).save_pretrained(tmp_path)
    file = Path(__file__).parents[1] / "configs" / "adapter_comparison.yaml"
    options = ["--base_model", str(tmp_path), "--seq_len", "64", "--json", str(tmp_path / "out")]
    code, out, err = run(capsys, "--config", str(file), *options)
    assert (code, err) == (0, "") and "1,543,714,304" in out
    lines = {line["name"]: line for line in json.loads((tmp_path / "out").read_text())["lines"]}
    base, lora, memory = (lines[n] for n in ("base model", "lora", "chapter_memory"))
    assert base["parameters"] == 1_543_714_304
    E, inner = 1536, 2 * 128
    matrices = 28 * (2 * E * E + 2 * E * inner + 3 * E * 8960) + 151936 * E
    assert base["flops"] == 2 * 64 * matrices
    assert lines["its attention"]["flops"] == 4 * E * (64 * 65 // 2) * 28
    assert lora["parameters"] == 28 * 16 * (2 * E + E + inner)  # of queries and of values
    assert lora["flops"] == 2 * 64 * lora["parameters"]
    # a bank of 1024 tokens, and in each layer four projections and a norm
    assert memory["parameters"] == 1024 * E + 28 * (4 * E * E + E) and memory["layers"] == 28
    assert memory["flops"] == 28 * (4 * (64 + 1024) * E * E + 4 * E * 64 * 1024)
    code, _, err = run(capsys, "vanilla", "--base_model", "x")
    assert code == 2 and "base_model must be left out without a pretrained model in --config" in err


def test_attached_counts_are_those_of_the_model():
    model = make_base("qwen2")
    base, part = estimate_attached(model, 7), {"kind": "scaled"}
    assert base.parameters == sum(p.numel() for p in model.parameters())
    own = estimate_attached(model, 7, part)
    assert base.lines == own.lines[:2]
    attach_memory(model, part)
    assert own.parameters == sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        estimate_attached(make_base("qwen2"), 0)
    wrong = {"kind": "chapter_memory", "memory_num_heads": 5}
    with pytest.raises(ValueError, match="memory_num_heads must divide hidden_size=32, got 5"):
        estimate_attached(make_base("qwen2"), 7, wrong)
