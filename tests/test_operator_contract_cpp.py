"""What every operator of the C++ extension must show: lengths, instruction sets, threads."""

import pytest
import torch
from operator_contract import DTYPES, INSTRUCTION_SETS, assert_same, needs_cpp, over
from operator_specs import having

SPECS = having("cpp")
pytestmark = [pytest.mark.operator, needs_cpp]
# around the sizes of panels, tiles and blocks
LENGTHS = [2, 15, 16, 17, 63, 64, 65, 95, 96, 97, 127, 128, 129]
HALF_LENGTHS = [3, 15, 17, 33, 47, 97, 129]


def lengths(values):
    """Operator, case at a length, and length."""
    return [
        pytest.param(spec, case, T, id=f"{spec}-{name}-{T}")
        for spec in SPECS
        for name, case in spec.at_length.items()
        for T in (*values, *spec.longest)
    ]


@pytest.mark.parametrize(("spec", "case", "T"), lengths(LENGTHS))
def test_awkward_lengths(spec, case, T):
    spec.check_case(case(T), "cpp", torch.float32)


@pytest.mark.parametrize(("spec", "case", "T"), lengths(HALF_LENGTHS))
def test_awkward_lengths_in_bfloat16(spec, case, T):
    """Pairs of rows and keys of which one is left over, tiles that are not full."""
    spec.check_case(case(T), "cpp", torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [dict(D=64), dict(D=80), dict(D=80, Dv=40), dict(D=96), dict(D=128), dict(D=256)],
    ids=str,
)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_head_dims(spec, sizes, dtype):
    spec.check_case(spec.at_head_dim, "cpp", dtype, **sizes)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over(SPECS, "at_instruction_set")
def test_every_instruction_set(spec, case, name, dtype):
    ops = torch.ops.memattn_cpp
    before = ops.cpu_capability()
    try:
        ops.set_cpu_capability(name)
    except RuntimeError:
        pytest.skip(f"this processor has no {name}")
    try:
        assert ops.cpu_capability() == name
        spec.check_case(case, "cpp", dtype)
    finally:
        ops.set_cpu_capability(before)


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(RuntimeError, match="name must be an instruction set"):
        torch.ops.memattn_cpp.set_cpu_capability("sse9")


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@over(SPECS, "at_threads")
def test_gradients_do_not_depend_on_who_computes_them(spec, case, threads):
    """Few heads leave threads idle, so their queries are split; the sums must still be right."""
    before = torch.get_num_threads()
    tensors, options = spec.make(case, "cpp")
    try:
        torch.set_num_threads(threads)
        for variant in spec.variants.values():
            first = spec.check(tensors, {**options, **variant})
            assert_same(spec.gradients(tensors, {**options, **variant}), first)
    finally:
        torch.set_num_threads(before)
