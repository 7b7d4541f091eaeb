"""A sequence over several processes: as one process has it, and no byte more than predicted."""

import pytest
import torch
import torch.distributed as dist
from forked_processes import results_of
from sequence_parallel_cases import CASES, SIZES, WORLD, T, inputs, outputs_and_gradients

from memattn.distributed import (
    EdgeBytes,
    SequenceShards,
    edge_bytes,
    sequence_parallel_segmented_attention,
)
from memattn.ops import segmented_attention
from memattn.testing import assert_within_budget


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each of four processes computed."""
    return results_of("sequence_parallel_cases.py", tmp_path_factory.mktemp("sequence"), WORLD)


@pytest.mark.parametrize("size", [4, 2, 1])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_one_process(found, name, size):
    exact, plain = (_of_one(name, dtype) for dtype in (torch.float64, torch.float32))
    for dtype in (torch.float32, torch.float64):
        results = [found[rank][size, dtype, name][0] for rank in range(size)]
        for key, high in exact.items():
            parts = [result[key] for result in results]
            actual = sum(parts) if "persistent" in key else torch.cat(parts, 2)
            if dtype == torch.float64:
                assert (actual - high).abs().max() <= 1e-12, key
            else:
                assert_within_budget(key, actual, plain[key], high)


def _of_one(name, dtype):
    """The definition in one process."""
    tensors, cotangents, options = inputs(name, torch.float32)
    cast = [{k: t.to(dtype) for k, t in given.items()} for given in (tensors, cotangents)]
    return outputs_and_gradients(segmented_attention, *cast, **options, backend="reference")


@pytest.mark.parametrize("size", [4, 2, 1])
@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_predicted(found, name, size):
    tensors, _, options = inputs(name, torch.float32)
    documents = options.pop("cu_seqlens", torch.tensor([])).tolist()
    options.pop("softcap", None)
    total = EdgeBytes(0, 0)
    for rank in range(size):
        predicted = edge_bytes(
            T,
            size,
            rank,
            **options,
            documents=documents,
            batch=len(tensors["query"]),
            num_kv_heads=SIZES["Hkv"],
            head_dim=SIZES["D"],
            value_dim=SIZES["Dv"],
            element_size=4,
        )
        calls = found[rank][size, torch.float32, name][1]
        back = EdgeBytes(predicted.received, predicted.sent)
        assert calls == ([] if predicted == (0, 0) else [predicted, back])
        total = EdgeBytes(*(a + b for a, b in zip(total, predicted, strict=True)))
    assert total.sent == total.received
    assert (total.sent == 0) == (size == 1 or name == "window-of-one" or _is_apart(name, size))


def _is_apart(name, size):
    return name == "documents-apart" and size == 4


def test_bytes_by_hand():
    # float32, 2 heads of 8 for keys and 8 for values: 128 bytes a token
    sizes = dict(num_kv_heads=2, head_dim=8, element_size=4)
    assert edge_bytes(40, 4, 0, window_size=5, **sizes) == (4 * 128, 0)
    assert edge_bytes(40, 4, 3, window_size=5, **sizes) == (0, 4 * 128)
    # segments of 16: process 1 begins at place 10 of its segment, and has 4 tokens of the next
    # one, which processes 2 and 3 need
    assert edge_bytes(40, 4, 1, segment_len=16, **sizes) == ((4 + 4) * 128, 10 * 128)
    # a window of 25 tokens over shards of 10: 24 before, from three processes
    assert edge_bytes(40, 4, 3, window_size=25, **sizes) == (0, 24 * 128)
    assert edge_bytes(40, 4, 0, window_size=25, **sizes) == ((10 + 10 + 4) * 128, 0)
    # what lies in another document is not needed
    assert edge_bytes(40, 4, 1, window_size=5, documents=[0, 9, 40], **sizes) == (512, 128)
    with pytest.raises(ValueError, match="rank must be below num_shards=4, got 4"):
        edge_bytes(40, 4, 4, window_size=5, **sizes)


def test_shards_hold_every_token_once():
    for total, size in ((37, 4), (4, 4), (40, 4), (7, 1), (1_000_003, 1024)):
        shards = SequenceShards(total, size)
        bounds = [shards.bounds(rank) for rank in range(size)]
        assert bounds[0][0] == 0 and bounds[-1][1] == total
        assert all(a[1] == b[0] and b[0] < b[1] for a, b in zip(bounds, bounds[1:], strict=False))
    with pytest.raises(ValueError, match=r"total_len must give each of 4 processes a token .* 5"):
        SequenceShards(5, 4)


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "segment_len must be given, or window_size, got None"),
        ({"window_size": 0}, "window_size must be at least 1, got 0"),
        ({"window_size": 4, "softcap": -1.0}, "softcap must be positive and finite, got -1.0"),
        ({"window_size": 4, "total_len": 9}, r"query must have T=9 tokens: 0 to 9 of total_len=9"),
        ({"window_size": 4, "B": 2, "cu_seqlens": [0, 8]}, "query must have B=1 with cu_seqlens"),
        ({"window_size": 4, "cu_seqlens": [0, 7]}, "cu_seqlens must begin with 0 and end with tot"),
        ({"window_size": 4, "cu_seqlens": [0, 9, 8]}, "cu_seqlens must rise, got"),
    ],
    ids=str,
)
def test_names_the_wrong_argument(group_of_one, options, message):
    options = dict(options)
    query = torch.zeros(options.pop("B", 1), 2, 8, 4)
    if "cu_seqlens" in options:
        options["cu_seqlens"] = torch.tensor(options["cu_seqlens"], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        sequence_parallel_segmented_attention(query, query, query, **options)


def test_needs_a_process_group():
    query = torch.zeros(1, 2, 8, 4)
    with pytest.raises(RuntimeError, match="group must be a process group, got none"):
        sequence_parallel_segmented_attention(query, query, query, window_size=4)
