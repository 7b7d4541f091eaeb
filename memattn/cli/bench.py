"""``memattn bench``."""

from typing import Literal


def bench(
    operators: tuple[str, ...] = (),
    suite: Literal["cpu-bars", "gpu-bars"] | None = None,
    out: str | None = None,
    quick: bool = False,
    retune: bool = False,
    all: bool = False,
    kinds: tuple[str, ...] = (),
    seq_lens: tuple[int, ...] = (),
    shape: tuple[str, ...] = (),
    directions: tuple[str, ...] = (),
    peers: tuple[str, ...] = (),
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto",
    backend: Literal["auto", "triton", "cpp", "reference"] = "auto",
    seed: int = 0,
) -> int:
    """Measure the operators and compare them with PyTorch's attention.

    Each operator is first checked against its definition; for a wrong result no times are printed
    and the exit code is 1. Then the operator and its peers are timed round by round. The tables
    show times, useful rates, the share of the machine's measured peak rate, and peak memory.

    Args:
        operators: Operators to measure; by default all.
        suite: Measure the performance targets (bars) of a suite and print what was reached.
        out: Folder for bench.json and plots over T; by default nothing is written.
        quick: Small sizes, few samples, no compiled peers: under a minute.
        retune: Instead of measuring, tune the Triton tile sizes for the current GPU.
        all: Measure the bars of the current device, operator by operator, and write records, plots
            and pages to --out (default docs/results). Records of other machines are kept and appear
            on the same pages.
        kinds: Kinds of cases, such as causal, window, mac; by default all.
        seq_lens: Lengths T.
        shape: Sizes as NAME=INTEGER, such as B=4 H=32 Hkv=8 D=128 window_size=512.
        directions: From forward, backward, forward+backward.
        peers: Peers such as "sdpa flash" or flex; "none" for no peers; by default all.
        device: Device; auto is CUDA if there is one.
        dtype: Type of the inputs; auto is float32 on the CPU and bfloat16 on CUDA.
        backend: Backend of our operators.
        seed: Seed of the inputs.
    """
    from memattn.bench.cli_entry import command

    return command(
        operators,
        suite=suite,
        out=out,
        quick=quick,
        retune=retune,
        all=all,
        kinds=kinds,
        seq_lens=seq_lens,
        shape=shape,
        directions=directions,
        peers=peers,
        device=device,
        dtype=dtype,
        backend=backend,
        seed=seed,
    )
