"""What the shared tests need to know of future attention and its loss."""

from typing import Any

from operator_contract import DOCUMENTS, ONE, Arguments, Case, OperatorSpec

from memattn import future_attention, future_attention_loss
from memattn.bench.inputs import make_future_inputs

TABLE = ("future_key", "future_value")


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
