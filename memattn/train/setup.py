"""From a configuration to a model, a tokenizer and tokens."""

import hashlib
import inspect
from pathlib import Path
from typing import Any, NamedTuple

import torch

from memattn.checks import must
from memattn.data.batches import Batches, PackedBatches, PaddedBatches
from memattn.data.documents import Document, load_documents, split_documents
from memattn.data.tokenizer import Tokens, load_tokenizer, tokenize_documents, train_tokenizer
from memattn.files import sha256_of_text
from memattn.train.config import DataConfig, ModelConfig, TrainConfig


class Corpus(NamedTuple):
    """Tokens to train on and to evaluate on, and the tokenizer that made them."""

    tokenizer: Any
    train: Tokens
    held_out: Tokens | None

    @property
    def fingerprint(self) -> str:
        """Hash of the training tokens."""
        digest = hashlib.sha256(self.train.bounds.numpy().data)
        digest.update(self.train.ids.numpy().data)
        return digest.hexdigest()


def prepare_data(config: TrainConfig) -> Corpus:
    """Load, split and tokenize the documents of a configuration.

    Args:
        config: A training run.

    Returns:
        The tokens of both sides; ``held_out`` is None where nothing is held out.

    Raises:
        ValueError, FileNotFoundError, ImportError, OSError: As ``load_documents``,
            ``split_documents`` and ``load_tokenizer`` do.
    """
    data = config.data
    documents = load_documents(
        data.dataset_name,
        subset=data.dataset_subset,
        split=data.dataset_split,
        text_field=data.text_field,
        separator=data.document_separator,
        cache_dir=data.cache_dir,
    )
    split = split_documents(documents, data.held_out, seed=data.split_seed)
    tokenizer = _tokenizer(data, config.model, split.train)
    train, held_out = (
        tokenize_documents(side, tokenizer, cache_dir=data.cache_dir) if side else None
        for side in split
    )
    assert train is not None
    return Corpus(tokenizer, train, held_out)


def _tokenizer(data: DataConfig, model: ModelConfig, documents: list[Document]) -> Any:
    """The tokenizer of a configuration, trained where it asks for that."""
    name = data.tokenizer or ("bpe" if model.model_path is None else model.model_path)
    if name != "bpe":
        if data.vocab_size is not None:
            must("data.vocab_size", f"be None with tokenizer {name}", data.vocab_size)
        return load_tokenizer(name)
    size = data.vocab_size or 4096
    texts = [document.text for document in documents]
    digest = hashlib.sha256(f"{size}".encode())
    for text in texts:
        digest.update(bytes.fromhex(sha256_of_text(text)))
    kept = Path(data.cache_dir).expanduser() / "tokenizers" / digest.hexdigest()[:32]
    if not kept.is_dir():
        train_tokenizer(texts, size, kept)
    return load_tokenizer(kept)


def build_model(config: ModelConfig, tokenizer: Any) -> Any:
    """A model with new weights from a preset, or a pretrained one, in float32.

    Args:
        config: Which model.
        tokenizer: Gives the size of the vocabulary and the special tokens.

    Returns:
        A transformers causal language model.

    Raises:
        ValueError: If there is no such preset, an option is wrong, or the vocabulary of the
            tokenizer is larger than that of a pretrained model.
        OSError: If there is no such pretrained model.
    """
    if config.preset is not None:
        from memattn.models import PRESETS, MemAttnForCausalLM

        if config.preset not in PRESETS:
            must("model.preset", f"be one of {', '.join(PRESETS)}", repr(config.preset))
        special = {
            f"{name}_token_id": getattr(tokenizer, f"{name}_token_id")
            for name in ("bos", "eos", "pad")
        }
        options = {"vocab_size": len(tokenizer), **special, **config.options}
        try:
            model_config = PRESETS[config.preset](**options)
        except TypeError as error:
            raise ValueError(f"model.options: {error}") from error
        model = MemAttnForCausalLM(model_config)
    else:
        from transformers import AutoModelForCausalLM

        assert config.model_path is not None
        model = AutoModelForCausalLM.from_pretrained(config.model_path, dtype=torch.float32)
    if len(tokenizer) > model.config.vocab_size:
        must(
            "data.tokenizer",
            f"have at most the model's vocab_size={model.config.vocab_size} entries",
            len(tokenizer),
        )
    return model


def make_batches(
    config: TrainConfig,
    tokens: Tokens,
    *,
    model: Any,
    tokenizer: Any,
    shuffle: bool,
    rank: int,
    world_size: int,
) -> Batches:
    """Packed or padded batches of a configuration.

    Raises:
        ValueError: If the model cannot take packed rows, or the tokenizer cannot pad.
    """
    options: dict[str, Any] = {
        "batch_size": config.training.batch_size,
        "seq_len": config.data.seq_len,
        "seed": config.training.seed,
        "shuffle": shuffle,
        "rank": rank,
        "world_size": world_size,
    }
    if config.data.packed:
        if "cu_seqlens" not in inspect.signature(model.forward).parameters:
            name = type(model).__name__
            must("data.packed", f"be false for {name}, which takes no cu_seqlens", "true")
        return PackedBatches(tokens, **options)
    if tokenizer.pad_token_id is None:
        must("data.tokenizer", "have a padding or end-of-text token for padded rows", "neither")
    return PaddedBatches(tokens, pad_token_id=tokenizer.pad_token_id, **options)
