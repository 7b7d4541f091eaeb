"""The forward pass of a decoder with the attention and the cache of a server, vLLM or SGLang.

Their backends for models of transformers set ``config._attn_implementation`` to the name of their
attention function before they make the model. A call has the tokens of many sequences in one row,
``position_ids`` for each token, and keywords that every layer passes to the attention function.
The attention, the cache and the packed documents of this package are not used in such a call.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from memattn.checks import check_rank, must
from memattn.models.config import MemAttnConfig
from memattn.models.outputs import MemAttnModelOutput
from memattn.nn.rotary import apply_rotary
from memattn.parts.packing import check_table

OWN = (None, "eager")  # values of config._attn_implementation for the attention of this package


def check_attention(config: MemAttnConfig) -> None:
    """Raise NotImplementedError if a server's attention is chosen and cannot compute the model."""
    name = config._attn_implementation
    lacked = None if name in OWN else config.lacks_for_servers
    if lacked is not None:
        what = f'be "eager", which is that of the package, for a model with {lacked}'
        must("attn_implementation", what, f"{name!r} (generate has no server)", NotImplementedError)


def served_call(
    model: Any,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    position_ids: Tensor | None,
    options: dict[str, Any],
    keywords: Mapping[str, Any],
) -> MemAttnModelOutput:
    """Hidden states ``[B, T, E]`` of a decoder, computed with a server's attention function.

    Args:
        model: The decoder.
        input_ids: Tokens ``[B, T]``, or None with ``inputs_embeds``.
        inputs_embeds: ``[B, T, E]``, or the hidden states from the layers of another process.
        position_ids: ``[B or 1, T]``, position of each token in its sequence; None counts columns.
        options: ``hidden_to_keep``, and arguments of the model that only its own attention uses.
        keywords: Passed to the attention function unchanged.

    Raises:
        ValueError: If a mask, a cache or another argument of the model's own attention is given.
        NotImplementedError: If the server's attention cannot compute the model.
    """
    name = model.config._attn_implementation
    check_attention(model.config)
    hidden_to_keep = options.pop("hidden_to_keep")
    for argument, value in options.items():
        if value is not None and value is not False:
            allowed = f"be None with attention {name!r}, which knows what each token sees"
            must(argument, allowed, type(value).__name__)
    if (input_ids is None) == (inputs_embeds is None):
        must("input_ids", "be given, or inputs_embeds, but not both", "both or neither")
    if input_ids is not None:
        check_rank("input_ids", input_ids, "B T")
        inputs_embeds = model.embed_tokens(input_ids)
    hidden_states: Any = inputs_embeds
    check_rank("inputs_embeds", hidden_states, "B T E")
    B, T, _ = hidden_states.shape
    if position_ids is None:
        position_ids = torch.arange(T, device=hidden_states.device)[None]
    check_table("position_ids", position_ids, (B, 1), T)
    angles = model.rotary(position_ids, hidden_states.dtype)
    attend = AttentionInterface()[name]
    for layer in model.layers:
        if not isinstance(layer, nn.Identity):  # placeholder of a layer of another process
            hidden_states = _layer(layer, hidden_states, angles, attend, keywords)
    hidden_states = model.norm(hidden_states)
    return MemAttnModelOutput(last_hidden_state=hidden_states[:, -hidden_to_keep:])


def _layer(
    layer: Any,
    hidden_states: Tensor,
    angles: tuple[Tensor, Tensor],
    attend: Callable[..., tuple[Tensor, Any]],
    keywords: Mapping[str, Any],
) -> Tensor:
    """Hidden states behind one block."""
    attention = layer.attention
    query, key, value = attention.split_heads(layer.attention_norm(hidden_states))
    query, key = apply_rotary(query, *angles), apply_rotary(key, *angles)
    out, _ = attend(
        attention,
        query,
        key,
        value,
        None,
        dropout=0.0,
        scaling=attention.head_dim**-0.5,
        sliding_window=attention.window_size,
        **keywords,
    )
    B, T, _ = hidden_states.shape
    hidden_states = hidden_states + attention.o_proj(out.reshape(B, T, -1))
    return hidden_states + layer.mlp(layer.mlp_norm(hidden_states))
