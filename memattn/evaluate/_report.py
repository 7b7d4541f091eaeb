"""The report of an audit: one row for each comparison."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class AuditRow:
    """One comparison of two runs of a model.

    Args:
        check: The property, such as ``"batch coupling"``.
        case: What was changed or how the sequence was cut.
        dtype: The dtype that the model ran in, such as ``"float64"``.
        value: The largest difference that was seen: absolute where the bound is 0, relative to the
            largest logit otherwise. None where the check does not apply.
        bound: The largest difference that passes.
        where: The first offending position and module; the reason where it does not apply.
    """

    check: str
    case: str
    dtype: str
    value: float | None
    bound: float
    where: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether the difference is within the bound; None where the check does not apply."""
        # NaN is within no bound
        return None if self.value is None else self.value <= self.bound


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """All rows of an audit, and notes about their limits.

    Args:
        model: Class of the model.
        rows: One row for each comparison.
        notes: What a reader must know to judge the rows.
    """

    model: str
    rows: tuple[AuditRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no check failed. A check that does not apply is not a failure."""
        return all(row.passed is not False for row in self.rows)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the failed checks, in order, each once."""
        return tuple(dict.fromkeys(row.check for row in self.rows if row.passed is False))

    @property
    def verdict(self) -> str:
        """``"all 0"`` or ``"failed: <checks>"``, for a cell of a table.

        ``"all 0"`` says that every exact check gave exactly 0.0 and every other one is in bound;
        checks that did not apply are named after it.
        """
        if not self.passed:
            return f"failed: {', '.join(self.failed)}"
        lacking = dict.fromkeys(row.check for row in self.rows if row.passed is None)
        return "all 0" + f" (not applicable: {', '.join(lacking)})" * bool(lacking)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values that JSON can hold."""
        rows = []
        for row in self.rows:
            value = row.value
            if value is not None and not math.isfinite(value):
                value = str(value)  # JSON has no infinity
            rows.append({**asdict(row), "value": value, "passed": row.passed})
        return {
            "model": self.model,
            "passed": self.passed,
            "verdict": self.verdict,
            "rows": rows,
            "notes": list(self.notes),
        }

    def print(self, console: Console | None = None) -> None:
        """Print the report as a table."""
        table = Table(title=f"audit of {self.model}", title_justify="left")
        for name in ("check", "case", "dtype"):
            table.add_column(name)
        for name in ("difference", "bound"):
            table.add_column(name, justify="right")
        table.add_column("result")
        table.add_column("where", overflow="fold")
        results = {True: "[green]pass[/]", False: "[red]FAIL[/]", None: "[dim]not applicable[/]"}
        for row in self.rows:
            value = "" if row.value is None else _number(row.value)
            table.add_row(
                *(row.check, row.case, row.dtype, value, _number(row.bound)),
                *(results[row.passed], row.where),
            )
        console = console or Console()
        console.print(table)
        for note in self.notes:
            console.print(f"note: {note}", style="dim", highlight=False)
        style = "green" if self.passed else "bold red"
        console.print(f"audit: {self.verdict}", style=style, highlight=False)


def _number(value: float) -> str:
    """0 only where it is exactly 0."""
    return "0" if value == 0.0 else f"{value:.1e}"
