"""What the shared tests need to know of chapter attention."""

from typing import Any

import torch
from chapter_factories import make_chapter_inputs
from operator_contract import DOCUMENTS, ONE, Arguments, Case, OperatorSpec
from torch.nn import functional as F

from memattn import chapter_attention
from memattn.reference.chapter_quantization import quantize_rows

ROUTING_BLOCK_LEN = 4  # tokens of a routing block


def chapter_inputs(
    *,
    form: str = "token",
    T: int = 37,
    N: int | None = None,
    chosen: int | None = None,
    bits: int | None = None,
    **sizes: Any,
) -> Arguments:
    """Inputs of chapter attention for a form of routing.

    ``N`` rows instead of as many as ``T`` tokens have; only the first ``chosen`` chapters are
    selected; a bank of ``bits`` is an option, as it has no gradient.
    """
    rows = {"token": T, "block": -(-T // ROUTING_BLOCK_LEN), "sequence": None}[form]
    tensors, options = make_chapter_inputs(T=T, N=rows if N is None else N, **sizes)
    if form == "block":
        options["routing_block"] = ROUTING_BLOCK_LEN
    if chosen is not None:
        indices = options["chapter_indices"]
        options["chapter_indices"] = torch.where(indices < 0, indices, indices % chosen)
    if bits is not None:
        for name in ("key", "value"):
            codes, scale = quantize_rows(tensors.pop(f"chapter_{name}"), bits)
            options |= {f"chapter_{name}": codes, f"{name}_scale": scale}
    return tensors, options


def change_slots(tensors, options, change) -> Arguments:
    """The arguments with indices and weights changed by a function of a tensor."""
    named = {"chapter_indices": options["chapter_indices"]}
    named |= {n: t for n, t in tensors.items() if n == "chapter_weights"}
    changed = {name: change(tensor) for name, tensor in named.items()}
    indices = changed.pop("chapter_indices")
    return tensors | changed, options | {"chapter_indices": indices}


def pad_slots(tensors, options, left, right) -> Arguments:
    """Rows for more tokens; rows of blocks and sequences count from the start."""
    if options["chapter_indices"].dim() == 2 or "routing_block" in options:
        return tensors, options
    return change_slots(tensors, options, lambda t: F.pad(t, (0, 0, left, right)))


def slots_of_document(tensors, options, d, first, last) -> Arguments:
    """The rows of a document's tokens, or of its blocks, which follow those of others."""
    if options["chapter_indices"].dim() == 2:
        return tensors, options
    if "routing_block" in options:
        bounds = zip(DOCUMENTS, DOCUMENTS[1:], strict=False)
        blocks = [-(-(b - a) // ROUTING_BLOCK_LEN) for a, b in bounds]
        first, last = sum(blocks[:d]), sum(blocks[: d + 1])
    return change_slots(tensors, options, lambda t: t[:, first:last])


PADDED = dict(seq_start=[3, 0], seq_end=[37, 30])

CHAPTERS = OperatorSpec(
    operator=chapter_attention,
    make_inputs=chapter_inputs,
    cases={
        "one": Case(dict(B=1, T=1, C=1, M=1, K=1)),
        "token": Case(dict(T=37)),
        "token-empty": Case(dict(T=37, empty=True, repeats=True, K=4)),
        "token-plain": Case(dict(T=37, weights=False), dict(scale=0.3)),
        "token-repeats": Case(dict(T=20, weights=False, repeats=True, K=6, C=3)),
        "block": Case(dict(form="block", T=37, empty=True, repeats=True)),
        "block-plain": Case(dict(form="block", T=37, weights=False)),
        "sequence": Case(dict(form="sequence", T=37, empty=True, repeats=True)),
        "sequence-plain": Case(dict(form="sequence", T=37, weights=False)),
        "multi-head": Case(dict(T=20, H=2, Hkv=2)),
        "multi-query": Case(dict(T=20, H=4, Hkv=1)),
        "large-group": Case(dict(B=1, T=9, H=24, Hkv=1)),
        "large-chapters": Case(dict(B=1, T=20, H=2, Hkv=1, C=3, M=300, K=2)),
        "many-chapters": Case(dict(B=1, T=20, H=2, Hkv=1, C=70, M=3, K=20)),
        "many-keys": Case(dict(B=1, T=70, H=2, Hkv=1, C=8, M=40, K=8, empty=True)),
        "one-key": Case(dict(T=20, M=1)),
        "head-dim-40": Case(dict(T=17, D=40)),
        "odd-head-dim": Case(dict(T=15, D=13, Dv=7)),
        "wide-value": Case(dict(T=17, D=8, Dv=24)),
        "decode": Case(dict(T=1, B=3), dict(query_offset=32)),
        "decode-block": Case(dict(form="block", T=3, N=2, B=3), dict(query_offset=6)),
        "token-padded": Case(dict(T=37), {}, PADDED),
        "block-padded": Case(dict(form="block", T=37), {}, PADDED),
        "block-padded-offset": Case(
            dict(form="block", T=11, N=4),
            dict(query_offset=6),
            dict(seq_start=[3, 8], seq_end=[17, 12]),
        ),
        "sequence-padded": Case(dict(form="sequence", T=37), {}, PADDED),
        "nothing-left": Case(dict(T=9), {}, dict(seq_start=[9, 0], seq_end=[9, 0])),
        "packed": Case(dict(B=1, T=37), {}, dict(cu_seqlens=DOCUMENTS)),
        "packed-block": Case(dict(form="block", B=1, T=37, N=11), {}, dict(cu_seqlens=DOCUMENTS)),
        "int8": Case(dict(T=20, bits=8)),
        "int4": Case(dict(form="block", T=20, bits=4, weights=False)),
    },
    variants={name: {"combine": name} for name in ("joint", "independent")},
    few_variants=("joint", "independent"),
    interpreted=(
        "one",
        "token",
        "token-empty",
        "block",
        "sequence",
        "multi-head",
        "large-group",
        "large-chapters",
        "odd-head-dim",
        "wide-value",
        "decode-block",
        "token-padded",
        "block-padded-offset",
        "sequence-padded",
        "nothing-left",
        "packed-block",
        "int8",
        "int4",
    ),
    interpreted_half=("token-empty", "block", "sequence-padded", "large-chapters"),
    gradcheck={
        form: Case(dict(form=form, B=1, H=2, Hkv=1, T=5, D=3, C=4, M=2, K=3, repeats=True))
        for form in ("token", "block", "sequence")
    },
    empty={
        "no-sequences": Case(dict(B=0, T=9)),
        "no-sequences-block": Case(dict(form="block", B=0, T=9)),
        "no-queries": Case(dict(T=0)),
        "no-queries-sequence": Case(dict(form="sequence", T=0)),
        "no-slots": Case(dict(T=9, K=0)),
        "no-slots-sequence": Case(dict(form="sequence", T=9, K=0, weights=False)),
    },
    at_length={
        "token": lambda T: Case(dict(**ONE, T=T, D=32, C=5, M=40, K=2)),
        "sequence": lambda T: Case(dict(form="sequence", **ONE, T=T, D=32, C=5, M=40, K=2)),
        "keys": lambda T: Case(dict(T=40, D=32, C=5, M=T, K=2)),
    },
    longest=(200, 300),
    at_head_dim=Case(dict(**ONE, T=130, C=6, M=20, K=2)),
    at_instruction_set={
        "one": Case(dict(B=1, T=1)),
        "token": Case(dict(T=37, empty=True, repeats=True)),
        "block-padded": Case(dict(form="block", T=37), {}, PADDED),
        "odd-head-dim": Case(dict(T=15, D=13, Dv=7)),
        "long": Case(dict(**ONE, T=150, D=72, C=5, M=150, K=2)),
        "many-keys": Case(dict(B=1, T=70, H=2, Hkv=1, C=8, M=40, K=8)),
        "int8": Case(dict(T=20, bits=8)),
    },
    at_threads={
        form: Case(dict(form=form, H=3, Hkv=1, T=150, C=5, M=20)) for form in ("token", "block")
    },
    tokens=("query",),
    batched=("query", "chapter_weights", "chapter_indices"),
    float32=("chapter_weights",),
    small=Case(dict(T=19, repeats=True), dict(scale=0.3)),
    causal={form: Case(dict(form=form, T=37)) for form in ("token", "block", "sequence")},
    padded={
        form: Case(dict(form=form, B=1, T=21, empty=True))
        for form in ("token", "block", "sequence")
    },
    pad=pad_slots,
    packed={
        "token": Case(dict(B=1, T=37)),
        "block": Case(dict(form="block", B=1, T=37, N=11)),
        "sequence": Case(dict(form="sequence", B=1, T=37)),
    },
    document=slots_of_document,
    unseen={
        "empty": Case(dict(T=40, K=2, chosen=3, empty=True, weights=False)),
        "padded": Case(dict(T=40, K=2, chosen=4), {}, dict(seq_start=[3, 0], seq_end=[33, 0])),
        "sequence": Case(dict(form="sequence", T=40, K=2, chosen=2), {}, dict(seq_end=[33, 40])),
    },
    repeated=Case(dict(T=17, empty=True, repeats=True, Dv=24)),
    large=Case(dict(T=9, D=64, weights=False)),
    opcheck={
        "token": Case(dict(H=2, Hkv=1, T=9, empty=True, repeats=True, Dv=24)),
        "block": Case(
            dict(form="block", H=2, Hkv=1, T=9, N=3, weights=False),
            {},
            dict(seq_start=[2, 0], seq_end=[9, 7]),
        ),
        "int8": Case(dict(form="sequence", H=2, Hkv=1, T=9, bits=8)),
    },
    compiled={  # no two sizes alike at the first length: torch would take them for one
        "token": lambda T: Case(dict(H=4, Hkv=1, T=T, D=16, C=7, M=5, K=3)),
        "block": lambda T: Case(dict(form="block", H=4, Hkv=1, T=T, D=16, C=11, M=7, K=6)),
        "sequence": lambda T: Case(
            dict(form="sequence", H=4, Hkv=1, T=T, weights=False),
            {},
            dict(seq_start=[0, 2], seq_end=[7, 9]),
        ),
    },
    gpu_large={
        "token": Case(dict(T=1500, D=64, C=64, M=64, K=8)),
        "block": Case(dict(form="block", T=1500, D=64, C=64, M=64, K=8)),
    },
    wrong=Case(dict(H=4, Hkv=2, T=9)),
    wrong_packed=Case(dict(B=1, T=9)),
)
