"""Attention and encoder layers of PyTorch with specialists beside them."""

import copy
import io
import re
import warnings

import pytest
import torch
from torch import nn

from memattn.nn import DomainGate, ShiftableMultiheadAttention, ShiftableTransformerBlock
from memattn.testing import assert_within_budget

EQUAL = dict(rtol=1e-11, atol=1e-12)  # float64, another order of sums
B, T, E, H = 2, 6, 8, 2
RIGHT = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
LEFT = RIGHT.flip(1)
GAP = torch.tensor([[False] * 6, [False, True, True, False, False, True]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(T)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shake(module, size=0.3):
    """Weights that no initialisation has, biases among them."""
    for n, parameter in enumerate(module.parameters()):
        with torch.no_grad():
            parameter.add_(size * draw(*parameter.shape, seed=n).to(parameter))
    return module


def make_layer(**options):
    torch.manual_seed(0)
    options = dict(dropout=0.3, batch_first=True) | options
    return shake(nn.TransformerEncoderLayer(E, H, 16, **options)).eval()


def shift(module, n=2, **gate):
    """A module of ours around a layer or an attention, with open specialists that differ."""
    torch.manual_seed(1)
    module = copy.deepcopy(module)
    given = DomainGate(E, gate_size=4, **gate)
    if isinstance(module, nn.MultiheadAttention):
        block = attention = ShiftableMultiheadAttention(
            E, H, module, gate=given.to(module.out_proj.weight)
        )
    else:
        block = ShiftableTransformerBlock.from_layer(module, gate=given.to(module.linear1.weight))
        attention = block.self_attn
    for _ in range(n):
        name = attention.add_specialist(prior=1.0)
        for p in attention.specialist_parameters(name):
            p.data += 0.3 * draw(*p.shape, seed=len(name) + p.numel()).to(p)
    return block


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


def each_alone(module):
    """The base and every specialist of a module as PyTorch's attention."""
    names = dict(q="q_proj_weight", k="k_proj_weight", v="v_proj_weight")
    found = [module.base]
    for name in module.gate.specialists:
        own, other = module.specialists[name], copy.deepcopy(module.base).requires_grad_(True)
        with torch.no_grad():
            if other._qkv_same_embed_dim:
                other.in_proj_weight.copy_(torch.cat([own.q_weight, own.k_weight, own.v_weight]))
            else:
                for n, at in names.items():
                    getattr(other, at).copy_(getattr(own, f"{n}_weight"))
            if other.in_proj_bias is not None:
                other.in_proj_bias.copy_(torch.cat([own.q_bias, own.k_bias, own.v_bias]))
                other.out_proj.bias.copy_(own.out_bias)
            other.out_proj.weight.copy_(own.out_weight)
        found.append(other)
    return found


HEADS = draw(B * H, T, T, seed=5)
CALLS = {
    "plain": (dict(), dict()),
    "causal": (dict(), dict(attn_mask=CAUSAL, is_causal=True)),
    "right": (dict(), dict(key_padding_mask=RIGHT)),
    "left-causal": (
        dict(),
        dict(
            key_padding_mask=torch.zeros(B, T).masked_fill(LEFT, -torch.inf),
            attn_mask=CAUSAL,
            is_causal=True,
        ),
    ),
    "added": (dict(), dict(key_padding_mask=torch.zeros(B, T).masked_fill(RIGHT, -torch.inf))),
    "gap": (dict(bias=False), dict(key_padding_mask=GAP)),
    "any": (dict(), dict(attn_mask=(HEADS[0] > 1.0).fill_diagonal_(False), key_padding_mask=RIGHT)),
    "heads": (dict(batch_first=False), dict(attn_mask=HEADS)),
    "sizes": (dict(kdim=5, vdim=3), dict()),
    "across": (dict(), dict(key_padding_mask=RIGHT)),
    "one": (dict(batch_first=False), dict()),
}


@pytest.mark.parametrize("name", CALLS)
def test_output_is_the_gated_sum_of_separate_attentions(name):
    """Values and all gradients in float64; with three slots, one and all; attention weights too."""
    sizes, masks = CALLS[name]
    torch.manual_seed(0)
    base = shake(nn.MultiheadAttention(E, H, **dict(batch_first=True) | sizes)).double()
    masks = {n: m.double() if torch.is_tensor(m) and m.is_floating_point() else m
             for n, m in masks.items()}  # fmt: skip
    shape = [T, E] if name == "one" else [T, B, E] if name == "heads" else [B, T, E]
    query = draw(*shape, dtype=torch.float64).requires_grad_()
    key, value = query, query
    if name in ("sizes", "across"):
        key, value = (draw(B, T, n, seed=n).double() for n in (5, 3)) if name == "sizes" else (
            draw(B, T, E, seed=3).double(), draw(B, T, E, seed=4).double())  # fmt: skip
    for top_k in (None, 1, 2):
        module = shift(base, n=3, top_k=top_k).train()
        out, attention, gates = module(query, key, value, **masks, return_gates=True)
        alone = each_alone(module)
        results = [attend(query, key, value, **masks) for attend in alone]
        torch.testing.assert_close(attention, results[0][1], rtol=0, atol=0, equal_nan=True)
        outs = torch.stack([r[0] for r in results], -1)
        shares = gates.gates[0] if name == "one" else gates.gates
        shares = shares.transpose(0, 1) if name == "heads" else shares
        if "key_padding_mask" in masks and key is query:
            hidden = {"gap": GAP, "left-causal": LEFT}.get(name, RIGHT)
            assert not shares[hidden].any()
            only = torch.tensor([1.0, 0, 0, 0]).double()
            shares = torch.where(hidden[..., None], only, shares)
        expected = (outs * shares[..., None, :]).sum(-1)
        cotangent = draw(*out.shape, seed=9).double()
        rows = shares.sum(-1) > 0
        if name == "left-causal":  # what precedes a sequence sees nothing
            rows = rows & ~LEFT
        torch.testing.assert_close(out[rows], expected[rows], **EQUAL)
        if name == "left-causal":
            continue
        grads = []
        for result, parameters in (
            (out, [module.specialists[n] for n in module.gate.specialists]), (expected, alone[1:])
        ):  # fmt: skip
            weights = [*(p.out_weight if hasattr(p, "out_weight") else p.out_proj.weight
                         for p in parameters)]  # fmt: skip
            grads.append(
                torch.autograd.grad(  # zeros for a specialist that no token uses
                    *((result * cotangent).sum(), [query, *weights]),
                    retain_graph=True,
                    materialize_grads=True,
                )
            )
        for actual, wanted in zip(*grads, strict=True):
            torch.testing.assert_close(actual, wanted, **EQUAL)
        assert all(p.grad is None and not p.requires_grad for p in module.base.parameters())


def test_the_fused_path_keeps_the_error_rule_and_one_hot_gates_are_one_branch():
    torch.manual_seed(0)
    module = shift(shake(nn.MultiheadAttention(E, H, batch_first=True)))
    x = draw(B, T, E)
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]])
    results = {}
    for dtype in (torch.float32, torch.float64):
        own = module.to(dtype)
        outs = torch.stack(
            [attend(x.to(dtype), *[x.to(dtype)] * 2)[0] for attend in each_alone(own)], -1
        )
        given = x.to(dtype)
        fused = own(given, given, given, domain_weights=weights)[0]
        results[dtype] = (fused, (outs * weights[:, None, None].to(dtype)).sum(-1))
        for b in range(B):  # together and apart
            row = given[b : b + 1]
            apart = own(row, row, row, domain_weights=weights[b : b + 1])[0]
            torch.testing.assert_close(apart, fused[b : b + 1])
    assert_within_budget("out", results[torch.float32][0], results[torch.float32][1],
                         results[torch.float64][1])  # fmt: skip
    torch.testing.assert_close(results[torch.float64][0][1], outs[1, ..., 2], **EQUAL)


@pytest.mark.parametrize("rank", [None, 2])
def test_specialists_begin_as_copies_and_are_trained_exported_and_removed_alone(rank):
    """Opening one moves the output by rounding alone; a step changes it and nothing else."""
    torch.manual_seed(0)
    base = shake(nn.MultiheadAttention(E, H, batch_first=True, dropout=0.5))
    module = ShiftableMultiheadAttention(E, H, base, 2, rank=rank).train()
    x = draw(B, T, E)
    lower = nn.Linear(E, E)
    with torch.no_grad():
        expected = base.eval()(x, x, x)[0]
    assert torch.equal(module(x, x, x)[0], expected)
    module.gate.set_prior("specialist_1", 1.0)
    torch.testing.assert_close(module(x, x, x)[0], expected)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    optimizer = torch.optim.SGD(module.specialist_parameters("specialist_1"), lr=0.5)
    for _ in range(2):
        hidden = lower(x)
        out = module(hidden, hidden, hidden)[0]
        optimizer.zero_grad()
        out.square().sum().backward()
        optimizer.step()
    assert lower.weight.grad.any()
    for name, tensor in module.state_dict().items():
        is_own = "specialist_1" in name and not name.endswith(("prior", "k_bias"))
        assert torch.equal(tensor, before[name]) != is_own or "k_bias" in name, name
    # it goes to another model with the same base, closed specialists and all
    other = ShiftableMultiheadAttention(E, H, copy.deepcopy(base), 1, rank=rank)
    other.load_specialist_state("specialist_0", module.export_specialist_state("specialist_1"))
    assert torch.equal(other(x, x, x)[0], module(x, x, x)[0])
    module.remove_specialist("specialist_1")
    assert torch.equal(module(x, x, x)[0], expected)
    fresh = ShiftableMultiheadAttention(E, H, base, 1, rank=3)
    with pytest.raises(ValueError, match="state must be of this model, with .* as"):
        fresh.load_specialist_state("specialist_0", other.export_specialist_state("specialist_0"))
    with pytest.raises(ValueError, match="name must be a specialist: specialist_0, got 'sql'"):
        module.export_specialist_state("sql")


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
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    masks = dict(src_mask=CAUSAL, is_causal=True)
    torch.testing.assert_close(compiled(x, **masks), block(x, **masks))
    low = copy.deepcopy(block).bfloat16()(x.bfloat16())
    layer = make_layer().bfloat16()  # the rounding of the layer alone
    error = (layer(x.bfloat16()).float() - make_layer()(x)).abs().max()
    assert low.dtype == torch.bfloat16 and (low.float() - expected).abs().max() <= 2 * error


WRONG = {
    "base_mha must have embed_dim=d_model=16, got 8": lambda a: ShiftableMultiheadAttention(
        16, 2, a
    ),
    "base_mha must have num_heads=4, got 2": lambda a: ShiftableTransformerBlock(8, 4, 16, a),
    "base_mha must be an nn.MultiheadAttention, got NonDyn": lambda a: ShiftableTransformerBlock(
        8, 2, 16, a.out_proj
    ),
    "base_mha must have dim_feedforward=32, got 16": lambda a: ShiftableTransformerBlock(
        8, 2, 32, make_layer()
    ),
    "dropout must be None where base_mha is a layer": lambda a: ShiftableTransformerBlock(
        8, 2, 16, make_layer(), dropout=0.1
    ),
    "base_mha must be a layer without specialists": lambda a: ShiftableTransformerBlock.from_layer(
        ShiftableTransformerBlock.from_layer(make_layer())
    ),
    "base_mha must have no add_bias_kv": lambda a: ShiftableMultiheadAttention(
        8, 2, nn.MultiheadAttention(8, 2, add_bias_kv=True)
    ),
    "gate must have hidden_size=8 and no specialists yet": lambda a: ShiftableMultiheadAttention(
        8, 2, a, gate=DomainGate(8, 1)
    ),
    "rank must be at least 1": lambda a: ShiftableMultiheadAttention(8, 2, a, 1, rank=0),
    "scope must be token or prefix in a causal model": lambda a: shift(a, scope="sequence")(
        *[draw(B, T, E)] * 3, attn_mask=CAUSAL
    ),
    "prior must have shape [3] or [B=2, 3], got []": lambda a: shift(a)(
        *[draw(B, T, E)] * 3, domain_prior=torch.tensor(1.0)
    ),
    "override must be at least 0 and sum to 1": lambda a: shift(a)(
        *[draw(B, T, E)] * 3, domain_weights=torch.tensor([[0.5, 0.0, 0.0]] * B)
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_names_the_wrong_argument(message):
    errors = (ValueError, TypeError, NotImplementedError)
    with pytest.raises(errors, match=re.escape(message)):
        WRONG[message](nn.MultiheadAttention(8, 2, batch_first=True))
