"""Several parts in one model: their names, and checks that they fit together."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from memattn.checks import must
from memattn.parts.base import PLACES, PartConfig, Role, Sizes


def check_together(parts: Sequence[PartConfig], sizes: Sizes) -> None:
    """Raise ValueError unless the parts fit a model and each other."""
    coefficients: dict[str, float] = {}
    for part in parts:
        others = [other for other in parts if other is not part]
        number = sum(other.kind == part.kind for other in parts)
        if number > 1 and not part.repeatable:
            must("parts", f"have {part.kind} at most once", f"it {number} times")
        if part.resolved_place not in PLACES:
            place = repr(part.resolved_place)
            must(f"{part.path}.resolved_place", f"be one of {', '.join(PLACES)}", place)
        if (part.resolved_place == "attention") != (part.place == "attention"):
            side = "be" if part.place == "attention" else "not be"
            must(f"{part.path}.resolved_place", f"{side} attention", repr(part.resolved_place))
        part.check(sizes, others)
        for name, coefficient in part.losses.items():
            if coefficients.setdefault(name, coefficient) != coefficient:
                must(f"{part.path}.{name}", f"count {coefficients[name]}", coefficient)


def name_parts(parts: Sequence[PartConfig]) -> dict[str, PartConfig]:
    """Parts by the names of their modules and states."""
    named: dict[str, PartConfig] = {}
    for part in parts:
        kind = "attention" if part.place == "attention" else part.kind
        twins = sum(name.partition("-")[0] == kind for name in named)
        named[kind if not twins else f"{kind}-{twins + 1}"] = part
    return named


def parts_of_layer(
    named: Mapping[str, PartConfig], layer: int, sizes: Sizes
) -> dict[str, PartConfig]:
    """The parts in one layer, by name."""
    found = {name: part.in_layer(layer, sizes) for name, part in named.items()}
    return {name: part for name, part in found.items() if part is not None}


def build_shared_parts(named: Mapping[str, PartConfig], sizes: Sizes) -> dict[str, nn.Module]:
    """The modules that layers of a part share, by the part's name."""
    found = {name: part.build_shared(sizes) for name, part in named.items()}
    return {name: shared for name, shared in found.items() if shared is not None}


def chapter_layout(named: Mapping[str, PartConfig], sizes: Sizes) -> dict[str, int]:
    """Features that parts keep per token of a text; see ``memattn.parts.chapters``."""
    return {
        f"layers.{layer}.{name}.{tensor}": features
        for layer in range(sizes.num_layers)
        for name, part in parts_of_layer(named, layer, sizes).items()
        for tensor, features in part.chapter_layout(sizes).items()
    }


def losses_of(named: Mapping[str, PartConfig]) -> dict[str, float]:
    """Losses that parts add to the cross-entropy, with their coefficients."""
    return {name: value for part in named.values() for name, value in part.losses.items()}


def check_inputs(
    named: Mapping[str, PartConfig], inputs: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """Extra inputs from the caller that are not None; TypeError for one that no part takes."""
    known = {name for part in named.values() for name in part.inputs}
    for name, value in inputs.items():
        if name not in known:
            takes = f"be an argument of forward or of a part: {', '.join(sorted(known)) or 'none'}"
            must(name, takes, type(value).__name__, TypeError)
    return {name: value for name, value in inputs.items() if value is not None}


def for_all_samples(parts: Iterable[PartConfig], arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names of extra inputs that are for all samples: those of one dimension."""
    known = {name for part in parts for name in part.inputs}
    return {
        name: value
        for name, value in arguments.items()
        if name in known and isinstance(value, Tensor) and value.dim() == 1
    }


def roles_of(placed: Iterable[tuple[str, PartConfig, nn.Module]]) -> dict[str, Role]:
    """Roles of the parameters for which parts define one, by name.

    ``placed`` has the prefix of the names, the part and its module.
    """
    return {
        prefix + name: role
        for prefix, part, module in placed
        for name, parameter in module.named_parameters()
        if (role := part.role(name, parameter)) is not None
    }
