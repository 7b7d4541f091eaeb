"""What vLLM's and SGLang's backends for models of transformers ask of a model, without either.

They make ``AutoModel.from_config`` on the meta device with their attention in the configuration,
put layers of theirs in place of linear ones, and call it with the tokens of many sequences in one
row. Their attention finds the cache of a layer by its number, and returns ``[T, H D]``.
"""

import copy
from typing import Any

import pytest
import torch
from model_factories import SYSTEMS, make_config, make_model, make_tokens
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModel

from memattn.models import MemAttnConfig, MemAttnModel
from memattn.ops import segmented_attention

WINDOW = dict(window_size=4, num_persistent_tokens=0)
REQUESTS = (9, 4, 13)  # tokens of the sequences


class Layer:
    """The attention of a layer in a server: keys and values of each sequence."""

    def __init__(self, num_requests: int, sliding_window: int | None) -> None:
        self.kept: list[list[Tensor]] = [[] for _ in range(num_requests)]
        self.sliding_window = sliding_window

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, sizes: list[int]) -> Tensor:
        """Of ``[T, H, D]``, so many tokens of each sequence."""
        outputs = []
        new = (x.split(sizes) for x in (query, key, value))
        for kept, q, k, v in zip(self.kept, *new, strict=True):
            kept.append(torch.stack([k, v]))
            keys, values = torch.cat(kept, 1).transpose(1, 2)[:, None]
            attended = segmented_attention(
                q.transpose(0, 1)[None],
                keys,
                values,
                window_size=self.sliding_window,
                query_offset=keys.shape[2] - len(q),
                backend="reference",
            )
            outputs.append(attended.out[0].transpose(0, 1))
        return torch.cat(outputs)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    attention_instances: dict[int, Layer],
    forward_batch: list[int],
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As vLLM's and SGLang's functions: one row, keywords of the model's call, a flat output."""
    assert attention_mask is None and scaling == query.shape[-1] ** -0.5
    assert kwargs["sliding_window"] == attention_instances[module.layer_idx].sliding_window
    assert getattr(module, "is_causal", True)
    flat = (x[0].transpose(0, 1) for x in (query, key, value))
    out = attention_instances[module.layer_idx](*flat, forward_batch)
    return out.flatten(1), None


@pytest.fixture(autouse=True)
def server():
    AttentionInterface.register("server", attend)
    yield
    AttentionInterface._global_mapping.pop("server")


def serve(config: MemAttnConfig, weights: nn.Module) -> Any:
    """The decoder as a server makes it: on the meta device, and then with weights."""
    config = copy.deepcopy(config)
    config._attn_implementation = "server"
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    assert type(model) is MemAttnModel and type(model).is_backend_compatible()
    assert not list(model.buffers())  # which a server would have to fill
    model.load_state_dict(weights.state_dict(), assign=True)
    return model.eval()


def instances(config: MemAttnConfig) -> dict[int, Layer]:
    """By layer, as servers read the configuration."""
    windows: list[int | None] = [None] * config.num_hidden_layers
    for i in range(config.num_hidden_layers):
        if config.layer_types[i] == "sliding_attention":
            windows[i] = config.sliding_window
    return {i: Layer(len(REQUESTS), window) for i, window in enumerate(windows)}


def make(window: bool, **sizes: Any) -> Any:
    return make_model("window" if window else "vanilla", **sizes, **(WINDOW if window else {}))


@torch.no_grad()
def steps(stages: list[Any], config: MemAttnConfig) -> list[Tensor]:
    """Hidden states of each sequence: a first part of all in one call, then token by token."""
    rows = [make_tokens(1, T, seed=T)[0] for T in REQUESTS]
    cache, found = instances(config), [[] for _ in rows]
    places = [0] * len(rows)
    while any(place < len(row) for place, row in zip(places, rows, strict=True)):
        size = 1 if places[0] else 3  # chunks of a prompt, then tokens
        new = [row[p : p + size] for row, p in zip(rows, places, strict=True)]
        sizes = [len(part) for part in new]
        positions = torch.cat([torch.arange(p, p + n) for p, n in zip(places, sizes, strict=True)])
        inputs: dict[str, Any] = {"input_ids": torch.cat(new)[None]}
        for stage in stages:
            states = stage(
                **inputs,
                use_cache=False,
                position_ids=positions[None],
                attention_instances=cache,
                forward_batch=sizes,
                return_dict=False,
            )[0]
            inputs = {"inputs_embeds": states}
        for part, hidden in zip(found, states[0].split(sizes), strict=True):
            part.append(hidden)
        places = [p + n for p, n in zip(places, sizes, strict=True)]
    return [torch.cat(part) for part in found]


def expected(model: Any) -> list[Tensor]:
    with torch.no_grad():
        rows = [make_tokens(1, T, seed=T) for T in REQUESTS]
        return [model.model(row, use_cache=False).last_hidden_state[0] for row in rows]


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_sequences_of_a_server_are_those_of_the_model(window, mlp):
    model = make(window, mlp=mlp, norm="rms" if mlp == "swiglu" else "layer")
    served = serve(model.config, model.model)
    for hidden, alone in zip(steps([served], model.config), expected(model), strict=True):
        torch.testing.assert_close(hidden, alone)


def test_layers_may_lie_in_several_processes():
    model = make(True, num_hidden_layers=3)
    plan = list(model.config.base_model_pp_plan)
    assert plan == ["embed_tokens", "layers", "norm"]
    named = [name for name, child in model.model.named_children() if list(child.parameters())]
    assert named == plan  # which vLLM takes, too, where there is no plan
    stages = [serve(model.config, model.model) for _ in range(2)]
    first, last = stages
    first.norm, last.embed_tokens = Missing(), Missing()
    first.layers[2], last.layers[0], last.layers[1] = Missing(), Missing(), Missing()
    for hidden, alone in zip(steps(stages, model.config), expected(model), strict=True):
        torch.testing.assert_close(hidden, alone)


class Missing(nn.Identity):
    """What stands for a module that another process has."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args[0]


def test_every_linear_layer_is_in_the_plan_or_replicated_as_a_whole():
    model = make(False)
    plan, decoder = model.config.base_model_tp_plan, model.model
    linear = {n for n, m in decoder.named_modules() if isinstance(m, nn.Linear)}
    assert {name.replace("layers.0.", "layers.*.") for name in linear if ".0." in name} == {*plan}
    # as many heads as a shard of a projection has
    served = serve(model.config, decoder)
    attention: Any = served.layers[0].attention
    for name in ("q_proj", "k_proj", "v_proj"):
        whole = getattr(attention, name)
        half = nn.Linear(32, whole.out_features // 2, bias=False, dtype=torch.float64)
        setattr(attention, name, half)
    query, key, value = attention.split_heads(torch.randn(1, 5, 32, dtype=torch.float64))
    assert query.shape == (1, 2, 5, 8) and key.shape == value.shape == (1, 1, 5, 8)


def test_a_server_may_compile_the_decoder():
    AttentionInterface.register("server", lambda module, q, k, v, *args, **kwargs: (v, None))
    model = make(False, num_hidden_layers=1, num_key_value_heads=4)
    served = serve(model.config, model.model)
    ids, places = make_tokens(1, 7), torch.arange(7)[None]
    call = lambda x, p: served(input_ids=x, position_ids=p, use_cache=False)[0]
    compiled = torch.compile(call, fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        assert torch.equal(compiled(ids, places), call(ids, places))
        assert torch.equal(compiled(ids[:, :4], places[:, :4]), call(ids[:, :4], places[:, :4]))


@pytest.mark.parametrize("system", [name for name in SYSTEMS if name != "vanilla"])
def test_what_a_server_would_compute_otherwise_is_refused(system):
    config = make_config(system)
    assert config.base_model_pp_plan is None and not hasattr(config, "layer_types")
    config._attn_implementation = "server"
    lacked = config.lacks_for_servers
    assert lacked
    with pytest.raises(NotImplementedError, match=f'attn_implementation must be "eager".*{lacked}'):
        AutoModel.from_config(config)


def test_what_belongs_to_its_own_attention_is_refused_with_a_servers():
    model = make(False)
    served, ids = serve(model.config, model.model), make_tokens(1, 5)
    cache = model(ids[:, :2], use_cache=True).past_key_values
    for name, value in {
        "attention_mask": torch.ones(1, 5),
        "past_key_values": cache,
        "use_cache": True,
        "cu_seqlens": torch.tensor([0, 5], dtype=torch.int32),
        "output_hidden_states": True,
        "output_attentions": True,
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be None with attention 'server'"):
            served(ids, **{name: value})
    assert model.config.get_text_config() is model.config  # whose attention servers choose
    with pytest.raises(TypeError, match="attention_instances"):
        model(ids, attention_instances={})
    with pytest.raises(ValueError, match=r"position_ids must have shape \[B, T=5\]"):
        served(ids, position_ids=torch.arange(4)[None])
    with pytest.raises(ValueError, match="input_ids must be given, or inputs_embeds"):
        served(ids, inputs_embeds=served.embed_tokens(ids))
