"""The wheel: it builds, installs into an empty environment, and works there."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
# what an installed package must do, away from the checkout
USE = """
import sys, torch, memattn
assert {site!r} in memattn.__file__, memattn.__file__
q = torch.randn(1, 2, 9, 16)
out = memattn.segmented_attention(q, q, q, window_size=4, backend={backend!r}).out
assert out.shape == q.shape and out.isfinite().all()
import importlib.util
assert importlib.util.find_spec("memattn_kernels.segmented_attention")
"""


def run(*command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """Run a command and fail with what it printed."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CI")}
    result = subprocess.run(
        command, cwd=cwd, env={**clean, **env}, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result


def build(folder: Path, **env: str) -> Path:
    """Build the wheel from a copy of the tracked sources."""
    source = folder / "source"
    for name in ("csrc", "kernels", "memattn"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation"]
    run(*command, "--no-deps", "--wheel-dir", str(folder), str(source), cwd=folder, **env)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """An environment with the wheel, and this one's packages but not its memattn."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = Path(torch.__file__).parent.parent
    (site,) = folder.glob("lib/python*/site-packages")
    # a path line, so that no editable install of the other environment comes along
    (site / "others.pth").write_text(f"{packages}\n")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return python


def test_a_release_has_one_version():
    places = {
        "pyproject.toml": r'^version = "(.*)"$',
        "memattn/__init__.py": r'^__version__ = "(.*)"$',
        "CITATION.cff": r"^version: (.*)$",
        "CHANGELOG.md": r"^## (\d+\.\d+\.\d+)",
    }
    found = {
        name: re.search(form, (ROOT / name).read_text(), re.M) for name, form in places.items()
    }
    assert all(found.values()), found
    assert len({match.group(1) for match in found.values() if match}) == 1, found


@pytest.mark.slow
def test_the_wheel_works_where_it_is_installed(tmp_path):
    wheel = build(tmp_path, MEMATTN_CXXFLAGS="-O0")  # its speed is measured elsewhere
    assert "cp310-abi3" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "memattn/_C.abi3.so" in names and "memattn/py.typed" in names
    assert not [n for n in names if n.startswith(("tests/", "bench/", "kernels/"))]
    python = install(wheel, tmp_path / "env")
    run(str(python), "-c", USE.format(site=str(tmp_path), backend="cpp"), cwd=tmp_path)
    run(str(python), "-m", "memattn", "doctor", cwd=tmp_path)


@pytest.mark.slow
def test_without_a_compiler_the_package_still_installs(tmp_path):
    wheel = build(tmp_path, CC="no-such-compiler", CXX="no-such-compiler")
    with zipfile.ZipFile(wheel) as archive:
        assert not [n for n in archive.namelist() if n.endswith(".so")]
    python = install(wheel, tmp_path / "env")
    run(str(python), "-c", USE.format(site=str(tmp_path), backend="auto"), cwd=tmp_path)
    doctor = run(str(python), "-m", "memattn", "doctor", cwd=tmp_path).stdout
    assert "pip install --no-build-isolation" in " ".join(doctor.split())
