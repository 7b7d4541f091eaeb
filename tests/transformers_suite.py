"""The test classes that transformers has for its own models: fetched, never part of the package.

``python tests/transformers_suite.py`` (``make test-transformers`` begins so) fetches the source
distribution of the installed version into ``build/``, with what its tests import. Its modules hold
the common tests of models and of training; those of generation and of export are only in the
repository of transformers, and run where ``build/transformers-VERSION/`` has them too: put the
``tests`` folder of a checkout of that version there.
"""

import importlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path
from typing import Any

import transformers

FOLDER = Path(__file__).parents[1] / "build" / f"transformers-{transformers.__version__}"
NEEDS = "parameterized"
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
    return importlib.import_module(f"tests.{name}")


if __name__ == "__main__":
    fetch()
