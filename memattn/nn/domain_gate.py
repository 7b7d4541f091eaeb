"""The gate of specialists: weights of base and specialists for each token."""

import re
from collections.abc import Container
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.checks import (
    check_int,
    check_rank,
    check_shape,
    check_tensor,
    check_type,
    is_readable,
    must,
    plain_values,
)
from memattn.nn._running_sums import running_sum
from memattn.nn.gate_losses import check_labels, check_weights, domain_loss, entropy, sparsity
from memattn.nn.gate_row import GateRow, check_prior

SCOPES = ("token", "prefix", "sequence")
ACTIVATIONS = ("softmax", "sigmoid")
NAMES = ("prior", "mask", "override", "labels", "label_weights")
SUMS_TO_ONE = 1e-5  # tolerance for the sum of a token's weights


class GateState(NamedTuple):
    """State of a gate with scope ``"prefix"``: sums over the tokens of earlier calls."""

    total: Tensor  # [B, E], float64, the sum of their inputs
    tokens: Tensor  # [B], float64, number of tokens


class GateOutput(NamedTuple):
    """Gates of the base and of each specialist, and their losses."""

    gates: Tensor  # [B, T, 1 + N], float32 (float64 for float64 inputs); 0 for absent tokens
    losses: dict[str, tuple[Tensor, Tensor]]  # name -> (sum over tokens, number of tokens)
    state: GateState | None  # of scope "prefix"
    sums: Tensor | None = (
        None  # [B, T, E + 1], float64, totals and counts of states after each token
    )

    def means(self) -> Tensor:
        """The mean gates of each row over its present tokens, ``[B, 1 + N]``."""
        count = (self.gates.sum(-1) > 0.5).sum(1)  # the gates of a present token sum to 1
        return self.gates.sum(1) / count.clamp(min=1)[:, None]


class DomainGate(nn.Module):
    """Gates of a base and N specialists, for every token of a sequence.

    Each specialist has its own row, a small network that gives its logit ``a_e``; the base's logit
    is 0. So rows can be trained, frozen, saved and added one by one without changing the others.
    With priors ``prior_e`` and a temperature ``tau``:

    - softmax: ``softmax(a_e / tau + log prior_e)``;
    - sigmoid: ``s_e / sum s`` of ``s_e = prior_e sigmoid(a_e / tau)`` and ``s_0 = prior_0``.

    A specialist with prior 0 is **closed**: its gate is exactly 0, and the other gates are as if it
    did not exist. New specialists are closed until ``set_prior``. If no branch is left, the base
    gets 1.

    Logits are computed in float32, whatever the autocast.

    Args:
        hidden_size: Features of the input, E.
        num_specialists: Initial number of specialists, named ``specialist_0``, ``specialist_1``,
            ...
        scope: Input of a token's gates: ``"token"``, its own input; ``"prefix"``, the mean over all
            tokens up to it; ``"sequence"``, the mean over all tokens, for encoders.
        activation: ``"softmax"`` or ``"sigmoid"``.
        temperature: ``tau``.
        top_k: Largest number of specialists that a token uses, taken by the largest ``a_e / tau +
            log prior_e`` (ties: the first); None means all. The base is always used.
        gate_size: Hidden features of a row.

    Raises:
        TypeError: If an argument has the wrong Python type.
        ValueError: If a size, ``scope``, ``activation`` or ``temperature`` does not fit.

    Example:
        >>> gate = DomainGate(16, 2, top_k=1)
        >>> gate(torch.randn(4, 5, 16)).gates.shape
        torch.Size([4, 5, 3])

    Note:
        Source: Shiftable attention, https://github.com/computermaster0101/shiftable-attention-poc.
        Differs: no hidden layer is shared by specialists, the mean of a causal model ends at the
        token, padding is not pooled, and entropies are finite where a gate is 0.
    """

    place: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_specialists: int = 0,
        *,
        scope: str = "token",
        activation: str = "softmax",
        temperature: float = 1.0,
        top_k: int | None = None,
        gate_size: int = 64,
    ) -> None:
        super().__init__()
        check_int("hidden_size", hidden_size, 1)
        check_int("num_specialists", num_specialists, 0)
        check_int("gate_size", gate_size, 1)
        if top_k is not None:
            check_int("top_k", top_k, 1)
        if scope not in SCOPES:
            must("scope", f"be one of {', '.join(SCOPES)}", repr(scope))
        if activation not in ACTIVATIONS:
            must("activation", f"be one of {', '.join(ACTIVATIONS)}", repr(activation))
        if not 0.0 < temperature < float("inf"):
            must("temperature", "be positive and finite", temperature)
        self.hidden_size, self.gate_size = hidden_size, gate_size
        self.scope, self.activation = scope, activation
        self.temperature, self.top_k = temperature, top_k
        # names of arguments in error messages; callers with other names override them
        self.names = {name: name for name in NAMES}
        self.rows = nn.ModuleDict()
        # keeps dtype and device of a gate without rows
        self.register_buffer("place", torch.empty(0), persistent=False)
        for _ in range(num_specialists):
            self.add_specialist()

    def extra_repr(self) -> str:
        return f"scope={self.scope!r}, activation={self.activation!r}, top_k={self.top_k}"

    @property
    def specialists(self) -> tuple[str, ...]:
        """The names of the specialists, in the order of their gates."""
        return tuple(self.rows)

    @property
    def open_specialists(self) -> tuple[int, ...]:
        """Indices (0 to N - 1) of the specialists whose prior is above 0."""
        return tuple(e for e, row in enumerate(self._rows()) if row.is_open)

    def add_specialist(self, name: str | None = None, *, prior: float = 0.0) -> str:
        """Add a row, and return its name; None takes the first ``specialist_<n>`` that is free.

        Raises:
            TypeError: If ``name`` is no string.
            ValueError: If ``name`` is taken or has other characters than letters, digits, ``_`` and
                ``-``, or ``prior`` is negative or not finite.
        """
        if name is None:
            free = (f"specialist_{n}" for n in range(len(self.rows) + 1))
            name = next(x for x in free if x not in self.rows)
        check_new_name(name, self.rows)
        row = GateRow(self.hidden_size, self.gate_size, check_prior(prior))
        self.rows[name] = row.to(self.place.device)
        for parameter in row.parameters():
            parameter.data = parameter.data.to(self.place.dtype)
        row.train(self.training)
        return name

    def remove_specialist(self, name: str) -> None:
        """Drop a row.

        Raises:
            ValueError: If there is no such specialist.
        """
        self.row(name)
        del self.rows[name]

    def row(self, name: str) -> GateRow:
        """The row of one specialist.

        Raises:
            ValueError: If there is no such specialist.
        """
        if name not in self.rows:
            must("name", f"be a specialist: {', '.join(self.rows) or 'there is none'}", repr(name))
        row = self.rows[name]
        assert isinstance(row, GateRow)
        return row

    def set_prior(self, name: str, prior: float) -> None:
        """Set a specialist's prior: 0 closes it, 1 weighs as much as the base.

        Raises:
            ValueError: If there is no such specialist, or ``prior`` is negative or not finite.
        """
        with torch.no_grad():
            self.row(name).prior.fill_(check_prior(prior))

    def forward(
        self,
        x: Tensor,
        *,
        present: Tensor | None = None,
        index: Tensor | None = None,
        is_causal: bool = False,
        prior: Tensor | None = None,
        mask: Tensor | None = None,
        override: Tensor | None = None,
        labels: Tensor | None = None,
        label_weights: Tensor | None = None,
        state: GateState | None = None,
    ) -> GateOutput:
        """Gates of all tokens, and their losses.

        ``losses`` has three entries: ``"gate_entropy"``, ``-sum g log g``; ``"gate_sparsity"``,
            ``(1 - sum g^2) / 2``, which is 0 if one branch gets everything; and ``"gate_domain"``,
            ``-log g_0`` for tokens labelled 0 and ``-log sum_e g_e`` for tokens labelled 1. The
            losses and their gradients are finite even if gates are 0.

        Args:
            x: ``[B, T, E]``.
            present: bool ``[B, T]``, False for padding. Padding may have any values; its gates are
                0, and it is in no mean and no loss.
            index: int64 ``[B, T]``, index of each token in its sequence or packed document, for
                scope ``"prefix"``; None means one sequence in each row.
            is_causal: Whether no token may depend on a later one: scope ``"sequence"`` is refused.
            prior: ``[1 + N]`` or ``[B, 1 + N]``, at least 0: priors of base and specialists instead
                of 1 and the specialists' own.
            mask: bool ``[N]`` or ``[B, N]``, True where a specialist may be used.
            override: ``[B, 1 + N]`` or ``[B, T, 1 + N]``, at least 0: gates to use directly. The
                gates of a token must sum to 1 (checked on the CPU).
            labels: int64 ``[B, 1]`` or ``[B, T]``, domain of the text: 0 the base's, 1 the
                specialists', -1 unknown. Only the loss uses them; None means all unknown.
            label_weights: ``[B, 1]`` or ``[B, T]``, at least 0, weight of each label in the loss;
                None gives both labels the same total weight in the call.
            state: What an earlier call of scope ``"prefix"`` returned.

        Raises:
            TypeError: If an argument has the wrong Python type.
            ValueError: If a shape or value does not fit, or the scope looks ahead in a causal call.
        """
        check_tensor("x", x)
        check_rank("x", x, "B T E")
        B, T, _ = x.shape
        N = len(self.rows)
        check_shape("x", x, B=B, T=T, E=self.hidden_size)
        if is_causal and self.scope == "sequence":
            must("scope", "be token or prefix in a causal model", repr(self.scope))
        for name, tensor in (("present", present), ("index", index)):
            if tensor is not None:
                check_shape(name, tensor, B=B, T=T)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        if present is None:
            present = torch.ones(B, T, dtype=torch.bool, device=x.device)
        x = torch.where(present[..., None], x, 0.0)
        inputs, state, sums = self._inputs(x, present, index, state)
        if override is not None:
            name = self.names["override"]
            gates = _check_override(name, override, B, T, 1 + N).to(wide).expand(B, T, 1 + N)
            scores = None
        else:
            gates, scores = self._gates(inputs.to(wide), prior, mask)
            gates = gates.expand(B, T, 1 + N)
        if labels is not None:
            labels = check_labels(self.names["labels"], labels, B, T)
        if label_weights is not None:
            if labels is None:
                must(
                    self.names["label_weights"],
                    f"be None without {self.names['labels']}",
                    "a tensor",
                )
            label_weights = check_weights(self.names["label_weights"], label_weights, B, T)
        count = present.sum().to(wide)
        each = {
            "gate_entropy": entropy(gates, scores if self.activation == "softmax" else None),
            "gate_sparsity": sparsity(gates),
        }
        losses = {n: (torch.where(present, loss, 0.0).sum(), count) for n, loss in each.items()}
        losses["gate_domain"] = domain_loss(gates, present, labels, label_weights)
        return GateOutput(torch.where(present[..., None], gates, 0.0), losses, state, sums)

    def _rows(self) -> list[GateRow]:
        return [row for row in self.rows.values() if isinstance(row, GateRow)]

    def _inputs(
        self, x: Tensor, present: Tensor, index: Tensor | None, state: GateState | None
    ) -> tuple[Tensor, GateState | None, Tensor | None]:
        """Input of the rows, ``[B, T or 1, E]``; 0 for absent tokens."""
        if self.scope == "token":
            return x, None, None
        counted = torch.cat([x.double(), present[..., None].double()], -1)  # and a column of ones
        if self.scope == "sequence":
            if index is not None:
                must("index", "be None with scope sequence", "a tensor")
            sums = counted.sum(1, keepdim=True)
        else:
            B, T = present.shape
            if index is None:
                index = torch.arange(T, device=x.device).expand(B, T)
            sums = running_sum(counted, index)
            if state is not None:
                check_shape("state.total", state.total, B=B, E=x.shape[-1])
                sums = sums + torch.cat([state.total, state.tokens[:, None]], -1)[:, None]
            if T:
                state = GateState(sums[:, -1, :-1], sums[:, -1, -1])
        mean = sums[..., :-1] / sums[..., -1:].clamp(min=1.0)
        if self.scope == "sequence":
            return mean.to(x.dtype), None, None
        return mean.to(x.dtype), state, sums

    def _gates(self, x: Tensor, prior: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gates ``[B, T, 1 + N]``, and the scores under their softmax."""
        B, N = x.shape[0], len(self.rows)
        rows = self._rows()
        used = [prior is not None or row.is_open for row in rows]
        device = x.device.type
        can_autocast = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if can_autocast else nullcontext():
            # a closed specialist's logit is not used
            zero = x.new_zeros(x.shape[:2])
            logits = [row(x) if use else zero for row, use in zip(rows, used, strict=True)]
            logits = torch.stack([zero, *logits], -1) / self.temperature
        if prior is None:
            prior = torch.stack([x.new_ones(()), *(row.prior.to(x) for row in rows)])
        else:
            prior = _check_row(self.names["prior"], prior, B, 1 + N).detach().to(x)
            if is_readable(prior) and not bool((prior >= 0).all()):
                must(self.names["prior"], "be at least 0", plain_values(prior))
        prior = prior.expand(B, 1 + N)[:, None]
        if mask is not None:
            allowed = _check_row(self.names["mask"], mask, B, N).bool().expand(B, N)
            allowed = F.pad(allowed, (1, 0), value=True)
            prior = torch.where(allowed[:, None], prior, 0.0)
        scores = logits + prior.log()
        if self.top_k is not None and self.top_k < N:
            order = scores[..., 1:].detach().sort(dim=-1, descending=True, stable=True).indices
            keep = torch.zeros_like(scores, dtype=torch.bool)
            keep = keep.scatter(-1, order[..., : self.top_k] + 1, True)
            keep[..., 0] = True
            scores = scores.masked_fill(~keep, -torch.inf)
        if self.activation == "sigmoid":
            shares = torch.where(scores.isneginf(), 0.0, logits.sigmoid() * prior)
            shares = torch.cat([prior[..., :1].expand_as(shares[..., :1]), shares[..., 1:]], -1)
            total = shares.sum(-1, keepdim=True)
            alone = F.one_hot(torch.zeros_like(total[..., 0], dtype=torch.long), 1 + N).to(total)
            return torch.where(
                total > 0, shares / torch.where(total > 0, total, 1.0), alone
            ), scores
        nothing = scores.isneginf().all(-1, keepdim=True)
        base = torch.where(nothing, 0.0, scores[..., :1])
        scores = torch.cat([base, scores[..., 1:]], -1)
        return scores.softmax(-1), scores


def check_new_name(name: str, taken: Container[str]) -> None:
    """Raise unless ``name`` is a string that can name a new specialist."""
    check_type("name", name, str, "be a string")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict, name):
        must("name", "be letters, digits, _ and -, and no method of a dict", repr(name))
    if name in taken:
        must("name", "be a new one", repr(name))


def _check_row(name: str, tensor: Tensor, B: int, n: int) -> Tensor:
    """A tensor ``[n]`` or ``[B, n]``."""
    check_tensor(name, tensor)
    if list(tensor.shape) not in ([n], [B, n]):
        must(name, f"have shape [{n}] or [B={B}, {n}]", list(tensor.shape))
    return tensor


def _check_override(name: str, override: Tensor, B: int, T: int, n: int) -> Tensor:
    """Check gates ``[B, 1 or T, n]`` given as ``override``."""
    check_tensor(name, override)
    if list(override.shape) not in ([B, n], [B, T, n]):
        must(name, f"have shape [B={B}, {n}] or [B={B}, T={T}, {n}]", list(override.shape))
    if is_readable(override) and override.numel():
        off = (override.detach().double().sum(-1) - 1).abs().max().item()
        if not off <= SUMS_TO_ONE or bool((override < 0).any()):
            must(name, "be at least 0 and sum to 1 for each token", f"sums off by {off:.3g}")
    return override if override.dim() == 3 else override[:, None]
