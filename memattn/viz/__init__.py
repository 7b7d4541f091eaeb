"""Pictures of training and of models."""

from functools import partial
from typing import Any

from memattn.parts.views import draw_attention_mass, part_views
from memattn.viz.attention import attention_mass, plot_attention_mass
from memattn.viz.bands import plot_bands
from memattn.viz.continual import plot_accuracy_matrices, plot_task_graph
from memattn.viz.curves import draw_curves, plot_curves
from memattn.viz.figures import draw_influence, draw_state, plot_influence
from memattn.viz.gates import plot_gate_comparison
from memattn.viz.pages import to_svg, write_figures
from memattn.viz.state import visualize_model_state
from memattn.viz.tasks import plot_tasks
from memattn.viz.views import plot_view

__all__ = [
    "attention_mass",
    "draw_attention_mass",
    "draw_curves",
    "draw_influence",
    "draw_state",
    "plot_accuracy_matrices",
    "plot_attention_mass",
    "plot_bands",
    "plot_curves",
    "plot_gate_comparison",
    "plot_influence",
    "plot_task_graph",
    "plot_tasks",
    "plot_view",
    "to_svg",
    "visualize_model_state",
    "write_figures",
]


def __getattr__(name: str) -> Any:
    """``measure_<view>`` and ``plot_<view>`` of the pictures of parts."""
    verb, _, view = name.partition("_")
    if view in part_views() and verb in ("measure", "plot"):
        return part_views()[view].measure if verb == "measure" else partial(plot_view, view)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
