"""``memattn study``: its options are those of what is studied, so the functions stand there."""

from memattn.study.command import KINDS, study

__all__ = ["KINDS", "study"]
