"""Chapters in a model, each made from a text: create, list, open, close and delete them.

The model reads a text once. The hidden states of its layers become a chapter in addition to the
learned memory. Every token of every sequence attends to an open chapter.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from memattn.checks import check_int, check_rank, must
from memattn.files import sha256_of_text
from memattn.parts.chapters import Chapter, Chapters

SAMPLES = 16  # elements of each weight that enter the checksum
LONGEST = 1024  # default number of tokens that a model reads at once, at most


def chapters_of(model: nn.Module) -> Chapters:
    """The chapters of a model, or of its active adapter: a collection by name.

    ``for chapter in chapters`` gives the description of each; ``open``, ``close``, ``delete``,
    ``save`` and ``load`` change it.

    Args:
        model: A ``MemAttnForCausalLM`` or a transformers model with attached parts, also inside
            PEFT's, ``torch.compile`` or ``DistributedDataParallel``.

    Raises:
        ValueError: If no part of the model keeps chapters, or several adapters are active (then use
            ``MemoryAdapter.chapters`` of one).
    """
    return _find(model)[1]


def chapter_from_text(
    model: nn.Module,
    text: str | Tensor,
    *,
    name: str | None = None,
    tokenizer: Any = None,
    source: str = "",
    context_len: int | None = None,
) -> Chapter:
    """Make a chapter from a text. It starts closed: logits are unchanged until it is opened.

    The model reads the text in evaluation mode with all chapters closed, in pieces of
    ``context_len`` tokens, each after the tokenizer's begin-of-text token. A chapter memory keeps
    the hidden states of each layer. In an open chapter they are memory tokens, which the layer's
    own projections turn into keys and values. Nothing is trained, and the kept states get no
    gradient; a model can be trained with open chapters.

    Args:
        model: As ``chapters_of`` takes it.
        text: A text, or its tokens, int64 ``[n]``, at least one.
        name: Name of the chapter; None means ``chapter-1``, ``chapter-2`` and so on.
        tokenizer: Tokenizer for a text; None means the one saved with the model.
        source: Where the text comes from, in the user's words.
        context_len: Tokens that are read at once; None means the model's
            ``max_position_embeddings``, at most 1024.

    Returns:
        The description of the chapter. ``chapters_of(model).open(name)`` opens it.

    Raises:
        TypeError: If ``text`` is neither a string nor a tensor.
        ValueError: If the model takes no chapters, the name is taken, the text has no token, or
            there is no tokenizer.
    """
    base, chapters = _find(model)
    if name is None:
        names = (f"chapter-{number}" for number in range(1, len(chapters) + 2))
        name = next(each for each in names if each not in chapters)
    if not isinstance(name, str) or not name.strip():
        must("name", "be a text that is not empty", repr(name))
    if name in chapters:
        must("name", "be new", repr(name))
    if isinstance(text, str):
        tokenizer = _own_tokenizer(base) if tokenizer is None else tokenizer
        tokens = torch.tensor(
            tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long
        )
        first = tokenizer.bos_token_id
        prefix, checksum = (() if first is None else (int(first),)), sha256_of_text(text)
    elif isinstance(text, Tensor):
        check_rank("text", text, "n")
        tokens, prefix = text.detach().long().cpu(), ()
        checksum = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    else:
        must("text", "be a text or a tensor of tokens", type(text).__name__, TypeError)
    if not len(tokens):
        must("text", "have at least one token", "none")
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None) or LONGEST
    read_at_once = min(limit, LONGEST) - len(prefix) if context_len is None else context_len
    check_int("context_len", read_at_once, 1)
    chapter = Chapter(
        name=name,
        source=source,
        num_tokens=len(tokens),
        sha256=checksum,
        made_at=_now(),
        model=_describe(base),
        weights=weights_checksum(model),
        context_len=read_at_once,
        prefix=prefix,
    )
    chapters.add(chapter, tokens, _read(base, chapters, chapter, tokens))
    return chapter


def refresh_chapters(model: nn.Module, *names: str) -> None:
    """Make chapters again from their texts, after the model's weights have changed.

    Args:
        model: As ``chapters_of`` takes it.
        names: Which chapters; none means all. Open ones stay open.

    Raises:
        ValueError: If a name is unknown.
    """
    base, chapters = _find(model)
    weights = weights_checksum(model)
    for name in names or [chapter.name for chapter in chapters]:
        chapter = replace(chapters[name], weights=weights, made_at=_now(), model=_describe(base))
        tokens = chapters.tokens(name).cpu()
        chapters.add(chapter, tokens, _read(base, chapters, chapter, tokens))


def load_chapters(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the chapters of a file that ``chapters_of(model).save(path)`` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, its chapters were made with other weights, or a name is
            taken; then no chapter is loaded.
    """
    chapters_of(model).load(path, weights=weights_checksum(model))


def stale_chapters(model: nn.Module) -> list[str]:
    """Names of the chapters that were made before the model's weights changed.

    They still work, but ``refresh_chapters`` would give other hidden states.
    """
    weights = weights_checksum(model)
    return [chapter.name for chapter in chapters_of(model) if chapter.weights != weights]


def weights_checksum(model: nn.Module) -> str:
    """A hexadecimal checksum over some elements of each weight; it changes with the weights.

    Weights of inactive adapters are left out.
    """
    base, chapters = _find(model)
    own = {id(p) for adapter in _other_adapters(base, chapters) for p in adapter.parameters()}
    digest = hashlib.sha256()
    for parameter in base.parameters():
        if id(parameter) in own:
            continue
        values = parameter.detach()
        values = (values.to_local() if hasattr(values, "to_local") else values).flatten()
        step = max(len(values) // SAMPLES, 1)
        digest.update(values[::step][:SAMPLES].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def _read(base: Any, chapters: Chapters, chapter: Chapter, tokens: Tensor) -> dict[str, Tensor]:
    """The states that the parts of a model keep for tokens ``[n]``."""
    prefix, was_training = torch.tensor(chapter.prefix, dtype=torch.long), base.training
    few = {"logits_to_keep": 1} if "logits_to_keep" in signature(base.forward).parameters else {}
    base.eval()
    try:
        # no inference mode: the kept states are used in training
        with (
            torch.inference_mode(False),
            torch.compiler.set_stance("force_eager"),
            chapters.recording() as recorded,
        ):
            for piece in tokens.split(chapter.context_len):
                ids = torch.cat([prefix, piece])[None].to(base.device)
                base(input_ids=ids, use_cache=False, **few)
            return {
                name: torch.cat([tensor[len(prefix) :] for tensor in pieces])
                for name, pieces in recorded.items()
            }
    finally:
        base.train(was_training)


def _find(model: Any) -> tuple[Any, Chapters]:
    """The model without wrappers, and its chapters."""
    base = model
    while (inner := _inside(base)) is not None:
        base = inner
    chapters = getattr(base, "chapters", None)
    if not isinstance(chapters, Chapters):
        must("model", "be a model of memattn or have attached parts", type(base).__name__)
    if not chapters.layout:
        allowed = "have a part that keeps chapters, such as a chapter memory as wide as the model"
        must("model", allowed, type(base).__name__)
    return base, chapters


def _inside(model: Any) -> Any:
    """The model inside a wrapper (torch.compile, PEFT, DistributedDataParallel), or None."""
    if hasattr(model, "_orig_mod"):
        return model._orig_mod
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else None


def _other_adapters(base: Any, chapters: Chapters) -> Iterator[Any]:
    """Adapters of a model other than the one that made these chapters."""
    attachment = getattr(base, "_memattn", None)
    for adapter in () if attachment is None else attachment.adapters.values():
        if adapter.chapters is not chapters:
            yield adapter


def _own_tokenizer(base: Any) -> Any:
    """The tokenizer in the folder that the model was loaded from."""
    from memattn.data import load_tokenizer

    folder = getattr(base.config, "_name_or_path", "")
    if not folder or not os.path.isfile(os.path.join(folder, "tokenizer_config.json")):
        must("tokenizer", "be given for a model that was not loaded with one", "None")
    return load_tokenizer(folder)


def _describe(base: Any) -> str:
    folder = getattr(base.config, "_name_or_path", "")
    return f"{type(base).__name__}{' of ' * bool(folder)}{folder}"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
