"""Load the texts that a model is evaluated on."""

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memattn.cli._runs import Loaded


def load_texts(loaded: "Loaded", data: str | None, cache_dir: str) -> tuple[list[str], str]:
    """The texts and their name."""
    from memattn.data import load_documents
    from memattn.train.setup import held_out_texts

    if data is not None:
        documents = load_documents(data, cache_dir=cache_dir)
        return [document.text for document in documents], data
    if loaded.run is None:
        raise ValueError(
            f"data must be given where the model is not a run folder, got {loaded.name}"
        )
    source = loaded.run.data
    if source.task is not None:
        raise ValueError(
            f"data must be given where the run has learnt a task, no text, got {loaded.name}"
        )
    if source.held_out == 0.0:
        raise ValueError(
            f"data must be given where the run held out no documents, got {loaded.name}"
        )
    texts = held_out_texts(replace(source, cache_dir=cache_dir))
    return texts, f"held-out part of {source.dataset_name}"
