"""The MODEL argument of several commands: a folder, a run, a preset or a name on the hub."""

from pathlib import Path
from typing import Any

HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
SMALL = dict(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)


def find_model(model: str) -> Path | None:
    """Folder of the weights, or None for the name of a preset.

    A run folder stands for its final model or, where the run has not finished, for its newest
    checkpoint. A name on the Hugging Face hub stands for the local copy of that model, which is
    downloaded where there is none.

    Raises:
        FileNotFoundError: If it is none of these, or the hub cannot be reached.
    """
    from memattn.models import PRESETS
    from memattn.train.checkpoint import latest_checkpoint

    path = Path(model).expanduser()
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    checkpoint = latest_checkpoint(path / "checkpoints")
    if checkpoint is not None:
        return checkpoint
    if model in PRESETS:
        return None
    reason = "no such folder"
    if path.exists():
        reason = "a folder without config.json" if path.is_dir() else "a file"
    elif model[:1] not in "./~":
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        try:
            # what transformers reads of it, not copies in other formats
            return Path(snapshot_download(model, allow_patterns=HUB_FILES, ignore_patterns="*/*"))
        except HFValidationError:
            pass  # no name of the hub's form
        except LocalEntryNotFoundError:
            reason = "no such folder, and the hub cannot be reached"
        except OSError as error:  # unknown, private, or the disk is full
            reason = str(error).strip().splitlines()[0]
    raise FileNotFoundError(
        "model must be a folder with a saved model, a run folder, a preset "
        f"({', '.join(PRESETS)}) or a name on the Hugging Face hub, got {model} ({reason})"
    )


def load_model(model: str, device: str | None) -> Any:
    """The model in evaluation mode; a preset is small and has random weights.

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
    try:
        both: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise ValueError(f"model must be a whole checkpoint, got {folder}: {error}") from error
    loaded, info = both
    if info["missing_keys"]:
        # transformers would go on with random weights in their place
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
        raise FileNotFoundError(f"model must be a folder with a tokenizer, got {model}")
    return load_tokenizer(folder)


def choose_device(device: str | None) -> Any:
    """The device of that name; None is CUDA where there is one, else the CPU."""
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ValueError(f"device must be cpu, or a GPU that is here, got {device}") from error
    return chosen
