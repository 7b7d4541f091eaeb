"""What importing the package loads, and that imports run one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# from the command line down to the backends; a layer imports only from layers after it
LAYERS = [
    {"cli"},
    {"demo", "study"},
    {"train", "evaluate", "continual", "viz", "bench", "data"},
    {"models", "adapters"},
    {"parts"},
    {"nn"},
    {"testing"},
    {"ops"},
    {"reference", "cpp"},
]
# modules of one layer may use these of the same layer
SAME_LAYER = {("train", "data"), ("train", "evaluate"), ("evaluate", "data"), ("continual", "data")}


def layer_of(name: str) -> int | None:
    """The index of the layer that a part of the package belongs to."""
    return next((i for i, parts in enumerate(LAYERS) if name in parts), None)


def imported_names(path: Path) -> set[str]:
    """Modules that a file imports, wherever in the file; ``from memattn import x`` names x too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            if node.module == "memattn":
                names |= {f"memattn.{alias.name}" for alias in node.names}
    return names


def imported_parts(path: Path) -> set[str]:
    """Parts of memattn that a file imports."""
    return {n.split(".")[1] for n in imported_names(path) if n.startswith("memattn.")}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "memattn").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_run_one_way(path):
    part = path.relative_to(ROOT / "memattn").parts[0].removesuffix(".py")
    here = layer_of(part)
    if here is None:
        pytest.skip("the package's own files stand outside the layers")
    for other in imported_parts(path):
        there = layer_of(other)
        if there is None or other == part or (part, other) in SAME_LAYER:
            continue
        assert there > here, f"{part} must not import {other}"


def test_kernels_do_not_import_the_package():
    files = list((ROOT / "kernels").rglob("*.py"))
    assert files
    for path in files:
        assert "memattn" not in {name.split(".")[0] for name in imported_names(path)}, path


BLOCK = """
import sys
for name in ("triton", "transformers", "accelerate", "matplotlib", "rich", "jsonargparse"):
    sys.modules[name] = None
"""


def run(code: str) -> subprocess.CompletedProcess:
    """Run code in a fresh process."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


def test_importing_the_package_needs_torch_only():
    result = run(
        BLOCK + "import memattn, memattn.ops, torch\n"
        "q = torch.zeros(1, 1, 3, 8)\n"
        "print(memattn.segmented_attention(q, q, q).out.sum().item())"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "0.0"


def test_without_the_extension_the_reference_runs():
    result = run(
        "import sys; sys.modules['memattn._C'] = None\n"
        "import memattn, torch\n"
        "q = torch.zeros(1, 1, 3, 8)\n"
        "memattn.segmented_attention(q, q, q)\n"
        "try: memattn.segmented_attention(q, q, q, backend='cpp')\n"
        "except ImportError as error: print(error)"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith('backend "cpp" is not built; run `pip install')
