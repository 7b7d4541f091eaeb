"""One picture of each system, of models that were just trained on a text."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from memattn.checks import check_int
from memattn.continual import digits_stream, train_continual
from memattn.data import load_documents, load_tokenizer
from memattn.dtgma import DTGMAModel
from memattn.evaluate import influence
from memattn.models import MemAttnForCausalLM
from memattn.parts.views import part_views
from memattn.train import DataConfig, ModelConfig, TrainConfig, TrainingConfig, train
from memattn.viz import plot_influence, plot_tasks, plot_view

SIZES = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=256,
)
TOKENS = 192  # of the text that a model reads for its picture
DTGMA = "dtgma"


class Picture(NamedTuple):
    """How the picture of a preset is made: its options, and the name of a view or ``influence``."""

    view: str
    options: dict[str, Any]


PICTURES = {
    "vanilla": Picture("influence", {}),
    "segmented": Picture("influence", dict(segment_len=32, window_size=16)),
    "titans": Picture("memory", dict(variant="mag", window_size=32)),
    "future": Picture("future", dict(future_dim=16)),
    "memory_transformer": Picture(
        "chapters",
        dict(num_memory_tokens=64, use_chapters=True, num_chapters=8, top_k_chapters=2),
    ),
    "shiftable": Picture("gates", dict(num_specialists=4, top_k=2)),
}


def draw_gallery(
    text: str | Path,
    out: str | Path,
    *,
    steps: int = 200,
    epochs: int = 10,
    cache_dir: str = "~/.cache/memattn",
    on_picture: Callable[[Path], None] = lambda path: None,
) -> list[Path]:
    """Train a small model of each system, and draw what is special about it.

    Args:
        text: A corpus, a text file or a folder with text files, for the language models.
        out: Folder of the pictures, ``NAME.png`` by the name of a preset, and ``dtgma.png``.
        steps: Optimizer steps of each language model.
        epochs: Passes over the digits, for DTG-MA.
        cache_dir: Folder for fetched corpora, tokenizers and tokens.
        on_picture: Called with each picture when it is written.

    Returns:
        The pictures.

    Raises:
        ValueError: If the text is too short, or an option is out of range.
        FileNotFoundError: If there is no such text.
        ImportError: If scikit-learn, which has the digits, is not installed.
    """
    check_int("steps", steps, 1)
    check_int("epochs", epochs, 1)
    logging.disable_progress_bar()
    pictures = []
    shown = load_documents(text, cache_dir=cache_dir)[0].text
    for preset, picture in PICTURES.items():
        path = Path(out) / f"{preset}.png"
        with TemporaryDirectory() as folder:
            _draw_preset(preset, picture, str(text), shown, steps, cache_dir, folder, path)
        pictures.append(path)
        on_picture(path)
    path = Path(out) / f"{DTGMA}.png"
    _draw_dtgma(epochs, path)
    on_picture(path)
    return [*pictures, path]


def _draw_preset(
    preset: str,
    picture: Picture,
    text: str,
    shown: str,
    steps: int,
    cache_dir: str,
    folder: str,
    path: Path,
) -> None:
    """Train a preset in a folder, and draw what it does with the beginning of a document."""
    config = TrainConfig(
        model=ModelConfig(preset=preset, options=SIZES | picture.options),
        data=DataConfig(dataset_name=text, vocab_size=1024, seq_len=128, cache_dir=cache_dir),
        training=TrainingConfig(
            output_dir=folder,
            max_steps=steps,
            optimizer="muon",
            base_model_lr=1e-2,
            warmup_steps=max(1, steps // 10),
            save_steps=None,
        ),
    )
    result = train(config, progress=False)
    model = MemAttnForCausalLM.from_pretrained(result.model_dir).eval()
    ids = torch.tensor([load_tokenizer(result.model_dir)(shown)["input_ids"][:TOKENS]])
    title = f"{preset}, {steps} steps"
    if picture.view == "influence":
        plot_influence(influence(model, ids), path, title=title)
    else:
        plot_view(picture.view, part_views()[picture.view].measure(model, ids), path, title=title)


def _draw_dtgma(epochs: int, path: Path) -> None:
    """Two tasks, the first with a mask of neighbours; the second reads the first."""
    torch.manual_seed(0)
    stream = digits_stream(n_tasks=2)
    first = stream.tasks[0].name
    model = DTGMAModel(input_dim=(8, 8), hidden_dim=32, num_classes=5)
    model.register_task(first)
    model.set_mask(first, neighbours(4))
    train_continual(model, stream, epochs=epochs, reads="previous")
    plot_tasks(model, path, title=f"DTG-MA, {epochs} epochs")


def neighbours(side: int) -> torch.Tensor:
    """A mask of ``side`` by ``side`` patches and one node, bool ``[L, L]`` with ``L = side² + 1``.

    A patch sees itself and its four neighbours; the node sees everything, and no patch sees it.
    """
    n = side * side
    row, column = torch.arange(n) // side, torch.arange(n) % side
    mask = torch.ones(n + 1, n + 1, dtype=torch.bool)
    apart = (row[:, None] - row).abs() + (column[:, None] - column).abs()
    mask[:n, :n] = apart <= 1
    mask[:n, n] = False
    return mask
