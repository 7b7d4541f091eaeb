"""The state of a neural memory after a text, as a file that can be used any number of times."""

import hashlib
import json
import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memattn.checks import check_int, check_rank, must
from memattn.models.cache import MemAttnCache
from memattn.models.cache_file import read_cache, write_cache
from memattn.models.config import MemAttnConfig
from memattn.parts.memory_measures import MemoryWatch, memory_layers, watch_memory

MEASURES = ("tokens", "update", "surprise", "relevance")


@dataclass
class KeptMemory:
    """The state of a model with a neural memory after a text, and measures of reading it.

    Its size does not depend on the length of the text, except for three numbers per chunk and
    layer.

    Attributes:
        cache: The state, of one sequence.
        fingerprint: Hash of the model's weights.
        start: Memory weights before any text, ``[1, H, d_n, d_{n-1}]`` each, by layer name.
        metrics: By layer name, one number per chunk for each of: ``tokens`` (the chunk's end), and
            means over heads and tokens of ``update``, ``surprise`` and ``relevance`` (see
            ``memattn.parts.memory_measures.measure_memory``).

    Example:
        >>> memory = KeptMemory.of(model)
        >>> memory.read(model, torch.randint(100, (1, 3000)))
        >>> memory.save("book.memory")
        >>> cache = KeptMemory.load("book.memory", model).cache
        >>> logits = model(torch.tensor([[7]]), past_key_values=cache).logits
    """

    cache: MemAttnCache
    fingerprint: str
    start: dict[str, tuple[Tensor, ...]]
    metrics: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any) -> "KeptMemory":
        """An empty memory of a model.

        Raises:
            TypeError: If the model is not a decoder of this package with a neural memory.
        """
        layers = memory_layers(model)
        if not isinstance(getattr(model, "config", None), MemAttnConfig):
            must("model", "be a decoder of memattn", type(model).__name__, TypeError)
        start = {name: x.memory.start().memory.current()[0] for name, x in layers.items()}
        return cls(MemAttnCache(model.config), fingerprint_of(model), start)

    @property
    def num_tokens(self) -> int:
        """Tokens that were read."""
        return self.cache.position

    @torch.no_grad()
    def read(
        self, model: Any, input_ids: Tensor, *, piece_len: int = 512, measure: bool = True
    ) -> None:
        """Read more tokens, in pieces, so that activation memory does not grow with the text.

        The result equals one call of the model with all tokens.

        Args:
            model: The model of this memory, in evaluation mode.
            input_ids: int64 ``[1, T]``.
            piece_len: Tokens in a piece; with segments, rounded down to a multiple of the segment
                length.
            measure: Whether to compute the metrics, which writes every token twice.

        For layers that attend to the memory within segments, the relevance is NaN if a call starts
        within a segment.

        Raises:
            ValueError: If the text exceeds the model's maximum length.
        """
        check_rank("input_ids", input_ids, "B T")
        check_int("piece_len", piece_len, 1)
        T, at, piece_len = input_ids.shape[1], 0, piece_length(model, piece_len)
        limit = getattr(model.config, "position_limit", None)
        if limit is not None and self.num_tokens + T > limit:
            must("text", f"have at most {limit} tokens for this model", self.num_tokens + T)
        with watch_memory(model) if measure else nullcontext([]) as watches:
            while at < T:
                # pieces end at the same tokens, however the text was split between calls
                stop = min(T, at + piece_len - self.num_tokens % piece_len)
                model(input_ids[:, at:stop], past_key_values=self.cache, logits_to_keep=1)
                for watch in watches:
                    self._add(watch)
                at = stop

    def _add(self, watch: MemoryWatch) -> None:
        """Append a layer's chunks to the earlier ones; the last of these may be incomplete."""
        sizes = watch.chunk_tokens
        surprise = torch.cat(watch.surprise, 2).mean((0, 1)).split(sizes)
        relevance = torch.cat(watch.relevance, 1).mean(0).split(sizes)
        new = {
            "tokens": self.cache.position - sum(sizes) + torch.tensor(sizes).cumsum(0),
            "update": torch.stack([x.mean() for x in watch.update]).float(),
            "surprise": torch.stack([x.mean() for x in surprise]).float(),
            "relevance": torch.stack([x.nanmean() for x in relevance]).float(),
        }
        old = self.metrics.get(watch.name)
        if old is not None:
            if watch.continues:
                ends = old["tokens"].tolist()
                before = ends[-1] - (ends[-2] if len(ends) > 1 else 0)
                share = before / (before + sizes[0])
                for name in ("surprise", "relevance"):
                    new[name][0] = share * old[name][-1] + (1 - share) * new[name][0]
                old = {name: x[:-1] for name, x in old.items()}
            new = {name: torch.cat([old[name], new[name]]) for name in MEASURES}
        self.metrics[watch.name] = new
        watch.drain()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file atomically.

        Raises:
            ValueError: If no text was read.
        """
        extra = {}
        for i, (layer, start) in enumerate(self.start.items()):
            extra |= {f"{i}.start.{n}": x for n, x in enumerate(start)}
            extra |= {f"{i}.metrics.{name}": x for name, x in self.metrics.get(layer, {}).items()}
        notes = {"model": self.fingerprint, "layers": json.dumps(list(self.start))}
        write_cache(path, self.cache.to_file()._replace(notes=notes, extra=extra))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Any = None,
        device: str | torch.device | None = None,
    ) -> "KeptMemory":
        """Read a file that ``save`` wrote.

        Args:
            path: The file.
            model: The model that will use it, checked by its fingerprint; None means no check.
            device: Device of the state; None means the model's device, else the CPU.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, of another kind, or of another model.
        """
        where = "cpu" if model is None else next(model.parameters()).device
        try:
            saved = read_cache(path, where if device is None else device)
        except (FileNotFoundError, ValueError) as error:
            text = str(error).replace("path must", "memory must", 1)
            raise type(error)(text.replace("MemAttnCache.save", "memattn memorize")) from error
        if "model" not in saved.notes:
            must("memory", "be a file that memattn memorize wrote", f"{path}, a cache")
        if model is not None and saved.notes["model"] != fingerprint_of(model):
            must("memory", "be of this model, with these weights", f"{path}, of another one")
        start, metrics = {}, {}
        for i, layer in enumerate(json.loads(saved.notes["layers"])):
            own = {
                name.split(".", 1)[1]: x
                for name, x in saved.extra.items()
                if name.startswith(f"{i}.")
            }
            start[layer] = tuple(own[name] for name in sorted(own) if name.startswith("start."))
            named = {name: own.get(f"metrics.{name}") for name in MEASURES}
            found = {name: x.cpu() for name, x in named.items() if x is not None}
            metrics |= {layer: found} if found else {}
        return cls(MemAttnCache.of_file(saved), saved.notes["model"], start, metrics)


def fingerprint_of(model: nn.Module) -> str:
    """A hash of the names, shapes, dtypes and values of all parameters of a model."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        x = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.flatten().view(torch.uint8).numpy().tobytes() if x.numel() else b"")
    return digest.hexdigest()


def piece_length(model: Any, wanted: int) -> int:
    """The largest multiple of the segment length up to ``wanted``; at least one segment."""
    segment = getattr(model.config.attention, "segment_len", None) or 1
    return max(wanted // segment, 1) * segment
