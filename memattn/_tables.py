"""Mean and spread over seeds; tables for the terminal and Markdown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table as RichTable

# 97.5 % points of Student's t with 1, 2, ... degrees of freedom
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation (None for one value) and number of some values."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, len(values))

    def text(self, form: str) -> str:
        """``mean ± standard deviation``, each in this format; a sign is for the mean alone."""
        text = f"{self.mean:{form}}"
        return text if self.sd is None else f"{text} ± {self.sd:{form.removeprefix('+')}}"

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % t interval of the mean; None for one value.

        For more than ten values the quantile for ten is used, so the interval is slightly too wide.
        """
        if self.sd is None:
            return None
        half = _T[min(self.n - 1, len(_T)) - 1] * self.sd / math.sqrt(self.n)
        return self.mean - half, self.mean + half


class Table(NamedTuple):
    """Cells as text."""

    title: str
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def to_markdown(self) -> str:
        """The table as Markdown, under its title."""
        head, *rows = (f"| {' | '.join(cells)} |" for cells in (self.heads, *self.rows))
        rule = "|" + "|".join("---" if i == 0 else "---:" for i in range(len(self.heads))) + "|"
        return "\n".join([f"**{self.title}**", "", head, rule, *rows]) + "\n"

    @classmethod
    def of_markdown(cls, text: str) -> "Table":
        """Read the first table of a text that ``to_markdown`` wrote."""
        lines = text.splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("| "))
        rows = []
        for line in lines[start:]:
            if not line.startswith("|"):
                break
            rows.append(tuple(line.removeprefix("| ").removesuffix(" |").split(" | ")))
        return cls(lines[start - 2].strip("*"), rows[0], rows[2:])

    def to_rich(self) -> "RichTable":
        """The table for a terminal."""
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, title_justify="left")
        for i, head in enumerate(self.heads):
            table.add_column(head, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        return table
