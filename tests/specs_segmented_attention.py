"""What the shared tests need to know of segmented attention."""

from typing import Any

import torch
from operator_contract import DOCUMENTS, ONE, Arguments, Case, OperatorSpec

from memattn import segmented_attention
from memattn.bench.inputs import make_segmented_inputs

MEMORY = ("memory_key", "memory_value")
SINKS = dict(segment_len=4, window_size=3, num_sink_tokens=5)


def segmented_inputs(**sizes: Any) -> Arguments:
    """Inputs of segmented attention; it needs no options."""
    return make_segmented_inputs(**sizes), {}


def more_segments(tensors, options, left, right) -> Arguments:
    """Memory for one segment more than the sequence has."""
    pad = torch.nn.functional.pad
    return tensors | {n: pad(tensors[n], (0, 0, 0, 0, 0, 1)) for n in MEMORY if n in tensors}, (
        options
    )


def memory_of_document(tensors, options, d, first, last) -> Arguments:
    """Memory of the segments of a document, which count over all documents."""
    if "memory_key" not in tensors:
        return tensors, options
    bounds, length = DOCUMENTS[: d + 1], options["segment_len"]
    begin = sum(-(-(b - a) // length) for a, b in zip(bounds, bounds[1:], strict=False))
    end = begin - (first - last) // length
    return tensors | {n: tensors[n][:, :, begin:end] for n in MEMORY}, options


SEGMENTED = OperatorSpec(
    operator=segmented_attention,
    make_inputs=segmented_inputs,
    cases={
        "one": Case(dict(T=1)),
        "dense": Case(dict(T=37, S=23), dict(is_causal=False)),
        "causal": Case(dict(T=37)),
        "multi-head": Case(dict(T=20, H=2, Hkv=2), dict(scale=0.3)),
        "multi-query": Case(dict(T=20, H=4, Hkv=1)),
        "window": Case(dict(T=37), dict(window_size=5)),
        "window-1": Case(dict(T=17), dict(window_size=1)),
        "window-both": Case(dict(T=37), dict(window_size=5, is_causal=False)),
        "segment": Case(dict(T=37), dict(segment_len=8)),
        "segment-both": Case(dict(T=33), dict(segment_len=16, is_causal=False)),
        "union": Case(dict(T=37), dict(segment_len=8, window_size=11)),
        "union-both": Case(dict(T=37), dict(segment_len=8, window_size=6, is_causal=False)),
        "persistent": Case(dict(T=37, P=3), dict(window_size=5)),
        "memory": Case(dict(T=37, M=4, segment_len=8), dict(segment_len=8)),
        "memory-causal": Case(
            dict(T=37, M=8, segment_len=8), dict(segment_len=8, memory_is_causal=True)
        ),
        "all-sources": Case(
            dict(T=37, P=3, M=8, segment_len=8, Dv=24),
            dict(segment_len=8, window_size=3, memory_is_causal=True),
        ),
        "near-the-largest-integer": Case(
            dict(B=1, T=20, M=2, segment_len=20, n_segments=3),
            dict(segment_len=2**31 - 1, window_size=2**31 - 1),
        ),
        "head-dim-40": Case(dict(T=17, D=40)),
        "wide-value": Case(dict(T=17, D=8, Dv=24)),
        "odd-head-dim": Case(dict(T=15, D=13, Dv=7)),
        "decode": Case(dict(T=1, S=33, B=3), dict(query_offset=32)),
        "decode-window": Case(dict(T=3, S=33), dict(query_offset=30, window_size=7)),
        "past-the-keys": Case(dict(T=9, S=5), dict(query_offset=2, window_size=3)),
        "packed": Case(dict(B=1, T=37, P=2), dict(window_size=6), dict(cu_seqlens=DOCUMENTS)),
        "packed-memory": Case(
            dict(B=1, T=37, M=8, segment_len=8, n_segments=6),
            dict(segment_len=8, memory_is_causal=True),
            dict(cu_seqlens=DOCUMENTS),
        ),
        "padded-left": Case(
            dict(B=3, T=21, P=2, M=3, segment_len=8),
            dict(segment_len=8, window_size=4),
            dict(seq_start=[0, 5, 20]),
        ),
        "padded-right": Case(
            dict(B=3, T=21, P=2), dict(segment_len=8, is_causal=False), dict(seq_end=[21, 7, 0])
        ),
        "cut": Case(
            dict(B=1, T=37, P=3, M=2, segment_len=16),
            dict(segment_len=16, window_size=5),
            dict(seq_end=[35]),
        ),
        "trimmed": Case(
            dict(B=2, T=4, S=21, P=1),
            dict(segment_len=8, window_size=4, query_offset=17),
            dict(seq_start=[-3, 2], seq_end=[21, 20]),
        ),
        "sinks": Case(dict(T=37), dict(window_size=5, num_sink_tokens=3)),
        "sinks-both": Case(dict(T=37, P=2), dict(SINKS, is_causal=False)),
        "sinks-past-the-keys": Case(
            dict(T=9, S=5), dict(query_offset=2, window_size=2, num_sink_tokens=4)
        ),
        "sinks-packed": Case(
            dict(B=1, T=37, P=2, M=2, segment_len=4, n_segments=11),
            SINKS,
            dict(cu_seqlens=DOCUMENTS),
        ),
        "sinks-padded-left": Case(dict(B=3, T=21), SINKS, dict(seq_start=[0, 5, 20])),
        "sinks-trimmed": Case(
            dict(B=3, T=4, S=21), dict(SINKS, query_offset=17), dict(seq_start=[-9, 2, 19])
        ),
        "softcap": Case(dict(T=37), dict(softcap=0.7)),
        "softcap-both": Case(dict(T=37, S=23), dict(scale=9.0, softcap=50, is_causal=False)),
        "softcap-all-sources": Case(
            dict(B=1, T=37, P=2, M=2, segment_len=4, n_segments=11, Dv=24),
            dict(SINKS, softcap=0.7),
            dict(cu_seqlens=DOCUMENTS),
        ),
        "softcap-padded": Case(
            dict(B=3, T=21, P=2), dict(window_size=4, softcap=0.7), dict(seq_start=[0, 5, 20])
        ),
        "softcap-decode": Case(dict(T=3, S=33), dict(query_offset=30, window_size=7, softcap=0.7)),
    },
    interpreted_half=(
        "all-sources",
        "padded-left",
        "union-both",
        "decode-window",
        "sinks",
        "softcap",
    ),
    gradcheck={
        name: Case(dict(B=1, H=2, Hkv=1, T=6, D=3, P=2, M=4, segment_len=4), options)
        for name, options in {
            "causal": dict(segment_len=4, window_size=3, memory_is_causal=True),
            "both": dict(segment_len=4, window_size=2, is_causal=False),
            "sinks": dict(segment_len=4, window_size=1, num_sink_tokens=2),
            "softcap": dict(segment_len=4, window_size=3, softcap=0.7),
        }.items()
    },
    empty={
        "nothing": Case(dict(T=0, S=0), dict(is_causal=False)),
        "no-sequences": Case(dict(B=0, T=37), dict(is_causal=False)),
        "no-queries": Case(dict(T=0, S=5), dict(is_causal=False)),
        "no-keys": Case(dict(T=3, S=0), dict(is_causal=False)),
        "no-sequences-persistent": Case(dict(B=0, H=2, Hkv=1, T=5, P=2), dict(window_size=3)),
        "no-queries-persistent": Case(dict(**ONE, T=0, S=5, P=2), dict(window_size=3)),
        "persistent-only": Case(dict(**ONE, T=5, S=0, P=2), dict(window_size=3)),
    },
    at_length={
        "causal": lambda T: Case(dict(**ONE, T=T, D=32, P=5)),
        "window": lambda T: Case(dict(**ONE, T=T, D=32, P=5), dict(window_size=33)),
        "union": lambda T: Case(
            dict(**ONE, T=T, D=32, P=5), dict(segment_len=48, window_size=20, is_causal=False)
        ),
        "sinks": lambda T: Case(dict(**ONE, T=T, D=32), dict(window_size=33, num_sink_tokens=7)),
        "softcap": lambda T: Case(dict(**ONE, T=T, D=32), dict(window_size=33, softcap=0.7)),
    },
    longest=(200, 1000),
    at_head_dim=Case(dict(**ONE, T=130), dict(window_size=70)),
    at_instruction_set={
        "one": Case(dict(T=1)),
        "dense": Case(dict(T=37, S=23), dict(is_causal=False)),
        "all-sources": Case(
            dict(T=37, P=3, M=8, segment_len=8, Dv=24),
            dict(segment_len=8, window_size=3, memory_is_causal=True),
        ),
        "padded-left": Case(
            dict(B=3, T=21, P=2, M=3, segment_len=8),
            dict(segment_len=8, window_size=4),
            dict(seq_start=[0, 5, 20]),
        ),
        "odd-head-dim": Case(dict(T=15, D=13, Dv=7)),
        "decode": Case(dict(T=1, S=33, B=3), dict(query_offset=32)),
        "long": Case(dict(**ONE, T=150, D=72), dict(window_size=33)),
        "sinks": Case(dict(**ONE, T=150, D=72), dict(window_size=33, num_sink_tokens=5)),
        "softcap": Case(dict(**ONE, T=150, D=72), dict(window_size=33, softcap=0.7)),
        "softcap-one": Case(dict(T=1), dict(softcap=0.7)),
        "softcap-odd": Case(dict(T=15, D=13, Dv=7, P=3), dict(softcap=0.7)),
    },
    at_threads={
        "memory": Case(
            dict(B=2, H=2, Hkv=1, T=300, P=3, M=4, segment_len=32),
            dict(segment_len=32, window_size=40),
        ),
        "sinks": Case(dict(B=2, H=2, Hkv=1, T=300), dict(window_size=40, num_sink_tokens=5)),
    },
    batched=("query", "key", "value", *MEMORY),
    small=Case(dict(T=19, P=2, M=3, segment_len=8), dict(segment_len=8, window_size=5, scale=0.3)),
    causal={
        "causal": Case(dict(T=37, P=2)),
        "window": Case(dict(T=37, P=2), dict(window_size=9)),
        "segment": Case(dict(T=37, P=2), dict(segment_len=8)),
        "union": Case(dict(T=37, P=2), dict(segment_len=8, window_size=5)),
        "sinks": Case(dict(T=37, P=2), SINKS),
    },
    padded={
        "sinks": Case(dict(B=1, T=21), SINKS),
        "all-sources": Case(
            dict(B=1, T=21, P=2, M=3, segment_len=8), dict(segment_len=8, window_size=4)
        ),
    },
    pad=more_segments,
    packed={
        "sinks": Case(dict(B=1, T=37), SINKS),
        "all-sources": Case(
            dict(B=1, T=37, P=2, M=4, segment_len=8, n_segments=7),
            dict(segment_len=8, window_size=4),
        ),
    },
    document=memory_of_document,
    unseen={
        "sinks": Case(dict(T=9, S=20), dict(query_offset=11, window_size=3, num_sink_tokens=4)),
        "padded": Case(dict(T=9, P=2), {}, dict(seq_end=[4, 0])),
        "no-sequence": Case(dict(B=1, T=5, P=2), {}, dict(seq_end=[0])),
        "softcap": Case(dict(T=9, P=2), dict(softcap=0.7), dict(seq_end=[4, 0])),
        "trimmed": Case(
            dict(T=4, S=21, P=1, M=2, segment_len=8, n_segments=4),
            dict(segment_len=8, window_size=4, query_offset=17),
            dict(seq_start=[0, 2], seq_end=[21, 20]),
        ),
    },
    repeated=Case(
        dict(T=37, P=3, M=8, segment_len=8, Dv=24),
        dict(segment_len=8, window_size=3, memory_is_causal=True),
    ),
    large=Case(dict(T=9, D=64, P=2, M=2, segment_len=4), dict(segment_len=4)),
    opcheck={
        "all-sources": Case(
            dict(**ONE, T=9, P=3, M=4, segment_len=4, Dv=24),
            dict(segment_len=4, window_size=3, memory_is_causal=True),
        ),
        "sinks": Case(dict(**ONE, T=9), dict(window_size=3, num_sink_tokens=2)),
        "softcap": Case(dict(**ONE, T=9), dict(softcap=0.7)),
        "packed": Case(
            dict(**ONE, T=9, P=2), dict(window_size=6), dict(cu_seqlens=[0, 1, 6, 6, 9])
        ),
        "trimmed": Case(
            dict(B=2, H=2, Hkv=1, T=4, S=21, P=1),
            dict(segment_len=8, window_size=4, query_offset=17),
            dict(seq_start=[-3, 2], seq_end=[21, 20]),
        ),
    },
    compiled={  # no two sizes alike at the first length: torch would take them for one
        "all-sources": lambda T: Case(
            dict(H=2, Hkv=1, T=T, P=5, M=4, segment_len=4, Dv=24),
            dict(segment_len=4, window_size=3, memory_is_causal=True),
        ),
        "padded": lambda T: Case(
            dict(H=2, Hkv=1, T=T, P=2),
            dict(window_size=5, softcap=0.7),
            dict(seq_start=[0, 2], seq_end=[7, 9]),
        ),
    },
    gpu_large={
        "all-sources": Case(
            dict(T=1500, D=64, P=16, M=16, segment_len=256),
            dict(segment_len=256, window_size=128),
        )
    },
    wrong=Case(dict(T=9)),
    wrong_packed=Case(dict(B=1, T=9)),
)
