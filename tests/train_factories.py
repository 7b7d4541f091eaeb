"""Small text, and runs on it that take a second."""

import json
import random
from pathlib import Path
from typing import Any

from memattn.train import DataConfig, ModelConfig, TrainConfig, TrainingConfig

_WORDS = ("the", "a", "of", "sea", "wind", "ship", "sails", "under", "over", "bright", "dark")


def write_corpus(path: Path, documents: int = 24, words: int = 30) -> Path:
    """A JSON Lines file of made sentences, all different."""
    draw = random.Random(0)
    rows = [
        {"title": f"tale {i}", "text": f"{i} " + " ".join(draw.choices(_WORDS, k=words))}
        for i in range(documents)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def tiny_config(
    folder: Path,
    *,
    preset: str = "segmented",
    data: dict[str, Any] | None = None,
    **training: Any,
) -> TrainConfig:
    """A run of a model with some ten thousand parameters, in ``folder / "run"``."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(corpus)
    options: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    if preset == "segmented":
        options |= {"segment_len": 8, "window_size": 4}
    if preset == "future":
        options |= {"future_dim": 4, "max_position_embeddings": 32, "loss_coefficient": 0.5}
    if preset == "memory_transformer":
        options |= {"num_memory_tokens": 16, "use_chapters": True, "num_chapters": 8}
        options |= {"top_k_chapters": 2, "routing_block_size": 8, "wo_init_zero": False}
        # a product of means, which two processes take each over its own rows
        options |= {"use_load_balance_loss": False}
    if preset == "shiftable":
        options |= {"num_specialists": 12, "top_k": 1, "gate_size": 4}
    return TrainConfig(
        model=ModelConfig(preset=preset, options=options),
        data=DataConfig(
            **{
                "dataset_name": str(corpus),
                "tokenizer": "bytes",
                "held_out": 0.1,
                "seq_len": 32,
                "cache_dir": str(folder / "cache"),
                **(data or {}),
            }
        ),
        training=TrainingConfig(
            **{
                "output_dir": str(folder / "run"),
                "max_steps": 8,
                "batch_size": 4,
                "warmup_steps": 2,
                "base_model_lr": 1e-2,
                "save_steps": 3,
                "cpu": True,
                **training,
            }
        ),
    )


def columns(rows: list[dict[str, Any]], *names: str) -> list[tuple]:
    """Some columns of metrics; None where a run has no such column."""
    return [tuple(row.get(name) for name in names) for row in rows]
