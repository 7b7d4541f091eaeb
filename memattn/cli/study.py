"""``memattn study``; the functions are in ``memattn.study``, where their options are defined."""

from memattn.study.command import KINDS, study

__all__ = ["KINDS", "study"]
