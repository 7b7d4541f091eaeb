"""What importing the package loads, and that imports run one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The one list of layers, from the command line down to what stands on nothing: a layer imports only
# from layers after it. A part of the package is a folder or a file of memattn.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"demo", "gallery", "study"},
    {"train", "continual", "viz", "bench"},
    {"evaluate"},
    {"dtgma"},
    {"chapters"},
    {"data"},
    {"models", "adapters"},
    {"parts"},
    {"nn"},
    {"distributed"},
    {"testing"},
    {"ops"},
    {"reference", "cpp"},
    {"_settings"},
    {"checks", "files", "yaml_text", "_tables", "_auto_classes"},
    {"_when_imported"},
]


def layer_of(name: str) -> int | None:
    """The index of the layer that a part of the package belongs to."""
    return next((i for i, parts in enumerate(LAYERS) if name in parts), None)


def imported_names(path: Path) -> set[str]:
    """Modules that a file imports, wherever in the file; ``from a import b`` names ``a.b`` too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_parts(path: Path) -> set[str]:
    """Parts of memattn that a file imports."""
    return {n.split(".")[1] for n in imported_names(path) if n.startswith("memattn.")}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "memattn").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_run_one_way(path):
    part = path.relative_to(ROOT / "memattn").parts[0].removesuffix(".py")
    if part == "__init__":
        pytest.skip("the package itself loads its public names from any layer")
    here = layer_of(part)
    assert here is not None, f"{part} must have a place in LAYERS"
    for other in imported_parts(path) - {part, "__version__", "_C"}:
        there = layer_of(other)
        assert there is not None, f"{other} must have a place in LAYERS"
        assert there > here, f"{part} must not import {other}"


def modules() -> dict[str, Path]:
    """The files of the package and of its kernels by the names of their modules."""
    found = {}
    for top in (ROOT / "memattn", ROOT / "kernels" / "memattn_kernels"):
        for path in top.rglob("*.py"):
            name = ".".join(path.relative_to(top.parent).with_suffix("").parts)
            if not name.endswith("__init__"):
                found[name] = path
    return found


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, each module with all that leads back to it."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(edges[start])
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += edges[name]
        return seen

    after = {name: reached(name) for name in edges}
    groups = {
        tuple(sorted(other for other in after[name] if name in after[other]))
        for name in edges
        if name in after[name]
    }
    return [list(group) for group in sorted(groups)]


def test_no_modules_import_each_other():
    """Wherever the imports stand: at the top, in functions and for types."""
    files = modules()
    edges = {name: imported_names(path) & files.keys() - {name} for name, path in files.items()}
    assert len(files) > 100 and sum(map(len, edges.values())) > 300
    assert circles(edges) == []


def test_circles_are_found():
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"f"}, "f": {"e"}}
    assert circles(edges) == [["a", "b", "c"], ["e", "f"]]


def test_kernels_do_not_import_the_package():
    files = list((ROOT / "kernels").rglob("*.py"))
    assert files
    for path in files:
        assert "memattn" not in {name.split(".")[0] for name in imported_names(path)}, path


BLOCK_OPTIONAL_IMPORTS = """
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
        BLOCK_OPTIONAL_IMPORTS + "import memattn, memattn.ops, torch\n"
        "q = torch.zeros(1, 1, 3, 8)\n"
        "print(memattn.segmented_attention(q, q, q).out.sum().item())"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "0.0"


def test_dtgma_learns_with_torch_alone():
    result = run(
        BLOCK_OPTIONAL_IMPORTS + "import torch\n"
        "from memattn.dtgma import DTGMAModel, train_continual\n"
        "x, y = torch.randn(2, 8, 12), torch.arange(8) % 2\n"
        "model = DTGMAModel(12, 8, 2, n_heads=2, n_tokens=4)\n"
        "tasks = {t: (x[t], y, x[t], y) for t in range(2)}\n"
        "print(train_continual(model, tasks, epochs=1)['avg_forgetting'])"
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
