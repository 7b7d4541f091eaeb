"""chapter_attention in Triton: what the test file of all backends does not reach."""

import pytest
import torch
from chapter_factories import make_chapter_inputs
from operator_contract import DEVICE, assert_same, check, needs_triton

from memattn import chapter_attention
from memattn.testing import run_with_gradients

pytest.importorskip("triton", reason="Triton is not installed")

from memattn_kernels import configs
from memattn_kernels.chapter_attention import backward, forward, index, lists
from memattn_kernels.signatures import ChapterAttentionArgs

pytestmark = needs_triton
COMBINE = ("joint", "independent")
SIZES = dict(H=2, Hkv=1, T=21, N=21, M=20, C=5, empty=True, repeats=True)


def triton_inputs(**sizes):
    tensors, slots = make_chapter_inputs(**{**SIZES, **sizes}, device=DEVICE["triton"])
    return tensors, slots | {"backend": "triton"}


def use_form(monkeypatch: pytest.MonkeyPatch, by_chapter: bool) -> None:
    for module in (forward, backward):
        monkeypatch.setattr(module, "is_by_chapter", lambda args: by_chapter)


def use_parts(monkeypatch: pytest.MonkeyPatch) -> list[lists.Parts]:
    """Every tile of a chapter is a part of it; the parts of calls to come."""
    found: list[lists.Parts] = []

    def cut(*sizes):
        found.append(lists.parts_of_chapters(*sizes))
        return found[-1]

    monkeypatch.setattr(lists, "MIN_PART", 16)
    monkeypatch.setattr(lists, "N_PROGRAMS", 10**6)
    monkeypatch.setattr(backward, "parts_of_chapters", cut)
    return found


@pytest.mark.parametrize("by_chapter", [False, True], ids=["by row", "by chapter"])
@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize(
    ("sizes", "options"),
    [(dict(T=13, N=13, C=3), {}), (dict(H=6, Hkv=2, N=5, M=7), dict(routing_block=5))],
    ids=["token", "block"],
)
def test_both_forms_match_the_reference(monkeypatch, sizes, options, combine, by_chapter):
    """Chapters of several tiles and of one, in parts; entries of one query and of several."""
    use_form(monkeypatch, by_chapter)
    tensors, slots = triton_inputs(**sizes)
    found = use_parts(monkeypatch)
    check(chapter_attention, tensors, {**slots, **options, "combine": combine})
    assert found and all(part.n_sums for part in found)


@pytest.mark.parametrize("by_chapter", [False, True], ids=["by row", "by chapter"])
@pytest.mark.parametrize("combine", COMBINE)
def test_neither_slots_nor_the_batch_change_a_bit(monkeypatch, combine, by_chapter):
    """Of results and the query's gradient; the others are sums over the batch."""
    use_form(monkeypatch, by_chapter)
    tensors, slots = triton_inputs(M=9, T=9, N=9)
    slots["combine"] = combine
    whole = run_with_gradients(chapter_attention, tensors, slots)

    order = torch.rand(slots["chapter_indices"].shape, generator=torch.Generator().manual_seed(1))
    order = order.argsort(-1).to(DEVICE["triton"])
    mixed = {"chapter_weights": tensors["chapter_weights"].gather(-1, order)}
    indices = {"chapter_indices": slots["chapter_indices"].gather(-1, order)}
    again = run_with_gradients(chapter_attention, tensors | mixed, slots | indices)
    again["d_chapter_weights"] = again["d_chapter_weights"].gather(-1, order.argsort(-1))
    # equal weights of one chapter have equal gradients, whichever slot is whose
    assert_same(again, whole)

    outputs = run_with_gradients(chapter_attention, {n: t for n, t in tensors.items()}, slots)
    for b in range(2):
        of_batch = ("query", "chapter_weights")
        alone = {n: t[b : b + 1] if n in of_batch else t for n, t in tensors.items()}
        rows = {"chapter_indices": slots["chapter_indices"][b : b + 1]}
        single = chapter_attention(**alone, **slots | rows)
        for name, value in single._asdict().items():
            assert torch.equal(value[0], outputs[name][b]), name


@pytest.mark.parametrize("weighted", [False, True])
def test_slots_rise_and_the_index_has_every_entry_once(weighted):
    tensors, slots = make_chapter_inputs(N=9, T=18, K=6, C=5, empty=True, repeats=True)
    indices, weights = slots["chapter_indices"], tensors["chapter_weights"]
    indices[0, 0, :2] = torch.tensor([-7, 5], dtype=torch.int32)  # out of range, as on a GPU
    start = torch.arange(0, 18, 2, dtype=torch.int32).expand(2, 9).contiguous()
    end = start + 2
    end[1, 7:] = start[1, 7:]  # rows without a query
    args = ChapterAttentionArgs(
        *(tensors[f"{name}"] for name in ("query", "chapter_key", "chapter_value")),
        *(indices, weights if weighted else None, None, None, start, end, 2, 16, True, 1.0),
    )
    found, order = index.sort_slots(args)
    for b in range(2):
        for n in range(9):
            filled = [
                (int(c), float(w))
                for c, w in zip(indices[b, n], weights[b, n], strict=True)
                if 0 <= c < 5 and end[b, n] > start[b, n] and not (weighted and w <= 0)
            ]
            chapters = sorted(filled) if weighted else sorted((c, 0.0) for c, _ in filled)
            assert found[b, n].tolist() == [c for c, _ in chapters] + [5] * (6 - len(chapters))
            if order is not None:
                moved = weights[b, n][order[b, n]].tolist()
                assert moved[: len(chapters)] == [w for _, w in chapters]
    entries = index.ChapterIndex(torch.empty(108).int(), torch.empty(31).int())
    index.fill_index(entries, found, 5)
    assert sorted(entries.entry.tolist()) == list(range(108))
    for chapter in range(5):
        for slot in range(6):
            first, last = entries.offset[chapter * 6 + slot : chapter * 6 + slot + 2].tolist()
            expected = (found[..., slot].flatten() == chapter).nonzero()[:, 0] * 6 + slot
            assert entries.entry[first:last].tolist() == expected.tolist()
    of_tile, first = index.tiles_of_slots(entries, 5, 6, 4, 16, 20)
    for slot in range(6):
        counts = (found[..., slot].flatten()[:, None] == torch.arange(5)).sum(0) * 4
        tiles = [(c, row) for c in range(5) for row in range(0, int(counts[c]), 16)]
        listed = list(zip(of_tile[slot].tolist(), first[slot].tolist(), strict=True))
        assert listed[: len(tiles)] == tiles
        assert all(c == 5 for c, _ in listed[len(tiles) :])


@pytest.mark.parametrize("rows", [1, 6, 64])
def test_parts_have_every_tile_once(rows, monkeypatch):
    monkeypatch.setattr(lists, "MIN_PART", 32)
    monkeypatch.setattr(lists, "N_PROGRAMS", 40)
    C, K, block = 5, 3, 16
    # a chapter that every row selects, one that none does
    slots = torch.randint(0, C - 1, (2, 100, K), generator=torch.Generator().manual_seed(0)).int()
    slots[..., 0] = 0
    entries = index.ChapterIndex(torch.empty(600).int(), torch.empty(C * K + 1).int())
    index.fill_index(entries, slots.sort(-1).values, C)
    parts = lists.parts_of_chapters(entries, K, rows, block, 2)
    n_tiles = [-(-int((slots == c).sum()) * rows // block) for c in range(C)]
    assert parts.tiles.diff().tolist() == n_tiles and parts.tiles[-1] <= parts.n_tiles
    walked = [[] for _ in range(C + 1)]
    for chapter, first in zip(parts.chapter.tolist(), parts.first.tolist(), strict=True):
        walked[chapter].append(first)
    assert [firsts for firsts in walked[:C]] == [[*range(0, n, parts.most)] or [0] for n in n_tiles]
    several = [c for c in range(C) if n_tiles[c] > parts.most]
    assert 0 in several and set(several) <= set(parts.several.tolist())
    places = [parts.sums[c] + i for c in several for i in range(len(walked[c]))]
    assert places == [*range(len(places))] and len(places) <= parts.n_sums
    # entries follow each other in the list, and a chapter begins with a tile
    begins = lists.places_of_entries(entries, parts, K, rows, block)
    for c in range(C):
        first, last = entries.offset[c * K].item(), entries.offset[(c + 1) * K].item()
        begin = parts.tiles[c].item() * block
        assert begins[first:last].tolist() == [*range(begin, begin + (last - first) * rows, rows)]


def test_the_form_depends_on_no_batch():
    """Bytes decide: many heads or queries that share their chapters are rows of one program."""

    def form(*, T=64, H=8, Hkv=8, M=128, D=64, row_len=1, B=2):
        query = torch.empty(B, H, T, D, dtype=torch.bfloat16, device="meta")
        key = torch.empty(16, Hkv, M, D, dtype=torch.bfloat16, device="meta")
        rest = (None,) * 6
        return forward.is_by_chapter(
            ChapterAttentionArgs(query, key, key, *rest, row_len, D, True, 1.0)
        )

    assert form() and form(B=1) and form(H=16, Hkv=1)
    assert not form(row_len=64) and not form(H=64, Hkv=1)
    assert not form(T=configs.DECODE_LENGTH) and form(T=configs.DECODE_LENGTH + 1)
