"""MAC, and its one-call relative: against a plain loop over tokens, and what is theirs alone."""

import math

import pytest
import torch
from model_factories import enable_checkpointing, logits_of, make_model, make_tokens, pad_left
from torch.nn import functional as F

from memattn.models import MemAttnCache
from memattn.viz.attention import attention_mass

SHORT = dict(segment_len=6, chunk_size=3, num_hidden_layers=1)  # two chunks in a segment


def captured(model, embeds):
    """What the attention part of the first layer gets and returns."""
    found = []
    hook = lambda module, args, out: found.append((args[0], out))
    handle = model.model.layers[0].attention.register_forward_hook(hook)
    with torch.no_grad():
        model(inputs_embeds=embeds, use_cache=False)
    handle.remove()
    return found[0]


def norm(x, weight=1.0, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotated(x, t):
    """A head's vector at position t."""
    half = len(x) // 2
    angle = t * 10000.0 ** (-2 * torch.arange(half, dtype=x.dtype) / len(x))
    first, second = x[:half], x[half:]
    turned = first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()
    return torch.cat(turned)


class MemoryByHand:
    """The memory of one sequence, token by token, with gradients by autograd."""

    def __init__(self, layer, chunk):
        self.layer, self.chunk, self.count = layer, chunk, 0
        self.heads = range(layer.num_heads)
        self.weights = [[w[h].detach() for w in layer.memory_weights] for h in self.heads]
        self.moved = [[torch.zeros_like(w) for w in head] for head in self.weights]
        self.past = {}  # inputs of the convolutions by name

    def projected(self, name, x, kind):
        """SiLU of a filtered projection, by heads; queries and keys have length 1."""
        past = self.past.setdefault(name, [])
        past.append(getattr(self.layer, f"{kind}_proj").weight @ x)
        filters = getattr(self.layer, f"{kind}_conv").weight
        out = sum(w * past[-1 - back] for back, w in enumerate(filters.T.flip(0)[: len(past)]))
        out = F.silu(out).view(self.layer.num_heads, -1)
        return out if kind == "v" else F.normalize(out, dim=-1)

    def network(self, weights, x):
        return weights[1] @ F.gelu(weights[0] @ x)

    def given(self, reads, x):
        """What the layer makes of the heads' reads for a token."""
        out = torch.cat([norm(read, self.layer.norm.weight) for read in reads])
        return self.layer.o_proj.weight @ (out * (self.layer.gate_proj.weight @ x).sigmoid())

    def learn(self, y):
        """Write a token, and read it with its own query."""
        if self.count % self.chunk == 0:
            self.begun = [list(head) for head in self.weights]
        self.count += 1
        query, key, value = (self.projected(kind, y, kind) for kind in "qkv")
        rates = self.layer.rate_proj(y).sigmoid().view(3, -1)
        reads = []
        for h in self.heads:
            lr, momentum, decay = rates[:, h]
            with torch.enable_grad():
                at = [w.clone().requires_grad_() for w in self.begun[h]]
                loss = (self.network(at, key[h]) - value[h]).square().sum() / 2
                update = torch.autograd.grad(loss, at)
            size = torch.stack([u.square().sum() for u in update]).sum().sqrt()
            clamp = min(1.0, 1.0 / size.item())  # max_norm
            for n, u in enumerate(update):
                self.moved[h][n] = momentum * self.moved[h][n] - lr * clamp * u
                self.weights[h][n] = (1 - decay) * self.weights[h][n] + self.moved[h][n]
            reads.append(self.network(self.weights[h], query[h]))
        return self.given(reads, y)


@torch.no_grad()
def mac_by_hand(layer, x, segment, chunk):
    """Output of MAC for one sequence ``[T, E]``, and mean mass of its sources for each head."""
    attention, memory = layer.attention, MemoryByHand(layer.memory, chunk)
    D, H = attention.head_dim, attention.num_heads
    by_heads = lambda proj, x: (proj.weight @ x).view(-1, D)
    outputs, masses = [], []
    for t, token in enumerate(x):
        if t % segment == 0:
            begun, seen = [list(head) for head in memory.weights], []
            memory.past.pop("longterm", None)
            for learned in layer.longterm.tokens:
                query = memory.projected("longterm", learned, "q")
                read = [memory.network(begun[h], query[h]) for h in memory.heads]
                for states in (learned, memory.given(read, learned)):
                    projections = (attention.k_proj, attention.v_proj)
                    keys, values = (by_heads(proj, states) for proj in projections)
                    seen.append((3, keys, values))  # at no position
        query = memory.projected("read", token, "q")
        read = [memory.network(begun[h], query[h]) for h in memory.heads]
        for source, states in enumerate((token, memory.given(read, token))):
            keys, values = by_heads(attention.k_proj, states), by_heads(attention.v_proj, states)
            seen.append((source, [rotated(key, t) for key in keys], values))
        query, out, mass = by_heads(attention.q_proj, token), [], torch.zeros(4, H)
        for h in range(H):
            kv = h * attention.num_kv_heads // H
            keys = [k[kv] for _, k, _ in seen] + list(attention.persistent_key[kv])
            values = [v[kv] for _, _, v in seen] + list(attention.persistent_value[kv])
            sources = [source for source, _, _ in seen] + [2] * attention.num_persistent_tokens
            weights = (torch.stack(keys) @ rotated(query[h], t) / math.sqrt(D)).softmax(0)
            out.append(weights @ torch.stack(values))
            for source, weight in zip(sources, weights.tolist(), strict=True):
                mass[source, h] += weight
        y = attention.o_proj.weight @ torch.cat(out)
        gate = norm(memory.learn(y), layer.gate.gate_norm.weight).sigmoid()
        outputs.append(norm(y, layer.gate.value_norm.weight) * gate)
        masses.append(mass)
    return torch.stack(outputs), torch.stack(masses).mean(0)


@pytest.mark.parametrize("chunk", [6, 3])
def test_mac_is_the_loop_over_tokens(chunk):
    model = make_model("titans-mac", **SHORT | dict(chunk_size=chunk))
    x, out = captured(model, torch.randn(1, 14, 32, dtype=torch.float64))
    expected, masses = mac_by_hand(model.model.layers[0].attention, x[0], 6, chunk)
    torch.testing.assert_close(out[0], expected, rtol=0, atol=1e-12)
    if chunk == 6:
        ids = make_tokens(B=1, T=14)
        x, _ = captured(model, model.get_input_embeddings()(ids))
        _, masses = mac_by_hand(model.model.layers[0].attention, x[0], 6, chunk)
        found = attention_mass(model, ids)
        assert tuple(found) == ("tokens", "memory", "persistent", "longterm")
        for mass, expected in zip(found.values(), masses, strict=True):
            torch.testing.assert_close(mass[0].float(), expected)


def test_parallel_memory_is_attention_over_tokens_and_what_it_gives():
    model = make_model("titans-mac_parallel", num_hidden_layers=1)
    x, out = captured(model, torch.randn(2, 21, 32, dtype=torch.float64))
    layer = model.model.layers[0].attention
    attention, T = layer.attention, x.shape[1]
    with torch.no_grad():
        remembered = layer.memory(x).out
        heads = lambda proj, x: proj(x).unflatten(-1, (-1, 8)).transpose(1, 2)
        turned = lambda x: torch.stack([rotated_rows(x, t) for t in range(T)], 2)
        rotated_rows = lambda x, t: torch.stack(
            [torch.stack([rotated(head[t], t) for head in row]) for row in x]
        )
        query = turned(heads(attention.q_proj, x))
        keys = [turned(heads(attention.k_proj, states)) for states in (x, remembered)]
        values = [heads(attention.v_proj, states) for states in (x, remembered)]
        for found, persistent in ((keys, "key"), (values, "value")):
            found.append(getattr(attention, f"persistent_{persistent}").expand(2, -1, -1, -1))
        key, value = (torch.cat(found, 2).repeat_interleave(2, 1) for found in (keys, values))
        i, j = torch.arange(T)[:, None], torch.arange(T)
        seen = (j <= i) & (i // 9 == j // 9)
        seen = torch.cat([seen, seen, torch.ones(T, 2, dtype=torch.bool)], 1)
        scores = (query @ key.mT / math.sqrt(8)).masked_fill(~seen, -math.inf)
        y = attention.o_proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        gate = norm(remembered, layer.gate.gate_norm.weight).sigmoid()
        expected = norm(y, layer.gate.value_norm.weight) * gate
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    masses = attention_mass(model, make_tokens())
    assert sum(masses.values()).sub(1.0).abs().max() < 1e-12 and masses["memory"].min() > 0.0


def test_a_crop_goes_back_into_the_segment_before():
    model, tokens = make_model("titans-mac", **SHORT), make_tokens(T=30)
    mask = torch.ones(2, 30)
    mask[0, :4] = 0
    expected = logits_of(model, tokens, attention_mask=mask)
    cache = MemAttnCache(model.config)
    run = lambda ids, **options: model(ids, past_key_values=cache, **options).logits
    with torch.no_grad():
        run(tokens[:, :11], attention_mask=mask[:, :11])
        cache.activate_past_recording()
        for begin, right, wrong in ((11, 1, 3), (12, 1, 1), (13, 6, 0), (19, 0, 3), (19, 2, 2)):
            end = begin + right
            guess = torch.cat([tokens[:, begin:end], make_tokens(T=wrong, seed=7)], 1)
            actual = run(guess)[:, :right]
            torch.testing.assert_close(actual, expected[:, begin:end], rtol=0, atol=1e-12)
            cache.crop(-wrong)
        torch.testing.assert_close(run(tokens[:, 21:]), expected[:, 21:], rtol=0, atol=1e-12)


def test_gradients_go_through_all_segments():
    torch.manual_seed(0)
    model = make_model("titans-mac", **SHORT | dict(segment_len=2, chunk_size=1), head_dim=2)
    embeds = torch.randn(1, 5, 32, dtype=torch.float64)
    basis = torch.randn(3, *embeds.shape, dtype=torch.float64) / 5
    weight = model.model.layers[0].attention.memory.memory_weights[0]
    direction = torch.randn_like(weight) / 5

    def outputs(along, step):
        moved = embeds + (along[:, None, None, None] * basis).sum(0)
        named = {"model.layers.0.attention.memory.memory_weights.0": weight + step * direction}
        options = dict(inputs_embeds=moved, use_cache=False)
        return torch.func.functional_call(model, named, kwargs=options).logits[:, 1:, :3]

    along, step = (torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in ((3,), ()))
    assert torch.autograd.gradcheck(outputs, (along, step))
    first = torch.randn(1, 5, 32, dtype=torch.float64, requires_grad=True)
    model(inputs_embeds=first, use_cache=False).logits[:, -1].sum().backward()
    assert first.grad[0, 0].abs().min() > 0.0  # two segments back


def test_checkpointing_gives_equal_gradients():
    tokens, mask = pad_left([make_tokens(T=14)[0], make_tokens()[1, :9]], 14)
    grads = []
    for checkpointing in (False, True):
        model = make_model("titans-mac", **SHORT).train()
        if checkpointing:
            enable_checkpointing(model)
        model(tokens, attention_mask=mask, labels=tokens).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_documents_of_any_length_and_empty_ones():
    for variant in ("mac", "mac_parallel"):
        model = make_model(f"titans-{variant}", **SHORT)
        lengths = [2, 0, 13, 6]
        tokens = make_tokens(B=1, T=sum(lengths))
        cu_seqlens = torch.tensor([0, 2, 2, 15, 21], dtype=torch.int32)
        packed = logits_of(model, tokens, cu_seqlens=cu_seqlens)
        for part, actual in zip(tokens.split(lengths, 1), packed.split(lengths, 1), strict=True):
            if part.numel():
                expected = logits_of(model, part)
                torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
