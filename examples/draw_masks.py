"""Draw which keys each query sees, read off the operator itself.

The values are unit vectors, so the output row of a query *is* its attention weights; the scores are
all zero, so every key that it sees has the same weight.

    python examples/draw_masks.py docs/masks.svg
"""

import sys

import matplotlib
import torch
from matplotlib.colors import ListedColormap

from memattn import segmented_attention

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  the backend is chosen first

T, P, L, M = 24, 3, 8, 8
COLOURS = ListedColormap(["#f1f1ee", "#3b6ea5", "#d98032", "#5a9c64"])  # unseen and the sources
PANELS = {
    "causal": dict(),
    "window_size=6": dict(window_size=6),
    "segment_len=8": dict(segment_len=L),
    "segment_len=8,\nwindow_size=6": dict(segment_len=L, window_size=6),
    "segments with persistent\nand memory keys": dict(segment_len=L, memory_is_causal=True),
}


def seen(with_memory: bool, **options) -> torch.Tensor:
    """Which source each key is of, where a query sees it, and 0 elsewhere: [T, keys]."""
    n_memory = T // L * M if with_memory else 0
    n_keys = (P if with_memory else 0) + n_memory + T
    values = torch.eye(n_keys)[None, None]  # [1, 1, keys, keys]
    zeros = torch.zeros_like(values)
    source = torch.full((n_keys,), 1.0)
    if with_memory:
        persistent, memory = slice(0, P), slice(P, P + n_memory)
        options |= {
            "persistent_key": zeros[0, :, persistent],
            "persistent_value": values[0, :, persistent],
            "memory_key": zeros[:, :, memory].unflatten(2, (T // L, M)),
            "memory_value": values[:, :, memory].unflatten(2, (T // L, M)),
        }
        source[persistent], source[memory] = 2.0, 3.0
    tokens = slice(n_keys - T, None)
    query = torch.zeros(1, 1, T, n_keys)
    out = segmented_attention(query, zeros[:, :, tokens], values[:, :, tokens], **options).out
    return (out[0, 0] > 0) * source


def main(path: str) -> None:
    """Draw the panels and write them to ``path``."""
    pictures = [seen("memory" in title, **options) for title, options in PANELS.items()]
    widths = [picture.shape[1] for picture in pictures]
    figure, axes = plt.subplots(1, len(pictures), width_ratios=widths, figsize=(13, 2.9))
    for axis, title, picture in zip(axes, PANELS, pictures, strict=True):
        axis.imshow(picture, cmap=COLOURS, vmin=0, vmax=3, aspect="equal")
        axis.set_xticks(torch.arange(picture.shape[1] + 1) - 0.5, minor=True)
        axis.set_yticks(torch.arange(T + 1) - 0.5, minor=True)
        axis.grid(which="minor", color="white", linewidth=0.6)
        axis.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
        axis.spines[:].set_visible(False)
        axis.set_title(title, fontsize=9)
    axes[0].set_ylabel("queries", fontsize=9)
    axes[0].set_xlabel("keys", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


if __name__ == "__main__":
    main(sys.argv[1])
