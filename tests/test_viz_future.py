"""Pictures of future attention: their numbers, against explicit matrices."""

import pytest
import torch
from model_factories import make_model

from memattn.cli import main
from memattn.data import train_tokenizer
from memattn.nn import FutureAttention
from memattn.parts.future import FutureMeasures
from memattn.viz import attention_mass, measure_future, plot_future

T = 12
CASES = {
    "table": dict(source="table", future_dim=4, max_position_embeddings=T),
    "to-the-end": dict(source="table", future_dim=T - 1, max_position_embeddings=T),
    "longer-table": dict(source="table", future_dim=3, max_position_embeddings=20),
    "relative": dict(source="relative", future_dim=5, max_position_embeddings=T),
    "computed": dict(source="computed", source_rank=2, future_dim=3, max_position_embeddings=T),
}


def expected(layer: FutureAttention, hidden: torch.Tensor):
    """Mass ``[H]`` and cosine ``[T]`` of one layer from a loop over the queries of its input."""
    (query, key, value, future_key, future_value), options = layer.operands(hidden)
    H, D = query.shape[1], query.shape[-1]
    f, by_distance = options["future_dim"], options["future_index"] == "distance"
    last_row = 10**9 if by_distance else layer.future.num_positions - 1
    mass, cosine = torch.zeros(H, T), torch.full((H, T), torch.nan)
    for b, h in ((0, h) for h in range(H)):
        g = h // (H // key.shape[1])
        q, k, v = query[b, h], key[b, g], value[b, g]
        fk, fv = (x[b, h] if x.dim() == 4 else x[h] for x in (future_key, future_value))
        for i in range(T):
            band = range(i + 1, min(i + f, last_row) + 1)
            rows = [p - i - 1 if by_distance else p - 1 for p in band]
            scores = torch.cat([k[: i + 1] @ q[i], fk[rows] @ q[i]]) / D**0.5
            weights = scores.softmax(0)
            mass[h, i] = weights[i + 1 :].sum()
            if len(band) and band[-1] < T:
                seen = slice(band[-1] + 1)
                real = (k[seen] @ q[i] / D**0.5).softmax(0)[i + 1 :] @ v[seen][i + 1 :]
                predicted = weights[i + 1 :] @ fv[rows]
                cosine[h, i] = torch.dot(real, predicted) / (real.norm() * predicted.norm())
    return mass.mean(1), cosine.mean(0)


@pytest.mark.parametrize("name", CASES)
def test_mass_and_cosine_are_those_of_explicit_matrices(name):
    model = make_model("learned", **{"start_layer": 0, **CASES[name]})
    ids = torch.randint(53, (1, T), generator=torch.Generator().manual_seed(2))
    measures = measure_future(model, ids)
    layers = [layer.attention for layer in model.model.layers]
    inputs = []
    hooks = [m.register_forward_pre_hook(lambda m, args: inputs.append(args[0])) for m in layers]
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    for i, (layer, hidden) in enumerate(zip(layers, inputs, strict=True)):
        with torch.no_grad():
            mass, cosine = expected(layer, hidden)
        torch.testing.assert_close(measures.mass[i], mass.double(), atol=1e-6, rtol=0.0)
        torch.testing.assert_close(
            measures.cosine[i], cosine.double(), atol=1e-5, rtol=0.0, equal_nan=True
        )
    defined = measures.cosine.isfinite().any(0)
    assert defined[0] and not defined[-1]


def test_real_keys_in_the_table_are_foreseen_exactly():
    model = make_model("learned", start_layer=0, num_key_value_heads=4, max_position_embeddings=T)
    ids = torch.randint(53, (1, T))

    def insert(layer, args):
        _, key, value = layer.split_heads(args[0])
        layer.future.key.data, layer.future.value.data = key[0, :, 1:], value[0, :, 1:]

    for layer in model.model.layers:
        layer.attention.register_forward_pre_hook(insert)
    cosine = measure_future(model, ids).cosine
    assert (cosine[:, : T - 7] - 1.0).abs().max() < 1e-9 and cosine[:, T - 7 :].isnan().sum() == 2


def test_future_mass_is_a_source_beside_tokens_and_rope_is_no_obstacle():
    for system in ("future", "learned"):  # the second has one layer without future keys
        model = make_model(system, torch.float32).train()
        ids = torch.randint(53, (2, 20))
        masses = attention_mass(model, ids)
        assert list(masses) == ["tokens", "future"] and model.training
        assert (masses["tokens"] + masses["future"] - 1.0).abs().max() < 1e-6
        assert masses["future"][1].min() > 0.0
        assert (masses["future"][0] == 0.0).all() == (system == "learned")
        measures = measure_future(model, ids)
        assert measures.layers == ([1] if system == "learned" else [0, 1])
        assert torch.equal(measures.mass, masses["future"][measures.layers])
        assert measures.cosine.nan_to_num().abs().max() <= 1.0


def test_what_is_wrong_is_named(tmp_path):
    ids = torch.zeros(1, 7, dtype=torch.long)
    with pytest.raises(TypeError, match="model must have layers of kind FutureAttention, got Mem"):
        measure_future(make_model("vanilla"), ids)
    with pytest.raises(ValueError, match="input_ids must have at least 8 tokens, one whole band, "):
        measure_future(make_model("learned"), ids)
    measures = FutureMeasures([0, 1], torch.rand(2, 4), torch.rand(2, 9))
    with pytest.raises(ValueError, match="path must end in"):
        plot_future(measures, tmp_path / "x.jpg")


def test_the_command_draws_one_model(tmp_path, capsys):
    text = "the cat sat on the mat and the dog sat on the log " * 3
    tokenizer = train_tokenizer([text], 270, tmp_path / "model")
    options = dict(vocab_size=len(tokenizer), max_position_embeddings=40, future_dim=9)
    make_model("learned", torch.float32, **options).save_pretrained(tmp_path / "model")
    model, out = str(tmp_path / "model"), str(tmp_path / "future.png")
    assert main(["plot", "future", model, "--text", text, "--out", out]) == 0
    assert (tmp_path / "future.png").read_bytes().startswith(b"\x89PNG")
    assert "the first 40 tokens" in capsys.readouterr().out
    assert main(["plot", "future", model, "--text", "the cat", "--out", out]) == 2
    assert "at least 10 tokens" in capsys.readouterr().err
    assert main(["plot", model, "--text", text]) == 2
    error = capsys.readouterr().err
    assert "text must be left out but for" in error
    assert all(f" {view}" in error for view in ("page", "attention", "state", "future", "gates"))
