"""Check results against the definition in float64, before anything is timed."""

import torch
from torch import Tensor

from memattn.bench.case import Case, Forward
from memattn.testing import assert_within_budget

ROWS = 32  # rows in one slice of a long case
SMALL_T = 160  # up to this length, every row is checked


class WrongResultError(RuntimeError):
    """A result differs from the definition, so its time is not reported."""


def leaves_of(inputs: dict[str, Tensor], *, gradients: bool) -> dict[str, Tensor]:
    """The inputs detached; floating-point ones require gradients if ``gradients``."""
    return {
        name: tensor.detach().requires_grad_(gradients and tensor.is_floating_point())
        for name, tensor in inputs.items()
    }


class ExpectedResults:
    """Output rows, and gradients if ``gradients``, that the definition gives for a case.

    A short case has all rows. A long case has some slices of rows, and a cotangent that is zero
    in all other rows, so that the definition never computes the whole T x T scores.
    """

    def __init__(self, case: Case, *, gradients: bool) -> None:
        self.case, self.gradients = case, gradients
        self.rows = sampled_rows(case.T, case.seed)
        inputs = case.inputs()
        self.low = self._definition(inputs)
        self.high = self._definition(
            {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        )

    def results_of(self, forward: Forward, *, gradients: bool) -> dict[str, Tensor]:
        """The same results computed by another function."""

        def rows(leaves: dict[str, Tensor]) -> Tensor:
            out = forward(leaves)
            return torch.cat([out[:, :, part] for part in self.rows], 2)

        return _results(rows, self.case.inputs(), gradients, seed=0, slices=self.rows)

    def _definition(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        # slice by slice: the autograd graphs of all slices at once would not fit in memory
        total: dict[str, Tensor] = {}
        for seed, part in enumerate(self.rows):
            results = _results(
                self.case.definition(part), inputs, self.gradients, seed=seed, slices=[part]
            )
            outs = [total.pop("out"), results["out"]] if total else [results["out"]]
            for name in results:
                if name in total:
                    results[name] += total[name]
            total = results | {"out": torch.cat(outs, 2)}
        return total


def check_subject(case: Case, backend: str, *, gradients: bool) -> None:
    """Raise WrongResultError unless our operator keeps the error budget of the tests.

    It is checked on all rows at a small length. Unless ``case.is_checked_short()``, it is then
    checked on sampled rows at the case's own length.

    Args:
        case: The case to check.
        backend: Backend of our operator.
        gradients: Whether to check the gradients too.
    """
    small = case.resized(min(case.T, SMALL_T))
    for part in (small,) if small == case or case.is_checked_short() else (small, case):
        told = gradients and (part == small or part.rows_are_independent())
        expected = ExpectedResults(part, gradients=told)
        actual = expected.results_of(part.checked(backend), gradients=told)
        for name, high in expected.high.items():
            where = f"{case.operator}, {part.label()}: {name}"
            try:
                assert_within_budget(where, actual[name], expected.low[name], high)
            except AssertionError as error:
                raise WrongResultError(str(error)) from error


def check_peer(expected: ExpectedResults, forward: Forward, *, gradients: bool) -> None:
    """Raise WrongResultError unless a peer computes the same function, up to its own rounding.

    Peers may approximate exponentials, so the bound is loose: it detects a wrong mask, not a loss
    of precision.
    """
    loose = 1e-4 if expected.case.dtype == torch.float32 else 2e-2
    gradients = gradients and expected.gradients
    for name, result in expected.results_of(forward, gradients=gradients).items():
        high = expected.high[name]
        error, rounding = (
            (x.double() - high).abs().max().item() for x in (result, expected.low[name])
        )
        bound = max(loose * high.abs().max().item(), 8 * rounding)
        if not error <= bound:  # NaN fails
            raise WrongResultError(f"error of {name} is {error:.1e}, over {bound:.1e}")


def sampled_rows(T: int, seed: int) -> list[slice]:
    """All rows of a short case; else the first rows, the last rows and a slice between."""
    if T <= SMALL_T:
        return [slice(0, T)]
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randint(ROWS, T - 2 * ROWS + 1, (1,), generator=generator).tolist()
    starts = [0]
    for start in [*middle, T - ROWS]:
        if start >= starts[-1] + ROWS:
            starts.append(start)
    return [slice(start, start + ROWS) for start in starts]


def _results(
    forward: Forward, inputs: dict[str, Tensor], gradients: bool, *, seed: int, slices: list[slice]
) -> dict[str, Tensor]:
    """Output and gradients; the cotangent of a slice depends on its number only."""
    leaves = leaves_of(inputs, gradients=gradients)
    with torch.set_grad_enabled(gradients):
        out = forward(leaves)
    results = {"out": out.detach()}
    if gradients:
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        parts = []
        for number, part in enumerate(slices, seed):
            generator = torch.Generator().manual_seed(number)
            shape = (*out.shape[:2], part.stop - part.start, out.shape[3])
            parts.append(torch.randn(shape, generator=generator))
        # exact in every dtype
        d_out = torch.cat(parts, 2).to(torch.bfloat16).to(out)
        # an input that the case does not use has gradient 0
        grads = torch.autograd.grad(out, list(wanted.values()), d_out, materialize_grads=True)
        results |= {f"d_{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return results
