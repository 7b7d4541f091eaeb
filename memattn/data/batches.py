"""Batches of training rows. Each depends on (tokens, seed, index) only: a position resumes them.

Training reads an endless stream in which each epoch has every token once, in an order drawn from
``(seed, epoch)``. Batch ``i`` of all processes together is a fixed piece of that stream, cut by
rank: n processes see what one process with n times the batch size sees.
"""

import hashlib
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from memattn.checks import check_int, must
from memattn.data.tokens import Tokens

IGNORE = -100  # the label that transformers' losses leave out

Batch = dict[str, Tensor]


class Batches(ABC):
    """An endless iterator over the batches of one process, which can be resumed anywhere.

    If ``tokens`` has ``domains``, a batch has ``domain_labels`` (int64): the domain of each token,
    ``[1, T]``, if rows are packed, else of each row, ``[B, 1]``. If ``tokens`` has
    ``domain_weights``, ``domain_label_weights`` has the weight of each of these labels.

    Args:
        tokens: A tokenized corpus.
        batch_size: Rows of one process.
        seq_len: Tokens in a row.
        seed: Seed of the order of the documents.
        shuffle: Whether each epoch has a random order; otherwise every epoch has that of
            ``tokens``.
        rank: Index of this process.
        world_size: Number of processes.

    Raises:
        ValueError: If a size is below 1, or ``rank`` is not below ``world_size``.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ):
        check_int("batch_size", batch_size, 1)
        check_int("seq_len", seq_len, 2)
        check_int("world_size", world_size, 1)
        check_int("rank", rank, 0)
        if rank >= world_size:
            must("rank", f"be below world_size={world_size}", rank)
        self.tokens, self.seq_len = tokens, seq_len
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.position = 0  # rows that all processes have seen
        self._orders = lru_cache(maxsize=2)(self._draw_order)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        start, self.position = self.position, self.position + self.world_size * self.batch_size
        return self._rows(self._share(start), range(start, self.position), endless=True)

    def one_epoch(self) -> Iterator[Batch]:
        """The batches of one epoch, in the order of ``tokens`` where ``shuffle`` is False.

        Every process gets the same number of batches. The last one may be short. A process for
        which no row is left gets one without labels, since all must take part in collective
        operations.
        """
        step = self.world_size * self.batch_size
        for start in range(0, self.num_rows, step):
            rows_of_all = range(start, min(start + step, self.num_rows))
            share = self._share(start)
            rows = range(share.start, min(share.stop, self.num_rows))
            if rows:
                yield self._rows(rows, rows_of_all, endless=False)
            else:
                batch = self._rows(range(1), range(1), endless=False)
                batch["labels"].fill_(IGNORE)
                yield batch

    def state_dict(self) -> dict[str, int]:
        """The position: rows that all processes together have seen."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position, also with another number of processes."""
        check_int("position", state["position"], 0)
        self.position = state["position"]

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Rows in an epoch."""

    def _labels(self, first: int, stop: int) -> Tensor:
        """Tokens ``first`` to ``stop`` of the corpus as targets: -100 where there is none."""
        ids = self.tokens.ids[first:stop].long()
        if self.tokens.trained is None:
            return ids
        return ids.masked_fill(~self.tokens.trained[first:stop], IGNORE)

    def _packed(
        self, pieces: list[Tensor], targets: list[Tensor], documents: list[int], bounds: list[int]
    ) -> Batch:
        """One row of pieces of these documents; the first label of each is left out."""
        labels = torch.cat(targets)
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        labels[cu_seqlens[:-1].long()] = IGNORE
        ids = torch.cat(pieces).long()
        batch = {"input_ids": ids[None], "labels": labels[None], "cu_seqlens": cu_seqlens}
        if self.tokens.domains is not None:
            lengths = torch.tensor([len(piece) for piece in pieces])
            of_tokens = self.tokens.domains[documents].repeat_interleave(lengths)
            self._add_domains(batch, of_tokens[None])
        return batch

    def _add_domains(self, batch: Batch, labels: Tensor) -> None:
        """Add the domains of the rows or tokens, and their weights."""
        batch["domain_labels"] = labels
        if self.tokens.domain_weights is not None:
            batch["domain_label_weights"] = self.tokens.domain_weights[labels]

    @abstractmethod
    def _rows(self, rows: range, rows_of_all: range, *, endless: bool) -> Batch:
        """Rows of the stream, part of the ``rows_of_all`` ranks; or of one epoch."""

    @abstractmethod
    def _draw_order(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Order of the units of an epoch, and their cumulative lengths."""

    def _share(self, start: int) -> range:
        """The rows of this process, where those of all begin at ``start``."""
        first = start + self.rank * self.batch_size
        return range(first, first + self.batch_size)

    def _permutation(self, n: int, epoch: int | str) -> Tensor:
        """A permutation drawn from ``(seed, epoch)``; another text draws another one."""
        if not self.shuffle:
            return torch.arange(n)
        # hashed, since the generator reads 32 bits of its seed
        digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        return torch.randperm(n, generator=generator)


class PackedBatches(Batches):
    """Rows of documents one after another, all in one row ``[1, batch_size * seq_len]``.

    A document is cut where a row of ``seq_len`` tokens ends; its rest begins the next row.
    ``cu_seqlens`` (int32) has the bounds of these pieces. Each batch has the same number of tokens
    and each epoch every token once, so the next epoch may begin in the middle of a row. The first
    label of a piece is -100.

    Rows of an epoch come in random order too, except for the row in which the epoch ends:
    neighbouring rows are mostly of one document, so a batch of them adds little to one row.
    """

    def __init__(self, tokens: Tokens, **options: Any):
        super().__init__(tokens, **options)
        self._rows_are_drawn = True
        self._row_orders = lru_cache(maxsize=2)(self._draw_rows)

    def state_dict(self) -> dict[str, int]:
        """The position, and whether rows are drawn."""
        return super().state_dict() | {"rows_drawn": self._rows_are_drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position; where nothing says that rows are drawn, they are not, as they
        were not before 0.2.
        """
        super().load_state_dict(state)
        self._rows_are_drawn = bool(state.get("rows_drawn", False))

    @property
    def num_rows(self) -> int:
        return -(-len(self.tokens.ids) // self.seq_len)

    def _rows(self, rows: range, rows_of_all: range, *, endless: bool) -> Batch:
        n = len(self.tokens.ids)
        pieces: list[Tensor] = []
        targets: list[Tensor] = []
        documents: list[int] = []
        bounds = [0]
        for row in rows:
            at = self.seq_len * (self._drawn(row) if endless else row)
            stop = at + self.seq_len if endless else min(at + self.seq_len, n)
            while at < stop:
                order, ends = self._orders(at // n)
                place = int(torch.searchsorted(ends, at % n, right=True))
                left = int(ends[place]) - at % n  # tokens of the document from here on
                documents.append(int(order[place]))
                first = int(self.tokens.bounds[documents[-1] + 1]) - left
                length = min(left, stop - at)
                pieces.append(self.tokens.ids[first : first + length])
                targets.append(self._labels(first, first + length))
                at += length
                bounds.append(bounds[-1] + length)
        return self._packed(pieces, targets, documents, bounds)

    def _drawn(self, row: int) -> int:
        """The row of documents in a row that is read as the ``row``-th."""
        if not self._rows_are_drawn:
            return row
        first, order = self._row_orders(row * self.seq_len // len(self.tokens.ids))
        place = row - first
        return first + int(order[place]) if 0 <= place < len(order) else row

    def _draw_rows(self, epoch: int) -> tuple[int, Tensor]:
        """The first row that is in an epoch from end to end, and the order of these rows."""
        n = len(self.tokens.ids)
        first, last = -(-epoch * n // self.seq_len), (epoch + 1) * n // self.seq_len
        return first, self._permutation(max(0, last - first), f"rows {epoch}")

    def _draw_order(self, epoch: int) -> tuple[Tensor, Tensor]:
        lengths = self.tokens.bounds.diff()
        order = self._permutation(len(lengths), epoch)
        return order, lengths[order].cumsum(0)


class WholeBatches(Batches):
    """Rows of whole documents, all in one row ``[1, T]``: no document is cut.

    Documents are assigned to rows of at most ``seq_len`` tokens once, by best fit, longest first.
    An epoch has every row once. ``T`` differs from batch to batch. ``cu_seqlens`` (int32) has the
    bounds of the documents; the first label of each is -100.

    Raises:
        ValueError: If a document has more than ``seq_len`` tokens.
    """

    def __init__(self, tokens: Tokens, **options: Any):
        super().__init__(tokens, **options)
        lengths = tokens.bounds.diff()
        if int(lengths.max()) > self.seq_len:
            must("seq_len", f"be at least {int(lengths.max())}, the longest document", self.seq_len)
        self._bins = _fill_bins(lengths.tolist(), self.seq_len)
        self._sizes = torch.tensor([sum(int(lengths[i]) for i in bin) for bin in self._bins])

    @property
    def num_rows(self) -> int:
        return len(self._bins)

    def _rows(self, rows: range, rows_of_all: range, *, endless: bool) -> Batch:
        pieces, targets, documents, ends = [], [], [], [0]
        for index in rows:
            order, _ = self._orders(index // self.num_rows)
            for document in self._bins[int(order[index % self.num_rows])]:
                first, stop = self.tokens.bounds[document : document + 2].tolist()
                pieces.append(self.tokens.ids[first:stop])
                targets.append(self._labels(first, stop))
                documents.append(document)
                ends.append(ends[-1] + stop - first)
        return self._packed(pieces, targets, documents, ends)

    def _draw_order(self, epoch: int) -> tuple[Tensor, Tensor]:
        order = self._permutation(self.num_rows, epoch)
        return order, self._sizes[order].cumsum(0)


def _fill_bins(lengths: list[int], room: int) -> list[list[int]]:
    """Indices of the lengths in bins of at most ``room`` each: best fit, longest first."""
    bins: list[list[int]] = []
    open_bins: dict[int, list[int]] = {}  # by the room that is left
    rooms: list[int] = []  # its keys, in rising order
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(rooms, lengths[index])
        if place == len(rooms):
            number, left = len(bins), room
            bins.append([])
        else:
            left = rooms[place]
            number = open_bins[left].pop()
            if not open_bins[left]:
                del open_bins[left], rooms[place]
        bins[number].append(index)
        left -= lengths[index]
        if left not in open_bins:
            insort(rooms, left)
        open_bins.setdefault(left, []).append(number)
    return bins


class PaddedBatches(Batches):
    """One piece of a document in each row, padded on the right to the longest of all ranks.

    A document longer than ``seq_len`` tokens is cut into pieces; an epoch has every piece once.
    ``attention_mask`` is 1 on tokens; the first label of a row and those of padding are -100.

    Args:
        pad_token_id: Token that fills rows.
    """

    def __init__(self, tokens: Tokens, *, pad_token_id: int, **options: Any):
        super().__init__(tokens, **options)
        self.pad_token_id = pad_token_id
        begins, lengths = [], []
        bounds = zip(tokens.bounds[:-1].tolist(), tokens.bounds[1:].tolist(), strict=True)
        documents: list[int] = []  # of the pieces
        for document, (begin, end) in enumerate(bounds):
            begins += range(begin, end, self.seq_len)
            documents += [document] * (len(begins) - len(documents))
            lengths += [min(self.seq_len, end - at) for at in range(begin, end, self.seq_len)]
        self._begins, self._lengths = torch.tensor(begins), torch.tensor(lengths)
        self._documents = torch.tensor(documents)

    @property
    def num_rows(self) -> int:
        return len(self._begins)

    def _rows(self, rows: range, rows_of_all: range, *, endless: bool) -> Batch:
        width = max(int(self._lengths[self._piece(index)]) for index in rows_of_all)
        ids = torch.full((len(rows), width), self.pad_token_id)
        labels = torch.full_like(ids, IGNORE)
        attention_mask = torch.zeros_like(ids)
        for row, index in enumerate(rows):
            piece = self._piece(index)
            begin, length = int(self._begins[piece]), int(self._lengths[piece])
            ids[row, :length] = self.tokens.ids[begin : begin + length]
            labels[row, 1:length] = self._labels(begin + 1, begin + length)
            attention_mask[row, :length] = 1
        batch = {"input_ids": ids, "labels": labels, "attention_mask": attention_mask}
        if self.tokens.domains is not None:
            documents = self._documents[[self._piece(index) for index in rows]]
            self._add_domains(batch, self.tokens.domains[documents][:, None])
        return batch

    def _piece(self, index: int) -> int:
        """Piece at a row of the stream."""
        order, _ = self._orders(index // self.num_rows)
        return int(order[index % self.num_rows])

    def _draw_order(self, epoch: int) -> tuple[Tensor, Tensor]:
        order = self._permutation(self.num_rows, epoch)
        return order, self._lengths[order].cumsum(0)
