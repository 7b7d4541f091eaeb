"""Pictures of the state of a model: its memories, its keys, and its updates over the tokens."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from memattn.checks import must
from memattn.models import KeptMemory
from memattn.ops import NeuralMemoryState
from memattn.parts import PartState
from memattn.parts.memory_picture import LABELS, draw_measure, finish
from memattn.parts.views import short_name
from memattn.reference.neural_memory import pack, unpack
from memattn.viz.curves import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Layers = Sequence[Tensor]  # of a memory, [H, d_n, d_{n-1}] each
Metrics = Mapping[str, Mapping[str, Tensor]]


class StateFacts(NamedTuple):
    """The data of the picture of one sequence, by the names of layers."""

    weights: dict[str, Layers]  # of the memories, after the last token
    start: dict[str, Layers]  # before any text, where that is known
    keys: dict[str, Tensor]  # that attention keeps, [Hkv, S, D]
    metrics: Metrics


def visualize_model_state(
    state: Any,
    path: str | Path,
    metrics: Metrics | None = None,
    *,
    row: int = 0,
    title: str = "",
) -> None:
    """Draw the state of a model into one picture.

    A heat map for every layer of every memory (how its weights have changed since the start, heads
    side by side), the norms of the keys that attention keeps, and over the tokens: update
    magnitude, surprise and relevance.

    Args:
        state: A ``KeptMemory``, the file of one, a cache of a model, or an object with one as
            ``cache``. A cache has no record over the tokens; without ``metrics`` its total update
            is drawn instead.
        path: Picture to write, ``.png``, ``.svg``, ``.pdf`` or ``.html``; it is whole or absent.
        metrics: Over the tokens, as ``KeptMemory.metrics``; None means those of the state.
        row: Which sequence.
        title: Heading.

    Raises:
        TypeError: If the state is none of these.
        ValueError: If it is empty, has no such sequence, or the format is unknown.
        FileNotFoundError: If there is no such file.
    """
    save_figure(state_figure(state, metrics, row=row, title=title), path)


def state_figure(
    state: Any, metrics: Metrics | None = None, *, row: int = 0, title: str = ""
) -> Figure:
    """The figure of ``visualize_model_state``."""
    facts = _facts(state, row)
    if metrics is not None:
        facts = facts._replace(metrics=metrics)
    rows = max(len(facts.weights), 1)
    figure = Figure(figsize=(12.0, 1.9 * rows + 7.0), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.9 * rows, 7.0])[:, 0]
    _draw_weights(upper, facts)
    axes = lower.subplots(2, 2).flatten()
    _draw_keys(axes[0], facts.keys)
    for ax, name in zip(axes[1:], ("update", "surprise", "relevance"), strict=True):
        if facts.metrics:
            draw_measure(ax, facts.metrics, name)
        elif name == "update":
            _draw_total_update(ax, facts)
        else:
            _say(ax, f"{name} was not recorded")
    if title:
        figure.suptitle(title)
    return figure


def _facts(state: Any, row: int) -> StateFacts:
    """The data to draw of a state."""
    if isinstance(state, str | os.PathLike):
        state = KeptMemory.load(state)
    start: dict[str, Layers] = {}
    metrics: Metrics = {}
    if isinstance(state, KeptMemory):
        start = {name: [x[0] for x in layers] for name, layers in state.start.items()}
        metrics, state = state.metrics, state.cache
    cache = getattr(state, "cache", state)
    layers = getattr(cache, "layers", None)
    if layers is None:
        must("state", "be a KeptMemory, its file or a cache", type(state).__name__, TypeError)
    if cache.seq_start is None:
        must("state", "hold sequences", "an empty cache")
    if not 0 <= row < cache.batch_size:
        must("row", f"be from 0 to {cache.batch_size - 1}", row)
    weights: dict[str, Layers] = {}
    keys: dict[str, Tensor] = {}
    known = {short_name(name): x for name, x in start.items()}
    for i, layer in enumerate(layers):
        name = f"layer {i}"
        for part in layer.parts.values():
            memory = _memory_of(part, known.get(name))
            if memory is not None:
                known.setdefault(name, unpack(memory.initial, memory.sizes))
                weights[name] = [x[row] for x in memory.current()[0]]
        if layer.keys is not None and layer.kept:
            keys[name] = layer.keys[row]
    return StateFacts(weights, known, keys, metrics)


def _memory_of(part: PartState, start: Layers | None) -> NeuralMemoryState | None:
    """The memory that a part keeps, if any; after a file its sizes are those of ``start``."""
    if (live := getattr(part, "memory", None)) is not None:
        return live
    prefix = "memory."
    rows = {n.removeprefix(prefix): x for n, x in part.rows.items() if n.startswith(prefix)}
    if start is None or not rows:
        return None
    sizes = torch.tensor([start[0].shape[-1], *(x.shape[-2] for x in start)])
    return NeuralMemoryState.from_tensors({**rows, "sizes": sizes, "initial": pack(start)})


def _draw_weights(figure: Any, facts: StateFacts) -> None:
    """A heat map for each layer of each memory, heads side by side."""
    if not facts.weights:
        _say(figure.subplots(), "no memory is kept")
        return
    depth = max(len(layers) for layers in facts.weights.values())
    grid = figure.subplots(len(facts.weights), depth, squeeze=False)
    for axes, (name, layers) in zip(grid, facts.weights.items(), strict=True):
        for n, ax in enumerate(axes):
            if n >= len(layers):
                ax.axis("off")
                continue
            change = (layers[n] - facts.start[name][n]).detach().float().cpu()
            heads = torch.cat(list(change), -1)
            most = float(heads.abs().max()) or 1.0
            image = ax.imshow(heads.numpy(), cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
            for head in range(1, len(change)):
                ax.axvline(head * change.shape[-1] - 0.5, color="black", linewidth=0.5)
            ax.set_title(f"{name}, memory layer {n}: change of the weights", fontsize=9)
            figure.colorbar(image, ax=ax)


def _draw_keys(axes: "Axes", keys: Mapping[str, Tensor]) -> None:
    """The mean over heads of the norms of the keys, the newest at 0."""
    if not keys:
        _say(axes, "no keys are kept")
        return
    for name, key in keys.items():
        norms = key.detach().float().norm(dim=-1).mean(0).cpu()
        axes.plot(range(1 - len(norms), 1), norms.numpy(), label=name)
    axes.set_xlabel("place of the key, 0 is the newest")
    axes.set_ylabel("norm of the key, mean over heads")
    axes.set_ylim(bottom=0.0)
    finish(axes)


def _draw_total_update(axes: "Axes", facts: StateFacts) -> None:
    """How far each memory is from its start."""
    if not facts.weights:
        _say(axes, "no memory is kept")
        return
    totals = []
    for name, layers in facts.weights.items():
        pairs = list(zip(layers, facts.start[name], strict=True))
        moved = sum(float((a - b).float().square().sum()) for a, b in pairs)
        size = sum(float(b.float().square().sum()) for _, b in pairs)
        totals.append((moved / size) ** 0.5 if size else 0.0)
    axes.bar(list(facts.weights), totals)
    axes.set_ylabel("total " + LABELS["update"])
    axes.spines[["top", "right"]].set_visible(False)


def _say(axes: "Axes", text: str) -> None:
    """Write a text in place of a picture."""
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
    axes.axis("off")
