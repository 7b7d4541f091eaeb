"""Pictures of continual learning."""

import re

import pytest
import torch

from memattn.viz import plot_accuracy_matrices, plot_task_graph

MATRIX = torch.tensor([[0.9, float("nan")], [0.4, 0.8]])


@pytest.mark.parametrize("n", [1, 6])
def test_accuracy_matrices_are_drawn(n, tmp_path):
    path = tmp_path / "accuracy.svg"
    matrices = {f"strategy {i}": MATRIX for i in range(n)}
    plot_accuracy_matrices(matrices, path, tasks=["first", "second"])
    drawn = path.read_text()
    for name in (*matrices, "first", "second", "90", "40", "80"):
        assert f"<!-- {name} -->" in drawn
    assert drawn.count("<!-- 40 -->") == n


def test_task_graph_is_drawn(tmp_path):
    pictures = []
    for reads in ({"a": [], "b": [], "c": []}, {"a": [], "b": ["a"], "c": ["a", "b"]}):
        plot_task_graph(reads, tmp_path / "graph.svg")
        pictures.append((tmp_path / "graph.svg").read_text())
        assert all(f"<!-- {task} -->" in pictures[-1] for task in reads)
    # an arrow is a line and a head
    assert pictures[1].count('<path d="M') >= pictures[0].count('<path d="M') + 3


@pytest.mark.parametrize(
    ("draw", "data", "message"),
    [
        (plot_accuracy_matrices, {}, "matrices must have a strategy to draw, got none"),
        (plot_accuracy_matrices, {"a": MATRIX[:1]}, "matrices[a] must be a square [n, n]"),
        (plot_task_graph, {}, "reads must have a task to draw, got none"),
        (plot_task_graph, {"a": ["b"], "b": []}, "reads[a] must name tasks before it, got b"),
        (plot_task_graph, {"a": ["c"]}, "reads[a] must name tasks before it, got c"),
    ],
)
def test_bad_data_is_told_and_nothing_is_written(draw, data, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        draw(data, tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())
