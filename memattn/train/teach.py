"""Train specialists' gates to classify the domain of a text, before the specialists are trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import AdamW

from memattn.checks import must
from memattn.data.tokens import Tokens
from memattn.nn._modules import modules_of
from memattn.nn.domain_gate import DomainGate
from memattn.nn.gate_losses import BASE, SPECIALIST
from memattn.nn.gate_row import GateRow
from memattn.train.config import TrainConfig
from memattn.train.setup import Corpus, make_batches

STEPS, TOKENS, RATE, DECAY = 400, 512, 5e-3, 0.1  # TOKENS of each text in a step
ROOM = 2**28  # largest number of stored gate inputs


class _Gate(NamedTuple):
    """A gate, and its inputs ``[n, E]`` for the tokens of both texts."""

    gate: DomainGate
    seen: dict[int, list[Tensor]]


def teach_gates(model: Any, config: TrainConfig, corpus: Corpus) -> dict[str, float]:
    """Train the gates of trainable specialists to distinguish the text from ``data.mix_in``.

    Only the base runs on ``training.gate_rows`` rows of each text (or all, if fewer). Then each
    gate is trained on its inputs with the loss ``gate_domain``, weighted as in training. No other
    weights change, and the result is deterministic. Gates without open, trainable specialists do
    not change.

    Args:
        model: The model, a decoder of this package or one with specialists attached.
        config: The run.
        corpus: Its text with domain labels.

    Returns:
        The last losses by gate name.

    Raises:
        ValueError: If the model has no specialists.
    """
    gates = {n: _Gate(m, {}) for n, m in modules_of(model, DomainGate).items()}
    if not gates:
        allowed = "be 0 for a model without specialists"
        must("training.gate_rows", allowed, config.training.gate_rows)
    training = model.training
    model.eval()
    # all layers have the same specialists
    base = torch.eye(1 + len(next(iter(gates.values())).gate.specialists))[0]
    for domain in (BASE, SPECIALIST):
        _see(model, config, corpus, domain, gates, base)
    model.train(training)
    weights = corpus.train.domain_weights
    assert weights is not None
    shares = weights * torch.bincount(_domains_of_tokens(corpus.train), minlength=len(weights))
    generator = torch.Generator().manual_seed(config.training.seed)
    return {
        name: loss
        for name, known in gates.items()
        if (loss := _teach(known, shares / shares.mean(), generator)) is not None
    }


def _domains_of_tokens(tokens: Tokens) -> Tensor:
    assert tokens.domains is not None
    return tokens.domains.repeat_interleave(tokens.bounds.diff())


@torch.no_grad()
def _see(
    model: Any,
    config: TrainConfig,
    corpus: Corpus,
    domain: int,
    gates: dict[str, _Gate],
    base: Tensor,
) -> None:
    """Run the base on rows of one text, and collect the gates' inputs.

    ``base`` are priors with all specialists closed.
    """
    tokens = _of_domain(corpus.train, domain)
    size = min(config.training.batch_size, config.training.gate_rows)
    batches = make_batches(
        replace(config, training=replace(config.training, batch_size=size)),
        tokens,
        model=model,
        tokenizer=corpus.tokenizer,
        shuffle=True,
    )
    number = -(-min(config.training.gate_rows, batches.num_rows) // size)
    numbers = sum(known.gate.hidden_size for known in gates.values())
    room = max(1, ROOM // (2 * numbers * number))  # tokens per batch
    generator = torch.Generator().manual_seed(config.training.seed)
    for _ in range(number):
        batch = {name: x.to(model.device) for name, x in next(batches).items() if name != "labels"}
        present = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        with _watching(gates) as seen:  # only the base, whatever is open
            model(**batch, domain_prior=base.to(model.device), use_cache=False)
        count = int(present.sum())
        kept = torch.randperm(count, generator=generator)[:room].to(model.device)
        for name, x in seen.items():
            known = gates[name].seen.setdefault(domain, [])
            known.append(x[present] if count <= room else x[present][kept])


@contextmanager
def _watching(gates: dict[str, _Gate]) -> Iterator[dict[str, Tensor]]:
    """Context that records the input ``[B, T, E]`` of each gate, which all its rows share."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        return lambda row, args: seen.__setitem__(name, args[0])

    hooks = []
    for name, known in gates.items():
        for row in list(known.gate.rows.values())[:1]:
            hooks.append(row.register_forward_pre_hook(watch(name)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _teach(known: _Gate, shares: Tensor, generator: torch.Generator) -> float | None:
    """Train one gate and return its last loss; None if it has nothing to train."""
    gate = known.gate
    rows = [row for row in gate.rows.values() if isinstance(row, GateRow) and row.is_open]
    parameters = [p for row in rows for p in row.parameters() if p.requires_grad]
    if not parameters:
        return None
    texts = [torch.cat(known.seen[domain]) for domain in (BASE, SPECIALIST)]
    labels = torch.tensor([BASE, SPECIALIST]).repeat_interleave(TOKENS)[:, None]
    weights = shares[labels]
    labels, weights = labels.to(texts[0].device), weights.to(texts[0].device)
    optimizer = AdamW(parameters, lr=RATE, weight_decay=DECAY)
    loss = torch.zeros(())
    with torch.enable_grad():
        for _ in range(STEPS):
            drawn = [torch.randint(len(x), (TOKENS,), generator=generator) for x in texts]
            x = torch.cat([x[i.to(x.device)] for x, i in zip(texts, drawn, strict=True)])
            # each token is its own sequence, whose mean is the token
            output = gate(x[:, None], labels=labels, label_weights=weights)
            total, count = output.losses["gate_domain"]
            loss = total / count
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return loss.item()


def _of_domain(tokens: Tokens, domain: int) -> Tokens:
    """The documents of one text."""
    assert tokens.domains is not None
    chosen = (tokens.domains == domain).nonzero()[:, 0].tolist()
    bounds = tokens.bounds.tolist()
    ids = [tokens.ids[bounds[i] : bounds[i + 1]] for i in chosen]
    lengths = torch.tensor([0, *map(len, ids)])
    return Tokens(torch.cat(ids), lengths.cumsum(0), 0)
