"""Comparisons of models of equal size or cost over several seeds: one file for each study."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from memattn.checks import must
from memattn.study.adapters import AdaptersCompare, AdaptersStudy, BaseModel
from memattn.study.base import Study
from memattn.study.cells import Cell, Measure
from memattn.study.chapters import ChaptersCompare, ChaptersStudy
from memattn.study.compare import CompareStudy
from memattn.study.future import FutureCompare, FutureStudy
from memattn.study.shiftable import Generalist, ShiftableCompare, ShiftableStudy, Teaching
from memattn.study.titans import TitansCompare, TitansPart, TitansStudy
from memattn.train.config import read_config

if TYPE_CHECKING:
    from memattn.study.run import run_study

STUDIES: dict[str, type[Study]] = {
    study.system: study
    for study in (FutureStudy, ChaptersStudy, AdaptersStudy, TitansStudy, ShiftableStudy)
}

__all__ = [
    "STUDIES",
    "AdaptersCompare",
    "AdaptersStudy",
    "BaseModel",
    "Cell",
    "ChaptersCompare",
    "ChaptersStudy",
    "CompareStudy",
    "FutureCompare",
    "FutureStudy",
    "Generalist",
    "Measure",
    "ShiftableCompare",
    "ShiftableStudy",
    "Study",
    "Teaching",
    "TitansCompare",
    "TitansPart",
    "TitansStudy",
    "load_study",
    "run_study",
]


def load_study(system: str, path: str | Path) -> Study:
    """Read the YAML file of a study.

    Args:
        system: Its name, a key of ``STUDIES``.
        path: The file. Missing fields have their default.

    Returns:
        The checked study.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no such study, the file is no YAML, or a field is unknown or wrong.
    """
    if system not in STUDIES:
        must("system", f"be one of {', '.join(STUDIES)}", repr(system))
    return read_config(STUDIES[system], path)


def __getattr__(name: str) -> Any:
    # it imports transformers and matplotlib, which reading a configuration must not
    if name == "run_study":
        from memattn.study.run import run_study

        return run_study
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
