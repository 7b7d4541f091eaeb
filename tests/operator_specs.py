"""The operators that the shared tests call."""

from typing import Any

import torch
from operator_contract import Arguments, Case, OperatorSpec
from task_mask_factories import make_task_masked_inputs, pad_task_mask

from memattn import (
    future_attention,
    future_attention_loss,
    segmented_attention,
    task_masked_attention,
)
from memattn.testing import make_future_inputs, make_segmented_inputs

DOCUMENTS = [0, 1, 9, 9, 30, 37]  # bounds of packed documents, one of them empty
MEMORY = ("memory_key", "memory_value")
TABLE = ("future_key", "future_value")
ONE = dict(B=1, H=2, Hkv=1)


# ---------------------------------------------------------------- segmented attention


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
    },
    interpreted_half=("all-sources", "padded-left", "union-both", "decode-window"),
    gradcheck={
        name: Case(dict(B=1, H=2, Hkv=1, T=6, D=3, P=2, M=4, segment_len=4), options)
        for name, options in {
            "causal": dict(segment_len=4, window_size=3, memory_is_causal=True),
            "both": dict(segment_len=4, window_size=2, is_causal=False),
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
    },
    at_threads={
        "memory": Case(
            dict(B=2, H=2, Hkv=1, T=300, P=3, M=4, segment_len=32),
            dict(segment_len=32, window_size=40),
        )
    },
    batched=("query", "key", "value", *MEMORY),
    small=Case(dict(T=19, P=2, M=3, segment_len=8), dict(segment_len=8, window_size=5, scale=0.3)),
    causal={
        "causal": Case(dict(T=37, P=2)),
        "window": Case(dict(T=37, P=2), dict(window_size=9)),
        "segment": Case(dict(T=37, P=2), dict(segment_len=8)),
        "union": Case(dict(T=37, P=2), dict(segment_len=8, window_size=5)),
    },
    padded={
        "all-sources": Case(
            dict(B=1, T=21, P=2, M=3, segment_len=8), dict(segment_len=8, window_size=4)
        )
    },
    pad=more_segments,
    packed={
        "all-sources": Case(
            dict(B=1, T=37, P=2, M=4, segment_len=8, n_segments=7),
            dict(segment_len=8, window_size=4),
        )
    },
    document=memory_of_document,
    unseen={
        "padded": Case(dict(T=9, P=2), {}, dict(seq_end=[4, 0])),
        "no-sequence": Case(dict(B=1, T=5, P=2), {}, dict(seq_end=[0])),
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
        "packed": Case(
            dict(**ONE, T=9, P=2), dict(window_size=6), dict(cu_seqlens=[0, 1, 6, 6, 9])
        ),
        "trimmed": Case(
            dict(B=2, H=2, Hkv=1, T=4, S=21, P=1),
            dict(segment_len=8, window_size=4, query_offset=17),
            dict(seq_start=[-3, 2], seq_end=[21, 20]),
        ),
    },
    compiled={
        "all-sources": lambda T: Case(
            dict(H=2, Hkv=1, T=T, P=3, M=4, segment_len=4, Dv=24),
            dict(segment_len=4, window_size=3, memory_is_causal=True),
        ),
        "padded": lambda T: Case(
            dict(H=2, Hkv=1, T=T, P=2), dict(window_size=5), dict(seq_start=[0, 2], seq_end=[7, 9])
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


# ---------------------------------------------------------------- future attention and its loss


def future_inputs(*, future_dim: int, **sizes: Any) -> Arguments:
    """Inputs of future attention and the one option that it needs."""
    return make_future_inputs(**sizes), dict(future_dim=future_dim)


def table_of_document(tensors, options, d, first, last) -> Arguments:
    """The table of a document, where each has its own."""
    if tensors["future_key"].ndim == 3:
        return tensors, options
    return tensors | {name: tensors[name][d] for name in TABLE}, options


def future_case(*, future_dim: int, bounds: dict | None = None, options=None, **sizes) -> Case:
    """A case of future attention."""
    return Case(dict(future_dim=future_dim, **sizes), options or {}, bounds or {})


DISTANCE = dict(future_index="distance")
FUTURE_CASES = {
    "one": future_case(T=1, rows=3, future_dim=2),
    "two": future_case(T=2, future_dim=1),
    "whole": future_case(T=37, future_dim=36),
    "band": future_case(T=37, future_dim=5),
    "band-1": future_case(T=20, H=2, Hkv=2, future_dim=1, options=dict(scale=0.3)),
    "short": future_case(T=20, rows=36, Hf=2, future_dim=9),
    "multi-query": future_case(T=20, H=4, Hkv=1, Hf=1, future_dim=7),
    "odd-head-dim": future_case(T=15, D=13, Dv=7, future_dim=4),
    "wide-value": future_case(T=17, D=8, Dv=24, rows=30, future_dim=30, options=DISTANCE),
    "distance": future_case(T=23, rows=6, separate_query=True, future_dim=6, options=DISTANCE),
    "separate-query": future_case(T=23, separate_query=True, future_dim=6),
    "per-sequence": future_case(T=19, B=3, tables=3, Hf=2, future_dim=6),
    "decode": future_case(T=1, S=33, B=3, rows=40, future_dim=5, options=dict(query_offset=32)),
    "chunk": future_case(T=6, S=33, rows=40, future_dim=5, options=dict(query_offset=20)),
    "packed": future_case(B=1, T=37, rows=22, future_dim=4, bounds=dict(cu_seqlens=DOCUMENTS)),
    "packed-tables": future_case(
        B=1, T=37, rows=22, tables=5, Hf=2, future_dim=4, bounds=dict(cu_seqlens=DOCUMENTS)
    ),
    "padded-left": future_case(B=3, T=21, Dv=8, future_dim=4, bounds=dict(seq_start=[0, 5, 20])),
    "padded-right": future_case(B=3, T=21, future_dim=6, bounds=dict(seq_end=[21, 7, 0])),
    "padded-tables": future_case(
        B=2, T=21, tables=2, future_dim=6, bounds=dict(seq_start=[2, 0], seq_end=[21, 12])
    ),
    "documents-distance": future_case(
        B=1,
        H=1,
        Hkv=1,
        T=45,
        rows=3,
        future_dim=3,
        options=DISTANCE,
        bounds=dict(cu_seqlens=[0, 36, 40, 40, 45]),
    ),  # fmt: skip
    "cut": future_case(
        **ONE, Hf=1, T=21, separate_query=True, future_dim=5, bounds=dict(seq_end=[18])
    ),
}
COSINE_THROUGH = dict(loss_type="cosine", detach_target=False)
LOSSES = {
    f"{loss_type}-{'detached' if detach else 'through'}": dict(
        loss_type=loss_type, detach_target=detach
    )
    for loss_type in ("mse", "cosine")
    for detach in (True, False)
}


def future_spec(**own: Any) -> OperatorSpec:
    """What the plain operator and its loss have in common."""
    gradcheck = dict(B=1, H=2, Hkv=1, T=5, D=3)
    shared = dict(
        make_inputs=future_inputs,
        cases=FUTURE_CASES,
        gradcheck={
            "position": future_case(**gradcheck, rows=5, separate_query=True, future_dim=3),
            "distance": future_case(
                **gradcheck, rows=3, separate_query=True, future_dim=3, options=DISTANCE
            ),
            "shared-query": future_case(**gradcheck, future_dim=3),
        },
        empty={
            "nothing": future_case(H=2, Hkv=1, T=0, S=0, rows=3, future_dim=2),
            "no-sequences": future_case(H=2, Hkv=1, B=0, T=4, future_dim=2),
            "no-queries": future_case(T=0, S=9, future_dim=4),
            "table-only": future_case(T=3, S=0, rows=9, future_dim=4),
            **{
                f"{name}-{'shared' if tables is None else 'per-sequence'}": future_case(
                    **ONE | sizes, rows=6, tables=tables, future_dim=3
                )
                for name, sizes in {
                    "no-queries": dict(T=0, S=5),
                    "table-only": dict(T=5, S=0),
                    "no-sequences": dict(B=0, T=5),
                }.items()
                for tables in (None, sizes.get("B", 1))
            },
        },
        at_length={
            f"band-{n}": lambda T, n=n: future_case(**ONE, T=T, D=32, future_dim=min(n, T - 1))
            for n in (1, 17, 130)
        },
        longest=(200, 600),
        at_head_dim=future_case(**ONE, Hf=1, T=130, future_dim=70),
        at_instruction_set={
            "long": future_case(**ONE, T=150, D=72, future_dim=8),
            "separate-query": future_case(
                H=2, Hkv=1, T=9, D=13, Dv=7, separate_query=True, future_dim=8
            ),
        },
        at_threads={
            name: future_case(B=2, H=2, Hkv=1, Hf=1, T=150, tables=tables, future_dim=40)
            for name, tables in {"shared": None, "per-sequence": 2}.items()
        },
        batched=("query", "key", "value", "future_query"),
        small=future_case(T=19, separate_query=True, Hf=2, future_dim=4),
        causal={"band": future_case(H=2, Hkv=1, T=37, future_dim=7)},
        padded={"band": future_case(**ONE, T=21, rows=30, future_dim=4)},
        packed={
            "shared": future_case(B=1, T=37, rows=22, future_dim=4),
            "per-document": future_case(B=1, T=37, rows=22, tables=5, Hf=2, future_dim=4),
        },
        document=table_of_document,
        unseen={
            "short": future_case(H=2, Hkv=1, T=10, rows=36, future_dim=5),
            "padded": future_case(
                T=20, future_dim=4, bounds=dict(seq_start=[3, 0], seq_end=[17, 0])
            ),
            # the second tile of queries holds the tail of a document, a short one and the next
            **{
                f"documents-{index}-{'shared' if tables is None else 'own'}": future_case(
                    **ONE | {"H": 1},
                    T=45,
                    rows=50 if index == "position" else 3,
                    tables=tables,
                    future_dim=3,
                    options=dict(future_index=index),
                    bounds=dict(cu_seqlens=[0, 36, 40, 40, 45]),
                )
                for index, tables in (("position", None), ("position", 4), ("distance", 4))
            },
        },
        repeated=FUTURE_CASES["packed"],
        large=future_case(T=9, D=64, future_dim=3),
        opcheck={
            "plain": future_case(B=2, H=2, Hkv=1, T=9, future_dim=3),
            "padded": future_case(
                H=2, Hkv=1, T=9, future_dim=3, bounds=dict(seq_start=[2, 0], seq_end=[9, 7])
            ),
            "distance": future_case(
                H=2, Hkv=1, T=9, separate_query=True, future_dim=8, options=DISTANCE
            ),
        },
        compiled={
            "padded": lambda T: future_case(
                H=2,
                Hkv=1,
                T=T,
                tables=2,
                future_dim=4,
                bounds=dict(seq_start=[2, 0], seq_end=[9, 7]),
            ),  # fmt: skip
            "fixed-table": lambda T: future_case(H=2, Hkv=1, T=T, rows=40, future_dim=4),
        },
        gpu_large={"band": future_case(T=1500, D=64, future_dim=100)},
        wrong=future_case(T=9, future_dim=2),
        wrong_packed=future_case(B=1, T=9, future_dim=2),
    )
    return OperatorSpec(**shared | own)


FUTURE = future_spec(
    operator=future_attention,
    rows=("out", "out_future", "lse"),
    interpreted_half=("distance", "band", "padded-tables"),
)
FUTURE_LOSS = future_spec(
    operator=future_attention_loss,
    variants=LOSSES,
    interpreted=("distance", "packed-tables", "padded-left", "chunk", "cut"),
    interpreted_half=("packed-tables",),
    # the definition of a loss that a published text gives: queries whose whole band is there
    means={"loss": lambda T: max(T - 4, 0)},
    few_variants=("cosine-through", "mse-detached"),
)


# ---------------------------------------------------------------- task-masked attention

TASK_MASKED = OperatorSpec(
    operator=task_masked_attention,
    make_inputs=make_task_masked_inputs,
    cases={
        "one": Case(dict(B=1, T=1, form="graph", nodes=1)),
        "small": Case(dict(T=20, form="dense")),
        "graph": Case(dict(T=135, form="graph", nodes=5)),
        "graph-causal": Case(dict(T=135, form="graph", nodes=40), dict(is_causal=True)),
        "heads": Case(dict(T=40, heads=True, form="dense")),
        "graph-heads": Case(dict(T=40, heads=True, form="graph", nodes=7), dict(scale=0.2)),
        "blocks": Case(dict(T=270, B=1, form="blocks")),
        "blocks-causal": Case(dict(T=270, B=1, H=1, form="blocks"), dict(is_causal=True)),
        "cross": Case(dict(T=33, S=140, form="dense")),
        "cross-graph": Case(dict(T=140, S=33, D=13, Dv=7, form="graph", nodes=9)),
        "multi-query": Case(dict(T=60, H=4, Hkv=1, form="graph", nodes=33)),
        "full": Case(dict(T=130, form="full")),
        "nothing": Case(dict(T=33, form="nothing")),
        "padded-left": Case(dict(T=135, form="graph", nodes=6), {}, dict(seq_start=[5, 134])),
        "padded": Case(
            dict(T=135, form="dense"),
            dict(is_causal=True),
            dict(seq_start=[3, 0], seq_end=[134, 0]),
        ),
        # full and partial tiles that bounds cut, in rows before, in and after the sequence
        **{
            f"cut-{'causal' if is_causal else 'both'}": Case(
                dict(B=2, H=1, Hkv=1, T=150, form="halves", n_tasks=1),
                dict(is_causal=is_causal),
                dict(seq_start=[3, 150], seq_end=[141, 200]),
            )
            for is_causal in (False, True)
        },
    },
    interpreted_half=("small", "graph-heads", "cross-graph"),
    gradcheck={"heads": Case(dict(B=2, H=2, Hkv=1, T=5, D=3, form="dense", n_tasks=2, heads=True))},
    empty={
        "no-sequences": Case(dict(B=0, T=9, form="dense")),
        "no-sequences-graph": Case(dict(B=0, T=5, form="graph")),
    },
    at_length={
        f"{form}-{'causal' if is_causal else 'both'}": lambda T, form=form, c=is_causal: Case(
            dict(**ONE, T=T, D=32, form=form, n_tasks=1), dict(is_causal=c)
        )
        for form in ("dense", "blocks", "graph")
        for is_causal in (False, True)
    },
    longest=(200, 300),
    at_head_dim=Case(dict(**ONE, T=130, form="dense", n_tasks=1)),
    at_instruction_set={
        f"{name}-{form}": Case(
            dict(H=2, Hkv=1, form=form, n_tasks=1, **sizes), dict(is_causal=name == "long")
        )
        for name, sizes in {"long": dict(T=150, D=72, B=1), "odd": dict(T=9, D=13, Dv=7)}.items()
        for form in ("dense", "graph")
    },
    at_threads={},  # test_task_masked_attention_cpp.py, beside batches
    small=Case(dict(T=40, heads=True, form="some", n_tasks=3), dict(scale=0.2)),
    causal={form: Case(dict(T=37, form=form), dict(is_causal=True)) for form in ("full", "some")},
    padded={
        "graph": Case(dict(B=1, T=21, form="graph", n_tasks=2)),
        "dense": Case(dict(B=1, T=21, form="dense", n_tasks=2), dict(is_causal=True)),
    },
    pad=pad_task_mask,
    unseen={form: Case(dict(T=40, form=form)) for form in ("dense", "graph-holes")}
    | {"padded": Case(dict(T=40, form="dense"), {}, dict(seq_start=[3, 0], seq_end=[33, 0]))},
    repeated=Case(dict(T=40, heads=True, form="graph", nodes=7)),
    large=Case(dict(T=9, D=64, form="some"), dict(is_causal=True)),
    opcheck={
        form: Case(
            dict(H=2, Hkv=1, T=9, form=form, n_tasks=2),
            dict(is_causal=form == "graph"),
            dict(seq_start=[2, 0], seq_end=[9, 7]) if form == "dense" else {},
        )
        for form in ("dense", "graph")
    },
    compiled={
        "graph-heads": lambda T: Case(
            dict(H=2, Hkv=1, T=T, heads=True, form="graph", nodes=7), dict(scale=0.2)
        ),
        "padded": lambda T: Case(
            dict(H=2, Hkv=1, T=T, form="dense"), {}, dict(seq_start=[0, 2], seq_end=[7, 9])
        ),
    },
    gpu_large={
        "graph": Case(dict(B=3, H=4, Hkv=2, T=1500, D=64, form="graph", nodes=20, n_tasks=2))
    },
    wrong=Case(dict(H=4, Hkv=2, T=9, form="dense", n_tasks=2)),
)

SPECS = [SEGMENTED, FUTURE, FUTURE_LOSS, TASK_MASKED]
