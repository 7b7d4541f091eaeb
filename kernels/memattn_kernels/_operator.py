"""How an operator of a compiled backend is registered with PyTorch: the same for Triton and C++.

An operator has a tuple of arguments (``signatures``), named results and a backward. From these
follow the schemas, what is saved, what fake tensors give, and that gradients are differentiable
once. Only torch is needed.
"""

from collections.abc import Callable
from types import NoneType
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

SCHEMA_TYPES = {Tensor: "Tensor", int: "SymInt", float: "float", bool: "bool", str: "str"}
Named = dict[str, Any]


def _types(arguments: type) -> dict[str, tuple[type, bool]]:
    """The type of each argument, and whether it may be None."""
    types = {}
    for name, hint in get_type_hints(arguments).items():
        kinds = [kind for kind in get_args(hint) or (hint,) if kind is not NoneType]
        types[name] = kinds[0], NoneType in get_args(hint)
    return types


def schema_of(arguments: type) -> str:
    """The arguments of a signature as text, such as ``Tensor query, SymInt? window_size``."""
    return ", ".join(
        f"{SCHEMA_TYPES[kind]}{'?' * optional} {name}"
        for name, (kind, optional) in _types(arguments).items()
    )


def register(
    operator: str,
    arguments: Any,
    *,
    results: str,
    cotangents: str,
    saved: str,
    empty_results: Callable[[Any], tuple[Tensor, ...]],
    empty_gradient: Callable[[str, Tensor], Tensor],
    forward: Callable[[Any, Named], None] | None = None,
    backward: Callable[[Any, Named, Named, Named], None] | None = None,
) -> Callable[..., tuple[Tensor, ...]]:
    """Define ``operator`` and ``operator_backward``, and make the first differentiable once.

    Args:
        operator: Name with its namespace, such as ``"memattn_cpp::segmented_attention"``.
        arguments: The signature, a NamedTuple. One of its ``gradients`` that is not given has a
            gradient of size 0.
        results: Names of the results.
        cotangents: Results whose gradients the backward takes; with a ``?`` it also takes None.
        saved: Results that the backward reads.
        empty_results: Uninitialised results for these arguments.
        empty_gradient: Uninitialised gradient of an argument, by its name and value.
        forward: ``forward(args, results)`` fills the results. None where C++ has the kernels.
        backward: ``backward(args, cotangents, saved, gradients)`` fills the gradients.

    Returns:
        The operator.
    """
    types = _types(arguments)
    tensors = [name for name, (kind, _) in types.items() if kind is Tensor]
    result_names, saved_names = results.split(), saved.split()
    gradient_names = arguments.gradients.split()
    wanted = {name.rstrip("?"): name.endswith("?") for name in cotangents.split()}

    def define(name: str, schema: str, n_results: int) -> None:
        returned = ", ".join(["Tensor"] * n_results)
        tags = torch.Tag.pt2_compliant_tag
        torch.library.define(name, f"({schema}) -> ({returned})", tags=tags)

    first = [f"Tensor{'?' * optional} d_{name}" for name, optional in wanted.items()]
    first += [f"Tensor {name}" for name in saved_names]
    schema = schema_of(arguments)
    define(operator, schema, len(result_names))
    define(f"{operator}_backward", ", ".join([*first, schema]), len(gradient_names))
    namespace, name = operator.split("::")
    call = getattr(getattr(torch.ops, namespace), name).default
    call_backward = getattr(getattr(torch.ops, namespace), f"{name}_backward").default

    def empty_gradients(args: Any) -> tuple[Tensor, ...]:
        given = ((name, getattr(args, name)) for name in gradient_names)
        return tuple(
            args[0].new_empty(0) if tensor is None else empty_gradient(name, tensor)
            for name, tensor in given
        )

    n_wanted, n_saved = len(wanted), len(saved_names)
    n_first = n_wanted + n_saved
    names = list(types)
    tensor_places = [names.index(name) for name in tensors]
    saved_places = [result_names.index(name) for name in saved_names]
    wanted_places = [result_names.index(name) for name in wanted]
    needed = [name for name, optional in wanted.items() if not optional]
    gradient_places = [names.index(name) for name in gradient_names]

    @torch.library.register_fake(operator)
    def _(*values: Any) -> tuple[Tensor, ...] | Tensor:
        made = empty_results(arguments(*values))
        return made if len(made) > 1 else made[0]  # as the schema of one result says

    @torch.library.register_fake(f"{operator}_backward")
    def _(*values: Any) -> tuple[Tensor, ...]:
        return empty_gradients(arguments(*values[n_first:]))

    def compute(values: tuple[Any, ...]) -> tuple[Tensor, ...]:
        assert forward is not None
        args = arguments(*values)
        outputs = empty_results(args)
        forward(args, dict(zip(result_names, outputs, strict=True)))
        return outputs

    def compute_backward(values: tuple[Any, ...]) -> tuple[Tensor, ...]:
        assert backward is not None
        args = arguments(*values[n_first:])
        grads = empty_gradients(args)
        backward(
            args,
            dict(zip(wanted, values[:n_wanted], strict=True)),
            dict(zip(saved_names, values[n_wanted:n_first], strict=True)),
            dict(zip(gradient_names, grads, strict=True)),
        )
        return grads

    if forward is not None and backward is not None:
        torch.library.impl(operator, "default", lambda *values: compute(values))
        torch.library.impl(
            f"{operator}_backward", "default", lambda *values: compute_backward(values)
        )

    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        kept = [output[place] for place in saved_places]
        ctx.save_for_backward(*kept, *(inputs[place] for place in tensor_places))
        options = list(inputs)
        for place in tensor_places:
            options[place] = None
        ctx.options = options
        ctx.set_materialize_grads(False)

    def differentiate_by(
        backward_of: Callable[..., tuple[Tensor, ...]], ctx: Any, grads: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        # read once: non-reentrant checkpointing frees what it handed out
        kept = ctx.saved_tensors
        values = list(ctx.options)
        for place, tensor in zip(tensor_places, kept[n_saved:], strict=True):
            values[place] = tensor
        given = [grads[place] for place in wanted_places]
        if needed and any(given[list(wanted).index(name)] is None for name in needed):
            zeros = dict(zip(result_names, empty_results(arguments(*values)), strict=True))
            given = [
                zeros[name].zero_() if grad is None and name in needed else grad
                for name, grad in zip(wanted, given, strict=True)
            ]
        found = backward_of(*given, *kept[:n_saved], *values)
        by_place: list[Tensor | None] = [None] * len(values)
        for place, grad in zip(gradient_places, found, strict=True):
            by_place[place] = None if values[place] is None else grad
        return tuple(by_place)

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return differentiate_by(call_backward, ctx, grads)

    torch.library.register_autograd(operator, differentiate, setup_context=setup_context)
    torch.library.register_autograd(f"{operator}_backward", refuse_second_derivative)
    if forward is None:
        return call
    from memattn_kernels import recording

    n_names = len(names)
    recorded = recording.Recorded(compute, tensor_places, n_names)
    later_places = [*range(n_first), *(n_first + place for place in tensor_places)]
    recorded_backward = recording.Recorded(compute_backward, later_places, n_first + n_names)

    class Direct(torch.autograd.Function):
        """The operator past the dispatcher."""

        @staticmethod
        def forward(*values: Any) -> tuple[Tensor, ...]:
            return recorded(values, call)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
            setup_context(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            if torch.is_grad_enabled() or not recording.is_plain():
                return differentiate(ctx, *grads)
            return differentiate_by(
                lambda *values: recorded_backward(values, call_backward), ctx, grads
            )

    def direct(*values: Any) -> tuple[Tensor, ...]:
        if not recording.is_on() or not recording.is_plain():
            return call(*values)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*values):
            return Direct.apply(*values)
        return recorded(values, call)

    return direct


def refuse_second_derivative(ctx: Any, *grads: Tensor) -> None:
    """What is registered as the gradient of a backward operator."""
    raise RuntimeError(
        "memattn's kernels are differentiable once; backend='reference' is as often as you like"
    )
