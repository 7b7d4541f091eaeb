"""What a model remembers of a text, as a file: read once, and asked as often as one likes."""

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
    """The state of a model with a neural memory after a text, and what happened on the way.

    Its size does not grow with the text, but for three numbers a chunk and layer.

    Attributes:
        cache: The state, of one sequence.
        fingerprint: Which weights it belongs to.
        start: Weights before any text, ``[1, H, d_n, d_{n-1}]`` each, of the layers with a memory,
            by their names.
        metrics: Of each layer with a memory, by its name, one number for each chunk: the last of
            its ``tokens``, and means over heads and tokens of ``update``, ``surprise`` and
            ``relevance`` (see ``memattn.parts.memory_measures.measure_memory``).

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
        """An empty one.

        Raises:
            TypeError: If the model is no decoder of this package with a neural memory.
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
        """Read more tokens, in pieces, so that activations do not grow with the text either.

        The result is that of one call of the model with all of them.

        Args:
            model: The model that it is of, in evaluation mode.
            input_ids: int64 ``[1, T]``.
            piece_len: Tokens in a piece; where there are segments, the nearest multiple below.
            measure: Whether to measure what happens, which writes every token twice.

        The relevance of a memory whose layer attends to it within segments is not known (NaN) where
        a call begins within a segment.

        Raises:
            ValueError: If the text becomes longer than the model takes.
        """
        check_rank("input_ids", input_ids, "B T")
        check_int("piece_len", piece_len, 1)
        T, at, piece_len = input_ids.shape[1], 0, piece_length(model, piece_len)
        limit = getattr(model.config, "position_limit", None)
        if limit is not None and self.num_tokens + T > limit:
            must("text", f"have at most {limit} tokens for this model", self.num_tokens + T)
        with watch_memory(model) if measure else nullcontext([]) as watches:
            while at < T:
                # pieces end where others would have ended, however the text was cut before
                stop = min(T, at + piece_len - self.num_tokens % piece_len)
                model(input_ids[:, at:stop], past_key_values=self.cache, logits_to_keep=1)
                for watch in watches:
                    self._add(watch)
                at = stop

    def _add(self, watch: MemoryWatch) -> None:
        """Put the chunks that a layer has seen after those before; one may have been open."""
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
        """Write a safetensors file, whole or not at all.

        Raises:
            ValueError: If nothing was read.
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
            model: The model that is to go on with it; None checks nothing.
            device: Where to put it; None means where the model is, else the CPU.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, something else, or of another model.
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
    """A hash of the names, shapes, dtypes and numbers of all parameters of a model."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        x = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.flatten().view(torch.uint8).numpy().tobytes() if x.numel() else b"")
    return digest.hexdigest()


def piece_length(model: Any, wanted: int) -> int:
    """The largest multiple of the model's segment that is at most ``wanted``, and at least one."""
    segment = getattr(model.config.attention, "segment_len", None) or 1
    return max(wanted // segment, 1) * segment
