"""Held-out loss of a causal language model, with every token weighted the same."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memattn.evaluate.ngrams import bits_per_byte

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
Batch = tuple[dict[str, Tensor], Tensor]  # inputs, and for each position the token that follows
Item = TypeVar("Item")
Window = tuple[list[int], list[int]]  # inputs, and the tokens that follow the last of them


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Loss of a model on a text.

    Args:
        loss: Mean negative log-likelihood of a token, nats.
        num_tokens: Tokens that were predicted.
        num_bytes: UTF-8 bytes of the text; None for batches, which do not know theirs.
        num_words: Words of the text, split at white space; None for batches.
        losses: Means of the losses that parts of the model return, by name.
    """

    loss: float
    num_tokens: int
    num_bytes: int | None = None
    num_words: int | None = None
    losses: dict[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """``exp(loss)``: the perplexity of a token, which depends on the tokenizer."""
        return _exp(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits for a byte of the text, which compares models with different tokenizers."""
        if self.num_bytes is None:
            return None
        return bits_per_byte(self.loss, self.num_tokens, self.num_bytes)

    @property
    def word_perplexity(self) -> float | None:
        """The perplexity of a word: ``exp`` of the text's loss over its number of words."""
        if self.num_words is None:
            return None
        return _exp(self.loss * self.num_tokens / self.num_words)

    def to_dict(self) -> dict[str, Any]:
        """All numbers; None for those that do not exist."""
        derived = ("perplexity", "bits_per_byte", "word_perplexity")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def perplexity(
    model: nn.Module,
    data: Iterable[dict[str, Tensor]] | Sequence[str],
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    context_len: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> Perplexity:
    """Measure the loss of a causal language model on batches or on documents.

    The sums run over tokens, never over batches or documents, so short ones do not weigh more.
    Logits are taken to float32 before the softmax, and the sums are kept in float64.

    With a tokenizer, each document is predicted from its first token on, after the tokenizer's
    begin-of-text token (end-of-text where it has none). Where a document is longer than
    ``context_len``, windows move over it by ``stride`` tokens and each token is predicted once, in
    the first window that reaches it; a smaller stride gives more context and costs more.

    Args:
        model: A causal language model as transformers calls one. It runs in evaluation mode and
            is put back into the mode it was in.
        data: Without a tokenizer, a finite iterable of batches, dicts with ``input_ids [B, T]``,
            ``labels [B, T]`` (not shifted, -100 is left out) and what else the model takes
            (``attention_mask``, ``cu_seqlens``). With a tokenizer, texts.
        tokenizer: A transformers tokenizer.
        context_len: Tokens in a window; None means the model's ``max_position_embeddings``, at
            most 1024.
        stride: Tokens by which the window moves, at most ``context_len``; None means
            ``context_len``, windows without overlap.
        batch_size: Windows in one forward pass.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The loss and its counts.

    Raises:
        TypeError: If ``data`` is one text instead of a list of them.
        ValueError: If there is nothing to predict, a length is out of range, a batch has no labels,
            or the tokenizer has neither a begin- nor an end-of-text token.
    """
    if isinstance(data, str):
        raise TypeError("data must be a list of texts or batches, got str")
    num_bytes = num_words = None
    if tokenizer is None:
        for name, value in (("context_len", context_len), ("stride", stride)):
            if value is not None:
                raise ValueError(f"{name} must be None without a tokenizer, got {value}")
        batches = _shifted(data)  # pyright: ignore[reportArgumentType]
    else:
        texts: list[str] = list(data)  # pyright: ignore[reportArgumentType, reportAssignmentType]
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        context_len, stride = check_window(model, context_len, stride)
        windows = [
            window
            for tokens in tokenize(texts, tokenizer)
            for window in windows_of(tokens, context_len, stride)
        ]
        batches = padded(windows, batch_size)
        if progress:
            batches = with_progress(batches, -(-len(windows) // batch_size))
        num_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
        num_words = sum(len(text.split()) for text in texts)
    total, num_tokens, losses = _sum_loss(model, batches)
    if num_tokens == 0:
        raise ValueError("data must have at least one token to predict, got none")
    return Perplexity(
        loss=total / num_tokens,
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        num_words=num_words,
        losses=losses,
    )


@torch.no_grad()
def _sum_loss(model: nn.Module, batches: Iterable[Batch]) -> tuple[float, int, dict[str, float]]:
    """Sum of the loss over all targets, their number, and the means of the losses of parts."""
    names = getattr(getattr(model, "config", None), "losses", ())
    options = {"output_losses": True} if names else {}
    parts = dict.fromkeys(names, (0.0, 0.0))
    device = next(model.parameters()).device
    total, num_tokens = 0.0, 0
    with run_in_eval_mode(model):
        for inputs, targets in batches:
            inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
            output = model(**inputs, **options)
            logits = output.logits
            for name, (value, n) in parts.items():
                count = output.loss_counts[name].item()
                parts[name] = (value + output.losses[name].item() * count, n + count)
            losses = F.cross_entropy(
                logits.flatten(0, 1).float(),
                targets.flatten().to(device),
                ignore_index=IGNORE,
                reduction="none",
            )
            total += losses.double().sum().item()
            num_tokens += int((targets != IGNORE).sum())
    return total, num_tokens, {name: value / n for name, (value, n) in parts.items() if n}


@contextmanager
def run_in_eval_mode(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode, put back into the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _shifted(batches: Iterable[dict[str, Tensor]]) -> Iterator[Batch]:
    """Inputs and targets of batches whose labels stand under their own tokens."""
    for batch in batches:
        if "labels" not in batch:
            raise ValueError(f"data must be batches with labels, got {', '.join(batch)}")
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        yield inputs, F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)


def check_window(model: nn.Module, context_len: int | None, stride: int | None) -> tuple[int, int]:
    """The checked window and stride."""
    longest: int | None
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    context_len = context_len if context_len is not None else min(longest or 1024, 1024)
    stride = stride if stride is not None else context_len
    if context_len < 1:
        raise ValueError(f"context_len must be at least 1, got {context_len}")
    if not 1 <= stride <= context_len:
        raise ValueError(f"stride must be between 1 and context_len={context_len}, got {stride}")
    return context_len, stride


def tokenize(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> Iterator[list[int]]:
    """The ids of each text after one special token, which is context and not predicted."""
    first = tokenizer.bos_token_id
    first = tokenizer.eos_token_id if first is None else first
    if not isinstance(first, int):
        name = type(tokenizer).__name__
        raise ValueError(f"tokenizer must have a bos_token or an eos_token, got {name}")
    for text in texts:
        # a warning on texts longer than the model's context would be wrong: windows cut them
        yield [first, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


def windows_of(tokens: list[int], context_len: int, stride: int) -> Iterator[Window]:
    """Inputs of at most ``context_len`` tokens, and the targets of the last of them."""
    begin, n = 1, len(tokens)
    while begin < n:
        end = min(begin + (context_len if begin == 1 else stride), n)
        yield tokens[max(0, end - 1 - context_len) : end - 1], tokens[begin:end]
        begin = end


def padded(windows: list[Window], batch_size: int) -> Iterator[Batch]:
    """Batches of windows of similar lengths, padded on the right."""
    windows = sorted(windows, key=lambda window: len(window[0]))
    for at in range(0, len(windows), batch_size):
        rows = windows[at : at + batch_size]
        input_ids = torch.zeros(len(rows), max(len(ids) for ids, _ in rows), dtype=torch.long)
        targets, mask = torch.full_like(input_ids, IGNORE), torch.zeros_like(input_ids)
        for row, (ids, predicted) in enumerate(rows):
            n = len(ids)
            input_ids[row, :n] = torch.tensor(ids)
            targets[row, n - len(predicted) : n] = torch.tensor(predicted)
            mask[row, :n] = 1
        inputs = {"input_ids": input_ids}
        yield inputs if bool(mask.all()) else {**inputs, "attention_mask": mask}, targets


def with_progress(items: Iterable[Item], total: int) -> Iterator[Item]:
    """The items, with a bar on stderr."""
    from rich.console import Console
    from rich.progress import track

    yield from track(items, "evaluating", total, console=Console(stderr=True))


def _exp(value: float) -> float:
    """exp, infinite where it does not fit into a float."""
    return math.exp(value) if value < 709.0 else math.inf
