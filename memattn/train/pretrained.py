"""Find pretrained models: a local folder, a package, or a name on the hub."""

from pathlib import Path

from memattn.data.checkpoints import CHECKPOINTS, fetch_checkpoint

# the files that transformers reads, without copies in other formats
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def find_pretrained(name: str) -> Path:
    """The folder of a pretrained model, which is downloaded if there is no local copy.

    Args:
        name: A folder with ``config.json``, a name in ``CHECKPOINTS``, or ``owner/name`` on the
            Hugging Face hub.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: If it is none of these, or there is no hub and no local copy; the message
        names the model and the option for a local folder. ImportError, ConnectionError, ValueError,
        OSError: As ``fetch_checkpoint`` does.
    """
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return path
    if name in CHECKPOINTS:
        return fetch_checkpoint(name)
    reason = "no such folder"
    if path.exists():
        reason = "a folder without config.json" if path.is_dir() else "a file"
    elif name[:1] not in "./~":
        folder, reason = fetch_from_hub(name)
        if folder is not None:
            return folder
    raise FileNotFoundError(
        f"base model must be a folder with a saved model, {', '.join(CHECKPOINTS)}, or a name on a "
        f"Hugging Face hub that can be reached, got {name} ({reason}); a local folder may stand in "
        "its place in the configuration, or be given as --model.model_path FOLDER to train and as "
        "--base_model FOLDER to other commands"
    )


def fetch_from_hub(name: str) -> tuple[Path | None, str]:
    """The local copy of a model on the hub; or None and the reason."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        folder = snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns="*/*")
        return Path(folder), ""
    except HFValidationError:
        return None, "no such folder"  # not in the form of a hub name
    except LocalEntryNotFoundError:
        return None, "no such folder, and the hub cannot be reached"
    except OSError as error:  # unknown, private, or the disk is full
        return None, str(error).strip().splitlines()[0]
