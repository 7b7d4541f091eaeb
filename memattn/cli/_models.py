"""The MODEL argument of several commands: a folder, a run, a preset or a name on the hub."""

from pathlib import Path
from typing import Any

from memattn.checks import must

SMALL = dict(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)


def find_model(model: str) -> Path | None:
    """The folder of a model's weights; None for the name of a preset.

    For a run folder this is the final model or, if the run has not finished, the newest checkpoint.
    For a name on the Hugging Face hub it is the local copy, which is downloaded if missing.

    Raises:
        FileNotFoundError: If it is none of these, or the hub cannot be reached.
    """
    from memattn.models import PRESETS

    path = Path(model).expanduser()
    if (folder := weights_folder(path)) is not None:
        return folder
    if model in PRESETS:
        return None
    reason = "no such folder"
    if path.exists():
        reason = "a folder without config.json" if path.is_dir() else "a file"
    elif model[:1] not in "./~":
        from memattn.train.pretrained import fetch_from_hub

        fetched, reason = fetch_from_hub(model)
        if fetched is not None:
            return fetched
    raise FileNotFoundError(
        "model must be a folder with a saved model, a run folder, a preset "
        f"({', '.join(PRESETS)}) or a name on the Hugging Face hub, got {model} ({reason})"
    )


def weights_folder(path: Path) -> Path | None:
    """The folder of a saved model, or of a run's final model or newest checkpoint."""
    from memattn.train.checkpoint import latest_checkpoint

    for folder in (path, path / "model"):
        if (folder / "config.json").is_file() or (folder / "attached.json").is_file():
            return folder
    return latest_checkpoint(path / "checkpoints")


def load_model(model: str, device: str | None, base_model: str | None = None) -> Any:
    """Load a model in evaluation mode; a preset is small and has random weights.

    ``base_model`` is the folder of the pretrained model that a memory or LoRA was attached to.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If its files are damaged or incomplete, or the device is unknown.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from memattn.models import PRESETS, MemAttnForCausalLM

    where = choose_device(device)
    folder = find_model(model)
    if folder is None:
        torch.manual_seed(0)
        return MemAttnForCausalLM(PRESETS[model](**SMALL)).to(where).eval()
    logging.disable_progress_bar()
    if (folder / "attached.json").is_file():
        from memattn.train.attached import load_attached

        return load_attached(folder, base_model).to(where).eval()
    if base_model is not None:
        must("base_model", f"be left out for {model}, which has all its weights", base_model)
    try:
        both: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise ValueError(f"model must be a whole checkpoint, got {folder}: {error}") from error
    loaded, info = both
    if info["missing_keys"]:
        # transformers would use random weights instead
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(f"model must have all weights, got {folder} without {missing}")
    return loaded.to(where).eval()


def load_model_tokenizer(model: str) -> Any:
    """The tokenizer that was saved with a model.

    Raises:
        FileNotFoundError: If there is no such model, or it has no tokenizer.
    """
    from memattn.data import load_tokenizer

    folder = find_model(model)
    if folder is None or not (folder / "tokenizer_config.json").is_file():
        where = model if folder is None else folder
        raise FileNotFoundError(
            f"model must be a folder with a tokenizer, got {model}; put one into it with "
            f"tokenizer.save_pretrained({str(where)!r})"
        )
    return load_tokenizer(folder)


def choose_device(device: str | None) -> Any:
    """The device of that name; None means CUDA if there is one, else the CPU."""
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ValueError(f"device must be cpu, or a GPU that is here, got {device}") from error
    return chosen


def read_text(model: Any, tokenizer: Any, text: str) -> Any:
    """Tokens ``[1, T]`` of a text, cut to the model's maximum; - is the standard input.

    Raises:
        ValueError: If it has no token, or is the name of a file.
    """
    import sys
    from pathlib import Path

    import torch

    if len(text) < 256 and Path(text).expanduser().is_file():
        must("text", f"be the text itself, or - and a file behind it: --text - < {text}", text)
    text = sys.stdin.read() if text == "-" else text
    ids = tokenizer(text)["input_ids"]
    if not ids:
        must("text", "be one with at least one token", "none")
    limit = getattr(model.config, "position_limit", None)
    if limit is not None and len(ids) > limit:
        sys.stdout.write(f"reading the first {limit} tokens of {len(ids):,}\n")
        ids = ids[:limit]
    return torch.tensor([ids], device=model.device)
