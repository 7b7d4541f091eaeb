"""``memattn study``: its options are those of what is studied, so the function stands there."""

from memattn.study.command import study

__all__ = ["study"]
