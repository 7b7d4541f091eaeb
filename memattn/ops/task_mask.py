"""Which keys each query of a task may see, in the form that the kernels skip and read by."""

import math
from operator import index
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from memattn.checks import check_shape, check_tensor, must
from memattn.files import read_tensors, write_tensors
from memattn.ops._task_mask_tiles import (
    TILE,
    WORD,
    classify,
    classify_graph,
    lists,
    pack_queries,
    pack_words,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FORMAT = "memattn.TaskMask/1"


class MaskTensors(NamedTuple):
    """What a kernel reads of a mask. ``Hm`` is 1 or H; tiles are ``TILE`` queries by ``TILE`` keys.

    A tile without an allowed pair is in no list. Of the others those in which all pairs are
    allowed come first. The other ones read bits: query ``i`` sees key ``j`` if the bit ``c % 32``
    of ``bits[r, c // 32]`` is 1. In the dense form ``r = slots[task, head, i // TILE, j // TILE]
    * TILE + j % TILE`` and ``c = i % TILE``, in the graph form ``r = (task * Hm + head) * G +
    key_node[j]`` and ``c = query_node[i]``.
    """

    bits: Tensor  # int32 [rows, words]
    slots: Tensor | None  # int32 [N, Hm, query tiles, key tiles], dense form
    query_node: Tensor | None  # int32 [T], graph form
    key_node: Tensor | None  # int32 [S], graph form
    query_tiles: Tensor  # int32 [N, Hm, query tiles, key tiles], keys of each tile of queries
    query_counts: Tensor  # int32 [N, Hm, query tiles, 2], full and partial ones
    key_tiles: Tensor  # int32 [N, Hm, key tiles, query tiles], queries of each tile of keys
    key_counts: Tensor  # int32 [N, Hm, key tiles, 2]


class TaskMask:
    """Allowed pairs of queries and keys for each of N tasks; built once, used in every call.

    Pairs are grouped in tiles of 128 queries by 128 keys. Tiles in which nothing is allowed cost
    nothing, tiles in which everything is allowed cost no mask, and for the others the kernels read
    bits. A mask is constant: no method changes it.

    Attributes:
        n_tasks: Tasks N.
        n_heads: Heads that have their own mask, or 1 if all heads share one.
        n_queries: Queries T.
        n_keys: Keys S.
        edges: bool ``[N, n_heads, G, G]`` in the graph form, else None.
    """

    def __init__(
        self, tensors: MaskTensors, n_queries: int, n_keys: int, edges: Tensor | None = None
    ) -> None:
        """Use ``from_dense`` or ``from_graph``."""
        self.tensors = tensors
        self.n_tasks, self.n_heads = tensors.query_tiles.shape[:2]
        self.n_queries, self.n_keys = n_queries, n_keys
        self.edges = edges

    @classmethod
    def from_dense(cls, mask: Tensor) -> "TaskMask":
        """Build from all pairs; stores one bit for each pair of a tile that is partly allowed.

        Args:
            mask: bool ``[N, T, S]``, or ``[N, H, T, S]`` for a mask of each query head. True is
                allowed.

        Raises:
            TypeError: If ``mask`` is no tensor.
            ValueError: If its dtype or its shape is another one, or an axis is empty.
        """
        check_tensor("mask", mask)
        if mask.dtype != torch.bool:
            must("mask", "have dtype torch.bool (True = allowed)", mask.dtype)
        if mask.dim() not in (3, 4):
            must("mask", "have axes [N, T, S] or [N, H, T, S]", f"shape {list(mask.shape)}")
        if 0 in mask.shape:
            must("mask", "have no empty axis", f"shape {list(mask.shape)}")
        mask = mask[:, None] if mask.dim() == 3 else mask
        N, H, T, S = mask.shape
        n_q, n_k = math.ceil(T / TILE), math.ceil(S / TILE)
        words = TILE // WORD
        classes = torch.empty(N, H, n_q, n_k, dtype=torch.int8, device=mask.device)
        slots = torch.full(classes.shape, -1, dtype=torch.int32, device=mask.device)
        bits: list[Tensor] = []
        n_partial = 0
        for task in range(N):
            for head in range(H):
                packed = pack_queries(mask[task, head])  # uint8 [n_q, TILE / 8, n_k, TILE]
                own = classify(packed, T, S)
                classes[task, head] = own
                where = own == 2
                n = int(where.sum())
                slots[task, head][where] = torch.arange(
                    n_partial, n_partial + n, dtype=torch.int32, device=mask.device
                )
                partial = packed.transpose(1, 2)[where].transpose(1, 2).reshape(-1)
                bits.append(partial.view(torch.int32).view(n * TILE, words))
                n_partial += n
        tensors = MaskTensors(torch.cat(bits), slots, None, None, *lists(classes))
        return cls(tensors, T, S)

    @classmethod
    def from_graph(cls, edges: Tensor, query_node: Tensor, key_node: Tensor) -> "TaskMask":
        """Build from a task graph: query ``i`` sees key ``j`` if their nodes have an edge.

        Stores G² bits and one entry for each pair of tiles, for each task, and the nodes.

        Args:
            edges: bool ``[N, G, G]``, or ``[N, H, G, G]`` for a graph of each query head;
                ``edges[t, a, b]`` allows queries of node ``a`` to see keys of node ``b``.
            query_node: Nodes of the queries, integer ``[T]``.
            key_node: Nodes of the keys, integer ``[S]``.

        Raises:
            TypeError: If an argument is no tensor.
            ValueError: If a dtype, shape, device or node does not fit, or an axis is empty.
        """
        check_tensor("edges", edges)
        if edges.dtype != torch.bool:
            must("edges", "have dtype torch.bool (True = allowed)", edges.dtype)
        if edges.dim() not in (3, 4):
            must("edges", "have axes [N, G, G] or [N, H, G, G]", f"shape {list(edges.shape)}")
        if 0 in edges.shape:
            must("edges", "have no empty axis", f"shape {list(edges.shape)}")
        edges = edges[:, None] if edges.dim() == 3 else edges
        N, H, G, _ = edges.shape
        check_shape("edges", edges, N=N, H=H, G=G, G2=G)
        for name, node in (("query_node", query_node), ("key_node", key_node)):
            check_tensor(name, node)
            if node.dtype not in (torch.int32, torch.int64):
                must(name, "have dtype torch.int32 or torch.int64", node.dtype)
            if node.dim() != 1 or node.numel() == 0:
                must(name, "be a vector with a node for each position", list(node.shape))
            if node.device != edges.device:
                must(name, f"be on the device of edges, {edges.device}", node.device)
            low, high = (int(x) for x in node.aminmax())
            if low < 0 or high >= G:
                must(name, f"have nodes from 0 to G - 1 = {G - 1}", f"{low} to {high}")
        # copies: the mask stays what it is when the caller writes into these
        query_node, key_node = (x.to(torch.int32, copy=True) for x in (query_node, key_node))
        edges = edges.clone()
        classes = classify_graph(edges, query_node, key_node)
        # a row for a key node, a bit for a query node
        by_key = edges.flatten(0, 1).mT.reshape(N * H * G, G)
        bits = pack_words(by_key)
        tensors = MaskTensors(bits, None, query_node, key_node, *lists(classes))
        return cls(tensors, query_node.numel(), key_node.numel(), edges)

    @property
    def device(self) -> torch.device:
        """Where the mask is."""
        return self.tensors.bits.device

    @property
    def nbytes(self) -> int:
        """Bytes that the mask holds."""
        given = [t for t in (*self.tensors, self.edges) if t is not None]
        return sum(t.numel() * t.element_size() for t in given)

    def to(self, device: torch.device | str) -> "TaskMask":
        """The same mask on another device.

        Raises:
            TypeError: If ``device`` is no device.
        """
        given: Any = device
        if not isinstance(given, torch.device | str | int):
            must("device", "be a device", repr(given), TypeError)
        device = torch.device(given)
        moved: dict[str, Any] = {
            name: None if t is None else t.to(device) for name, t in self.tensors._asdict().items()
        }
        edges = None if self.edges is None else self.edges.to(device)
        return TaskMask(MaskTensors(**moved), self.n_queries, self.n_keys, edges)

    def dense(self, task: int) -> Tensor:
        """The pairs of one task, bool ``[n_heads, T, S]``. Costs ``T * S`` bytes for each head."""
        task = self._check_task(task)
        T, S, t = self.n_queries, self.n_keys, self.tensors
        if self.edges is not None and t.query_node is not None and t.key_node is not None:
            return self.edges[task][:, t.query_node.long()[:, None], t.key_node.long()[None]]
        assert t.slots is not None
        full, partial = self._tile_classes(task)
        slots = t.slots[task].clamp(min=0).long()
        n_q, n_k = slots.shape[1:]
        tiles = (full | partial)[..., None, None].expand(-1, -1, -1, TILE, TILE).clone()
        shift = torch.arange(TILE, device=self.device)
        words = t.bits.view(-1, TILE, TILE // WORD)
        for head in range(self.n_heads):
            own = words[slots[head][partial[head]]]  # [n, keys, words]
            told = (own[..., shift // WORD] >> (shift % WORD)) & 1  # [n, keys, queries]
            tiles[head][partial[head]] = told.mT.bool()
        whole = tiles.transpose(2, 3).reshape(self.n_heads, n_q * TILE, n_k * TILE)
        return whole[:, :T, :S].contiguous()

    def _check_task(self, task: int) -> int:
        """A task as an int, checked."""
        if isinstance(task, bool) or not hasattr(task, "__index__"):
            must("task", "be an integer", type(task).__name__, TypeError)
        task = index(task)
        if not 0 <= task < self.n_tasks:
            must("task", f"be at least 0 and below n_tasks={self.n_tasks}", task)
        return task

    def _tile_classes(self, task: int) -> tuple[Tensor, Tensor]:
        """Whether each tile of a task is full, and whether it is partial, ``[n_heads, ...]``."""
        tiles, counts = self.tensors.query_tiles[task].long(), self.tensors.query_counts[task]
        place = torch.arange(tiles.shape[-1], device=self.device)
        n_full, n_all = counts[..., :1], counts.sum(-1, keepdim=True)
        full, partial = (
            torch.zeros(tiles.shape, dtype=torch.bool, device=self.device).scatter(-1, tiles, seen)
            for seen in (place < n_full, (place >= n_full) & (place < n_all))
        )
        return full, partial

    def tile_density(self, task: int | None = None) -> float:
        """Share of the tiles that are computed, of one task or of all."""
        counts = self.tensors.query_counts
        counts = counts if task is None else counts[self._check_task(task)]
        return counts.sum().item() / (counts.numel() // 2 * self.tensors.query_tiles.shape[-1])

    def save(self, path: str | PathLike[str]) -> None:
        """Write the mask as safetensors. The file appears once it is whole.

        Raises:
            OSError: If it cannot be written.
        """
        named = {n: t for n, t in self.tensors._asdict().items() if t is not None}
        if self.edges is not None:
            named["edges"] = self.edges
        sizes = {"n_queries": str(self.n_queries), "n_keys": str(self.n_keys)}
        write_tensors(path, named, {"format": _FORMAT, **sizes})

    @classmethod
    def load(cls, path: str | PathLike[str], device: torch.device | str = "cpu") -> "TaskMask":
        """Read a mask that ``save`` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds something else.
        """
        named: dict[str, Any]
        named, about = read_tensors(path, "TaskMask.save", device)
        if about.get("format") != _FORMAT:
            must("path", f"hold a mask of format {_FORMAT}", f"{path}: {about.get('format')}")
        edges = named.pop("edges", None)
        named = dict.fromkeys(("slots", "query_node", "key_node")) | named
        sizes = [about.get(name, "") for name in ("n_queries", "n_keys")]
        if set(named) != set(MaskTensors._fields) or not all(size.isdecimal() for size in sizes):
            must("path", f"hold the tensors and sizes of {_FORMAT}", f"{path}: {sorted(named)}")
        tensors = MaskTensors(**named)
        n_queries, n_keys = map(int, sizes)
        four_axes = tensors.query_tiles.dim() == 4
        mask = cls(tensors, n_queries, n_keys, edges) if four_axes else None
        if mask is None or not mask._is_whole():
            must("path", "hold tensors that fit together", path)
        return mask

    def _is_whole(self) -> bool:
        """Whether shapes fit and indices are in range, so that a kernel reads no other memory."""
        t, edges = self.tensors, self.edges
        n_q, n_k = (math.ceil(n / TILE) for n in (self.n_queries, self.n_keys))
        lead, words = (self.n_tasks, self.n_heads), TILE // WORD
        wanted: dict[str, tuple[tuple[int, ...], int, int]] = dict(
            query_tiles=((*lead, n_q, n_k), 0, n_k),
            query_counts=((*lead, n_q, 2), 0, n_k + 1),
            key_tiles=((*lead, n_k, n_q), 0, n_q),
            key_counts=((*lead, n_k, 2), 0, n_q + 1),
        )
        if edges is None:
            n_bits = t.bits.shape[0]
            wanted["slots"] = ((*lead, n_q, n_k), -1, n_bits // TILE)
            bits = (n_bits // TILE * TILE, words)
        else:
            G = edges.shape[-1]
            wanted["query_node"] = ((self.n_queries,), 0, G)
            wanted["key_node"] = ((self.n_keys,), 0, G)
            bits = (math.prod(lead) * G, math.ceil(G / WORD))
            if edges.dtype != torch.bool or edges.shape != (*lead, G, G):
                return False
        if t.bits.dtype != torch.int32 or t.bits.shape != bits:
            return False
        for name, tensor in t._asdict().items():
            if name == "bits":
                continue
            if (tensor is None) != (name not in wanted):
                return False
            if tensor is None:
                continue
            shape, low, end = wanted[name]
            if tensor.dtype != torch.int32 or tensor.shape != shape:
                return False
            least, most = (int(x) for x in tensor.aminmax())
            if least < low or most >= end:
                return False
        return bool((t.query_counts.sum(-1) <= n_k).all() and (t.key_counts.sum(-1) <= n_q).all())

    def plot(self, task: int | None = None, head: int = 0, ax: "Axes | None" = None) -> "Axes":
        """Draw the allowed pairs of one task, or of all tasks by colour.

        Long masks are drawn by blocks of positions; a block is as dark as the share of its pairs
        that is allowed. Where tasks overlap the colour is that of the lowest.

        Args:
            task: Which task; None for all.
            head: Which head, where heads have their own masks.
            ax: Matplotlib axes; None draws on the current ones.
        """
        from memattn.ops._task_mask_plot import plot_task_mask

        return plot_task_mask(self, task, head, ax)

    def __repr__(self) -> str:
        form = "dense" if self.edges is None else f"graph of {self.edges.shape[-1]} nodes"
        heads = "" if self.n_heads == 1 else f", {self.n_heads} heads"
        return (
            f"TaskMask({self.n_tasks} tasks{heads}, {self.n_queries} x {self.n_keys}, {form}, "
            f"{100 * self.tile_density():.1f} % of tiles, {self.nbytes / 2**20:.2f} MiB, "
            f"{self.device})"
        )
