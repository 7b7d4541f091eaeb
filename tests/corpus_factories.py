"""Archives as packages have them, for tests of corpora."""

import io
import tarfile
import zipfile
from pathlib import Path

LONG = "word " * 49 + "end"  # as long as an article must be


def write_zip(path: Path, name: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)
    return path


def write_wiki(path: Path) -> Path:
    raw = f'<doc id="1" url="u" title="A &amp; B">\n{LONG}\n</doc>\n'
    raw += '<doc id="2" url="u" title="Stub">\nshort\n</doc>\n'
    name = "exllamav2/conversion/standard_cal_data/wiki.utf8"
    return write_zip(path, name, raw.replace("\n", "\r\n").encode())


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def write_tar(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            add(archive, name, text.encode())
    return path
