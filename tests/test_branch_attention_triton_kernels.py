"""branch_attention in Triton: what the test file of all backends does not reach."""

import pytest
import torch
from branch_factories import make_branch_inputs
from operator_contract import DEVICE, assert_same, int32, needs_triton

from memattn import branch_attention
from memattn.testing import run_with_gradients

pytest.importorskip("triton", reason="Triton is not installed")

from memattn_kernels.branch_attention import index
from memattn_kernels.signatures import BranchAttentionArgs

pytestmark = needs_triton


def test_what_other_slots_choose_changes_no_bit():
    """Of a row's results and of its query's gradient: it may stand in another tile."""
    tensors, options = make_branch_inputs(
        B=1, H=2, Hkv=1, T=37, F=2, empty=True, fixed_gates=True, device=DEVICE["triton"]
    )
    options |= {"backend": "triton"}
    gates, indices = options.pop("gates"), options.pop("branch_indices")

    def rows(gates, indices):
        found = run_with_gradients(
            branch_attention, tensors, options | {"gates": gates, "branch_indices": indices}
        )
        return {name: found[name] for name in ("out", "lse", "d_query")}

    expected = rows(gates, indices)
    for slot, token in ((0, slice(None)), (slice(None), slice(0, 23))):
        others = torch.ones_like(indices, dtype=torch.bool)
        others[:, token, slot] = False
        closed = others & (torch.arange(37, device=others.device) % 3 == 0)[:, None]
        moved = torch.where(others, 1 - indices.abs(), indices)
        changed = rows(gates.masked_fill(closed, 0.0), moved)
        of_kept = lambda results, slot=slot, token=token: {
            name: x[:, slot, :, token] for name, x in results.items()
        }
        assert_same(of_kept(changed), of_kept(expected))
        assert not torch.equal(changed["out"], expected["out"])


@pytest.mark.parametrize(
    ("sizes", "bounds", "query_offset"),
    [
        (dict(T=11), dict(seq_start=[2, 0], seq_end=[9, 14]), 3),
        (dict(B=1, T=9), dict(cu_seqlens=[0, 1, 6, 6, 9, 12]), 3),
        (dict(T=6, form="all"), {}, 0),
    ],
    ids=["padded", "packed", "all"],
)
def test_the_index_has_every_active_slot_once(sizes, bounds, query_offset):
    """By branch, document and token, and keys find the rows that see them."""
    tensors, options = make_branch_inputs(**sizes, S=sizes["T"] + query_offset, empty=True)
    bounds = {name: int32(*values) for name, values in bounds.items()}
    fields = dict.fromkeys(BranchAttentionArgs._fields) | tensors | bounds
    indices = options.get("branch_indices")
    args = BranchAttentionArgs(
        **fields | dict(indices=indices, is_causal=True, query_offset=query_offset, scale=1.0)
    )
    (B, T, A), F, S = args.gates.shape, args.key.shape[1], args.key.shape[3]
    if indices is None:
        indices = torch.arange(F).expand(B, T, F)

    documents = args.cu_seqlens.tolist() if args.cu_seqlens is not None else None
    n = 1 if documents is None else len(documents) - 1
    units: list[list[tuple[int, int]]] = [[] for _ in range(B * F * n)]
    for b in range(B):
        first = 0 if args.seq_start is None else int(args.seq_start[b])
        last = S if args.seq_end is None else int(args.seq_end[b])
        for t in range(T):
            i = t + query_offset
            d = 0 if documents is None else sum(bound <= i for bound in documents) - 1
            for a in range(A):
                f = int(indices[b, t, a])
                if first <= i < last and f >= 0 and args.gates[b, t, a] != 0:
                    units[(b * F + f) * n + d].append((t, (b * T + t) * A + a))

    found = index.BranchIndex(
        torch.empty(B * T * A, dtype=torch.int32), torch.empty(len(units) + 1, dtype=torch.int32)
    )
    index.fill_index(found, args)
    assert sorted(found.entry.tolist()) == list(range(B * T * A))
    for unit, (begin, end) in zip(
        units, zip(found.bounds.tolist(), found.bounds.tolist()[1:], strict=False), strict=True
    ):
        assert found.entry[begin:end].tolist() == [entry for _, entry in unit]
    before = index.entries_before(args, found)
    start, end = index.tokens_of_keys(args)
    first, last = index.keys_of_tokens(args)
    for b in range(B):
        for f in range(F):
            own = sum(units[(b * F + f) * n : (b * F + f + 1) * n], [])
            for j in range(S):
                place = before[[(b * F + f) * T + int(x[b, j]) for x in (start, end)]]
                seeing = [e for t, e in own if first[b, t] <= j < last[b, t]]
                assert found.entry[place[0] : place[1]].tolist() == seeing, (b, f, j)
