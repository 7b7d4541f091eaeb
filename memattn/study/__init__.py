"""Comparisons at equal parameters over several seeds: the study of future attention."""

from typing import TYPE_CHECKING, Any

from memattn.study.config import CompareConfig, StudyConfig, load_study

if TYPE_CHECKING:
    from memattn.study.run import run_study
    from memattn.study.variants import Variant, plan_variants

__all__ = [
    "CompareConfig",
    "StudyConfig",
    "Variant",
    "load_study",
    "plan_variants",
    "run_study",
]


def __getattr__(name: str) -> Any:
    # these import transformers and matplotlib, which reading a configuration must not
    if name == "run_study":
        from memattn.study.run import run_study

        return run_study
    if name in ("Variant", "plan_variants"):
        from memattn.study import variants

        return getattr(variants, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
