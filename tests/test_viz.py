"""Pictures: what is drawn, and files that are whole or absent."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from memattn.cli._models import read_text
from memattn.viz import draw_curves, draw_influence, draw_state, plot_curves, to_svg


def make_rows(n=40, offset=0.0):
    rows = [
        {"step": i, "tokens": 100 * i, "seconds": 0.5 * i, "loss": offset + 5.0 / i}
        for i in range(1, n + 1)
    ]
    rows[3]["loss"] = float("nan")
    rows.append({"step": n, "tokens": 100 * n, "seconds": 0.5 * n, "eval_loss": offset + 1.0})
    return rows


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_plot_curves_writes_a_picture(tmp_path, suffix):
    path = tmp_path / "deep" / f"curves{suffix}"
    plot_curves({"a": make_rows(), "b": make_rows(offset=1.0)}, path, x="seconds", title="t")
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(start)
    assert list(path.parent.iterdir()) == [path]


def test_curves_have_raw_smooth_and_held_out_losses():
    axes = Figure().add_subplot()
    draw_curves(axes, {"a": make_rows(), "b": make_rows()}, x="step")
    assert len(axes.lines) == 6
    raw, smooth, held_out = axes.lines[:3]
    assert len(raw.get_xdata()) == len(smooth.get_xdata()) == 39  # without the NaN
    assert smooth.get_ydata()[0] == raw.get_ydata()[0] == 5.0
    assert raw.get_ydata().min() < smooth.get_ydata().min()
    assert held_out.get_xdata().tolist() == [40] and held_out.get_ydata().tolist() == [1.0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["a", "b", "held out"]


def test_curves_leave_out_what_a_model_adds_to_the_cross_entropy():
    axes = Figure().add_subplot()
    rows = [{"step": i, "loss": 2.0 * i, "lm_loss": 1.0 * i} for i in (1, 2)]
    draw_curves(axes, {"a": rows}, x="step")
    assert axes.lines[0].get_ydata().tolist() == [1.0, 2.0]


def test_curves_name_what_is_wrong(tmp_path):
    with pytest.raises(
        ValueError, match=r"path must end in \.png, \.svg, \.pdf, \.html, got .*c\.jpg"
    ):
        plot_curves({"a": make_rows()}, tmp_path / "c.jpg")
    with pytest.raises(ValueError, match="x must be one of tokens, seconds, step, got 'loss'"):
        plot_curves({"a": make_rows()}, tmp_path / "c.png", x="loss")
    with pytest.raises(ValueError, match="runs must have losses to draw, got none in a"):
        plot_curves({"a": [{"step": 1, "tokens": 1, "seconds": 1.0}]}, tmp_path / "c.png")
    assert list(tmp_path.iterdir()) == []


def test_influence_leaves_exact_zeros_blank():
    axes = Figure().add_subplot()
    image = draw_influence(axes, [0, 4, 8], [[-1.0, -2.0, None], [None, 0.0, -3.0], [None] * 3])
    values = image.get_array()
    # positions run down, changed tokens run right
    assert values.shape == (3, 3) and values[1, 0] == -2.0 and values[2, 1] == -3.0
    assert values.mask.sum() == 5
    assert image.cmap(values)[2, 2, 3] == 0.0  # transparent
    assert list(image.get_extent()) == [0.0, 12, 12, 0.0]


def test_svg_takes_the_colour_of_the_page_and_is_reproducible():
    def draw():
        figure = Figure()
        draw_state(figure.add_subplot(), {"a": [(1, 2**20), (2, 2**21)], "b": [(1, 0), (2, 0)]})
        return to_svg(figure)

    svg = draw()
    assert svg == draw()
    assert svg.startswith("<svg") and "currentColor" in svg and "#010203" not in svg
    head = svg[: svg.index(">")]
    assert "viewBox" in head and "width=" not in head
    assert "state of one sequence (MiB)" in svg  # text stays text


def test_a_text_is_not_the_name_of_a_file(tmp_path: Path):
    file = tmp_path / "text.txt"
    file.write_text("a text")
    with pytest.raises(ValueError, match=r"text must be the text itself, or - .*--text - < "):
        read_text(None, None, str(file))


def test_pictures_say_what_a_cell_is():
    axes = Figure().add_subplot()
    draw_influence(axes, [0, 4, 8], [[None] * 3] * 3)
    assert axes.get_xlabel() == "token that is changed; a cell is 4 tokens"
