"""Tokenizers: loaded, trained or plain bytes; and corpora as one flat row of token ids."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from memattn.checks import check_int, must
from memattn.data.document import Document
from memattn.data.tokens import Tokens, read_tokens, tokenizer_identity, write_tokens
from memattn.files import replacing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
_BYTES = 256


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
            f"be reached, got {name_or_path} ({reason}); for a model without one, give the folder "
            "of another as data.tokenizer"
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
        if (kept := read_tokens(file)) is not None:
            return kept[0]
    tokens = _tokenize(documents, tokenizer)
    if file is not None:
        write_tokens(file, tokens)
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


def _fingerprint(documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash of the texts and of everything that the tokenizer makes of them."""
    digest = hashlib.sha256()
    for part in (*tokenizer_identity(tokenizer), *(document.text for document in documents)):
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
