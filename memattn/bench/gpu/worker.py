"""A worker process: one job a line on stdin, one result a line on stdout."""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from memattn.bench.gpu import correctness, host, predictions, speed, tuning
from memattn.bench.gpu.pool import Job, Result

JOBS: dict[str, Callable[[Job], Result]] = {
    "correct": correctness.run_job,
    "host": host.run_job,
    "prepare": speed.prepare,
    "speed": speed.measure,
    "sweep": speed.measure_sweep,
    "predict": predictions.run_job,
    "tune-check": tuning.check,
    "tune-time": tuning.measure,
}


def main() -> int:
    """Answer jobs until stdin ends."""
    # stdout carries the results only; what libraries print goes to stderr
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        start = time.monotonic()
        try:
            result = JOBS[job["task"]](job)
        except Exception as error:  # an error of a kernel or a peer is a result
            result = _failure(error)
        result["took"] = round(time.monotonic() - start, 2)
        answers.write(json.dumps(result) + "\n")
        answers.flush()
    return 0


def _failure(error: Exception) -> dict[str, Any]:
    text = "".join(traceback.format_exception(error))
    sys.stderr.write(text)
    sys.stderr.flush()
    lines = str(error).strip().splitlines() or [""]
    result: dict[str, Any] = {
        "status": "error",
        "reason": f"{type(error).__name__}: {lines[0]}"[:300],
    }
    # after an error on the device this process cannot be used any more
    if "CUDA error" in text or "device-side" in text or "AcceleratorError" in text:
        result["worker_is_lost"] = True
    return result


if __name__ == "__main__":
    sys.exit(main())
