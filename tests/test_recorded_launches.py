"""Recorded launches beside plain ones, in a process whose kernels are not interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("triton")


def test_recorded_launches():
    path = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "tests"))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-x", "-p", "no:cacheprovider"]
    process = subprocess.run(
        [*command, "tests/recorded_launch_cases.py"],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-2000:]
