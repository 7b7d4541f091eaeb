"""Decoding behind a state whose text is not at hand, which ``generate()`` asks for."""

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@torch.inference_mode()
def go_on(
    model: Any,
    cache: Any,
    input_ids: Tensor,
    max_new_tokens: int,
    streamer: Any,
    *,
    end: int | None,
    do_sample: bool,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> None:
    """Write a prompt and what the model makes of it, token by token, behind what a cache holds.

    Args:
        model: The model, in evaluation mode.
        cache: Its state, of one sequence, which goes on.
        input_ids: int64 ``[1, T]``.
        max_new_tokens: Tokens to add at most; fewer where the model ends the text.
        streamer: A streamer of transformers.
        end: The token that ends the text.
        do_sample: Whether to draw; else the likeliest token is taken.
        temperature: As in ``generate()``, like the two that follow.
        top_k: 0 means no limit.
        top_p: 1 means no limit.
    """
    warpers = LogitsProcessorList()
    if temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    streamer.put(input_ids.cpu())
    ids = input_ids.to(model.device)
    for _ in range(max_new_tokens):
        output = model(ids, past_key_values=cache, logits_to_keep=1)
        scores = output.logits[:, -1].float()
        if do_sample:
            shares = warpers(ids, scores).softmax(-1)
            ids = torch.multinomial(shares, 1)
        else:
            ids = scores.argmax(-1, keepdim=True)
        streamer.put(ids[0].cpu())
        if int(ids) == end:
            break
    streamer.end()
