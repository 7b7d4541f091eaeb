"""Tokenizers: loaded, trained or plain bytes; and corpora as one flat row of token ids."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from memattn.checks import check_int, must
from memattn.data.documents import Document
from memattn.files import replacing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
_BYTES = 256


class Tokens(NamedTuple):
    """A tokenized corpus: the ids of all documents in one row, and their bounds."""

    ids: Tensor  # int32 [N]
    bounds: Tensor  # int64 [n_documents + 1], 0 ... N
    num_bytes: int  # UTF-8 bytes of the texts, for bits per byte

    @property
    def num_documents(self) -> int:
        return len(self.bounds) - 1


def load_tokenizer(name_or_path: str | Path) -> "PreTrainedTokenizerBase":
    """Load a tokenizer.

    Args:
        name_or_path: ``"bytes"`` (one token per UTF-8 byte, and three special ones), a folder
            written by ``save_pretrained``, or a name on the hub.

    Returns:
        A transformers tokenizer. One without a padding token gets its end-of-text token for it.

    Raises:
        OSError: If there is no such tokenizer, or the hub cannot be reached.
    """
    if str(name_or_path) == "bytes":
        return _wrap(_byte_level_bpe([], _BYTES + len(_SPECIAL)))
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise OSError(
            f"tokenizer must be 'bytes', a folder with a tokenizer or a name on a hub that can "
            f"be reached, got {name_or_path} ({reason})"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, path: str | Path | None = None
) -> "PreTrainedTokenizerBase":
    """Train a byte-level BPE tokenizer; the same texts give the same tokenizer.

    Args:
        texts: Texts to learn merges from.
        vocab_size: Entries in all: 256 bytes, ``<|bos|>``, ``<|eos|>``, ``<|pad|>`` and merges.
            Fewer where the texts have no more pairs to merge.
        path: Folder to save it to, in one step.

    Returns:
        A transformers tokenizer that takes any text and gives it back unchanged.

    Raises:
        ValueError: If ``vocab_size`` is below 259.
        OSError: If it cannot be saved.
    """
    check_int("vocab_size", vocab_size, _BYTES + len(_SPECIAL))
    tokenizer = _wrap(_byte_level_bpe(texts, vocab_size))
    if path is not None:
        with replacing(Path(path)) as folder:
            tokenizer.save_pretrained(folder)
    return tokenizer


def tokenize_documents(
    documents: Sequence[Document],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    cache_dir: str | Path | None = None,
) -> Tokens:
    """Tokenize documents, each between the tokenizer's begin- and end-of-text tokens.

    Args:
        documents: Documents.
        tokenizer: A transformers tokenizer. A token that it lacks is left out.
        cache_dir: Folder that keeps the result, under a name that is a hash of the texts and the
            tokenizer; None keeps nothing.

    Returns:
        The ids and the bounds of the documents.

    Raises:
        ValueError: If there are no documents, or one has no token at all.
        OSError: If the result cannot be kept.
    """
    if not documents:
        must("documents", "not be empty", "none")
    file = None
    if cache_dir is not None:
        key = _fingerprint(documents, tokenizer)
        file = Path(cache_dir).expanduser() / "tokens" / key / "tokens.safetensors"
        if (kept := _read_tokens(file)) is not None:
            return kept
    tokens = _tokenize(documents, tokenizer)
    if file is not None:
        from safetensors.torch import save_file

        with replacing(file.parent) as folder:
            tensors = {"ids": tokens.ids, "bounds": tokens.bounds}
            save_file(tensors, folder / file.name, {"num_bytes": str(tokens.num_bytes)})
    return tokens


def _tokenize(documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    """Tokenize without a cache."""
    texts = [document.text for document in documents]
    # a warning on texts longer than the model's context would be wrong here: they are cut later
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    before, after = (
        [] if id is None else [id] for id in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    )
    rows = [torch.tensor(before + row + after, dtype=torch.int32) for row in rows]
    for document, row in zip(documents, rows, strict=True):
        if len(row) == 0:
            must("document", "have at least one token", repr(document))
    lengths = torch.tensor([0, *(len(row) for row in rows)], dtype=torch.int64)
    num_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
    return Tokens(torch.cat(rows), lengths.cumsum(0), num_bytes)


def _read_tokens(file: Path) -> Tokens | None:
    """Tokens kept in a file, or None where there are none or they are damaged."""
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as tensors:
            num_bytes = int(tensors.metadata()["num_bytes"])
            return Tokens(tensors.get_tensor("ids"), tensors.get_tensor("bounds"), num_bytes)
    except SafetensorError:
        return None


def _fingerprint(documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash of the texts and of everything that the tokenizer makes of them."""
    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    description = (
        str(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    )
    special = f"{type(tokenizer).__name__} {tokenizer.bos_token_id} {tokenizer.eos_token_id}"
    for part in (description, special, *(document.text for document in documents)):
        raw = part.encode("utf-8", "surrogatepass")
        digest.update(f"{len(raw)}\n".encode() + raw)
    return digest.hexdigest()[:32]


def _byte_level_bpe(texts: Iterable[str], vocab_size: int):
    """A trained ``tokenizers.Tokenizer``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _wrap(tokenizer) -> "PreTrainedTokenizerBase":
    """The tokenizer as transformers wants it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **_SPECIAL
    )
