"""Watch which sublayers of a model's layers are few calls of operators."""

from collections.abc import Callable
from typing import Any

import pytest

from memattn.models import block


def spy_on(
    monkeypatch: pytest.MonkeyPatch, *names: str, counts: Callable[..., bool] = lambda *_: True
) -> list[bool]:
    """Whether each call of these functions of ``block`` that ``counts`` gave a result.

    Args:
        monkeypatch: The fixture.
        names: The functions.
        counts: Which calls are looked at, by their arguments.
    """
    found: list[bool] = []

    def spy(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            result = function(*args)
            if counts(*args):
                found.append(result is not None)
            return result

        return call

    for name in names:
        monkeypatch.setattr(block, name, spy(getattr(block, name)))
    return found
