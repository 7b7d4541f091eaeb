"""Stage "correct": check every operator, direction and dtype on irregular shapes."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from memattn import ops, testing
from memattn.bench import inputs
from memattn.bench.gpu import branches, chapters, memories
from memattn.bench.gpu.pool import Job, Result

LENGTH, DRY_LENGTH = 333, 21
SEEDS = 16
HEAD_DIMS, DRY_HEAD_DIMS = (128, 64, 80, 256), (16,)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PLAIN = {"B": 2, "H": 2, "Hkv": 2}  # multi-head attention, as benchmarks run it
GROUPED = {"B": 2, "H": 4, "Hkv": 2}
# by operator and case name: sizes of the inputs, and options as a function of T. The first case of
# each operator runs first, in case time is short.
Options = Callable[[int], dict[str, Any]]
SEGMENTED: dict[str, tuple[dict, Options]] = {
    "all sources": (
        GROUPED | {"P": 5, "M": 7},
        lambda T: {"segment_len": 64, "window_size": T // 3, "seq_start": [0, T // 5]},
    ),
    "causal": (PLAIN, lambda T: {}),
    "dense": (PLAIN, lambda T: {"is_causal": False}),
    "window": (PLAIN, lambda T: {"window_size": T // 3}),
    "segments": (PLAIN | {"P": 5, "M": 7}, lambda T: {"segment_len": 64}),
    "packed": (
        {"B": 1, "H": 4, "Hkv": 2},
        lambda T: {"window_size": T // 3, "cu_seqlens": [0, T // 4, T // 4, T - 1, T]},
    ),
    "decode": (GROUPED | {"P": 5}, lambda T: {"query_offset": T - 3}),
}
FUTURE: dict[str, tuple[dict, Options]] = {
    "loss": (GROUPED, lambda T: {"loss_type": "mse", "seq_start": [0, T // 5]}),
    "no loss": (PLAIN, lambda T: {}),
    "loss, plain": (PLAIN, lambda T: {"loss_type": "mse"}),
    "cosine": (PLAIN, lambda T: {"loss_type": "cosine"}),
    "through": (PLAIN, lambda T: {"loss_type": "mse", "detach_target": False}),
    "packed": (
        {"B": 1, "H": 4, "Hkv": 2},
        lambda T: {"loss_type": "mse", "cu_seqlens": [0, T // 4, T // 4, T - 1, T]},
    ),
    "decode": (GROUPED, lambda T: {"query_offset": T - 3}),
}
TASK_MASKED: dict[str, tuple[dict, Options]] = {
    "graph": (GROUPED, lambda T: {"form": "graph", "seq_end": [T, T - T // 5]}),
    "pairs": (PLAIN, lambda T: {"form": "pairs"}),
    "graph, causal": (PLAIN, lambda T: {"form": "graph", "is_causal": True}),
    "full": (PLAIN, lambda T: {"form": "full"}),
}
CASES = {
    "segmented_attention": SEGMENTED,
    "future_attention": FUTURE,
    "task_masked_attention": TASK_MASKED,
    "chapter_attention": chapters.ATTENTION,
    "chapter_router": chapters.ROUTER,
    "branch_attention": branches.BRANCHES,
    "neural_memory": memories.MEMORY,
}
# checked only; not yet timed or tuned
CHECKED_ONLY = ("neural_memory",)


def jobs(operators: tuple[str, ...], *, dry: bool) -> list[Job]:
    """One job for each case, direction, dtype and head dimension, the most important first."""

    def make(operator: str, case: str, direction: str, dtype: str, D: int) -> Job:
        return {
            "task": "correct", "operator": operator, "case": case, "direction": direction,
            "dtype": dtype, "D": D, "T": DRY_LENGTH if dry else LENGTH, "seed": 0,
            "device": "cpu" if dry else "cuda",
        }  # fmt: skip

    def of_width(D: int, first_only: bool, dtypes: tuple[str, ...]) -> Iterator[Job]:
        for dtype in dtypes:
            for operator in operators:
                names = list(CASES[operator])
                for case in names[:1] if first_only else names[1:]:
                    for direction in ("backward", "forward"):
                        yield make(operator, case, direction, dtype, D)

    # the interpreter computes bfloat16 wrongly
    dtypes = ("float32", "float16") if dry else ("float32", "bfloat16", "float16")
    first, *others = DRY_HEAD_DIMS if dry else HEAD_DIMS
    found = list(of_width(first, True, dtypes))
    if not dry:
        found += of_width(first, False, ("bfloat16",))
        for D in others:
            found += of_width(D, True, ("bfloat16",))
            found += of_width(D, False, ("bfloat16",))
        found += of_width(first, False, ("float16", "float32"))
        for D in others:
            found += of_width(D, True, ("float32", "float16"))
    return found


def run_job(job: Job) -> Result:
    """Error of one case against float64, compared with its error budget."""
    function, tensors, options = build(job)
    dtype = DTYPES[job["dtype"]]
    backward = job["direction"] == "backward"

    def results(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        given = options | {"backend": backend}
        if backward:
            found = testing.run_with_gradients(
                function, tensors, given, dtype=dtype, seed=job["seed"]
            )
            return {name: x for name, x in found.items() if name.startswith("d_")}
        cast = {name: x.to(dtype) for name, x in tensors.items()}
        with torch.no_grad():
            return function(**cast, **given)._asdict()

    actual = results("triton", dtype)
    low, high = results("reference", dtype), results("reference", torch.float64)
    errors, wrong = {}, []
    for name in high:
        try:
            errors[name] = testing.error_and_budget(name, actual[name], low[name], high[name])
        except AssertionError as error:
            wrong.append(str(error))
            continue
        error, budget = errors[name]
        if error > budget and high[name].numel() == 1:
            errors[name] = error, budget = _over_seeds(job, name)
        if not error <= budget:
            wrong.append(f"{name}: error {error:.3e} over the budget {budget:.3e}")
    worst = max(((e / b if b else 0.0, name) for name, (e, b) in errors.items()), default=(0.0, ""))
    result: Result = {"status": "ok", "worst": worst[0], "worst_result": worst[1]}
    if wrong:
        result |= {"status": "wrong", "reason": "; ".join(wrong), "errors": errors}
        result["configurations"] = configurations(job)
    return result


def _over_seeds(job: Job, name: str) -> tuple[float, float]:
    """Error and budget of a scalar result, as root mean squares over seeds.

    For a single number and seed, plain PyTorch's error can be far smaller than usual by chance.
    """
    pairs = [_one_number(job | {"seed": seed}, name) for seed in range(SEEDS)]
    error, budget = (
        math.sqrt(sum(x * x for x in values) / SEEDS) for values in zip(*pairs, strict=True)
    )
    return error, budget


def _one_number(job: Job, name: str) -> tuple[float, float]:
    function, tensors, options = build(job)
    dtype = DTYPES[job["dtype"]]
    results = []
    for backend, precision in (
        ("triton", dtype), ("reference", dtype), ("reference", torch.float64)
    ):  # fmt: skip
        with torch.no_grad():
            cast = {key: x.to(precision) for key, x in tensors.items()}
            results.append(getattr(function(**cast, **options, backend=backend), name))
    return testing.error_and_budget(name, *results)


def build(job: Job) -> tuple[Callable[..., Any], dict[str, Tensor], dict[str, Any]]:
    """The operator, its inputs and its options."""
    operator, T, device = job["operator"], job["T"], job["device"]
    sizes, make_options = CASES[operator][job["case"]]
    options = make_options(T)
    for name in ("seq_start", "seq_end", "cu_seqlens"):
        if name in options:
            options[name] = torch.tensor(options[name], dtype=torch.int32, device=device)
    decode = "query_offset" in options
    shape = {"T": 3 if decode else T, "S": T, "D": job["D"]}
    common = {"device": device, "dtype": DTYPES[job["dtype"]], "seed": job["seed"]}
    if operator.startswith(("chapter", "branch")) or operator == "neural_memory":
        generator = torch.Generator().manual_seed(job["seed"])

        def draw(*shape: int) -> Tensor:
            values = torch.randn(*shape, generator=generator).to(torch.bfloat16)
            return values.to(device, common["dtype"])

        if operator == "neural_memory":
            sizes = memories.shrink_for_interpreter(sizes) if device == "cpu" else sizes
            return memories.build(sizes, options, T=T, D=job["D"], draw=draw)
        if operator == "branch_attention":
            sizes = branches.shrink_for_interpreter(sizes) if device == "cpu" else sizes
            return branches.build(sizes, options, **shape, draw=draw)
        if device == "cpu":
            sizes = chapters.shrink_for_interpreter(sizes)
        is_router = operator == "chapter_router"
        make = chapters.build_router if is_router else chapters.build_attention
        return make(sizes, options, T=shape["T"], D=job["D"], draw=draw)
    if device == "cpu":  # a dry run: fewer heads, with the same group size
        sizes = sizes | {"H": sizes["H"] // 2, "Hkv": sizes["Hkv"] // 2}
    if operator == "future_attention":
        tensors = inputs.make_future_inputs(**sizes, **shape, **common)
        options["future_dim"] = max(T // 5, 1)
        function = ops.future_attention_loss if "loss_type" in options else ops.future_attention
        return function, tensors, options
    if operator == "task_masked_attention":
        tensors = inputs.make_segmented_inputs(**sizes, **shape, **common)
        options["task_mask"] = task_mask(options.pop("form"), T).to(device)
        options["task_id"] = torch.arange(sizes["B"], device=device) % 2
        return ops.task_masked_attention, tensors, options
    segment_len = options.get("segment_len")
    tensors = inputs.make_segmented_inputs(**sizes, **shape, segment_len=segment_len, **common)
    return ops.segmented_attention, tensors, options


def task_mask(form: str, T: int) -> ops.TaskMask:
    """Masks of two tasks: a graph whose nodes cross tiles, random pairs, or all pairs."""
    generator = torch.Generator().manual_seed(0)
    if form == "pairs":
        return ops.TaskMask.from_dense(torch.rand(2, T, T, generator=generator) < 0.3)
    G = 1 if form == "full" else 9
    edges = torch.rand(2, G, G, generator=generator) < (1.1 if form == "full" else 0.4)
    node = torch.randint(G, (T,), generator=generator).sort().values
    return ops.TaskMask.from_graph(edges, node, node)


def configurations(job: Job) -> dict[str, Any]:
    """The configurations of the operator's kernels at this head dimension and dtype."""
    from memattn_kernels import configs

    like = torch.empty(0, dtype=DTYPES[job["dtype"]], device=job["device"])
    return {
        kernel: configs.lookup(kernel, like, job["D"])
        for kernel in configs.table("sm_90")
        if kernel.startswith(job["operator"])
    }
