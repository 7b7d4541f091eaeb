"""Rows of several documents, for the tests of packing."""

import torch

EXACT = dict(rtol=0, atol=1e-12)
LENGTHS = [[4, 1, 11, 7], [12, 11]]  # of the documents in each row
T = 23


def count(lengths):
    """Positions of rows of documents."""
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])


def documents(x, lengths=LENGTHS):
    """The documents of all rows, ``[1, n, ...]`` each."""
    return [part[None] for row, n in zip(x, lengths, strict=True) for part in row.split(n)]
