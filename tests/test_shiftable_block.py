"""PyTorch's encoder layer with specialists beside its attention."""

import copy
import io
import warnings

import pytest
import torch
from shiftable_factories import CAUSAL, LEFT, RIGHT, B, E, H, T, draw, make_layer, shift
from torch import nn

from memattn.nn import DomainGate, ShiftableTransformerBlock


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "options",
    [dict(), dict(norm_first=True), dict(batch_first=False), dict(bias=False, activation="gelu")],
    ids=str,
)
def test_a_new_block_has_the_bits_of_its_layer(options, training, monkeypatch):
    """With gradients and in the fast path; without specialists, with closed ones, one-hot.

    Of the frozen layer: PyTorch chooses another product of a strided input where a weight is not.
    """
    layer = make_layer(**options).requires_grad_(False)
    x = draw(B, T, E) if layer.self_attn.batch_first else draw(T, B, E)
    plain = ShiftableTransformerBlock(E, H, 16, copy.deepcopy(layer)).train(training)
    closed = ShiftableTransformerBlock(E, H, 16, copy.deepcopy(layer), 3).train(training)
    opened = shift(layer).train(training)
    one_hot = torch.tensor([[1.0, 0.0, 0.0]] * B)
    for masks in (
        dict(),
        dict(src_key_padding_mask=RIGHT),
        dict(src_mask=CAUSAL, is_causal=True),
        dict(src_mask=torch.triu(torch.ones(T, T), 1).bool(), src_key_padding_mask=RIGHT),
    ):
        for with_grad in (False, True):
            given = x.clone().requires_grad_(with_grad)
            calls = []
            fast = torch._transformer_encoder_layer_fwd
            with monkeypatch.context() as patch, torch.set_grad_enabled(with_grad):
                patch.setattr(
                    torch, "_transformer_encoder_layer_fwd",
                    lambda *a, fast=fast, calls=calls: calls.append(1) or fast(*a),
                )  # fmt: skip
                expected = layer(given, **masks)
                was_fast = len(calls)
                for block in (plain, closed):
                    assert torch.equal(block(given, **masks), expected)
                    assert torch.equal(block(given, **masks, return_gates=True)[0], expected)
                found = opened(given, **masks, domain_weights=one_hot)
                assert torch.equal(found, expected) and len(calls) == 6 * was_fast
                takes_it = layer.self_attn.batch_first and options.get("bias", True)
                assert bool(was_fast) == (takes_it and not with_grad)
    gates = closed(x, return_gates=True)[1].gates
    assert (gates[..., 0] == 1).all() and not gates[..., 1:].any()


@pytest.mark.parametrize("scope", ["token", "prefix"])
def test_nothing_later_and_no_padding_reaches_a_token(scope):
    """Of a causal block with open specialists, in float64, and the audit of a batch."""
    block = shift(make_layer().double(), scope=scope, top_k=1)
    x = draw(B, T, E, dtype=torch.float64)
    masks = dict(src_mask=CAUSAL.double(), is_causal=True)
    before, gates = block(x, **masks, return_gates=True)
    assert (gates.gates[..., 1:] > 0).sum(-1).max() == 1 and gates.gates.min() == 0
    for t in range(1, T):
        changed = x.clone()
        changed[:, t:] += 1.0
        assert torch.equal(block(changed, **masks)[:, :t], before[:, :t])
    changed = x.clone()
    changed[1] += 1.0
    assert torch.equal(block(changed, **masks)[0], before[0])
    changed = x.masked_fill(RIGHT[..., None], 1e3)
    padded = dict(src_key_padding_mask=RIGHT)
    kept = ~RIGHT
    assert torch.equal(block(changed, **padded)[kept], block(x, **padded)[kept])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_stands_in_an_encoder_and_its_fast_path():
    """Layers replaced and cloned, nested sequences; closed: its bits, open: the slow path's."""
    torch.manual_seed(0)
    layer = make_layer(dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    x = draw(B, T, E)
    for padding in (RIGHT, LEFT, None):
        for closed in (True, False):
            ours = copy.deepcopy(encoder)
            for n, own in enumerate(ours.layers):
                block = ShiftableTransformerBlock.from_layer(own, 1) if closed else shift(own)
                ours.layers[n] = block.eval()
            with torch.no_grad():
                found = ours(x, src_key_padding_mask=padding)
                if closed:
                    assert torch.equal(found, encoder(x, src_key_padding_mask=padding))
                    continue
                torch.backends.mha.set_fastpath_enabled(False)
                try:
                    slow = ours(x, src_key_padding_mask=padding)
                finally:
                    torch.backends.mha.set_fastpath_enabled(True)
                present = torch.ones(B, T).bool() if padding is None else ~padding
                torch.testing.assert_close(found[present], slow[present])
            # in evaluation with gradients on the encoder may nest its input all the same
            ours(x, src_key_padding_mask=padding)[present].square().sum().backward()
            for block in ours.layers:
                assert block.self_attn.specialists["specialist_0"].out_weight.grad.any()
                assert block.self_attn.gate.row("specialist_0").hidden.weight.grad.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cloned = nn.TransformerEncoder(shift(layer).eval(), 2)
    with torch.no_grad():
        one = cloned.layers[0](x)
        torch.testing.assert_close(cloned(x), cloned.layers[1](one))
        # a plain layer calls the attention in it, too, and not its kernel
        plain = copy.deepcopy(layer)
        plain.self_attn = shift(layer.self_attn)
        torch.testing.assert_close(plain(x), shift(layer)(x))


def test_the_seeds_call():
    """Around an attention: the MLP and the norms are new, trained, and have dropout."""
    pretrained = make_layer()
    block = ShiftableTransformerBlock(
        d_model=E,
        num_heads=H,
        dim_feedforward=16,
        base_mha=pretrained.self_attn,
        num_specialists=3,
    )
    x = draw(B, T, E)
    assert block.self_attn.gate.specialists == tuple(f"specialist_{n}" for n in range(3))
    assert block.norm1.training and not block.self_attn.base.training
    assert block.linear1.weight.requires_grad
    assert not torch.equal(block(x), block(x)) and torch.equal(block.eval()(x), block(x))
    assert not any(name.startswith("_layer") for name in block.state_dict())
    with torch.no_grad():
        y = block.norm1(x + pretrained.self_attn(x, x, x)[0])
        torch.testing.assert_close(block(x), block.norm2(y + block._ff_block(y)))
    clone = copy.deepcopy(block).double()
    assert clone._layer.linear1 is clone.linear1 and clone._layer.self_attn is clone.self_attn.base
    with torch.no_grad():
        torch.testing.assert_close(clone(x.double()).float(), block(x))


def test_is_saved_compiled_and_computed_in_half_precision():
    block = shift(make_layer(), top_k=1)
    x = draw(B, T, E)
    expected = block(x)
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    read = torch.load(file, weights_only=False)
    assert torch.equal(read(x), expected) and read._layer.linear1 is read.linear1
    new = ShiftableTransformerBlock.from_layer(make_layer(), 2, gate=DomainGate(E, gate_size=4))
    new.self_attn.gate.top_k = 1
    new.load_state_dict(block.state_dict())
    assert torch.equal(new(x), expected)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch._dynamo.reset()
    masks = dict(src_mask=CAUSAL, is_causal=True)
    torch.testing.assert_close(compiled(x, **masks), block(x, **masks))
    low = copy.deepcopy(block).bfloat16()(x.bfloat16())
    layer = make_layer().bfloat16()  # the rounding of the layer alone
    error = (layer(x.bfloat16()).float() - make_layer()(x)).abs().max()
    assert low.dtype == torch.bfloat16 and (low.float() - expected).abs().max() <= 2 * error
