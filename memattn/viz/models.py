"""Figures of a model on a text, for one page."""

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from memattn.models import KeptMemory, MemAttnCache, MemAttnConfig
from memattn.parts.titans_layers import MemoryLayer
from memattn.parts.views import attention_layers
from memattn.viz.attention import attention_figure, attention_mass
from memattn.viz.state import state_figure


@torch.no_grad()
def model_figures(name: str, model: Any, input_ids: Tensor) -> dict[str, Figure]:
    """The attention mass of a model, and its state after a text, by heading. The attention is left
    out if it is of an unknown kind, the state if the decoder is not of this package.

    Args:
        name: The name of the model, of which the headings are made.
        model: The model, in its evaluation mode.
        input_ids: The text, int64 ``[1, T]``, as many tokens as the model takes.
    """
    figures = {}
    if attention_layers(model):
        masses = attention_mass(model, input_ids)
        figures[f"{name}: where attention goes"] = attention_figure(masses)
    if isinstance(model.config, MemAttnConfig):
        if any(isinstance(module, MemoryLayer) for module in model.modules()):
            state: Any = KeptMemory.of(model)
            state.read(model, input_ids)
        else:
            state = MemAttnCache(model.config)
            model(input_ids, past_key_values=state)
        figures[f"{name}: state behind {input_ids.shape[1]:,} tokens"] = state_figure(state)
    return figures
