"""chapter_attention in C++: what its bits depend on, and what it stores."""

import pytest
import torch
from operator_contract import Case, assert_same, needs_cpp
from specs_chapter_attention import CHAPTERS, change_slots

from memattn import chapter_attention
from memattn.testing import run_with_gradients

pytestmark = needs_cpp
FORMS = ("token", "block", "sequence")
each_combine = pytest.mark.parametrize("combine", ["joint", "independent"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
each_form = pytest.mark.parametrize("form", FORMS)


def make(form: str, combine: str, dtype: torch.dtype = torch.float32, **sizes):
    """Rows of few and of many keys, repeats, empty slots; chapters of several tiles of rows."""
    sizes = dict(B=3, T=150, C=9, M=20, K=12, empty=True, repeats=True) | sizes
    tensors, options = CHAPTERS.make(Case(dict(form=form, **sizes)), "cpp", dtype)
    return tensors, options | dict(combine=combine)


@each_combine
@each_form
def test_the_order_of_slots_changes_no_bit(form, combine):
    tensors, options = make(form, combine)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    changed, other = change_slots(tensors, options, lambda t: t[..., order])
    expected, actual = (
        run_with_gradients(chapter_attention, *given)
        for given in ((tensors, options), (changed, other))
    )
    expected["d_chapter_weights"] = expected["d_chapter_weights"][..., order]
    assert_same(actual, expected)


@each_dtype
@each_combine
@each_form
def test_a_sequence_has_the_same_bits_alone(form, combine, dtype):
    tensors, options = make(form, combine, dtype)
    expected = run_with_gradients(chapter_attention, tensors, options)
    cotangents = {n: t.detach().sin() for n, t in expected.items() if n in ("out", "lse")}

    def gradients(tensors, options, part):
        leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
        out, lse = chapter_attention(**leaves, **options)
        wanted = [leaves["query"], leaves["chapter_weights"]]
        given = [t[part].nan_to_num(neginf=0.0) for t in cotangents.values()]
        return out, lse, *torch.autograd.grad([out, lse], wanted, given)

    together = gradients(tensors, options, slice(0, 3))
    own = change_slots(tensors, options, lambda t: t[1:2])
    own[0]["query"] = tensors["query"][1:2]
    for alone, among in zip(gradients(*own, slice(1, 2)), together, strict=True):
        assert torch.equal(alone, among[1:2])


@each_combine
@each_form
def test_threads_change_no_bit(form, combine):
    tensors, options = make(form, combine, H=6, Hkv=3)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run_with_gradients(chapter_attention, tensors, options))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same(other, results[0])


@each_combine
def test_nothing_of_the_size_of_the_selected_keys_is_saved(combine):
    """What autograd keeps beside the inputs grows with the slots by an index of four bytes each."""
    saved = []
    for K in (2, 32):
        tensors, options = make("token", combine, C=64, K=K, empty=False, repeats=False)
        sizes = {}

        def keep(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        leaves = {n: t.requires_grad_() for n, t in tensors.items()}
        given = {t.data_ptr() for t in (*leaves.values(), options["chapter_indices"])}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            chapter_attention(**leaves, **options)
        saved.append(sum(n for at, n in sizes.items() if at not in given))
    assert saved[1] - saved[0] == 4 * 3 * 150 * (32 - 2)
