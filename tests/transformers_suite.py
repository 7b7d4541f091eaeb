"""The test classes that transformers has for its own models: fetched, never part of the package.

``python tests/transformers_suite.py`` (``make test-transformers`` begins so) fetches the source
distribution of the installed version into ``build/``, with what its tests import. Its modules hold
the common tests of models and of training; those of generation and of export are only in the
repository of transformers, and run where ``build/transformers-VERSION/`` has them too: put the
``tests`` folder of a checkout of that version there.

``python tests/transformers_suite.py RESULTS.xml`` writes the page of a whole run.
"""

import importlib
import inspect
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
import transformers
from torch.utils._pytree import tree_map

FOLDER = Path(__file__).parents[1] / "build" / f"transformers-{transformers.__version__}"
NEEDS = "parameterized"
PAGE = Path(__file__).parents[1] / "docs" / "results" / "transformers_suite.md"
HEAD = """# The tests of transformers on the models of this package

`make test-transformers` wrote this page with transformers {version}: {total}

| system | passed | failed | skipped |
|---|---|---|---|
"""
# what the fetched modules import of those that are not published: names, and what stands for them
ABSENT: dict[str, dict[str, Any]] = {
    "tests.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "tests.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
}


def fetch() -> None:
    """Download the tests of the installed transformers into ``FOLDER``, by pip."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as where:
        options = ["--no-deps", "--no-build-isolation", "--no-binary=transformers", "--dest", where]
        wanted = f"transformers=={transformers.__version__}"
        subprocess.run([*pip, "download", *options, wanted], check=True)
        (archive,) = Path(where).glob("*.tar.gz")
        with tarfile.open(archive) as sources:
            sources.extractall(where, filter="data")
        (tests,) = Path(where).glob("*/tests")
        shutil.copytree(tests, FOLDER / "tests", dirs_exist_ok=True)
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(FOLDER / "site"), NEEDS], check=True
    )


def is_fetched() -> bool:
    """Whether the tests of the installed transformers are there."""
    return (FOLDER / "tests" / "test_modeling_common.py").is_file() and (FOLDER / "site").is_dir()


def has_repository() -> bool:
    """Whether those are there, too, that only the repository has."""
    return (FOLDER / "tests" / "causal_lm_tester.py").is_file()


def load(name: str) -> Any:
    """A module of the fetched tests, which is ``tests.name`` for the others."""
    if "tests" not in sys.modules:
        sys.path.append(str(FOLDER / "site"))
        package = types.ModuleType("tests")
        package.__path__ = [str(FOLDER / "tests")]
        sys.modules["tests"] = package
        for module, names in ABSENT.items():
            if not (FOLDER / f"{module.replace('.', '/')}.py").is_file():
                parent = module.rpartition(".")[0]
                for made in (parent, module):
                    sys.modules[made] = types.ModuleType(made)
                    sys.modules[made].__path__ = []
                vars(sys.modules[module]).update(names)
        _adapt_exporters()
    return importlib.import_module(f"tests.{name}")


def _adapt_exporters() -> None:
    """Let their tests of exporters take this version, and our caches.

    Those of an earlier version call what its exporters returned. Of caches they compare every
    entry: here only those that later tokens read.
    """
    if not (FOLDER / "tests" / "exporters" / "test_export.py").is_file():
        return
    tests = importlib.import_module("tests.exporters.test_export")
    if "exported_program.module()" in inspect.getsource(tests):
        given = tests.DynamoExporter.export
        own = {"export": lambda *args, **options: given(*args, **options).program}
        tests.DynamoExporter = type("DynamoExporter", (tests.DynamoExporter,), own)
    leaves = tests.get_leaf_tensors

    def get_leaf_tensors(found: Any) -> dict[str, Any]:
        cache = getattr(found, "past_key_values", None)
        if cache is not None:
            found = dict(found, past_key_values=what_is_read(cache))
        return leaves(found)

    tests.get_leaf_tensors = get_leaf_tensors


def what_is_read(cache: Any) -> Any:
    """A cache as programs return it, rows that have ended moved, with 0 in what no token reads."""
    cache = tree_map(lambda leaf: leaf, cache)
    for state in cache._states():
        unseen = torch.arange(cache.position)[-state.kept :] < state.floor[:, None]
        for name, x in state.tokens.items():
            axes = [1] * (x.dim() - 3)
            state.tokens[name] = x.masked_fill(unseen.view(len(x), *axes, -1, 1), 0)
        for name, x in state.rows.items():
            if name.startswith("memory.pending"):
                free = torch.arange(x.shape[2]) >= state.rows["memory.count"][:, None]
                axes = [1] * (x.dim() - 3)
                state.rows[name] = x.masked_fill(free.view(len(x), 1, -1, *axes), 0)
    return cache


def page_of(results: Path, deselected: dict[str, str]) -> str:
    """The page of a run that pytest wrote down as JUnit's XML."""
    counts: dict[str, Counter] = {}
    skips, total = Counter(), Counter()
    for case in ElementTree.parse(results).iter("testcase"):
        skipped = case.find("skipped")
        failed = case.find("failure") is not None or case.find("error") is not None
        kind = "failed" if failed else "passed" if skipped is None else "skipped"
        system = case.get("classname", "").rpartition("Test_")[2]
        counts.setdefault(system, Counter())[kind] += 1
        total[kind] += 1
        if skipped is not None:  # the reason without the class
            skips[re.sub(r"<class '.*?'>|\bMemAttn\w+", "A model", skipped.get("message", ""))] += 1
    kinds = ("passed", "failed", "skipped")
    said = ", ".join(f"{total[kind]} {kind}" for kind in kinds)
    lines = [f"| {s} | {' | '.join(str(c[kind]) for kind in kinds)} |" for s, c in counts.items()]
    lines += ["", "Left out:", "", *(f"- `{name}`: {why}." for name, why in deselected.items())]
    lines += ["", "Skipped by the tests themselves, in all systems:", ""]
    lines += [f"- {count}: {why.rstrip('.')}" for why, count in skips.most_common()]
    return HEAD.format(version=transformers.__version__, total=f"{said}.") + "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        from test_transformers_suite import DESELECTED

        left_out = {
            name: why if systems is None else f"of {', '.join(systems)}: {why}"
            for name, (systems, why) in DESELECTED.items()
        }
        PAGE.write_text(page_of(Path(sys.argv[1]), left_out), encoding="utf-8")
    else:
        fetch()
