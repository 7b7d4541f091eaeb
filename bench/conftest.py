"""Collect ``bench_*.py`` in ``pytest bench/``; plain ``pytest`` does not run them."""

from pathlib import Path

import pytest


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    named = file_path.name.startswith("bench_") and file_path.suffix == ".py"
    # pytest itself collects files named on the command line
    if named and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None
