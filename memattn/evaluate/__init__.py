"""Measuring models: exactness and held-out loss."""

from memattn.evaluate._report import AuditReport, AuditRow
from memattn.evaluate.audit import audit

__all__ = ["AuditReport", "AuditRow", "audit"]
