"""Future attention as layers: makers, calls, and its definition in plain loops."""

import math

import torch

from memattn.nn import (
    FutureAttention,
    FutureComputed,
    RotaryEmbedding,
    apply_rotary,
    sequence_positions,
)

E, F_DIM, N_CTX = 32, 5, 24


def make_attention(source="table", **options):
    """A layer with random weights of the size of its activations, so that future keys count."""
    torch.manual_seed(0)
    sizes = dict(future_dim=F_DIM, num_positions=N_CTX, source_rank=3) | options
    attention = FutureAttention(E, 4, source=source, **sizes).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return attention


def make_hidden(B=2, T=N_CTX, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, E, generator=generator, dtype=torch.float64)


def run(attention, hidden, *, rope=True, offset=0, **inputs):
    """Call the layer as the decoder does."""
    if rope:
        rotary = RotaryEmbedding(attention.head_dim)
        inside = {name: inputs.get(name) for name in ("seq_start", "cu_seqlens")}
        positions = sequence_positions(hidden, offset=offset, **inside)
        ahead = attention.future_positions(hidden, offset=offset)
        inputs["rotary"] = rotary(positions, hidden.dtype)
        inputs["future_rotary"] = rotary(ahead, hidden.dtype)
    return attention(hidden, **inputs)


def turn(states, positions, rope):
    """Rotate ``[..., n, D]`` by the given positions."""
    if not rope:
        return states
    cos, sin = RotaryEmbedding(states.shape[-1])(torch.tensor([positions]), states.dtype)
    return apply_rotary(states, cos[0], sin[0])


def row(attention, table, proj, hidden, i, p):
    """The future key or value of one sequence for position ``p``, seen from ``i``, ``[H, D]``."""
    source = attention.future
    if source.future_index == "distance":
        return table[:, p - i - 1]
    states = table[:, p - 1]
    if isinstance(source, FutureComputed) and p >= attention.future_dim:
        token = source.down_proj(hidden[p - attention.future_dim])
        states = states + getattr(source, proj)(token).view(len(table), -1)
    return states


def plain_attention(attention, hidden, *, rope):
    """Hidden states and loss of one sequence ``[T, E]``, query by query and key by key."""
    T, D, source = len(hidden), attention.head_dim, attention.future
    q, k, v = (
        proj(hidden).view(T, -1, D).transpose(0, 1)
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
    q, k = (turn(t, list(range(T)), rope) for t in (q, k))
    endless = source.future_index == "distance"
    out, rows = torch.zeros_like(q), []
    for i in range(T):
        ahead = [p for p in range(i + 1, i + attention.future_dim + 1) if endless or p < N_CTX]
        keys, values = k[:, : i + 1], v[:, : i + 1]
        if ahead:
            future_key, future_value = (
                torch.stack([row(attention, table, proj, hidden, i, p) for p in ahead], 1)
                for table, proj in ((source.key, "key_proj"), (source.value, "value_proj"))
            )
            keys = torch.cat([keys, turn(future_key, ahead, rope)], 1)
            values = torch.cat([values, future_value], 1)
        weights = (q[:, i : i + 1] @ keys.mT / math.sqrt(D)).softmax(-1)
        out[:, i : i + 1] = weights @ values
        if ahead and ahead[-1] < T:
            true = (q[:, i : i + 1] @ k[:, : ahead[-1] + 1].mT / math.sqrt(D)).softmax(-1)
            target = (true[..., i + 1 :] @ v[:, i + 1 : ahead[-1] + 1]).detach()
            rows.append((weights[..., i + 1 :] @ values[:, i + 1 :], target))
    return attention.o_proj(out.transpose(0, 1).flatten(1)), rows
