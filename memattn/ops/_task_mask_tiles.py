"""Tiles of a task mask: their bits, their classes, and the lists of those that hold pairs."""

import math

import torch
from torch import Tensor

TILE = 128  # queries and keys of a tile
WORD = 32  # queries in one word of bits


def pack_queries(mask: Tensor) -> Tensor:
    """Bits of bool ``[T, S]``, eight queries in a byte: uint8 ``[n_q, TILE / 8, n_k, TILE]``."""
    T, S = mask.shape
    n_q, n_k = math.ceil(T / TILE), math.ceil(S / TILE)
    if (n_q * TILE, n_k * TILE) != (T, S):
        mask = torch.nn.functional.pad(mask, (0, n_k * TILE - S, 0, n_q * TILE - T))
    rows = mask.contiguous().view(torch.uint8).view(n_q * TILE // 8, 8, n_k * TILE)
    for shift in (1, 2, 4):
        rows = rows[:, 0::2] | (rows[:, 1::2] << shift)
    return rows.view(n_q, TILE // 8, n_k, TILE)


def classify(packed: Tensor, T: int, S: int) -> Tensor:
    """0 for an empty tile, 1 for a full one, 2 for the others: int8 ``[n_q, n_k]``."""
    n_q, _, n_k, _ = packed.shape
    device = packed.device
    inside = torch.arange(n_q * TILE, device=device) < T
    whole = pack_queries(inside[:, None])[:, :, 0, :1]  # [n_q, TILE / 8, 1]
    is_key = (torch.arange(n_k * TILE, device=device) < S).view(1, 1, n_k, TILE)
    some = packed.amax((1, 3)) > 0
    missing = (packed != whole[:, :, None]) & is_key
    return torch.where(some, torch.where(missing.any(3).any(1), 2, 1), 0).to(torch.int8)


def classify_graph(edges: Tensor, query_node: Tensor, key_node: Tensor) -> Tensor:
    """The same from a graph: int8 ``[N, H, n_q, n_k]``."""
    queries, keys = (_presence(node, edges.shape[-1]) for node in (query_node, key_node))
    dtype = queries.dtype
    some = queries @ edges.to(dtype) @ keys.mT > 0
    missing = queries @ (~edges).to(dtype) @ keys.mT > 0
    return torch.where(some, torch.where(missing, 2, 1), 0).to(torch.int8)


def _presence(node: Tensor, G: int) -> Tensor:
    """1 where a tile has a node, else 0: float32 ``[n_tiles, G]``."""
    tile = torch.arange(node.numel(), device=node.device) // TILE
    present = torch.zeros(int(tile[-1]) + 1, G, device=node.device)
    present[tile, node.long()] = 1.0
    return present


def pack_words(rows: Tensor) -> Tensor:
    """Bits of bool ``[R, n]``: int32 ``[R, ceil(n / 32)]``."""
    R, n = rows.shape
    words = math.ceil(n / WORD)
    padded = torch.nn.functional.pad(rows, (0, words * WORD - n)).view(R, words, WORD)
    factors = 1 << torch.arange(WORD, device=rows.device)
    values = (padded * factors).sum(-1)  # int64
    return torch.where(values >= 1 << 31, values - (1 << 32), values).to(torch.int32)


def lists(classes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tiles in reach and their counts, by tiles of queries and by tiles of keys."""
    return *_list(classes), *_list(classes.mT)


def _list(classes: Tensor) -> tuple[Tensor, Tensor]:
    # full tiles first, then partial ones, then those in no list
    order = torch.tensor([2, 0, 1], device=classes.device)[classes.long()]
    tiles = order.sort(dim=-1, stable=True).indices.to(torch.int32)
    counts = torch.stack([(classes == kind).sum(-1) for kind in (1, 2)], -1).to(torch.int32)
    return tiles.contiguous(), counts.contiguous()
