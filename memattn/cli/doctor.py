"""``memattn doctor``."""

import importlib
import importlib.util
import platform
import shutil
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

REQUIRED = (
    *("torch", "triton", "einops", "transformers", "accelerate", "safetensors", "tokenizers"),
    *("jsonargparse", "rich", "matplotlib"),
)
# distribution: what it is for, the extra that installs it
OPTIONAL = {
    "peft": ("LoRA and comparisons", "lora"),
    "datasets": ("corpora of the Hugging Face hub", "hub"),
    "torchao": ("quantised memory banks", "quantization"),
    "scikit-learn": ("bundled digits", "digits"),
    "tensorboard": ("TensorBoard logs", "tensorboard"),
}


def doctor() -> int:
    """Show versions, devices and backends, and the command for what is missing.

    Exit code 1 means that PyTorch itself cannot be used; a missing backend is reported with the
    command that installs it, and is no failure: the reference backend always works.
    """
    from rich.console import Console

    console = Console()
    console.print(_versions())
    try:
        importlib.import_module("torch")
    except (ImportError, OSError) as error:  # OSError: a library of torch that does not load
        console.print(f"[red]torch cannot be used:[/] {error}", highlight=False)
        console.print("run: pip install torch", highlight=False)
        return 1
    console.print(_devices())
    console.print(_backends())
    console.print(_choices())
    console.print("what to do next", *_next_steps(), sep="\n", highlight=False, soft_wrap=True)
    return 0


def _next_steps() -> list[str]:
    """One line for each thing to do, the most urgent first."""
    import torch

    steps = [f"pip install {name}, which nothing goes without" for name in _missing()]
    ready, remedy = _triton() if torch.cuda.is_available() else _cpp()
    if not ready:
        steps.append(f"the fast backend for this machine is not usable: {remedy}")
    steps += [
        "memattn demo: every system trained and measured on real text, in about ten minutes",
        "docs/start.md: your own model, your own text, a memory, a task mask; a picture of each",
    ]
    return [f"{number}. {step}" for number, step in enumerate(steps, 1)]


def _missing() -> list[str]:
    """Required packages that are not installed."""
    needed = [name for name in REQUIRED if name != "triton" or platform.system() == "Linux"]
    return [name for name in needed if _version(name) is None]


def _table(title: str, *columns: str) -> "Table":
    """An empty table."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> "Table":
    """What is installed, and the command for what is not."""
    from memattn import __version__

    table = _table("versions", "package", "version", "note")
    table.add_row("python", platform.python_version(), platform.platform())
    table.add_row("memattn", __version__, "")
    for name in REQUIRED:
        version = _version(name)
        if name == "triton" and platform.system() != "Linux":
            table.add_row(name, version or "missing", "only on Linux")
        else:
            note = "" if version else f"run: pip install {name}"
            table.add_row(name, version or "[red]missing[/]", note)
    for name, (purpose, extra) in OPTIONAL.items():
        version = _version(name)
        note = purpose if version else f"{purpose}; run: pip install 'memattn\\[{extra}]'"
        table.add_row(name, version or "[dim]not installed[/]", note)
    return table


def _devices() -> "Table":
    """The CPU and every CUDA device."""
    import torch

    table = _table("devices", "device", "what", "note")
    capability = torch.backends.cpu.get_cpu_capability()
    table.add_row("cpu", platform.machine(), f"{torch.get_num_threads()} threads, {capability}")
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        note = f"sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB"
        table.add_row(f"cuda:{index}", found.name, note)
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "no device or driver found" if built else "this torch is built without CUDA"
        table.add_row("cuda", "[dim]none[/]", reason)
    return table


def _backends() -> "Table":
    """Each backend of the operators: usable, or why not and what to run."""
    table = _table("backends", "backend", "state", "note")
    table.add_row("reference", "[green]ready[/]", "plain PyTorch, every device and dtype")
    for name, (ready, note) in {"cpp": _cpp(), "triton": _triton()}.items():
        table.add_row(name, "[green]ready[/]" if ready else "[yellow]not usable[/]", note)
    return table


def _cpp() -> tuple[bool, str]:
    """Whether the C++ backend loads, and its instruction set or the remedy."""
    import torch

    from memattn.ops._dispatch import BUILD_CPP

    if importlib.util.find_spec("memattn._C") is None:
        if not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
            need = "install a C++ compiler (Debian, Ubuntu: apt-get install g++), then"
            return False, f"not built: no C++ compiler; {need} run: {BUILD_CPP}"
        return False, f"not built; run: {BUILD_CPP}"
    try:
        importlib.import_module("memattn._C")
    except ImportError as error:
        return False, f"does not load beside this torch ({error}); run: {BUILD_CPP}"
    return True, f"CPU tensors, instruction set {torch.ops.memattn_cpp.cpu_capability()}"


def _triton() -> tuple[bool, str]:
    """Whether Triton kernels can run here."""
    import torch

    if importlib.util.find_spec("triton") is None:
        if platform.system() != "Linux":
            return False, "Triton runs on Linux"
        return False, "not installed; run: pip install triton"
    from memattn.ops._dispatch import triton_is_interpreted
    from memattn_kernels.recording import obstacle

    reason = obstacle()
    recorded = "launches are recorded" if reason is None else f"launches are not recorded: {reason}"
    if torch.cuda.is_available():
        return True, f"CUDA tensors; {recorded}"
    if triton_is_interpreted():
        interpreter = "CPU tensors in Triton's interpreter (TRITON_INTERPRET=1), slow"
        return True, f"{interpreter}; {recorded}"
    return False, "installed, but there is no CUDA device; tests run it with TRITON_INTERPRET=1"


def _choices() -> "Table":
    """What backend="auto" picks for each kind of tensor that can exist here."""
    import torch

    from memattn.ops._dispatch import resolve_backend

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    table = _table('what backend="auto" picks', "tensors", "backend", "why")
    for device in devices:
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            picked = resolve_backend("auto", torch.empty(0, device=device, dtype=dtype))
            name = str(dtype).removeprefix("torch.")
            table.add_row(f"{device} {name}", picked, _why(device, dtype == torch.float64, picked))
    return table


def _why(device: str, is_float64: bool, picked: str) -> str:
    """The reason of a choice, in the words of the rule."""
    if is_float64:
        return "float64 is for checking: always the reference"
    if picked == "reference":
        fast = "Triton" if device == "cuda" else "the C++ backend"
        return f"{fast} is not usable here: correct, but slow and O(T * S) memory"
    return f"the fast backend for {device} tensors"
