"""A gate and its specialists: add, remove, train, export or import a specialist."""

from collections.abc import Iterator, Mapping
from typing import cast

from torch import Tensor, nn

from memattn.checks import check_int, check_tensor, is_readable, must, plain_values
from memattn.nn.attention_specialist import AttentionSpecialist, AttentionWeights
from memattn.nn.domain_gate import DomainGate


class SpecialistHolder(nn.Module):
    """Base class of attentions with specialists; each specialist has a row in the gate.

    Args:
        hidden_size: Features of the input.
        gate: A gate for ``hidden_size`` features without specialists.
        rank: Rank of new specialists' change of the base's weights; None: full weights.
        backend: Backend of ``branch_attention``.

    Raises:
        TypeError: If ``rank`` is no integer.
        ValueError: If it is below 1, or the gate does not fit.
    """

    def __init__(self, hidden_size: int, gate: DomainGate, rank: int | None, backend: str) -> None:
        super().__init__()
        if rank is not None:
            check_int("rank", rank, 1)
        if gate.hidden_size != hidden_size or gate.specialists:
            got = f"hidden_size={gate.hidden_size} and {len(gate.specialists)} specialists"
            must("gate", f"have hidden_size={hidden_size} and no specialists yet", got)
        self.gate = gate
        gate.names = dict(
            prior="domain_prior",
            mask="domain_mask",
            override="domain_weights",
            labels="domain_labels",
            label_weights="domain_label_weights",
        )
        self.rank, self.backend = rank, backend
        self.specialists = nn.ModuleDict()

    def add_copy(
        self, base: AttentionWeights, name: str | None = None, *, prior: float = 0.0
    ) -> str:
        """Add a copy of an attention, closed unless it has a ``prior``, and return its name.

        Raises:
            ValueError: If ``name`` is taken or no name, or ``prior`` is negative or not finite.
        """
        name = self.gate.add_specialist(name, prior=prior)
        specialist = AttentionSpecialist(base, self.rank)
        self.specialists[name] = specialist.train(self.training)
        return name

    def remove_specialist(self, name: str) -> None:
        """Remove a specialist and its row of the gate.

        Raises:
            ValueError: If there is no such specialist.
        """
        self.gate.remove_specialist(name)
        del self.specialists[name]

    def specialist_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Parameters of one specialist, including its row of the gate: to train or freeze it.

        Raises:
            ValueError: If there is no such specialist.
        """
        return self._owned_by(name).parameters()

    def export_specialist_state(self, name: str) -> dict[str, Tensor]:
        """Tensors of one specialist by name, including its row of the gate and its prior.

        Raises:
            ValueError: If there is no such specialist.
        """
        owned = self._owned_by(name).state_dict()
        return {key: tensor.detach().clone() for key, tensor in owned.items()}

    def load_specialist_state(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Load the result of ``export_specialist_state`` into a specialist.

        Raises:
            ValueError: If there is no such specialist, or ``state`` belongs to another model.
        """
        self.check_specialist_state(name, state)
        self._owned_by(name).load_state_dict(dict(state))

    def check_specialist_state(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless ``load_specialist_state`` can load ``state``."""
        expected, given = (
            {key: list(tensor.shape) for key, tensor in tensors.items()}
            for tensors in (self._owned_by(name).state_dict(), state)
        )
        for key in expected | given:
            if expected.get(key) != given.get(key):
                want, got = expected.get(key, "nothing"), given.get(key, "nothing")
                must("state", f"be of this model, with {want} as {key}", got)

    def _owned_by(self, name: str) -> nn.ModuleDict:
        return nn.ModuleDict({"gate": self.gate.row(name), "attention": self.specialists[name]})

    def specialist(self, name: str) -> AttentionSpecialist:
        """The projections of one specialist.

        Raises:
            ValueError: If there is no such specialist.
        """
        self.gate.row(name)
        return cast(AttentionSpecialist, self.specialists[name])

    @property
    def rests(self) -> bool:
        """Whether a call may skip some specialists, whose weights then get no gradient."""
        n = len(self.specialists)
        return len(self.gate.open_specialists) < n or (self.gate.top_k or n) < n

    def used_specialists(self, prior: Tensor | None, weights: Tensor | None) -> list[int]:
        """Indices of the specialists that a call with this prior or these weights may use."""
        given = prior if weights is None else weights
        if given is None:
            return list(self.gate.open_specialists)
        N = len(self.specialists)
        check_tensor("domain_prior" if weights is None else "domain_weights", given)
        if not is_readable(given) or list(given.shape[-1:]) != [1 + N]:
            return list(range(N))
        return plain_values((given[..., 1:] != 0).reshape(-1, N).any(0).nonzero()[:, 0])

    def most_slots(self, weights: Tensor | None) -> int | None:
        """Largest number of specialists that a token uses with these weights; None if unknown."""
        if weights is None:
            return self.gate.top_k
        count = (weights[..., 1:] != 0).sum(-1)
        return int(count.max()) if is_readable(count) and count.numel() else None
