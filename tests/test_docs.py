"""Every code block of the documentation runs."""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "configs").glob("*.md"))
RUN_PAGES = [page for page in PAGES if page.name != "start.md"]  # test_start.py runs that one


def blocks(page: Path, language: str) -> list[str]:
    """Code blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.S | re.M)


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess:
    """Run a command with this environment's memattn first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    env.pop("TRITON_INTERPRET", None)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in RUN_PAGES if blocks(p, "python")], ids=ids)
def test_python_blocks_run(page, tmp_path):
    """The blocks of a page run one after the other in one process."""
    script = tmp_path / "blocks.py"
    script.write_text("\n".join(blocks(page, "python")))
    result = run([sys.executable, str(script)], tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]


def commands(page: Path) -> list[list[str]]:
    """Commands of the bash blocks, each split into words."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in RUN_PAGES if blocks(p, "bash")], ids=ids)
def test_commands_run(page, tmp_path):
    """In a copy of configurations and texts, in order; what make would run is only looked up.

    The first command of memattn runs as the console script that is installed, those that follow
    each other after it in one process.
    """
    for folder in ("configs", "docs"):  # the small configuration learns from the documentation
        shutil.copytree(ROOT / folder, tmp_path / folder)
    first = True
    for program, words in itertools.groupby(commands(page), key=lambda words: words[0]):
        group = list(words)
        todo = [(command, tmp_path) for command in group]
        if program == "make":
            todo = [(["make", "--dry-run", *command[1:]], ROOT) for command in group]
        elif program == "memattn":
            todo = [(group.pop(0), tmp_path)] if first else []
            first = False
            if group:
                script = str(ROOT / "tests" / "run_commands.py")
                todo.append(([sys.executable, script, json.dumps(group)], tmp_path))
        for command, cwd in todo:
            result = run(command, cwd)
            shown = f"{command}\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
            assert result.returncode == 0, shown


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{ids(page)}: {target}"
