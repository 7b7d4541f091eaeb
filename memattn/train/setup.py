"""Make the model, the tokenizer and the tokens of a configuration."""

import hashlib
import inspect
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from memattn.checks import must
from memattn.data.batches import Batches, PackedBatches, PaddedBatches, WholeBatches
from memattn.data.conversations import load_conversations, tokenize_conversations
from memattn.data.documents import load_documents, split_documents
from memattn.data.tokenizer import load_tokenizer, tokenize_documents, train_tokenizer
from memattn.data.tokens import Tokens
from memattn.files import sha256_of_text
from memattn.train.attached import load_base
from memattn.train.config import DataConfig, ModelConfig, TaskConfig, TrainConfig
from memattn.train.mixture import mix_tokens
from memattn.train.pretrained import find_pretrained
from memattn.train.task_corpus import has_text, task_corpus, texts_of_task


class Corpus(NamedTuple):
    """Training and held-out tokens, and their tokenizer."""

    tokenizer: Any
    train: Tokens
    held_out: Tokens | None

    @property
    def fingerprint(self) -> str:
        """Hash of the training tokens."""
        digest = hashlib.sha256(self.train.bounds.numpy().data)
        digest.update(self.train.ids.numpy().data)
        if self.train.trained is not None:
            digest.update(self.train.trained.numpy().data)
        return digest.hexdigest()


def prepare_data(config: TrainConfig) -> Corpus:
    """Load, split and tokenize the documents of a configuration.

    Args:
        config: A training run.

    Returns:
        Training and held-out tokens; ``held_out`` is None if nothing is held out.

    Warns:
        UserWarning: If answers of conversations do not fit into a row, or another split is read.

    Raises:
        ValueError, FileNotFoundError, ImportError, OSError: As ``load_documents``,
            ``load_conversations``, ``split_documents`` and ``load_tokenizer`` do.
    """
    data = config.data
    if config.model.model_path is not None:
        find_pretrained(config.model.model_path)  # fails before the text is read
    if data.task is not None:
        if config.training.training_mode != "pretraining":
            mode = config.training.training_mode
            must("training.training_mode", "be pretraining with data.task", mode)
        tokenizer = _task_tokenizer(data, data.task, config.model)
        return Corpus(tokenizer, *task_corpus(data, data.task, tokenizer))
    if data.mix_in is not None and config.training.training_mode != "pretraining":
        mode = config.training.training_mode
        must("training.training_mode", "be pretraining with data.mix_in", mode)
    split = split_documents(
        load_source(data, config.training.training_mode), data.held_out, seed=data.split_seed
    )
    tokenizer = _tokenizer(data, config.model, [document.text for document in split.train])
    train, held_out = (
        _tokenize(side, tokenizer, config) if side else None
        for side in (split.train, split.held_out)
    )
    assert train is not None
    if data.packed and len(train.ids) < data.seq_len:
        wanted = f"have a text of at least data.seq_len={data.seq_len} tokens to train on"
        must("data.dataset_name", f"{wanted}: a longer text or a smaller seq_len", len(train.ids))
    if data.mix_in is not None:
        train = mix_tokens(train, data, tokenizer)
    return Corpus(tokenizer, train, held_out)


def load_source(data: DataConfig, training_mode: str) -> list[Any]:
    """The documents of a configuration, or its conversations in instruction finetuning.

    Raises:
        ValueError, FileNotFoundError, ImportError, ConnectionError: As ``load_documents`` and
            ``load_conversations`` do.
    """
    where: dict[str, Any] = {"subset": data.dataset_subset, "split": data.dataset_split}
    if training_mode == "instruction_finetuning":
        if data.document_separator is not None:
            got = repr(data.document_separator)
            must("data.document_separator", "be null for conversations", got)
        return load_conversations(data.dataset_name, messages_field=data.messages_field, **where)
    separator = data.document_separator
    if data.mix_in is not None and isinstance(data.dataset_name, str):
        # the separator may be for the text files of mix_in only
        separator = separator if Path(data.dataset_name).expanduser().exists() else None
    return load_documents(
        data.dataset_name,
        text_field=data.text_field,
        separator=separator,
        cache_dir=data.cache_dir,
        **where,
    )


def held_out_texts(data: DataConfig, training_mode: str = "pretraining") -> list[str]:
    """The texts of the held-out documents of a run; empty if nothing is held out.

    Raises:
        ValueError, FileNotFoundError, ImportError, ConnectionError: As ``load_source`` does, and if
            the run reads no text but a task.
    """
    if data.task is not None:
        must("data.task", "be null where held-out texts are read", data.task.name)
    documents = load_source(data, training_mode)
    split = split_documents(documents, data.held_out, seed=data.split_seed)
    return [document.text for document in split.held_out]


def _tokenize(side: list[Any], tokenizer: Any, config: TrainConfig) -> Tokens:
    """The tokens of documents or conversations."""
    data = config.data
    if config.training.training_mode == "pretraining":
        return tokenize_documents(side, tokenizer, cache_dir=data.cache_dir)
    if data.chat_template is not None:
        file = Path(data.chat_template).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"data.chat_template must be a file that exists, got {file}")
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    tokens, note = tokenize_conversations(side, tokenizer, data.seq_len, cache_dir=data.cache_dir)
    if note:
        warnings.warn(note, stacklevel=2)
    return tokens


def _task_tokenizer(data: DataConfig, task: TaskConfig, model: ModelConfig) -> Any:
    """The tokenizer of a task; for tasks of plain tokens the default is bytes."""
    if data.tokenizer is None and model.model_path is None and not has_text(task):
        data = replace(data, tokenizer="bytes")
    trained = data.tokenizer in (None, "bpe") and model.model_path is None
    return _tokenizer(data, model, list(texts_of_task(data, task)) if trained else [])


def _tokenizer(data: DataConfig, model: ModelConfig, texts: list[str]) -> Any:
    """The tokenizer of a configuration; trained if configured."""
    name = data.tokenizer or "bpe"
    if data.tokenizer is None and model.model_path is not None:
        name = str(find_pretrained(model.model_path))
    if name != "bpe":
        if data.vocab_size is not None:
            must("data.vocab_size", f"be None with tokenizer {name}", data.vocab_size)
        return load_tokenizer(name)
    size = data.vocab_size or 4096
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
        OSError: If there is no such pretrained model and no local copy.
    """
    if config.preset is not None:
        from memattn.models import MemAttnForCausalLM

        special = {
            f"{name}_token_id": getattr(tokenizer, f"{name}_token_id")
            for name in ("bos", "eos", "pad")
        }
        model = MemAttnForCausalLM(preset_config(config, vocab_size=len(tokenizer), **special))
    else:
        model = load_base(config)
    if len(tokenizer) > model.config.vocab_size:
        must(
            "data.tokenizer",
            f"have at most the model's vocab_size={model.config.vocab_size} entries",
            len(tokenizer),
        )
    return model


def preset_config(config: ModelConfig, **defaults: Any) -> Any:
    """The configuration of a preset's model; its options override the defaults.

    Raises:
        ValueError: If there is no such preset, or an option is wrong.
    """
    from memattn.models import PRESETS

    if config.preset not in PRESETS:
        must("model.preset", f"be one of {', '.join(PRESETS)}", repr(config.preset))
    try:
        return PRESETS[config.preset](**{**defaults, **config.options})
    except TypeError as error:
        raise ValueError(f"model.options: {error}") from error


def run_tokenizer(config: TrainConfig) -> Any:
    """The tokenizer of a run; a trained one is taken from the cache or trained.

    Raises:
        ValueError, FileNotFoundError, ImportError, OSError: As ``prepare_data`` does.
    """
    data, model = config.data, config.model
    if data.task is not None:
        return _task_tokenizer(data, data.task, model)
    if data.tokenizer == "bpe" or (data.tokenizer is None and model.model_path is None):
        return prepare_data(config).tokenizer
    return _tokenizer(data, model, [])


def make_batches(
    config: TrainConfig,
    tokens: Tokens,
    *,
    model: Any,
    tokenizer: Any,
    shuffle: bool,
    rank: int = 0,
    world_size: int = 1,
) -> Batches:
    """Packed or padded batches of a configuration.

    With ``shuffle`` they are for training, else for evaluation, with its batch size. They include
    domain labels, if known, for models with parts that take them.

    Raises:
        ValueError: If the model cannot take packed rows, or the tokenizer cannot pad.
    """
    training = config.training
    rows = training.batch_size
    if not shuffle and training.eval_batch_size is not None:
        rows = training.eval_batch_size
    options: dict[str, Any] = {
        "batch_size": rows,
        "seq_len": config.data.seq_len,
        "seed": training.seed,
        "shuffle": shuffle,
        "rank": rank,
        "world_size": world_size,
    }
    if "domain_labels" not in getattr(model, "part_inputs", ()):
        tokens = tokens._replace(domains=None, domain_weights=None)
    if config.data.packed:
        if "cu_seqlens" not in inspect.signature(model.forward).parameters:
            name = type(model).__name__
            must("data.packed", f"be false for {name}, which takes no cu_seqlens", "true")
        return (PackedBatches if tokens.trained is None else WholeBatches)(tokens, **options)
    if tokenizer.pad_token_id is None:
        must("data.tokenizer", "have a padding or end-of-text token for padded rows", "neither")
    return PaddedBatches(tokens, pad_token_id=tokenizer.pad_token_id, **options)
