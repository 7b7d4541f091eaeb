"""Time Triton's tile configurations on the current GPU and write the fastest as a table.

The table has the format of those in ``memattn_kernels.configs``, whose ``load`` reads it. Each
candidate is compiled and timed in its own process, because a configuration that the compiler cannot
handle may abort the process. Candidates whose outputs or gradients exceed the error budget are
rejected.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch

from memattn.bench.retune_workloads import workload
from memattn.files import write_text

Config = dict[str, int]
DTYPES = {"half": "bfloat16", "float": "float32"}
# a candidate whose compilation and timing take longer is rejected
TIMEOUT_SECONDS = 300
# BLOCK_M, BLOCK_N, num_warps, num_stages and perhaps a cap on registers; by the part of a kernel's
# name that operators share
_SHARED_CANDIDATES = {
    "half": {
        "fwd": [
            (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 2), (128, 64, 4, 3),
            (64, 64, 4, 3), (64, 128, 4, 3), (128, 32, 8, 3), (64, 32, 4, 2), (128, 32, 8, 2),
            (64, 32, 8, 2),
        ],
        "decode": [
            (16, 64, 4, 3), (16, 128, 4, 3), (16, 128, 8, 3), (16, 64, 2, 3), (16, 32, 4, 3),
        ],
        "bwd_dq": [
            (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 32, 8, 2), (64, 64, 4, 2),
            (64, 32, 4, 2), (64, 128, 8, 2), (64, 32, 8, 2),
        ],
        "bwd_dkdv": [
            (64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 2),
            (32, 64, 4, 2), (64, 64, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2),
        ],
        # the last is BLOCK_K
        "product": [
            (128, 128, 8, 3, 32), (128, 128, 8, 3, 64), (128, 128, 8, 4, 64), (128, 256, 8, 3, 64),
            (64, 128, 4, 3, 32), (64, 128, 8, 3, 32), (64, 128, 4, 3, 64), (64, 64, 4, 3, 64),
        ],
        "memory": [
            (64, 64, 8, 1, 32), (32, 64, 8, 1, 16), (32, 32, 8, 1, 16), (32, 32, 4, 1, 16),
            (16, 32, 4, 1, 16),
        ],
    },
    "float": {
        "fwd": [
            (32, 32, 8, 1), (64, 16, 8, 1), (64, 32, 8, 2), (32, 16, 8, 1), (16, 16, 8, 1),
            (16, 16, 16, 2),
        ],
        "decode": [(16, 32, 4, 1), (16, 32, 8, 1), (16, 64, 8, 1)],
        "bwd_dq": [
            (32, 32, 4, 2), (64, 32, 8, 2), (32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 2),
        ],
        "bwd_dkdv": [
            (32, 32, 4, 2), (32, 32, 8, 1), (32, 64, 8, 1), (16, 16, 8, 1), (16, 32, 8, 1),
            (16, 32, 8, 2),
        ],
        "product": [
            (64, 64, 8, 2, 16), (64, 64, 8, 2, 32), (128, 64, 8, 2, 16), (32, 64, 4, 2, 32),
        ],
        "memory": [
            (32, 32, 4, 1, 16), (32, 32, 8, 1, 16), (32, 64, 8, 1, 16), (16, 32, 4, 1, 16),
        ],
    },
}  # fmt: skip


# at head dimension 64 a cap makes room for two programs on a multiprocessor; NVIDIA only
_CAPPED_CANDIDATES = {
    "fwd": [(128, 64, 8, 3, 128), (128, 64, 8, 2, 128), (64, 64, 4, 3, 128)],
    "decode": [],
    "bwd_dq": [(128, 64, 8, 3, 128), (128, 64, 8, 2, 128), (64, 64, 4, 2, 128)],
    "bwd_dkdv": [(32, 128, 8, 3, 128), (32, 128, 8, 2, 128), (32, 64, 4, 2, 128)],
    "product": [],
    "memory": [],
}


# kernels that share the candidates of another kernel
_RELATIVES: dict[str, str] = {
    "fwd_loss": "fwd",
    "fwd_dense": "fwd",
    "fwd_causal": "fwd",
    "bwd_dkdv_dense": "bwd_dkdv",
    "bwd_dkdv_causal": "bwd_dkdv",
    "bwd_dkdv_grouped": "bwd_dkdv",
    "bwd_dq_target": "bwd_dq",
    "bwd_dkdv_target": "bwd_dkdv",
    "bwd_table": "bwd_dkdv",
    "fwd_independent": "fwd",
    "fwd_quantised": "fwd",
    "bwd_dq_independent": "bwd_dq",
    "bwd_dq_quantised": "bwd_dq",
    "fwd_by_chapter": "fwd",
    "bwd_dq_by_chapter": "bwd_dq",
    "bwd_dkdv_in_tile": "bwd_dkdv",
    "logits": "product",
    "d_hidden": "product",
    "d_weight": "product",
    "neural_memory_fwd": "memory",
    "neural_memory_bwd": "memory",
}
_KERNELS: dict[str, tuple[str, ...]] = {
    "segmented_attention": (
        *("fwd", "fwd_dense", "fwd_causal", "decode", "bwd_dq"),
        *("bwd_dkdv", "bwd_dkdv_dense", "bwd_dkdv_causal", "bwd_dkdv_grouped"),
    ),
    "future_attention": (
        *("fwd", "fwd_loss", "decode", "bwd_dq", "bwd_dq_target", "bwd_dkdv", "bwd_dkdv_target"),
        "bwd_table",
    ),
    "task_masked_attention": ("fwd", "bwd_dq", "bwd_dkdv"),
    "chapter_attention": (
        *("fwd", "fwd_independent", "fwd_quantised", "fwd_by_chapter", "decode"),
        *("bwd_dq", "bwd_dq_independent", "bwd_dq_quantised", "bwd_dq_by_chapter"),
        *("bwd_dkdv", "bwd_dkdv_in_tile"),
    ),
    "chapter_router": ("logits", "d_hidden", "d_weight"),
    "branch_attention": ("fwd", "decode", "bwd_dq", "bwd_dkdv"),
    "neural_memory": ("fwd", "bwd"),
}


def _by_kernel(shared: dict[str, list[tuple]]) -> dict[str, list[tuple]]:
    """Candidates by the name of the kernel."""
    found = {}
    for operator, parts in _KERNELS.items():
        for part in parts:
            kernel = f"{operator}_{part}"
            found[kernel] = shared[_RELATIVES.get(kernel, _RELATIVES.get(part, part))]
    return found


CANDIDATES = {kind: _by_kernel(shared) for kind, shared in _SHARED_CANDIDATES.items()}
CAPPED_CANDIDATES = _by_kernel(_CAPPED_CANDIDATES)


@dataclass(frozen=True)
class Trial:
    """One candidate for one kernel, head dimension and dtype class."""

    kernel: str
    head_dim: int
    kind: str
    config: Config


def retune(
    path: str | Path,
    *,
    kernels: Sequence[str] | None = None,
    head_dims: Sequence[int] = (64, 128, 256),
    kinds: Sequence[str] = ("half", "float"),
    on_trial: Callable[[Trial, float | str], None] = lambda trial, result: None,
) -> dict[str, Any]:
    """Time the candidates, and write a complete table of the best.

    Args:
        path: The JSON file to write; it is written only when the table is complete.
        kernels: Names of the kernels to tune; all others keep their present configuration.
        head_dims: Padded head dimensions to tune, of 64, 128 and 256.
        kinds: Dtype classes to tune, of ``"half"`` and ``"float"``.
        on_trial: Called with each trial and its milliseconds, or with the reason it was rejected.

    Returns:
        What was written: ``architecture``, ``device``, versions, ``kernels`` (the table) and
        ``milliseconds`` of the best.

    Raises:
        RuntimeError: If there is no CUDA device.
        ValueError: If a kernel, head dimension or dtype class is unknown.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("retune needs a CUDA device, and torch sees none")
    from memattn_kernels import configs

    known = CANDIDATES["half"]
    for name, values, allowed in (
        ("kernels", kernels or known, known),
        ("head_dims", head_dims, configs.WIDTHS),
        ("kinds", kinds, configs.DTYPE_CLASSES),
    ):
        for value in values:
            if value not in allowed:
                raise ValueError(f"{name} must be of {', '.join(map(str, allowed))}, got {value}")

    present = configs.table(configs.architecture(torch.device("cuda", 0)))
    table = json.loads(json.dumps(present))
    milliseconds: dict[str, float] = {}
    for kernel in kernels or known:
        for width in head_dims:
            for kind in kinds:
                before = present[kernel][str(width)][kind]
                best = choose(trials(kernel, width, kind, before), measure, on_trial)
                if best is not None:
                    table[kernel][str(width)][kind] = dict(best[0].config)
                    milliseconds[f"{kernel}/{width}/{kind}"] = best[1]
    return write_table(path, table, milliseconds)


def write_table(
    path: str | Path, table: dict[str, Any], milliseconds: dict[str, float]
) -> dict[str, Any]:
    """Write a measured table of configurations atomically; returns its content."""
    import triton

    from memattn_kernels import configs

    device = torch.device("cuda", 0)
    content = {
        "architecture": configs.device_architecture(device),
        "source": "measured by memattn bench --retune",
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": table,
        "milliseconds": milliseconds,
    }
    write_text(Path(path), json.dumps(content, indent=2) + "\n")
    return content


def trials(kernel: str, head_dim: int, kind: str, present: Config) -> Iterator[Trial]:
    """The present configuration, then every other candidate."""
    from memattn_kernels.configs import OPTIONAL, options_of

    yield Trial(kernel, head_dim, kind, present)
    candidates = CANDIDATES[kind][kernel]
    if head_dim == 64 and kind == "half" and torch.version.hip is None:
        candidates = candidates + CAPPED_CANDIDATES[kernel]
    for values in candidates:
        config = dict(zip(options_of(kernel) + OPTIONAL, values, strict=False))
        if config != present:
            yield Trial(kernel, head_dim, kind, config)
    for config in _more_candidates(kernel, head_dim, kind):
        if config != present:
            yield Trial(kernel, head_dim, kind, config)


def _more_candidates(kernel: str, head_dim: int, kind: str) -> Sequence[Config]:
    """Candidates with tensor descriptors, with key splits, and with TF32 products of float32."""
    from memattn_kernels import configs, tf32_candidates
    from memattn_kernels.segmented_attention import decode_parts, plain

    if kind != "half":
        return tf32_candidates.candidates(table_name(), kernel, head_dim)
    if kernel == configs.WITH_PARTS:
        return decode_parts.CANDIDATES
    return plain.CANDIDATES.get(table_name(), {}).get(kernel, {}).get(head_dim, ())


def choose(
    candidates: Iterator[Trial],
    measure: Callable[[Trial], float | str],
    on_trial: Callable[[Trial, float | str], None],
) -> tuple[Trial, float] | None:
    """The fastest trial and its milliseconds; None if no trial could be timed."""
    best = None
    for trial in candidates:
        result = measure(trial)
        on_trial(trial, result)
        if isinstance(result, float) and (best is None or result < best[1]):
            best = trial, result
    return best


def measure(trial: Trial) -> float | str:
    """Milliseconds of a trial in a process of its own, or why it failed."""
    command = [sys.executable, "-m", "memattn.bench.retune", json.dumps(asdict(trial))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"took more than {TIMEOUT_SECONDS} s"
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"exit code {done.returncode}"
    return float(done.stdout.split()[-1])


def run_trial(trial: Trial) -> float:
    """Check a candidate, then time it, in this process; milliseconds."""
    if not torch.cuda.is_available():
        raise RuntimeError("a trial needs a CUDA device, and torch sees none")
    check_trial(trial)
    return time_trial(trial)


def check_trial(trial: Trial, *, length: int = 700) -> None:
    """Compile a candidate and check its results; this process's table keeps the candidate.

    Raises:
        AssertionError: If results or gradients leave the error budget.
    """
    from memattn.testing import assert_results_within_budget, run_with_gradients
    from memattn_kernels import configs

    operator, make_inputs, passes = _use(trial)
    decode = trial.kernel.endswith("decode")
    dtype = getattr(torch, DTYPES[trial.kind])
    if "descriptors" in trial.config:  # whole tiles
        length = -(-length // configs.MAX_BLOCK) * configs.MAX_BLOCK
    # as many heads as are timed: another number may be another kernel
    heads = {"B": 1, "H": 16, "Hkv": key_heads(trial.kernel)} if torch.cuda.is_available() else {}
    small = make_inputs(T=7 if decode else length, S=length, **heads)
    options = passes[-1] | ({"query_offset": length - 7} if decode else {})
    results = [
        run_with_gradients(operator, small, options | {"backend": backend}, dtype=precision)
        for backend, precision in (
            ("triton", dtype),
            ("reference", dtype),
            ("reference", torch.float64),
        )
    ]
    assert_results_within_budget(*results)


def time_trial(trial: Trial) -> float:
    """Milliseconds of a candidate that ``check_trial`` has passed.

    A backward kernel is timed together with the operator's other backward kernels, whose
    configurations do not change.
    """
    from triton.testing import do_bench

    operator, make_inputs, passes = _use(trial)
    decode = trial.kernel.endswith("decode")
    T, S = (1, 4096) if decode else (4096, 4096)
    tensors = make_inputs(B=8 if decode else 2, H=16, Hkv=key_heads(trial.kernel), T=T, S=S)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    total = 0.0
    for options in passes:
        options = options | ({"query_offset": S - T} if decode else {})
        attend = partial(operator, **leaves, **options, backend="triton")
        if "_bwd" in trial.kernel or "_d_" in trial.kernel:
            outputs = [t for name, t in attend()._asdict().items() if name in ("out", "loss")]
            cotangents = [torch.ones_like(t) for t in outputs]
            run = partial(torch.autograd.grad, outputs, [*leaves.values()], cotangents, True)
        else:
            run = attend
        total += cast(float, do_bench(run, return_mode="median"))
    return total


def key_heads(kernel: str) -> int:
    """Key heads for 16 query heads: groups of four where the kernel takes any."""
    is_single = kernel.startswith("segmented_attention_bwd_dkdv") and "grouped" not in kernel
    return 16 if is_single else 4


def _use(trial: Trial) -> tuple[Callable, Callable, list[dict[str, Any]]]:
    """Put a candidate into this process's table; returns its workload, made for this device."""
    from memattn_kernels import configs, recording

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    table = configs.table(table_name())
    # the other kernels keep the configurations that the process started with
    table.update(json.loads(_first_table(table_name())))
    table[trial.kernel][str(trial.head_dim)][trial.kind] = trial.config
    recording.forget()
    operator, make_inputs, passes = workload(trial.kernel)
    dtype = getattr(torch, DTYPES[trial.kind])
    return operator, partial(make_inputs, D=trial.head_dim, device=device, dtype=dtype), passes


def table_name() -> str:
    """The architecture of the table in use; the interpreter reads no table."""
    from memattn_kernels import configs

    if not torch.cuda.is_available():
        return "sm_90"
    return configs.architecture(torch.device("cuda", 0))


@cache
def _first_table(name: str) -> str:
    """A table as the process found it, as JSON."""
    from memattn_kernels import configs

    return json.dumps(configs.table(name))


if __name__ == "__main__":
    sys.stdout.write(f"{run_trial(Trial(**json.loads(sys.argv[1])))}\n")
