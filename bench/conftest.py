"""Collects ``bench_*.py``, so that ``pytest bench/`` runs them and ``pytest`` alone does not."""

from pathlib import Path

import pytest


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    named = file_path.name.startswith("bench_") and file_path.suffix == ".py"
    # a file named on the command line is collected by pytest itself
    if named and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None
