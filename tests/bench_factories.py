"""Small cases of the benchmark, and operators that compute something wrong."""

import torch

from memattn.bench import result_check
from memattn.bench.engine import TimingBudget
from memattn.bench.segmented_attention import SegmentedCase
from memattn.ops import segmented_attention

QUICK = TimingBudget(seconds=0.0, min_rounds=3, compiled=False)
SMALL = {"B": 2, "H": 4, "Hkv": 2, "D": 16, "window_size": 9, "segment_len": 16, "P": 3, "M": 5}


def small(kind: str, T: int = 48, **sizes) -> SegmentedCase:
    return SegmentedCase(kind=kind, T=T, **(SMALL | {"documents": 3} | sizes))


def plant(monkeypatch, wrong):
    """Put something wrong in the place of our operator."""
    right = SegmentedCase.subject

    def subject(self, backend):
        return lambda inputs: wrong(self, inputs, right(self, backend)(inputs))

    monkeypatch.setattr(SegmentedCase, "subject", subject)


def longer_window(case, inputs, out):
    if case.kind != "window":
        return out
    options = case.options() | {"window_size": case.window_size + 1}
    return segmented_attention(**inputs, **options, backend="reference").out


def wrong_gradient(case, inputs, out):
    return out + 0.1 * (inputs["value"] - inputs["value"].detach()).sum()


def wrong_tail(case, inputs, out):
    last = torch.zeros(out.shape[2]).index_fill(0, torch.tensor(out.shape[2] - 1), 1.0)
    return out * (1 + last[:, None] * (case.T > result_check.SMALL_T))


def not_a_number(case, inputs, out):
    return out + torch.nan
