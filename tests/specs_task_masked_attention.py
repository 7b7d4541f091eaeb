"""What the shared tests need to know of task-masked attention."""

from operator_contract import ONE, Case, OperatorSpec
from task_mask_factories import make_task_masked_inputs, pad_task_mask

from memattn import task_masked_attention

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
        f"{form}-{'causal' if is_causal else 'both'}": Case(
            dict(H=2, Hkv=1, T=9, form=form, n_tasks=2),
            dict(is_causal=is_causal),
            dict(seq_start=[2, 0], seq_end=[9, 7]),
        )
        for form, is_causal in (("dense", False), ("dense", True), ("graph", False))
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
