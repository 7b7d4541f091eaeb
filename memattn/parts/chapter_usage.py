"""How chapters are used: measures of a training step, and a picture."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from memattn.checks import check_rank, must
from memattn.nn import ChapterRouter
from memattn.nn._modules import modules_of
from memattn.ops.chapter_router import RouterOutput
from memattn.parts.views import short_name, visit_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# reported with the losses but not trained on: the entropy of a row's probabilities, and the share
# of routed chapters that no row of the batch selected
MEASURES = ("router_entropy", "dead_chapters")


class ChapterUsage(NamedTuple):
    """Result of ``measure_usage``; one row for each layer with a router."""

    layers: list[str]  # names of the routers
    load: Tensor  # [layers, C'], share of the routing rows that selected each routed chapter
    entropy: Tensor  # [layers], nats, of a row's probabilities
    dead: Tensor  # int64 [layers], routed chapters that no row selected


def measures(output: RouterOutput) -> dict[str, Tensor]:
    """Losses and measures of one call of the router, by name."""
    dead = (output.load == 0).to(output.load.dtype).mean()
    named = {name: getattr(output, name) for name in output._fields}
    return named | {"router_entropy": output.entropy, "dead_chapters": dead}


def measure_usage(model: nn.Module, input_ids: Tensor) -> ChapterUsage:
    """Load of the chapters, entropy of the routing, and chapters that are never selected.

    Args:
        model: A model with ``ChapterRouter`` layers, called with ``input_ids`` and
            ``use_cache=False``. It is in evaluation mode during the call.
        input_ids: ``[B, T]``, without padding.

    Raises:
        TypeError: If the model has no router.
    """
    check_rank("input_ids", input_ids, "B T")
    routers = modules_of(model, ChapterRouter)
    if not routers:
        must("model", "have layers of kind ChapterRouter", type(model).__name__, TypeError)
    found: dict[nn.Module, RouterOutput] = {}

    def measure(router: Any, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        found[router] = router.forward(
            *args, **options
        )  # calling the module would run this wrapper again

    visit_layers(model, input_ids, routers.values(), measure)
    outputs = [found[router] for router in routers.values()]
    load = torch.stack([output.load.double().cpu() for output in outputs])
    entropy = torch.stack([output.entropy.double().cpu() for output in outputs])
    return ChapterUsage(list(routers), load, entropy, (load == 0).sum(1))


def draw_usage(figure: "Figure", usage: ChapterUsage) -> None:
    """Draw the load of each layer in descending order, with its entropy and unused chapters."""
    figure.set_size_inches(9.0, 1.2 + 1.6 * len(usage.layers))
    rows = figure.subplots(len(usage.layers), 1, squeeze=False, sharex=True)
    chapters = usage.load.shape[1]
    for axes, name, load, entropy, dead in zip(rows[:, 0], *usage, strict=True):
        axes.bar(range(chapters), load.sort(descending=True).values.numpy(), width=0.8)
        axes.set_ylabel("share of rows")
        measured = f"entropy {float(entropy):.2f} nats, {int(dead)} of {chapters} never chosen"
        axes.set_title(f"{short_name(name)}: {measured}", fontsize=8)
    rows[-1, 0].set_xlabel("routed chapters, the most chosen first; each row chooses several")
