"""Atomic file writes (a file is complete or absent), checksums, tensor files."""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_text(text: str) -> str:
    """SHA-256 of a text, as hexadecimal; lone surrogates count, too."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def describe_failure(done: subprocess.CompletedProcess) -> str:
    """The last line of a failed program's error output, or its exit code."""
    lines = [line.strip() for line in (done.stderr or done.stdout or "").splitlines()]
    telling = [line for line in lines if line.lower().startswith(("error", "e:", "npm error"))]
    return (telling or [line for line in lines if line] or [f"exit code {done.returncode}"])[-1]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path`` that becomes ``path`` on success.

    The folder's files are flushed to the disk before the rename, so that even after a power cut
    ``path`` is either unchanged or complete. On an error the temporary folder is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    old = temporary.with_suffix(".old")
    try:
        # mkdtemp makes the folder private; give it the permissions of its parent
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


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` for a file that takes its place on success."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(name: str, folder: Path) -> None:
    """Raise ValueError unless files can be written to a folder; it need not exist yet.

    Tests by writing, since permissions alone do not decide it, and removes the test file.

    Args:
        name: Name of the argument.
        folder: The folder.
    """
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{name} must be a folder that can be written to, got {folder} ({error.strerror})"
        ) from None
    finally:
        for path in missing:
            with suppress(OSError):  # it was not created, or another process uses it by now
                path.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write a small text file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, values: Any) -> None:
    """Write values as JSON, in one step."""
    write_text(Path(path), json.dumps(values, indent=2, allow_nan=False) + "\n")


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, "Tensor"], metadata: dict[str, str]
) -> None:
    """Write a safetensors file atomically.

    Raises:
        OSError: If it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path must be in a folder that exists, got {path}")
    # clones: safetensors refuses tensors that share memory
    own = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    try:
        with replacing_file(target) as temporary:
            save_file(own, temporary, metadata)
            # safetensors makes the file private; give it the permissions of its folder
            temporary.chmod(0o600 | target.parent.stat().st_mode & 0o044)
    except SafetensorError as error:  # an error of writing: the tensors themselves are valid
        raise OSError(f"path must be a file that can be written, got {path}: {error}") from error


def read_tensors(
    path: str | os.PathLike[str], writer: str, device: Any = "cpu"
) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """Tensors and metadata of a safetensors file; ``writer`` names the function that writes such
    files.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a complete file of this kind.
    """
    with _opened_tensors(path, writer, device) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}


def read_metadata(path: str | os.PathLike[str], writer: str) -> dict[str, str]:
    """Only the metadata of a safetensors file; raises as ``read_tensors``."""
    with _opened_tensors(path, writer, "cpu") as file:
        return file.metadata() or {}


@contextmanager
def _opened_tensors(path: str | os.PathLike[str], writer: str, device: Any) -> Iterator[Any]:
    """Open a safetensors file."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        lacks = "" if Path(path).exists() else ", which does not exist"
        raise FileNotFoundError(f"path must be a file that {writer} wrote, got {path}{lacks}")
    try:
        with safe_open(os.fspath(path), framework="pt", device=str(device)) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"path must be a whole safetensors file, got {path}: {error}") from error
