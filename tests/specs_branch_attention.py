"""What the shared tests need to know of branch attention."""

from branch_factories import make_branch_inputs
from operator_contract import DOCUMENTS, ONE, Arguments, Case, OperatorSpec
from torch.nn import functional as F

from memattn import branch_attention

FORMS = ("token", "sequence", "all")
PADDED = dict(seq_start=[3, 0], seq_end=[33, 37])


def pad_slots(tensors, options, left, right) -> Arguments:
    """Slots of more tokens, in branches that there are."""
    change = lambda t: F.pad(t, (0, 0, left, right))
    return tensors, options | {
        name: change(t) for name, t in options.items() if name == "branch_indices"
    }


def slots_of_document(tensors, options, d, first, last) -> Arguments:
    """Slots of the tokens of a document."""
    return tensors, options | {
        name: t[:, first:last] for name, t in options.items() if name == "branch_indices"
    }


BRANCHES = OperatorSpec(
    operator=branch_attention,
    make_inputs=make_branch_inputs,
    own_axes=True,
    cases={
        "one": Case(dict(T=1)),
        "token": Case(dict(T=37, empty=True)),
        "sequence": Case(dict(T=37, form="sequence", F=5)),
        "all": Case(dict(T=37, form="all", empty=True)),
        "one-branch": Case(dict(T=20, F=1, A=1)),
        "many-branches": Case(dict(T=37, F=51, H=2, Hkv=1)),
        "dense": Case(dict(T=37, S=23), dict(is_causal=False)),
        "dense-all": Case(dict(T=20, form="all"), dict(is_causal=False)),
        "multi-head": Case(dict(T=20, H=2, Hkv=2), dict(scale=0.3)),
        "multi-query": Case(dict(T=20, H=4, Hkv=1)),
        "odd-head-dim": Case(dict(T=15, D=13, Dv=7)),
        "wide-value": Case(dict(T=17, D=8, Dv=24)),
        "decode": Case(dict(T=1, S=33, B=3), dict(query_offset=32)),
        "decode-all": Case(dict(T=3, S=33, form="all"), dict(query_offset=30)),
        "past-the-keys": Case(dict(T=9, S=5), dict(query_offset=2)),
        "packed": Case(dict(B=1, T=37, empty=True), {}, dict(cu_seqlens=DOCUMENTS)),
        "packed-all": Case(
            dict(B=1, T=37, form="all"), dict(is_causal=False), dict(cu_seqlens=DOCUMENTS)
        ),
        "padded": Case(dict(T=37, empty=True), {}, PADDED),
        "padded-all": Case(dict(T=37, form="all"), dict(is_causal=False), PADDED),
        "nothing-left": Case(dict(T=9), {}, dict(seq_start=[9, 0], seq_end=[9, 0])),
        "trimmed": Case(
            dict(T=4, S=21), dict(query_offset=17), dict(seq_start=[-3, 2], seq_end=[21, 20])
        ),
    },
    interpreted=(
        *("token", "all", "odd-head-dim", "packed", "padded-all", "nothing-left", "trimmed"),
    ),
    interpreted_half=("token", "decode"),
    gradcheck={form: Case(dict(form=form, B=1, H=2, Hkv=1, T=4, D=3, Dv=2)) for form in FORMS},
    empty={
        "no-sequences": Case(dict(B=0, T=9)),
        "no-sequences-all": Case(dict(B=0, T=9, form="all")),
        "no-queries": Case(dict(T=0, S=5)),
        "no-keys": Case(dict(T=3, S=0), dict(is_causal=False)),
    },
    at_length={
        "token": lambda T: Case(dict(**ONE, T=T, D=32)),
        "all": lambda T: Case(dict(**ONE, T=T, D=32, form="all")),
        "dense": lambda T: Case(dict(**ONE, T=40, S=T, D=32), dict(is_causal=False)),
    },
    longest=(200, 300),
    at_head_dim=Case(dict(**ONE, T=130)),
    at_instruction_set={
        "one": Case(dict(T=1)),
        "token": Case(dict(T=37, empty=True)),
        "padded": Case(dict(T=37, empty=True), {}, PADDED),
        "odd-head-dim": Case(dict(T=15, D=13, Dv=7)),
        "decode": Case(dict(T=1, S=33, B=3), dict(query_offset=32)),
        "long": Case(dict(**ONE, T=150, D=72)),
    },
    at_threads={"token": Case(dict(**ONE, T=300)), "all": Case(dict(**ONE, T=300, form="all"))},
    tokens=("query", "key", "value", "gates"),
    batched=("query", "key", "value", "gates", "branch_indices"),
    float32=("gates",),
    small=Case(dict(T=19), dict(scale=0.3)),
    causal={form: Case(dict(form=form, T=37, empty=True)) for form in FORMS},
    padded={form: Case(dict(form=form, B=1, T=21, empty=True)) for form in FORMS},
    pad=pad_slots,
    packed={form: Case(dict(form=form, B=1, T=37, empty=True)) for form in FORMS},
    document=slots_of_document,
    unseen={
        "empty": Case(dict(T=19, F=7, empty=True, fixed_gates=True)),
        "padded": Case(dict(T=37), {}, PADDED),
        "padded-all": Case(dict(T=9, form="all"), {}, dict(seq_end=[4, 0])),
    },
    repeated=Case(dict(T=17, empty=True, Dv=24)),
    large=Case(dict(T=9, D=64, fixed_gates=True)),
    opcheck={
        "token": Case(dict(**ONE, T=9, empty=True, Dv=24)),
        "all": Case(dict(**ONE, T=9, form="all"), {}, dict(cu_seqlens=[0, 1, 6, 6, 9])),
    },
    compiled={  # no two sizes alike at the first length: torch would take them for one
        "token": lambda T: Case(
            dict(H=4, Hkv=1, T=T, D=16, F=5, A=3), {}, dict(seq_start=[0, 2], seq_end=[7, 9])
        ),
    },
    gpu_large={
        "token": Case(dict(T=1500, D=64, F=16)),
        "all": Case(dict(T=1500, D=64, F=2, form="all")),
    },
    wrong=Case(dict(T=9)),
    wrong_packed=Case(dict(B=1, T=9)),
)
