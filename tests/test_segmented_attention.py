"""segmented_attention: every backend against the float64 reference."""

import pytest
import torch
from segmented_factories import (
    BACKENDS,
    BOUNDED,
    CASES,
    DTYPES,
    check_against_reference,
    make_case,
    needs_cpp,
)

from memattn import segmented_attention
from memattn.testing import (
    make_segmented_inputs,
)

pytestmark = pytest.mark.operator


@pytest.mark.parametrize("name", [*CASES, *BOUNDED])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(
            *p.values, dtype, marks=p.marks, id=f"{p.values[0]}-{dtype}".replace("torch.", "")
        )
        for p in BACKENDS
        for dtype in DTYPES[p.values[0]]
    ],
)
def test_matches_reference(backend, dtype, name):
    tensors, options = make_case(name, backend, dtype)
    check_against_reference(backend, tensors, options)


# lengths around the sizes of tiles, blocks and panels
LENGTHS = [2, 15, 16, 17, 63, 64, 65, 95, 96, 97, 127, 128, 129, 200, 1000]


@needs_cpp
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(window_size=33),
        dict(segment_len=48, window_size=20, is_causal=False),
    ],
    ids=["causal", "window", "union"],
)
def test_cpp_matches_reference_at_awkward_lengths(T, options):
    tensors = make_segmented_inputs(B=1, H=2, Hkv=1, T=T, D=32, P=5)
    check_against_reference("cpp", tensors, options)


@needs_cpp
@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES["cpp"], ids=str)
def test_cpp_matches_reference_at_head_dim(D, dtype):
    tensors = make_segmented_inputs(B=1, H=2, Hkv=1, T=130, D=D, dtype=dtype)
    check_against_reference("cpp", tensors, dict(window_size=70))


@needs_cpp
@pytest.mark.parametrize("name", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("dtype", DTYPES["cpp"], ids=str)
def test_every_instruction_set_matches_reference(name, dtype):
    ops = torch.ops.memattn_cpp
    before = ops.cpu_capability()
    if name == "avx512" and before != "avx512":
        pytest.skip("this processor has no AVX-512")
    ops.set_cpu_capability(name)
    try:
        assert ops.cpu_capability() == name
        for case in ("one", "dense", "all-sources", "padded-left", "odd-head-dim", "decode"):
            check_against_reference("cpp", *make_case(case, "cpp", dtype))
        tensors = make_segmented_inputs(B=1, H=2, Hkv=1, T=150, D=72, dtype=dtype)
        check_against_reference("cpp", tensors, dict(window_size=33))
    finally:
        ops.set_cpu_capability(before)


@needs_cpp
def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(RuntimeError, match="name must be an instruction set"):
        torch.ops.memattn_cpp.set_cpu_capability("sse9")


@pytest.mark.parametrize(
    "options",
    [
        dict(segment_len=4, window_size=3, memory_is_causal=True),
        dict(segment_len=4, window_size=2, is_causal=False),
    ],
    ids=["causal", "both"],
)
def test_reference_gradcheck(options):
    tensors = make_segmented_inputs(
        B=1, H=2, Hkv=1, T=6, D=3, P=2, M=4, segment_len=4, dtype=torch.float64
    )
    leaves = [t.requires_grad_() for t in tensors.values()]
    torch.autograd.gradcheck(
        lambda *args: segmented_attention(**dict(zip(tensors, args, strict=True)), **options),
        leaves,
    )


@needs_cpp
@pytest.mark.parametrize("name", ["all-sources", "packed", "trimmed"])
def test_opcheck_cpp(name):
    import memattn.cpp.segmented_attention  # noqa: F401  its fake kernels, loaded when first used

    op = torch.ops.memattn_cpp.segmented_attention.default
    tensors, options = make_case(name, "cpp")
    names = ("query", "key", "value", "persistent_key", "persistent_value")
    names += ("memory_key", "memory_value")
    args = [tensors[n].requires_grad_() if n in tensors else None for n in names]
    args += [options.get(n) for n in ("cu_seqlens", "seq_start", "seq_end")]
    args += [options.get(n) for n in ("segment_len", "window_size")]
    args += [True, options.get("memory_is_causal", False), options.get("query_offset", 0), 0.25]
    torch.library.opcheck(op, tuple(args))


@needs_cpp
def test_gradients_do_not_depend_on_who_computes_them():
    """One key head leaves threads idle, so its queries are split; the sums must still be right."""
    threads = torch.get_num_threads()
    tensors = make_segmented_inputs(B=1, H=2, Hkv=1, T=300, P=3, M=4, segment_len=32)
    options = dict(segment_len=32, window_size=40)
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            check_against_reference("cpp", tensors, options)
    finally:
        torch.set_num_threads(threads)
