"""Build the wheel and the source distribution, and check that each works where it is installed.

    python scripts/build_dist.py        (or: make dist)

They are in dist/ afterwards. Needs torch, setuptools, build and twine in this environment. Each is
installed into a new environment in a temporary folder, beside the packages of this one but without
its memattn, and a model is run there, away from this folder.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
# what runs where a distribution is installed
USE = """
import importlib.metadata, importlib.resources, sys
import torch
import memattn
from memattn.models import MemAttnConfig, MemAttnForCausalLM

site, version = sys.argv[1:]
assert memattn.__file__.startswith(site), f"memattn must be in {site}, got {memattn.__file__}"
assert memattn.__version__ == version == importlib.metadata.version("memattn")
q, k, v = torch.randn(3, 1, 2, 33, 16).unbind()
out, expected = (
    memattn.segmented_attention(q, k, v, window_size=4, backend=backend).out
    for backend in ("cpp", "reference")
)
torch.testing.assert_close(out, expected)
configs = importlib.resources.files("memattn_kernels.configs")
assert any(file.name.endswith(".json") for file in configs.iterdir()), configs
assert importlib.resources.files("memattn").joinpath("py.typed").is_file()
sizes = dict(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
for preset in ("vanilla", "segmented", "titans"):
    model = MemAttnForCausalLM(getattr(MemAttnConfig, preset)(**sizes)).eval()
    tokens = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, pad_token_id=0)
    assert tokens.shape == (1, 7)
print(f"memattn {version} works in {site}")
"""


def main() -> int:
    """Build, check and try both; the exit code is 1 after the first failure."""
    for folder in (ROOT / "build", DIST):
        shutil.rmtree(folder, ignore_errors=True)
    python = sys.executable
    run(python, "-m", "build", "--no-isolation", "--sdist", "--wheel", "--outdir", DIST, cwd=ROOT)
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    run(python, "-m", "twine", "check", "--strict", wheel, sdist, cwd=ROOT)
    version = sdist.name.removeprefix("memattn-").removesuffix(".tar.gz")
    with tempfile.TemporaryDirectory() as folder:
        for distribution in (wheel, sdist):
            install_and_use(distribution, version, Path(folder) / distribution.suffix[1:])
    say(f"built and checked: {wheel.relative_to(ROOT)}, {sdist.relative_to(ROOT)}")
    return 0


def install_and_use(distribution: Path, version: str, folder: Path) -> None:
    """Install a distribution into a new environment, and run a model and a command there."""
    import torch

    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    # a path line: packages of this environment, but none of its editable installs
    (site / "others.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    # venv may bring setuptools of its own, which is older than the one that builds
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools", cwd=folder)
    pip = (python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation")
    # the source distribution is compiled to see that nothing is missing, not for its speed
    run(*pip, "--ignore-installed", distribution, cwd=folder, MEMATTN_CXXFLAGS="-O0", CI="1")
    run(python, "-c", USE, str(site), version, cwd=folder)
    run(folder / "bin" / "memattn", "doctor", cwd=folder)


def run(*command: str | Path, cwd: Path, **env: str) -> None:
    """Run a command away from the sources' import path, and end with what it printed."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    say(f"$ {' '.join(word if len(word) < 200 else '...' for word in words)}")
    done = subprocess.run(words, cwd=cwd, env={**clean, **env}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-4000:]}{done.stderr[-4000:]}\n{words[:4]} ended with an error")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
