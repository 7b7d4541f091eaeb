"""Measuring models: exactness and held-out loss."""

from memattn.evaluate._report import AuditReport, AuditRow
from memattn.evaluate.audit import audit
from memattn.evaluate.estimate import Estimate, EstimateLine, estimate
from memattn.evaluate.perplexity import Perplexity, perplexity

__all__ = [
    "AuditReport",
    "AuditRow",
    "Estimate",
    "EstimateLine",
    "Perplexity",
    "audit",
    "estimate",
    "perplexity",
]
