"""A call that passed its checks is not checked again; one that differs in anything is."""

import pytest
import torch

from memattn.ops import _checked, segmented_attention

Q = torch.zeros(1, 2, 3, 16)


@pytest.mark.parametrize(
    ("good", "wrong", "message"),
    [
        (dict(is_causal=True), dict(is_causal=1), "is_causal must be True or False, got int"),
        (dict(window_size=1), dict(window_size=True), "window_size must be an integer, got bool"),
        (dict(window_size=1), dict(window_size=1.0), "window_size must be an integer, got float"),
        (dict(window_size=1), dict(window_size=[1]), "window_size must be an integer, got list"),
        (dict(scale=1), dict(scale=True), "scale must be a number or None, got bool"),
        (dict(), dict(value=Q.half()), "value must have the dtype of query"),
        (dict(), dict(key=Q[:, :, :2]), "value must have shape"),
        (dict(), dict(sink_logits=Q[0, 0, 0]), "sink_logits must have shape"),
    ],
)
def test_what_differs_is_checked(good, wrong, message):
    tensors = dict(query=Q, key=Q, value=Q, backend="reference")
    for _ in range(2):
        segmented_attention(**tensors | good)
    with pytest.raises((TypeError, ValueError), match=message):
        segmented_attention(**tensors | good | wrong)


def test_values_of_bounds_are_checked_in_each_call():
    bounds = [torch.tensor(values, dtype=torch.int32) for values in ([0, 1, 3], [0, 2, 1])]
    segmented_attention(Q, Q, Q, cu_seqlens=bounds[0], backend="reference")
    with pytest.raises(ValueError, match="cu_seqlens must begin with 0 and end with S=3"):
        segmented_attention(Q, Q, Q, cu_seqlens=bounds[1], backend="reference")


def test_dtypes_are_those_of_autocast():
    half = Q.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert segmented_attention(half, Q, Q, backend="reference").out.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="key must have the dtype of query"):
        segmented_attention(half, Q, Q, backend="reference")


def test_signatures_are_forgotten_in_time(monkeypatch):
    monkeypatch.setattr(_checked, "MAX_SIGNATURES", 3)
    calls = _checked.CheckedCalls()
    signatures = [_checked.signature_of((Q,), (n,)) for n in range(9)]
    for signature in signatures:
        calls.add(signature)
    assert [signature in calls for signature in signatures] == [False] * 6 + [True] * 3
    assert _checked.signature_of((Q.as_subclass(type("Other", (torch.Tensor,), {})),), ()) is None
