"""Pictures of training."""

from memattn.viz.curves import draw_curves, plot_curves

__all__ = ["draw_curves", "plot_curves"]
