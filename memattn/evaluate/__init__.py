"""Measuring models: exactness and held-out loss."""

from memattn.evaluate._report import AuditReport, AuditRow
from memattn.evaluate.audit import audit
from memattn.evaluate.estimate import Estimate, EstimateLine, estimate
from memattn.evaluate.influence import influence
from memattn.evaluate.memory import memory_tables, memory_use
from memattn.evaluate.ngrams import NgramLosses, bits_per_byte, ngram_losses
from memattn.evaluate.perplexity import Perplexity, perplexity
from memattn.evaluate.positions import PositionLoss, loss_by_position
from memattn.evaluate.recall import RecallCell, RecallReport, recall

__all__ = [
    "AuditReport",
    "AuditRow",
    "Estimate",
    "EstimateLine",
    "NgramLosses",
    "Perplexity",
    "PositionLoss",
    "RecallCell",
    "RecallReport",
    "audit",
    "bits_per_byte",
    "estimate",
    "influence",
    "loss_by_position",
    "memory_tables",
    "memory_use",
    "ngram_losses",
    "perplexity",
    "recall",
]
