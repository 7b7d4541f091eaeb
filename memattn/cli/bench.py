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
    """Measure the operators beside PyTorch's own attention.

    Checks every operator against its definition first: one that is wrong is not printed, and the
    exit code is 1. Then times it in turn with its peers and prints useful rates, the share of the
    machine's measured roof and peak memory.

    Args:
        operators: Operators to measure; by default all.
        suite: Measure what the bars of a suite need, and print for each what was reached.
        out: Folder for bench.json and plots over T; by default nothing is written.
        quick: Small sizes and few samples, nothing that must be compiled: under a minute.
        retune: Renew the table of Triton tile sizes for the card at hand instead.
        all: Measure the bars of the device at hand, operator by operator, and write records, plots
            and pages to --out, by default docs/results. Records of other machines stay, and stand
            beside those of this one.
        kinds: Kinds of cases, such as causal, window, mac; by default all.
        seq_lens: Lengths T.
        shape: Sizes as NAME=INTEGER, such as B=4 H=32 Hkv=8 D=128 window_size=512.
        directions: From forward, backward, forward+backward.
        peers: Peers such as "sdpa flash" or flex; "none" for none, by default all.
        device: Where to run; auto is CUDA where there is one.
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
