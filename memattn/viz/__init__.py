"""Pictures of training and of models."""

from memattn.viz.attention import attention_mass, draw_attention_mass, plot_attention_mass
from memattn.viz.bands import plot_bands
from memattn.viz.continual import plot_accuracy_matrices, plot_task_graph
from memattn.viz.curves import draw_curves, plot_curves
from memattn.viz.figures import draw_influence, draw_state, to_svg
from memattn.viz.future import FutureMeasures, measure_future, plot_future

__all__ = [
    "FutureMeasures",
    "attention_mass",
    "draw_attention_mass",
    "draw_curves",
    "draw_influence",
    "draw_state",
    "measure_future",
    "plot_accuracy_matrices",
    "plot_attention_mass",
    "plot_bands",
    "plot_curves",
    "plot_future",
    "plot_task_graph",
    "to_svg",
]
