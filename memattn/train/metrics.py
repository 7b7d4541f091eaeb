"""Metrics of a run: ``metrics.csv``, and TensorBoard where it is installed."""

import csv
import importlib.util
import io
from pathlib import Path
from typing import Any

from memattn.files import write_text

# parts of the loss that a model may report beside it, without their coefficients
LOSS_PARTS = ("lm_loss", "future_loss")
COLUMNS = (
    "step",
    "tokens",
    "loss",
    *LOSS_PARTS,
    "eval_loss",
    "eval_future_loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "seconds",
)


class MetricsLog:
    """Appends rows, each flushed at once, and takes back those of a run that is resumed.

    Args:
        folder: Folder of the run.
        step: Step that the run goes on from; rows after it, and a half-written last one, go.
        active: False in all processes but the first, which then write nothing.
    """

    def __init__(self, folder: Path, *, step: int, active: bool):
        self._file = self._board = None
        if not active:
            return
        path = folder / "metrics.csv"
        rows = [row for row in read_metrics(path) if row["step"] <= step] if path.exists() else []
        write_text(path, _to_csv(rows, header=True))
        self._file = path.open("a", encoding="utf-8", newline="", buffering=1)
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, **row: Any) -> None:
        """Append a row; columns that are not given stay empty."""
        if self._file is None:
            return
        self._file.write(_to_csv([row]))
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
    """Read ``metrics.csv``: numbers, and None where a column is empty.

    A half-written last row, as a killed run leaves it, is left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has other columns or is damaged.
    """
    text = Path(path).read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(whole))
    if whole and tuple(reader.fieldnames or ()) != COLUMNS:
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


def _to_csv(rows: list[dict[str, Any]], *, header: bool = False) -> str:
    """Rows as text; floats with every digit, so that equal text means equal bits."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list[str](COLUMNS), lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
