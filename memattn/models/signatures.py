"""Signatures of methods that add arguments to another method, as ``generate()`` reads them."""

import inspect
from collections.abc import Callable
from typing import Any


def add_arguments(method: Callable[..., Any], like: Callable[..., Any], *names: str) -> None:
    """Give a method the signature of another, and keyword arguments that are None by default."""
    signature = inspect.signature(like)
    known = list(signature.parameters.values())
    rest = [p for p in known if p.kind is inspect.Parameter.VAR_KEYWORD]
    added = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in names]
    parameters = [*(p for p in known if p not in rest), *added, *rest]
    method.__signature__ = signature.replace(  # pyright: ignore[reportFunctionMemberAccess]
        parameters=parameters
    )
