"""Recorded launches are those of plain calls; run by ``test_recorded_launches.py`` as a process.

Kernels are not interpreted, and a stand-in takes the place of a driver: nothing is computed.
"""

import functools
import gc
import json
import weakref
from contextlib import contextmanager

import pytest
import torch
from operator_specs import having
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from triton import knobs

from memattn.bench.host_driver import HostDriver
from memattn.ops.segmented_attention import segmented_attention
from memattn_kernels import _replay, configs, recording

DRIVER = HostDriver(keeps=True).install()
FIRST_ARGUMENT = 14  # of the kernel, which stands before what the launcher is called with
ALLOCATORS = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided")]
ALLOCATORS += [(Tensor, "new_empty")]


@pytest.fixture(autouse=True)
def allocated(monkeypatch):
    """What was allocated, all zero and kept, so that no two addresses are the same."""
    kept = []

    def zeroed(allocate):
        return lambda *args, **kwargs: kept.append(allocate(*args, **kwargs).zero_()) or kept[-1]

    for owner, name in ALLOCATORS:
        monkeypatch.setattr(owner, name, zeroed(getattr(owner, name)))
    call = _replay._call
    keep = lambda step, tensors: call(step, tensors) or kept.append(list(tensors))
    monkeypatch.setattr(_replay, "_call", keep)
    yield kept
    recording.switch(False)
    DRIVER.streams.clear()


def launches_of(call):
    """What a call launches, and whether any was replayed: then pointers are integers."""
    DRIVER.launches.clear()
    call()
    found = list(DRIVER.launches)
    DRIVER.launches.clear()
    return found, any(map(is_of_replay, found))


def is_of_replay(launch):
    """Whether pointers are integers, not tensors."""
    return not any(isinstance(value, Tensor) for value in launch[FIRST_ARGUMENT:])


def is_replayed(call):
    """Whether the call is a replay once it was seen often enough."""
    for _ in range(recording.SIGHTS):
        assert not launches_of(call)[1]
    return launches_of(call)[1]


def assert_same_launches(plain, replayed, own=()):
    """The same kernels, grids, options and numbers; pointers that stand for each other."""
    assert [launch[0] for launch in plain] == [launch[0] for launch in replayed]
    pairs = {tensor.data_ptr(): tensor.data_ptr() for tensor in own}
    for launch, again in zip(plain, replayed, strict=True):
        # but for metadata and hooks, of which there are none
        assert launch[1:11] == again[1:11]
        assert not is_of_replay(again) or again[11:14] == (None, None, None)
        values = zip(launch[FIRST_ARGUMENT:], again[FIRST_ARGUMENT:], strict=True)
        for value, number in values:
            number = number.data_ptr() if isinstance(number, Tensor) else number
            if not isinstance(value, Tensor):
                assert value == number
                assert type(value) is type(number)
            else:
                pointer = value.data_ptr()
                assert pairs.setdefault(pointer, number) == number
                assert pointer % 16 == number % 16
    assert len(set(pairs.values())) == len(pairs)


def check_call(run, *tensors):
    """Plain launches, and those of a replay that was recorded with other tensors."""
    recording.switch(False)
    plain, is_replay = launches_of(lambda: run(*tensors))
    assert not is_replay
    recording.switch(True)
    for _ in range(recording.SIGHTS):
        run(*(like(tensor) for tensor in tensors))
    replayed, is_replay = launches_of(lambda: run(*tensors))
    assert_same_launches(plain, replayed, tensors)
    return is_replay


def like(tensor):
    """Another tensor with the same layout, and the same place beside a multiple of 16 bytes."""
    offset = tensor.data_ptr() % 64 // tensor.element_size()
    size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    whole = torch.zeros(size + offset, dtype=tensor.dtype)
    new = whole[offset:].as_strided(tensor.shape, tensor.stride())
    return new.requires_grad_(tensor.requires_grad)


def attention(T=37, D=40, dtype=torch.float16, skip=0, is_grad=False, **sizes):
    """Query, key and value, ``skip`` elements after an aligned address."""
    B, H, Hkv, S = (sizes.get(name, n) for name, n in dict(B=2, H=4, Hkv=2, S=T).items())
    shapes = [(B, H, T, D), (B, Hkv, S, D), (B, Hkv, S, D)]
    whole = [torch.zeros(skip + torch.Size(shape).numel(), dtype=dtype) for shape in shapes]
    return [
        t[skip:].view(shape).requires_grad_(is_grad) for t, shape in zip(whole, shapes, strict=True)
    ]


forward = functools.partial(segmented_attention, backend="triton")


def both(q, k, v, **options):
    results = forward(q, k, v, **options)
    return torch.autograd.grad(results, (q, k, v), [torch.ones_like(x) for x in results])


SPECS = having("triton")
MAX_CASES = 4  # of an operator


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_operator(spec):
    """Forward and backward launch as plainly, and both are replayed."""
    found = []
    for case in list(spec.cases.values())[:MAX_CASES]:
        for variant in spec.few_variants:
            tensors, options = spec.make(case, "triton", torch.float16)
            options |= spec.variants[variant]
            names = list(tensors)

            def run(*given, names=names, options=options):
                spec.gradients(dict(zip(names, given, strict=True)), options)

            found.append(check_call(run, *tensors.values()))
    assert any(found)


SIZES = [
    *(dict(T=T, D=D) for T in (1, 16, 17, 64, 100) for D in (16, 40, 64)),
    *(dict(T=48, S=S, D=64) for S in (1, 47, 48, 64)),
    *(dict(T=33, D=64, H=H, Hkv=Hkv, B=B) for H, Hkv, B in ((1, 1, 1), (16, 1, 3), (3, 3, 0))),
    *(dict(T=37, D=64, skip=skip) for skip in (1, 4, 8)),
    *(dict(T=37, D=64, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("run", [forward, both], ids=["forward", "both"])
def test_sizes_and_alignment(run, sizes):
    """What Triton compiles for: addresses and sizes that 16 divides, sizes of 1."""
    assert check_call(run, *attention(**sizes, is_grad=run is both)) or 0 in sizes.values()


def test_one_signature_after_the_other():
    """A replay is that of its own signature, options among it, whatever came between."""
    calls = [attention(T=T, D=64, skip=skip) for T in (32, 33, 48) for skip in (0, 1)]
    plain = [launches_of(lambda c=c: forward(*c))[0] for c in calls]
    recording.switch(True)
    for _ in range(recording.SIGHTS):
        for call in calls:
            forward(*map(like, call))
    for call, expected in zip(calls, plain, strict=True):
        replayed, is_replay = launches_of(lambda c=call: forward(*c))
        assert is_replay
        assert_same_launches(expected, replayed, call)
    for options in (dict(is_causal=False), dict(window_size=5), dict(window_size=6), dict(scale=2)):
        assert not launches_of(lambda o=options: forward(*calls[0], **o))[1]


def test_strides():
    """Rows as a layer hands them over are another signature than contiguous ones."""
    recording.switch(True)
    assert is_replayed(lambda: forward(*attention()))
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in attention()]
    assert not launches_of(lambda: forward(*strided))[1]
    assert check_call(forward, *strided)


def test_one_tensor_for_three():
    """What was recorded with one tensor as query, key and value launches three."""
    q, k, v = attention(H=2, Hkv=2)
    plain, _ = launches_of(lambda: forward(q, k, v))
    recording.switch(True)
    assert is_replayed(lambda: forward(q, q, q))
    replayed, is_replay = launches_of(lambda: forward(q, k, v))
    assert is_replay
    assert_same_launches(plain, replayed, (q, k, v))


def test_nothing_is_kept_alive(allocated):
    recording.switch(True)
    seen = []

    def call():
        tensors = attention(is_grad=True)
        results = forward(*tensors)
        seen.extend(map(weakref.ref, (*tensors, *results)))
        results.out.sum().backward()

    for _ in range(recording.SIGHTS + 1):
        call()
    DRIVER.launches.clear()
    allocated.clear()
    gc.collect()
    assert [ref for ref in seen if ref() is not None] == []


def test_stream_and_device(monkeypatch):
    """The stream is that of the call; a device that is not the current one becomes it."""
    recording.switch(True)
    call = lambda: forward(*attention())
    assert is_replayed(call)
    DRIVER.streams[-1] = 7
    launches, is_replay = launches_of(call)
    assert is_replay
    assert [launch[4] for launch in launches] == [7]

    entered = []

    class Device:
        def __init__(self, index):
            entered.append(index)

        __enter__ = lambda self: None
        __exit__ = lambda self, *error: None

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(DRIVER, "device", 3)
    assert launches_of(call)[1]
    assert entered == [-1]


def test_tensors_that_are_not_on_the_current_device(monkeypatch):
    """A call is recorded on the device of its tensors, whichever is current."""

    @contextmanager
    def device(index):
        with monkeypatch.context() as changed:
            changed.setattr(DRIVER, "device", index)
            yield

    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: device(5))
    monkeypatch.setattr(torch.cuda, "device", device)
    DRIVER.streams[5] = 11
    call = lambda: forward(*attention())
    plain, _ = launches_of(call)
    assert [launch[4] for launch in plain] == [11]
    recording.switch(True)
    assert is_replayed(call)
    assert [launch[4] for launch in launches_of(call)[0]] == [11]


def test_hooks_and_debugging_see_plain_launches():
    recording.switch(True)
    call = lambda: forward(*attention())
    assert is_replayed(call)
    hook = lambda metadata: None
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(hook)
        assert not launches_of(call)[1]
        chain.remove(hook)
    with knobs.runtime.scope():
        knobs.runtime.debug = True
        assert not launches_of(call)[1]
    from memattn_kernels.segmented_attention.forward import segmented_attention_fwd_kernel as kernel

    kernel.pre_run_hooks.append(lambda *args, **kwargs: None)
    assert not launches_of(call)[1]
    kernel.pre_run_hooks.clear()
    assert launches_of(call)[1]


def test_what_looks_on_sees_the_operator():
    """Modes, profilers and tensors of another kind go by PyTorch's dispatcher."""
    Other = type("Other", (Tensor,), {})
    recording.switch(True)
    call = lambda: forward(*attention())
    assert is_replayed(call)
    with FlopCounterMode(display=False):
        assert not launches_of(call)[1]
    with torch.profiler.profile() as profile:
        assert not launches_of(call)[1]
    names = {event.name for event in profile.events()}
    assert "memattn_kernels::segmented_attention" in names
    q, k, v = attention()
    assert not launches_of(lambda: forward(torch._neg_view(q), k, v))[1]
    assert not launches_of(lambda: forward(q.as_subclass(Other), k, v))[1]
    assert launches_of(call)[1]


def test_graphs_are_made_of_operators():
    recording.switch(True)
    call = lambda q, k, v: forward(q, k, v).out
    tensors = attention()
    assert is_replayed(lambda: call(*tensors))
    with FakeTensorMode() as mode:
        out = call(*map(mode.from_tensor, tensors))
        assert out.shape == tensors[0].shape
    graphs = []

    def keep(graph, inputs):
        graphs.append({node.target for node in graph.graph.nodes})
        return graph

    torch.compile(call, backend=keep, fullgraph=True)(*tensors)
    assert torch.ops.memattn_kernels.segmented_attention.default in graphs[0]


def test_gradients():
    """Inference mode, results without a gradient, second derivatives."""
    recording.switch(True)
    tensors = attention(is_grad=True)
    with torch.inference_mode():
        assert is_replayed(lambda: forward(*attention()))

    def backward(part):
        grads = torch.autograd.grad(forward(*tensors)[part].sum(), tensors)
        assert [g.shape for g in grads] == [t.shape for t in tensors]

    for part in [0, 1] * (recording.SIGHTS + 1):
        backward(part)
    q, k, v = tensors
    grads = torch.autograd.grad(forward(q, k.detach(), v.detach()).out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grads[0].sum().backward()


def test_another_table_is_another_recording(monkeypatch, tmp_path):
    """With another table of configurations calls are plain ones again, of its configurations."""
    monkeypatch.setattr(configs, "_loaded", dict(configs._loaded))
    monkeypatch.setattr(
        configs,
        "architecture",
        functools.cache(lambda device, own=configs.architecture: own(device)),
    )
    recording.switch(True)
    call = lambda: forward(*attention())
    assert is_replayed(call)
    kernels = json.loads(json.dumps(configs.table("sm_90")))
    kernels["segmented_attention_fwd_causal"]["64"]["half"]["BLOCK_M"] = 32
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"architecture": "sm_90", "kernels": kernels}))
    before, _ = launches_of(call)
    configs.load(path)
    assert is_replayed(call)
    after, _ = launches_of(call)
    assert [launch[1] for launch in after] == [2 * launch[1] for launch in before]


def test_signatures_are_forgotten_in_time(monkeypatch):
    monkeypatch.setattr(recording, "MAX_SIGNATURES", 3)
    recording.switch(True)
    for T in range(20, 40):
        forward(*attention(T=T))
    assert max(len(recorded.replays) for recorded in recording._recorded) <= 3


def test_values_that_decide_are_not_recorded():
    """A function that looks at values, or asks another device, has no replay."""
    recording.switch(True)
    for compute in (lambda v: (v[0] * int(v[0].sum()),), lambda v: (v[0][v[0] > 0],)):
        recorded = recording.Recorded(compute, [0], 3)
        plain = lambda *values, compute=compute: compute(values)
        for _ in range(recording.SIGHTS + 1):
            recorded((torch.ones(3), 1, 2), plain)
        assert list(recorded.replays.values()) == [None]


OBSTACLES = {
    "is_wanted": "MEMATTN_RECORD_LAUNCHES=1 is not set",
    "version": "it needs Triton 3.6, and this is 3.7.0",
    "interpret": "kernels are interpreted",
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_obstacles(name, monkeypatch):
    """Off by default, with another Triton and in the interpreter: plain launches, and why."""
    if name == "version":
        monkeypatch.setattr(recording.triton, "__version__", "3.7.0")
    with knobs.runtime.scope():
        knobs.runtime.interpret = name == "interpret"
        recording.switch(name != "is_wanted")
        assert recording.obstacle() == OBSTACLES[name]
        for _ in range(recording.SIGHTS + 1):
            assert not launches_of(lambda: forward(*attention()))[1]
