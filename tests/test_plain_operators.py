"""What the operators of plain layers refuse."""

import pytest
import torch

from memattn.models import plain_step

pytestmark = pytest.mark.skipif(not plain_step.AVAILABLE, reason="the C++ extension is not built")


def test_operators_refuse_what_does_not_fit():
    x, norm, weight = torch.zeros(1, 1, 8), torch.ones(8), torch.zeros(4, 8)
    with pytest.raises((RuntimeError, ValueError), match="weight must have shape"):
        torch.ops.memattn_cpp.linear_step(x, weight[:, :7])
    with pytest.raises((RuntimeError, ValueError), match="down_proj must have shape"):
        torch.ops.memattn_cpp.swiglu_step(x, norm, weight, weight, weight, 1e-6)
    with pytest.raises((RuntimeError, ValueError), match="contiguous float32"):
        torch.ops.memattn_cpp.norm_step(x, norm.double(), 1e-6)
    with pytest.raises((RuntimeError, ValueError), match="up_proj must have shape"):
        torch.ops.memattn_cpp.swiglu_rows(x, norm, weight, weight[:3], weight.T, 1, 1e-6)
    with pytest.raises((RuntimeError, ValueError), match="newest must be between 0 and 1"):
        torch.ops.memattn_cpp.swiglu_rows(x, norm, weight, weight, weight.T.contiguous(), 2, 1e-6)
    with pytest.raises((RuntimeError, ValueError), match="o_proj must have shape"):
        torch.ops.memattn_cpp.output_rows(x, torch.zeros(1, 2, 1, 4), weight)
    lists = [[], [], [], None, None, torch.zeros(1, 1, dtype=torch.long), [], [], []]
    with pytest.raises((RuntimeError, ValueError), match="an entry for each layer"):
        torch.ops.memattn_cpp.decoder_step(x, [norm], *lists[1:])


def test_operators_refuse_odd_heads_and_take_no_rows():
    hidden, norm = torch.randn(1, 1, 6), torch.ones(6)
    weights = [torch.randn(3, 6), torch.randn(3, 6), torch.randn(3, 6), torch.randn(6, 3)]
    keys, angles = torch.zeros(1, 1, 1, 3), torch.zeros(4, 1)
    absent = [None] * 4
    with pytest.raises(RuntimeError, match="a head an even number of features"):
        torch.ops.memattn_cpp.attention_step(
            hidden, norm, *weights, keys, keys.clone(), *absent, angles, angles,
            torch.zeros(1, 1, dtype=torch.int64), None, None, None, None, 0, 1e-6,
        )  # fmt: skip
    assert torch.ops.memattn_cpp.linear_step(hidden, torch.empty(0, 6)).shape == (1, 1, 0)
