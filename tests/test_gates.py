"""Reports of gates: what each layer gives the base and each specialist, printed and drawn."""

import re

import pytest
import torch
from matplotlib.figure import Figure

from memattn import MemAttnConfig, MemAttnForCausalLM
from memattn.cli import main
from memattn.data import load_tokenizer
from memattn.parts.gate_report import draw_gates, gate_lines, measure_gates

SIZES = dict(
    vocab_size=260,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=64,
)


def shiftable(**options) -> MemAttnForCausalLM:
    torch.manual_seed(0)
    names = ("sql", "sea")
    model = MemAttnForCausalLM(MemAttnConfig.shiftable(names=names, **SIZES, **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gate." in name:  # new gates hardly tell tokens apart
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    shiftable().save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    for name, text in (("a.txt", "the sea"), ("b.txt", "SELECT 1;")):
        (folder / name).write_text(text)
    return folder


def test_gates_are_those_that_the_layers_use():
    model = shiftable(layers=(1,))
    ids = torch.randint(260, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    (layer,) = measure_gates(model, ids, attention_mask=mask)
    assert (layer.layer, layer.names) == (1, ("base", "sql", "sea"))
    sums = layer.gates.sum(-1)
    assert torch.allclose(sums[mask.bool()], torch.ones(())) and not sums[~mask.bool()].any()
    assert torch.allclose(layer.means()[1], layer.gates[1, :5].mean(0))
    assert gate_lines([layer])[0].startswith("Layer 1: [0.")
    weights = torch.tensor([[0.25, 0.75, 0.0], [1.0, 0.0, 0.0]])
    (layer,) = measure_gates(model, ids, domain_weights=weights)
    assert torch.allclose(layer.means(), weights)
    assert gate_lines([layer]) == ["Layer 1: [0.62 base, 0.38 sql, 0.00 sea]"]
    # closed specialists leave the base alone
    (layer,) = measure_gates(shiftable(layers=(0,), prior=0.0), ids)
    assert gate_lines([layer]) == ["Layer 0: [1.00 base, 0.00 sql, 0.00 sea]"]
    with pytest.raises(ValueError, match="model must have specialists, got one without"):
        measure_gates(MemAttnForCausalLM(MemAttnConfig.vanilla(**SIZES)), ids)


def test_heat_maps_are_the_gates_of_layers_and_tokens():
    layers = measure_gates(shiftable(), torch.randint(260, (1, 9)))
    figure = Figure(layout="constrained")
    draw_gates(figure, layers)
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels] == ["base", "sql", "sea"]
    for i, axes in enumerate(panels):
        drawn = torch.tensor(axes.images[0].get_array().data)
        assert drawn.equal(torch.stack([layer.gates[0, :, i] for layer in layers]))


def test_the_command_prints_and_draws_a_text(saved, tmp_path, capsys):
    for command in (["gates"], ["plot", "gates"]):
        out = tmp_path / f"{len(command)}.svg"
        assert main([*command, str(saved), "--text", "SELECT a", "--out", str(out)]) == 0
        printed = capsys.readouterr().out
        lines = re.findall(
            r"^Layer (\d): \[(0\.\d\d) base, (0\.\d\d) sql, (0\.\d\d) sea\]$", printed, re.M
        )
        assert [line[0] for line in lines] == ["0", "1"]
        assert all(abs(sum(map(float, line[1:])) - 1.0) < 0.02 for line in lines)
        assert f"wrote {out}" in printed and out.stat().st_size > 1000


def test_the_command_compares_texts(saved, tmp_path, capsys):
    texts = [str(saved / name) for name in ("a.txt", "b.txt")]
    out = tmp_path / "gates.svg"
    options = ["--texts", *texts, "--tokens", "5", "--out", str(out)]
    assert main(["plot", "gates", str(saved), *options]) == 0
    printed = capsys.readouterr().out
    model, tokenizer = shiftable(), load_tokenizer("bytes")
    ids = [tokenizer(text)["input_ids"][:5] for text in ("the sea", "SELECT 1;")]
    means = [measure_gates(model, torch.tensor([row]))[1].means()[0].tolist() for row in ids]
    row = next(line for line in printed.splitlines() if line.startswith("│ 1 ") and "sql" in line)
    numbers = [float(number) for number in re.findall(r"-?\d\.\d{3}", row)]
    gap = means[1][1] - means[0][1]
    assert numbers == pytest.approx([means[0][1], means[1][1], gap], abs=6e-4)
    assert out.stat().st_size > 1000


def test_the_command_says_what_is_wrong(saved, capsys):
    for options, message in (
        ([], "text must be given, or texts, and not both"),
        (["--text", "a", "--texts", "b"], "text must be given, or texts, and not both"),
        (["--texts", "wiki", "--tokens", "0"], "tokens must be at least 1, got 0"),
        (["--text", ""], "text must be one with at least one token, got none"),
    ):
        assert main(["gates", str(saved), *options]) == 2
        assert message in capsys.readouterr().err
    assert main(["plot", "state", str(saved), "--text", "a", "--texts", "b"]) == 2
    assert "texts must be left out but for gates" in capsys.readouterr().err
