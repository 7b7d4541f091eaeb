"""The progress bar of a run."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainProgress:
    """Steps, loss, speed and time left, on stderr; used as a context manager.

    Args:
        max_steps: Steps of the run.
        active: Whether anything is shown.
    """

    def __init__(self, max_steps: int, *, active: bool):
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not active,
        )
        self._task = self._progress.add_task("", total=max_steps, loss=float("nan"), speed=0.0)

    def __enter__(self) -> "TrainProgress":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def update(self, step: int, loss: float, speed: float) -> None:
        """Show the numbers of a step."""
        self._progress.update(self._task, completed=step, loss=loss, speed=speed)
