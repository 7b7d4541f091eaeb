"""Checks that a causal language model is exact: no leak, and one pass equals many."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from memattn.evaluate._probe import Probe
from memattn.evaluate._report import AuditReport, AuditRow

RELATIVE_BOUND = 1e-10
MAX_DEFAULT_LEN = 640
ROUNDING = 1e-12
Finding = tuple[str, float | None, float, str]  # case, value, bound, where
COLUMN_WINDOWS = ("sliding_window", "attention_chunk_size")  # of models of transformers
LENGTHS = ("segment_len", "window_size", *COLUMN_WINDOWS)


def audit(
    model: nn.Module, *, seq_len: int | None = None, seed: int = 0, noise: float = 0.02
) -> AuditReport:
    """Measure whether a causal language model leaks, and whether it decodes what it prefilled.

    Every check compares two runs of a private copy of the model, in evaluation mode and with noise
    on all weights, so that a part whose output starts at zero cannot hide a leak. In float64,
    where also layers that upcast to float32 are kept in float64:

    - repeatability: the same input twice; the differences below mean nothing without it;
    - future leak: later tokens are changed, earlier logits must stay (exactly 0.0);
    - batch coupling: the other rows, and how far they are padded, are changed, a row's logits must
      stay (exactly 0.0);
    - pad sensitivity: the content of left and right padding is changed (exactly 0.0), and padded
      rows are compared with the same rows without padding (1e-10);
    - holes: columns without a token anywhere in a row: their content is changed (exactly 0.0), and
      rows are compared with their tokens alone (1e-10);
    - decode vs prefill: tokens one by one with the cache, against one pass, without and with left
      padding and holes (1e-10);
    - split vs whole: prefill in random pieces with the cache, against one pass (1e-10);
    - packed documents, where ``forward`` takes ``cu_seqlens``: the other documents are changed
      (exactly 0.0), and each document is compared with itself alone (1e-10), also in rows whose
      ``position_ids`` restart.

    Then future leak and batch coupling again in the model's own dtype on its own backend, where
    two runs of the same shape must agree bit for bit. Bounds of 1e-10 are relative to the largest
    logit: the two runs add in another order.

    Args:
        model: A causal language model that is called as transformers calls one: ``forward`` takes
            ``input_ids [B, T]`` and returns an object with ``logits [B, T, vocab_size]``; it has
            ``config.vocab_size``. It is not changed, and stays on its device.
        seq_len: Tokens in a sequence, at least 12. None chooses a length that crosses the model's
            segments and windows twice, as far as 640 tokens reach.
        seed: Seed of tokens, weight noise and cuts.
        noise: Standard deviation of the noise that is added to every floating parameter.

    Returns:
        The report. A check that needs what the model lacks is "not applicable" there, with the
        reason, and counts neither as passed nor as failed. A model that takes an argument and then
        raises has failed that check; NotImplementedError counts as lacking it.

    Raises:
        TypeError: If ``model`` is not a module with ``config.vocab_size``.
        ValueError: If ``seq_len`` is below 12 or above the model's maximum, or ``noise`` is not
            positive.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    config: Any = getattr(model, "config", None)
    if not isinstance(getattr(config, "vocab_size", None), int):
        raise TypeError(f"model must have config.vocab_size, got {type(model).__name__}")
    if not noise > 0.0:
        raise ValueError(f"noise must be positive, got {noise}")
    longest = getattr(config, "max_position_embeddings", None) or MAX_DEFAULT_LEN
    # parts know their own, those that are attached to a model of another library too
    known = max(getattr(config, "reach", 0), getattr(model, "reach", 0))
    reach: int = max(known, *_lengths(config), 0)
    if seq_len is None:
        seq_len = min(max(48, 2 * reach + 13), MAX_DEFAULT_LEN, longest)
    if not 12 <= seq_len <= longest:
        raise ValueError(f"seq_len must be between 12 and {longest}, got {seq_len}")

    notes = []
    if reach >= seq_len:
        notes.append(
            f"{seq_len} tokens do not cross the model's window or segment of {reach}; "
            f"seq_len={2 * reach + 13} would"
        )
    probe = Probe(model, torch.float64, seed, noise)
    exact = _Auditor(probe, config.vocab_size, seq_len, seed, reach)
    rows = exact.rows(
        *("repeatability", "future leak", "batch coupling", "pad sensitivity", "holes"),
        *("decode vs prefill", "split vs whole", "packed documents"),
    )
    experts = probe.experts
    del exact, probe  # the float64 copy, before the next one is made
    probe = Probe(model, None, seed, noise)
    own = _Auditor(probe, config.vocab_size, seq_len, seed, reach)
    rows += own.rows("future leak", "batch coupling")
    if experts != probe.experts:
        notes.append(
            f"experts run as {experts} in float64 and as {probe.experts} in {probe.dtype}, where "
            "all tokens of an expert are one product: how it rounds depends on how many there are; "
            f'model.set_experts_implementation("{experts}") ends that'
        )
    if any(_is_rounding(row) for row in rows):
        notes.append(
            f"differences below {ROUNDING} in float64 are rounding: the order of a sum depends on "
            "other tokens"
        )
    return AuditReport(model=type(model).__name__, rows=tuple(rows), notes=tuple(notes))


def _is_rounding(row: AuditRow) -> bool:
    """Whether an exact check failed by no more than float64 rounds."""
    if row.value is None or row.bound > 0.0 or row.dtype != "float64":
        return False
    return 0.0 < row.value < ROUNDING


def _lengths(config: Any, names: tuple[str, ...] = LENGTHS) -> Iterator[int]:
    """Window and segment lengths anywhere in a configuration."""
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if isinstance(values, dict):
        for name, value in values.items():
            if name in names and isinstance(value, int) and not isinstance(value, bool):
                yield value
            elif isinstance(value, dict):
                yield from _lengths(value, names)


class _Auditor:
    """The checks; ``ids`` is ``[3, T]``, and ``other`` differs from it in every token."""

    def __init__(self, probe: Probe, vocab_size: int, seq_len: int, seed: int, reach: int):
        self.probe = probe
        self.seq_len = T = seq_len
        self.generator = torch.Generator().manual_seed(seed + 1)
        ids = torch.randint(vocab_size, (3, T), generator=self.generator)
        shift = torch.randint(1, vocab_size, (3, T), generator=self.generator)
        self.ids = ids.to(probe.device)
        self.other = ((ids + shift) % vocab_size).to(probe.device)
        self.position = torch.arange(T, device=probe.device).expand_as(self.ids)
        self.lengths = [T - 1, 2 * T // 3 + 1, T // 4 + 1]  # of padded rows
        # where a window or a segment begins, an index that is off by one shows
        edges = {1, 2, T // 2, T - 2, T - 1, reach - 1, reach, reach + 1}
        self.edges = {edge for edge in edges if 1 <= edge < T}

    def rows(self, *checks: str) -> list[AuditRow]:
        """The rows of the named checks."""
        rows = []
        for check in checks:
            found = getattr(self, check.replace(" ", "_"))()
            try:
                for case, value, bound, where in found:
                    rows.append(self.row(check, case, value, bound, where))
            except NotImplementedError as error:
                rows.append(self.row(check, "", None, 0.0, f"not implemented: {error}"))
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                if check in ("repeatability", "future leak"):
                    raise  # a plain forward: the model does not run at all
                rows.append(self.row(check, "", math.inf, 0.0, f"{type(error).__name__}: {error}"))
        return rows

    def row(self, check: str, case: str, value: float | None, bound: float, where: str) -> AuditRow:
        dtype = self.probe.dtype
        return AuditRow(check=check, case=case, dtype=dtype, value=value, bound=bound, where=where)

    def repeatability(self) -> Iterator[Finding]:
        batch = {"input_ids": self.ids}
        yield self.exact("same input twice", [(batch, batch, self.position >= 0)])

    def future_leak(self) -> Iterator[Finding]:
        cuts = sorted({*self.edges, *self.draw(1, self.seq_len, 6)})
        one = {"input_ids": self.ids}
        for case in ("one later token", "all later tokens"):
            changes = []
            for cut in cuts:
                changed = self.position >= cut
                if case == "one later token":
                    changed = self.position == cut
                other = torch.where(changed, self.other, self.ids)
                changes.append((one, {"input_ids": other}, self.position < cut))
            yield self.exact(case, changes)

    def batch_coupling(self) -> Iterator[Finding]:
        # one mask for each row that is kept
        kept = torch.eye(len(self.ids), dtype=torch.bool, device=self.ids.device)
        kept = kept[:, :, None].expand(-1, *self.ids.shape)
        changed = [torch.where(row, self.ids, self.other) for row in kept]
        one = {"input_ids": self.ids}
        changes = [
            (one, {"input_ids": other}, row) for other, row in zip(changed, kept, strict=True)
        ]
        yield self.exact("content of other rows", changes)
        if not self.probe.takes("attention_mask"):
            yield "padding of other rows", None, 0.0, "forward takes no attention_mask"
            return
        for side in ("left", "right"):
            real, changes = self.real(self.lengths, side), []
            one = {"input_ids": self.ids, "attention_mask": real.long()}
            for b, row in enumerate(kept):
                # every batch has padding, so that both runs take the same path
                lengths = [n if i == b else n // 2 for i, n in enumerate(self.lengths)]
                mask = self.real(lengths, side).long()
                changes.append((one, {"input_ids": changed[b], "attention_mask": mask}, row & real))
            yield self.exact(f"padding of other rows, {side}", changes)

    def pad_sensitivity(self) -> Iterator[Finding]:
        if not self.probe.takes("attention_mask"):
            yield "padding", None, 0.0, "forward takes no attention_mask"
            return
        for side in ("left", "right"):
            changes, pairs = self.absent(self.real(self.lengths, side))
            yield self.exact(f"content, {side}", changes)
            yield self.close(f"{side} vs none", pairs)

    def absent(
        self, present: Tensor
    ) -> tuple[list[tuple[dict, dict, Tensor]], list[tuple[Tensor, Tensor, int]]]:
        """Arguments of ``exact``, with other tokens in the absent columns, and of ``close``, rows
        with and without these columns. Each row runs alone, because batch coupling is another
        check.
        """
        changes, pairs = [], []
        for b, real in enumerate(present.split(1)):
            ids, mask = self.ids[b : b + 1], real.long()
            other = torch.where(real, ids, self.other[b : b + 1])
            one: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
            changes.append((one, {"input_ids": other, "attention_mask": mask}, real))
            alone = self.probe(ids[real][None])[0]
            pairs.append((self.probe(**one)[0][real][None], alone, 0))
        return changes, pairs

    def holes(self) -> Iterator[Finding]:
        if not self.probe.takes("attention_mask"):
            yield "holes", None, 0.0, "forward takes no attention_mask"
            return
        if not self.probe.takes("position_ids"):
            yield "holes", None, 0.0, "forward takes no position_ids, and counts columns"
            return
        changes, pairs = self.absent(self.scattered())
        yield self.exact("content", changes)
        window = min(_lengths(self.probe.config, COLUMN_WINDOWS), default=self.seq_len)
        if window < self.seq_len:
            why = f"its window of {window} counts columns, with and without tokens"
            yield "with vs without", None, RELATIVE_BOUND, why
            return
        yield self.close("with vs without", pairs)

    def decode_vs_prefill(self) -> Iterator[Finding]:
        if self.probe.cache_name is None:
            yield "one by one", None, RELATIVE_BOUND, "forward takes no cache"
            return
        T, ids = self.seq_len, self.ids[:2]
        whole = self.probe(ids)[0]
        for start in sorted({1, max(1, T // 2 - 12), max(1, T - 24)}):
            stop = min(T, start + 24)
            pieces = self.in_pieces(ids[:, :stop], list(range(start, stop)))
            yield self.close(f"from {start} to {stop}", [(pieces, whole[:, :stop], 0)])
        if not self.probe.takes("attention_mask"):
            yield "left padding", None, RELATIVE_BOUND, "forward takes no attention_mask"
            return
        real = self.real(self.lengths, "left")
        whole = self.probe(self.ids, attention_mask=real.long())[0]
        pieces = self.in_pieces(self.ids, list(range(T - 6, T)), real.long())
        # padding has logits too, which mean nothing
        pairs = [(pieces[b][real[b]], whole[b][real[b]], 0) for b in range(len(real))]
        yield self.close("left padding", pairs)
        if not self.probe.takes("position_ids"):
            return
        real = self.scattered()
        whole = self.probe(self.ids, attention_mask=real.long())[0]
        pieces = self.in_pieces(self.ids, [T // 3, *range(max(T // 3 + 1, T - 8), T)], real.long())
        pairs = [(pieces[b][real[b]], whole[b][real[b]], 0) for b in range(len(real))]
        yield self.close("holes", pairs)

    def split_vs_whole(self) -> Iterator[Finding]:
        if self.probe.cache_name is None:
            yield "random pieces", None, RELATIVE_BOUND, "forward takes no cache"
            return
        ids = self.ids[:2]
        whole = self.probe(ids)[0]
        for n in (1, 2, 4):
            # even cuts, so that every piece has two tokens or more: single ones are decoding
            cuts = [2 * cut for cut in self.draw(1, self.seq_len // 2, n)]
            pieces = self.in_pieces(ids, cuts)
            yield self.close(f"cut at {', '.join(map(str, cuts))}", [(pieces, whole, 0)])

    def packed_documents(self) -> Iterator[Finding]:
        if not self.probe.takes("cu_seqlens"):
            yield "documents", None, 0.0, "forward takes no cu_seqlens"
            return
        T, ids, other = self.seq_len, self.ids[:1], self.other[:1]
        bounds = [0, T // 3 + 1, T // 3 + 2, T]
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=ids.device)
        batch: dict[str, Any] = {"input_ids": ids, "cu_seqlens": cu_seqlens}
        packed = self.probe(**batch)[0]
        changes, pairs = [], []
        for begin, end in zip(bounds, bounds[1:], strict=False):
            kept = (self.position[:1] >= begin) & (self.position[:1] < end)
            changes.append((batch, {**batch, "input_ids": torch.where(kept, ids, other)}, kept))
            alone = self.probe(ids[:, begin:end])[0]
            pairs.append((packed[:, begin:end], alone, begin))
        yield self.exact("content of the others", changes)
        yield self.close("packed vs alone", pairs)
        if not self.probe.takes("position_ids"):
            return
        ids, pairs = self.ids[:2], []
        cuts = [[0, T // 3 + 1, T], [0, 1, T // 2, T]]
        starts = [[max(cut for cut in row if cut <= t) for t in range(T)] for row in cuts]
        starts = torch.tensor(starts, device=ids.device)
        packed = self.probe(ids, position_ids=torch.arange(T, device=ids.device) - starts)[0]
        for b, row in enumerate(cuts):
            for begin, end in zip(row, row[1:], strict=False):
                alone = self.probe(ids[b : b + 1, begin:end])[0]
                pairs.append((packed[b : b + 1, begin:end], alone, begin))
        yield self.close("rows by position_ids", pairs)

    def exact(self, case: str, changes: list[tuple[dict, dict, Tensor]]) -> Finding:
        """The largest absolute difference over all ``(one, other, compared)``, which must be 0."""
        worst, where, logits, ran = 0.0, "", self.ids, None
        for one, other, compared in changes:
            if ran is not one:  # most changes start from the same run
                ran, logits = one, self.probe(**one)[0]
            difference = _difference(logits, self.probe(**other)[0]).amax(-1)
            difference = difference.masked_fill(~compared, 0.0)
            worst = max(worst, difference.max().item())
            if worst > 0.0 and not where:
                b, t = (difference > 0.0).nonzero()[0].tolist()
                module = self.probe.first_difference(one, other, compared)
                where = f"row {b}, position {t}" + f", in {module}" * bool(module)
        return case, worst, 0.0, where

    def close(self, case: str, pairs: list[tuple[Tensor, Tensor, int]]) -> Finding:
        """The largest relative difference over ``(actual, expected, first position)``."""
        worst, where = 0.0, ""
        for actual, expected, first in pairs:
            scale = expected.abs().max().item() or 1.0
            difference = _difference(actual, expected).amax(-1) / scale  # [T] or [B, T]
            worst = max(worst, difference.max().item())
            if worst > RELATIVE_BOUND and not where:
                over = difference.reshape(-1, difference.shape[-1]).amax(0) > RELATIVE_BOUND
                where = f"position {first + int(over.nonzero()[0])}"
        return case, worst, RELATIVE_BOUND, where

    def real(self, lengths: list[int], side: str) -> Tensor:
        """Mask ``[B, T]`` of the tokens of rows of these lengths, padded on the left or right."""
        length = torch.tensor(lengths, device=self.ids.device)[:, None]
        if side == "left":
            return self.position >= self.seq_len - length
        return self.position < length

    def scattered(self) -> Tensor:
        """Mask ``[B, T]`` of tokens: rows with scattered holes, a long hole, and padding."""
        real = self.position % 3 != 1
        begin, end = self.seq_len // 4, 2 * self.seq_len // 3
        real[1] = (self.position[1] < begin) | (self.position[1] >= end)
        real[2, : self.seq_len // 5] = real[2, -3:] = False
        return real

    def in_pieces(self, ids: Tensor, cuts: list[int], mask: Tensor | None = None) -> Tensor:
        """Logits of all tokens, in the pieces between ``cuts``, with the cache handed on."""
        cache, logits = None, []
        for begin, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
            piece_mask = None if mask is None else mask[:, :end]
            piece, cache = self.probe(
                ids[:, begin:end], attention_mask=piece_mask, cache=cache, use_cache=True
            )
            logits.append(piece)
        return torch.cat(logits, 1)

    def draw(self, low: int, high: int, n: int) -> list[int]:
        """``n`` distinct integers in ``[low, high)``, or as many as there are, rising."""
        order = torch.randperm(max(high - low, 0), generator=self.generator)[:n]
        return sorted((order + low).tolist())


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """Absolute difference; infinite where one is NaN, and 0 where both are the same."""
    difference = (a - b).abs()
    return difference.masked_fill(a == b, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
