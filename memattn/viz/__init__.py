"""Pictures of training and of models."""

from memattn.viz.curves import draw_curves, plot_curves
from memattn.viz.figures import draw_influence, draw_state, to_svg

__all__ = ["draw_curves", "draw_influence", "draw_state", "plot_curves", "to_svg"]
