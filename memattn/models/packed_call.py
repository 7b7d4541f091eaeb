"""Run rows with several documents as one row of all their tokens."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from memattn.checks import must
from memattn.models.outputs import MemAttnModelOutput
from memattn.parts.packing import read_rows


def packed_call(
    model: nn.Module,
    forward: Callable[..., MemAttnModelOutput],
    keywords: Mapping[str, Any],
    *,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    part_inputs: Mapping[str, Tensor | None],
    hidden_to_keep: int,
    may_pack: bool,
    **options: Any,
) -> MemAttnModelOutput | None:
    """The result of ``forward`` for rows with several documents; None if each row is one document.

    Args:
        model: The decoder.
        forward: Its method, which takes ``cu_seqlens``.
        keywords: Arguments by which collators without padding describe documents.
        input_ids: ``[B, T]`` or None.
        inputs_embeds: ``[B, T, E]`` or None.
        attention_mask: ``[B, T]`` or None.
        position_ids: ``[B or 1, T]`` or None.
        part_inputs: Extra inputs of parts.
        hidden_to_keep: Number of newest columns whose hidden states are needed; 0 means all.
        may_pack: Whether a row may hold several documents.
        options: More arguments, passed to ``forward`` unchanged.
    """
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    if tokens is None or tokens.dim() < 2 or (input_ids is not None and inputs_embeds is not None):
        return None  # refused by forward
    for name in ("past_key_values", "cu_seqlens"):
        if keywords and options[name] is not None:
            must(name, f"be None with {next(iter(keywords))}", type(options[name]).__name__)
    B, T = tokens.shape[:2]
    rows = read_rows((B, T), position_ids, attention_mask, keywords, tokens.device)
    if rows is None:
        return None
    if not may_pack:
        name = next(iter(keywords), "position_ids")
        must(name, "be of one document a row, padded to the longest, to have a class", "several")
    put = lambda x: None if x is None else rows.put(x)
    given = {n: x if x is None else rows.put_input(n, x) for n, x in part_inputs.items()}
    options = {**options, **given, "cu_seqlens": rows.cu_seqlens, "return_dict": True}
    outputs = forward(model, input_ids=put(input_ids), inputs_embeds=put(inputs_embeds), **options)
    assert outputs.last_hidden_state is not None
    hidden_states = rows.columns(outputs.last_hidden_state)
    if not model.training:
        hidden_states = rows.repeat_last(hidden_states)
    if outputs.hidden_states is not None:
        before = (rows.columns(x) for x in outputs.hidden_states[:-1])
        outputs.hidden_states = (*before, hidden_states)
    outputs.last_hidden_state = hidden_states[:, -hidden_to_keep:]
    outputs.order = rows  # pyright: ignore[reportAttributeAccessIssue]
    return outputs
