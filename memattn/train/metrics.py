"""Metrics of a run: ``metrics.csv``, and TensorBoard if it is installed."""

import csv
import importlib.util
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from memattn.files import write_text

COLUMNS = (
    *("step", "tokens", "loss", "lm_loss", "eval_loss"),
    *("learning_rate", "grad_norm", "tokens_per_second", "seconds"),
)


def columns_of(losses: Iterable[str]) -> list[str]:
    """``COLUMNS``, and the columns of a model's losses besides the cross-entropy."""
    names = list(losses)
    at = COLUMNS.index("eval_loss")
    held_out = [f"eval_{name}" for name in names]
    return [*COLUMNS[:at], *names, "eval_loss", *held_out, *COLUMNS[at + 1 :]]


class MetricsLog:
    """Appends rows, each flushed at once; removes later rows when a run is resumed.

    Args:
        folder: Folder of the run.
        step: Step that the run continues from; rows after it, and an incomplete last row, are
            removed.
        active: False in all processes except the first; they write nothing.
        losses: Names of the model's losses besides the cross-entropy.
    """

    def __init__(self, folder: Path, *, step: int, active: bool, losses: Iterable[str] = ()):
        self._file = self._board = None
        if not active:
            return
        path = folder / "metrics.csv"
        before = read_metrics(path) if path.exists() else []
        rows = [row for row in before if row["step"] <= step]
        # an earlier version wrote the same columns for every model
        self._columns = list(dict.fromkeys([*(before[0] if before else ()), *columns_of(losses)]))
        write_text(path, _to_csv(rows, self._columns, header=True))
        self._file = path.open("a", encoding="utf-8", newline="", buffering=1)
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, **row: Any) -> None:
        """Append a row; missing columns are empty."""
        if self._file is None:
            return
        self._file.write(_to_csv([row], self._columns))
        if self._board is not None:
            for name, value in row.items():
                if name not in ("step", "tokens", "seconds"):
                    self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read ``metrics.csv``: numbers, and None for empty columns.

    Its columns are ``COLUMNS``, and ``<name>`` and ``eval_<name>`` of the model's other losses.

    An incomplete last row, as left by a killed run, is skipped.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has other columns or is damaged.
    """
    text = Path(path).read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(whole))
    if whole and not set(COLUMNS) <= set(reader.fieldnames or ()):
        raise ValueError(f"metrics must have columns {','.join(COLUMNS)}, got {path}")
    try:
        return [
            {
                name: None if value == "" else (int if name in COLUMNS[:2] else float)(value)
                for name, value in row.items()
            }
            for row in reader
        ]
    except (ValueError, TypeError) as error:
        raise ValueError(f"metrics must be numbers, got {path} ({error})") from error


def _to_csv(rows: list[dict[str, Any]], columns: list[str], *, header: bool = False) -> str:
    """Rows as text; floats with every digit, so that equal text means equal bits."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
