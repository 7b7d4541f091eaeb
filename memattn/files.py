"""Files that are whole or absent: checksums and atomic writes."""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def describe_failure(done: subprocess.CompletedProcess) -> str:
    """The last line in which a failed client says why, or its exit code."""
    lines = [line.strip() for line in (done.stderr or done.stdout or "").splitlines()]
    telling = [line for line in lines if line.lower().startswith(("error", "e:", "npm error"))]
    return (telling or [line for line in lines if line] or [f"exit code {done.returncode}"])[-1]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path`` that becomes ``path`` on success.

    The folder's files are flushed to the disk before the rename, so that after a power cut, too,
    ``path`` is either what it was or complete. On an error the temporary folder is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    old = temporary.with_suffix(".old")
    try:
        # mkdtemp makes it private, but results are for everyone who may read the parent
        temporary.chmod(path.parent.stat().st_mode & 0o777)
        yield temporary
        for file in [*temporary.rglob("*"), temporary]:
            flush(file)
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
        flush(path.parent)
    except BaseException:
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def flush(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a small text file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, values: Any) -> None:
    """Write values as JSON, in one step."""
    write_text(Path(path), json.dumps(values, indent=2, allow_nan=False) + "\n")
