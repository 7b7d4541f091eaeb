"""The effect of open chapters: the loss on texts with chapters closed and open."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.chapters import LONGEST, chapter_from_text, chapters_of
from memattn.checks import check_int, must
from memattn.evaluate.perplexity import run_in_eval_mode

BATCH = 8


@dataclass(frozen=True, kw_only=True)
class ChapterEffect:
    """Loss of one text in one condition, compared with all chapters closed.

    Attributes:
        text: Which text.
        condition: Which chapters are open, or what the context holds.
        num_tokens: Tokens that are predicted.
        loss: Their mean loss, nats.
        change: That minus the loss with all chapters closed.
        error: Standard error of the change, over tokens as if they were independent.
    """

    text: str
    condition: str
    num_tokens: int
    loss: float
    change: float
    error: float

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def chapter_effect(
    model: nn.Module,
    text: str,
    tokenizer: Any,
    *,
    names: Sequence[str] = (),
    weight: float | None = None,
    context_len: int | None = None,
) -> list[ChapterEffect]:
    """Measure a text with the chapters of a model closed, and with some of them open.

    Args:
        model: As ``chapters_of`` takes it. Its chapters are open or closed afterwards as before.
        text: A text that is in no chapter; otherwise copying is measured.
        tokenizer: The model's tokenizer.
        names: Chapters to open, together; none means all.
        weight: Their weight; None means the one of each.
        context_len: Tokens in a piece, which is measured alone; None means half of the model's
            ``max_position_embeddings``, at most 512.

    Returns:
        ``closed`` and ``open``.

    Raises:
        ValueError: If there are no such chapters, or the text has less than two tokens.
    """
    chapters = chapters_of(model)
    names = tuple(names) or tuple(chapter.name for chapter in chapters)
    if not names:
        must("model", "have chapters", "none")
    tokens = _tokens(tokenizer, text)
    measure = _Measure(model, tokenizer, context_len)
    closed = measure(tokens)
    opened = measure(tokens, names=names, weight=weight)
    return [_effect("text", name, x, closed) for name, x in (("closed", closed), ("open", opened))]


def document_effect(
    model: nn.Module,
    document: str,
    other: str,
    tokenizer: Any,
    *,
    weight: float | None = None,
    context_len: int | None = None,
) -> list[ChapterEffect]:
    """Measure how a chapter of the first half of a document changes the loss of its second half.

    Chapters are made of the first halves of the document and of an unrelated text, and deleted in
    the end. Both second halves are measured with

    - ``closed``: no chapter is open;
    - ``open``: the chapter of the document is open. On the document's second half this shows what
    the chapter contributes; on that of the other text, what it disturbs;
    - ``control``: the chapter of the other text is open. On the document's second half this shows
    the effect of an unrelated chapter;
    - ``context``: no chapter is open, but the end of the document's first half, as long as the
    piece, precedes each piece: the effect of attention to the text itself.

    Args:
        model: As ``chapters_of`` takes it; its other chapters are closed meanwhile.
        document: A document, such as a chapter of a book.
        other: A text about something else.
        tokenizer: The model's tokenizer.
        weight: Weight of the chapters; None means 1.
        context_len: As in ``chapter_effect``.

    Returns:
        Four conditions for the document, then four for the other text.

    Raises:
        ValueError: If a text has less than four tokens, or the model takes no chapters.
    """
    measure = _Measure(model, tokenizer, context_len)
    halves: dict[str, tuple[Tensor, Tensor]] = {}
    for name, text in (("document", document), ("other", other)):
        tokens = _tokens(tokenizer, text)
        if len(tokens) < 4:
            must(name, "have at least 4 tokens", len(tokens))
        halves[name] = tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
    first = halves["document"][0]
    effects = []
    with _temporary(model, {name: half[0] for name, half in halves.items()}) as names:
        for text, (_, second) in halves.items():
            closed = measure(second)
            conditions = {
                "closed": closed,
                "open": measure(second, names=[names["document"]], weight=weight),
                "control": measure(second, names=[names["other"]], weight=weight),
                "context": measure(second, context=first),
            }
            effects += [_effect(text, name, x, closed) for name, x in conditions.items()]
    return effects


@contextmanager
def _temporary(model: nn.Module, texts: dict[str, Tensor]) -> Iterator[dict[str, str]]:
    """Context with chapters of texts, by name."""
    chapters, names = chapters_of(model), {}
    try:
        for key, tokens in texts.items():
            names[key] = chapter_from_text(model, tokens).name
        yield names
    finally:
        if names:
            chapters.delete(*names.values())


class _Measure:
    """Loss of each token of a text, in pieces of equal length."""

    def __init__(self, model: nn.Module, tokenizer: Any, context_len: int | None) -> None:
        self.model: Any = model
        longest = getattr(self.model.config, "max_position_embeddings", None) or LONGEST
        piece: int = min(longest, LONGEST) // 2 if context_len is None else context_len
        check_int("context_len", piece, 2)
        if 2 * piece > longest:
            must("context_len", f"be at most half of the model's {longest} positions", piece)
        self.piece_len = piece - 1  # after one token that is not predicted
        first = tokenizer.bos_token_id
        self.first = tokenizer.eos_token_id if first is None else first

    def __call__(
        self,
        tokens: Tensor,
        *,
        names: Sequence[str] = (),
        weight: float | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """float64 ``[n]``, with these chapters open and this text in front of each piece."""
        front = tokens.new_tensor([] if self.first is None else [self.first])
        if context is not None:
            front = torch.cat([front, context[-self.piece_len :]])
        if not len(front):
            tokens, front = tokens[1:], tokens[:1]
        full = len(tokens) // self.piece_len * self.piece_len
        groups = [*tokens[:full].view(-1, self.piece_len).split(BATCH), tokens[None, full:]]
        opened = chapters_of(self.model).only(*names, weight=weight)
        with torch.no_grad(), run_in_eval_mode(self.model), opened:
            return torch.cat([self._losses(front, group) for group in groups if group.numel()])

    def _losses(self, front: Tensor, pieces: Tensor) -> Tensor:
        device = next(self.model.parameters()).device
        ids = torch.cat([front.expand(len(pieces), -1), pieces], 1).to(device)
        logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits[:, len(front) - 1 :]
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), pieces.flatten().to(device), reduction="none"
        )
        return losses.double().cpu()


def _tokens(tokenizer: Any, text: str) -> Tensor:
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(tokens) < 2:
        must("text", "have at least 2 tokens", len(tokens))
    return torch.tensor(tokens)


def _effect(text: str, condition: str, losses: Tensor, closed: Tensor) -> ChapterEffect:
    change = losses - closed
    error = change.std().item() / math.sqrt(len(change)) if len(change) > 1 else math.nan
    return ChapterEffect(
        text=text,
        condition=condition,
        num_tokens=len(losses),
        loss=losses.mean().item(),
        change=change.mean().item(),
        error=error,
    )
