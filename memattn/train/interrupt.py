"""Ctrl-C and SIGTERM end a run at the next step instead of in the middle of one."""

import signal
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """Whether SIGINT or SIGTERM came, while used as a context manager.

    A second Ctrl-C ends the process at once, as it would without this. Outside the main thread,
    where Python allows no handlers, nothing is caught.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
