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
    inputs = [*(f"d_{name}" for name in wanted), *saved_names, *types]

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

    def arguments_of(named: Named) -> Any:
        return arguments(**{name: named[name] for name in types})

    @torch.library.register_fake(operator)
    def _(*values: Any) -> tuple[Tensor, ...]:
        return empty_results(arguments(*values))

    @torch.library.register_fake(f"{operator}_backward")
    def _(*values: Any) -> tuple[Tensor, ...]:
        return empty_gradients(arguments_of(dict(zip(inputs, values, strict=True))))

    if forward is not None and backward is not None:

        @torch.library.impl(operator, "default")
        def _(*values: Any) -> tuple[Tensor, ...]:
            args = arguments(*values)
            outputs = empty_results(args)
            forward(args, dict(zip(result_names, outputs, strict=True)))
            return outputs

        @torch.library.impl(f"{operator}_backward", "default")
        def _(*values: Any) -> tuple[Tensor, ...]:
            named = dict(zip(inputs, values, strict=True))
            args = arguments_of(named)
            grads = empty_gradients(args)
            backward(
                args,
                {name: named[f"d_{name}"] for name in wanted},
                {name: named[name] for name in saved_names},
                dict(zip(gradient_names, grads, strict=True)),
            )
            return grads

    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        args = dict(zip(types, inputs, strict=True))
        outputs = dict(zip(result_names, output, strict=True))
        ctx.save_for_backward(*map(outputs.get, saved_names), *map(args.get, tensors))
        ctx.options = {name: args[name] for name in types if name not in tensors}
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # read once: non-reentrant checkpointing frees what it handed out
        kept = dict(zip([*saved_names, *tensors], ctx.saved_tensors, strict=True))
        args = arguments_of(kept | ctx.options)
        given = dict(zip(result_names, grads, strict=True))
        missing = [n for n, optional in wanted.items() if given[n] is None and not optional]
        if missing:
            zeros = dict(zip(result_names, empty_results(args), strict=True))
            given |= {name: zeros[name].zero_() for name in missing}
        found = call_backward(
            *(given[name] for name in wanted), *(kept[name] for name in saved_names), *args
        )
        by_name = dict(zip(gradient_names, found, strict=True))
        return tuple(None if getattr(args, n) is None else by_name.get(n) for n in types)

    torch.library.register_autograd(operator, differentiate, setup_context=setup_context)
    torch.library.register_autograd(f"{operator}_backward", refuse_second_derivative)
    return call


def refuse_second_derivative(ctx: Any, *grads: Tensor) -> None:
    """What is registered as the gradient of a backward operator."""
    raise RuntimeError(
        "memattn's kernels are differentiable once; backend='reference' is as often as you like"
    )
