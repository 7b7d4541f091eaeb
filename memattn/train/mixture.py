"""Mix documents of another text into the training text."""

import random
from pathlib import Path
from typing import Any

import torch

from memattn.checks import must
from memattn.data.document import Document
from memattn.data.documents import load_documents, split_documents
from memattn.data.tokenizer import tokenize_documents
from memattn.data.tokens import Tokens
from memattn.train.config import DataConfig

_PIECE = 500  # documents to tokenize at once


def mix_tokens(tokens: Tokens, data: DataConfig, tokenizer: Any) -> Tokens:
    """Append documents of ``data.mix_in``, so that they are ``data.mix_share`` of all tokens.

    Documents are drawn by ``data.split_seed``; the last one is cut. Documents that a run on that
    text with the same ``held_out`` and ``split_seed`` would hold out are not used. ``domains`` is 0
    for them and 1 for the specialist text; ``domain_weights`` give all tokens of domain 0 together
    ``data.mix_weight`` times the weight of those of domain 1.

    Raises:
        ValueError: If the other text is too short, and what ``load_documents`` raises.
        FileNotFoundError, ImportError, ConnectionError: As ``load_documents`` does.
    """
    wanted = round(data.mix_share / (1.0 - data.mix_share) * len(tokens.ids))
    split = split_documents(load_mixed_in(data), data.held_out, seed=data.split_seed)
    documents: list[Document] = split.train
    random.Random(data.split_seed).shuffle(documents)
    pieces, found = [tokens], 0
    for first in range(0, len(documents), _PIECE):
        if found >= wanted:
            break
        pieces.append(tokenize_documents(documents[first : first + _PIECE], tokenizer))
        found += len(pieces[-1].ids)
    if found < wanted:
        possible = found / (found + len(tokens.ids))
        must("data.mix_share", f"be at most {possible:.3g} with so short a mix_in", data.mix_share)
    mixed = _joined(pieces, len(tokens.ids) + wanted, tokenizer)
    domains = torch.zeros(mixed.num_documents, dtype=torch.int64)
    domains[: tokens.num_documents] = 1
    # a token is weighted by the inverse of its text's share, so that both texts have equal totals
    shares = torch.tensor([data.mix_share, 1.0 - data.mix_share])
    weights = torch.tensor([data.mix_weight, 1.0]) / (2.0 * shares)
    return mixed._replace(domains=domains, domain_weights=weights)


def load_mixed_in(data: DataConfig) -> list[Document]:
    """The documents of ``data.mix_in``; ``document_separator`` cuts its text files.

    Raises:
        ValueError, FileNotFoundError, ImportError, ConnectionError: As ``load_documents`` does.
    """
    assert data.mix_in is not None
    sources = [data.mix_in] if isinstance(data.mix_in, str) else data.mix_in
    return [
        document
        for source in sources
        for document in load_documents(
            source,
            text_field=data.text_field,
            separator=data.document_separator if Path(source).expanduser().is_file() else None,
            cache_dir=data.cache_dir,
        )
    ]


def _joined(pieces: list[Tokens], length: int, tokenizer: Any) -> Tokens:
    """Concatenate the pieces, cut after ``length`` tokens."""
    last = pieces[-1]
    spare = sum(len(piece.ids) for piece in pieces) - length
    kept = last.ids[: len(last.ids) - spare]
    bounds = last.bounds[last.bounds < len(kept)]
    text = tokenizer.decode(kept.tolist(), skip_special_tokens=True)
    cut = torch.tensor([*bounds.tolist(), len(kept)], dtype=torch.int64)
    pieces = [*pieces[:-1], Tokens(kept, cut, len(text.encode("utf-8", "replace")))]
    starts, all_bounds = 0, [torch.zeros(1, dtype=torch.int64)]
    for piece in pieces:
        all_bounds.append(piece.bounds[1:] + starts)
        starts += len(piece.ids)
    return Tokens(
        torch.cat([piece.ids for piece in pieces]),
        torch.cat(all_bounds),
        sum(piece.num_bytes for piece in pieces),
    )
