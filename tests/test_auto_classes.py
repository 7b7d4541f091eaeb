"""transformers' auto classes load the models of this package, whoever imported what first."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from memattn.models import MemAttnConfig, MemAttnForCausalLM
from memattn.models.folder_code import FILE

ROOT = Path(__file__).parent.parent
SIZES = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
LOAD = """
import torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]{options})
print(type(model).__module__, model(torch.arange(9)[None]).logits.double().sum().item())
"""
ORDERS = {
    "before": "import memattn\nassert 'torch' not in sys.modules\n"
    "import transformers.generation.utils\nfrom transformers import AutoModelForCausalLM",
    "between": "from transformers import AutoConfig\nimport memattn\n"
    "from transformers import AutoModelForCausalLM",
}
# the module that is watched is as everybody finds it
WHAT_IS_LEFT = """
module = sys.modules["transformers.models.auto.configuration_auto"]
print(*(type(x).__name__ for x in [*sys.meta_path, module.__loader__, module.__spec__.loader]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    MemAttnForCausalLM(MemAttnConfig.segmented(segment_len=4, **SIZES)).save_pretrained(path)
    return path


def logits(folder):
    return MemAttnForCausalLM.from_pretrained(folder)(torch.arange(9)[None]).logits.double().sum()


def run(code, *arguments, package=True):
    """Run code in a fresh process, with this package or without."""
    paths = [ROOT, ROOT / "kernels"] if package else []
    return subprocess.run(
        [sys.executable, "-c", "import sys\n" + code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("order", ORDERS)
def test_a_folder_loads_from_any_import_order(folder, order):
    code = ORDERS[order] + "\nassert 'memattn.models' not in sys.modules\n"
    result = run(code + LOAD.format(options="") + WHAT_IS_LEFT, folder)
    assert result.returncode == 0, result.stderr
    (where, total), left = (line.split() for line in result.stdout.splitlines())
    assert where == "memattn.models.decoder"
    assert float(total) == pytest.approx(logits(folder).item(), abs=1e-5)
    assert left[-2:] == ["SourceFileLoader"] * 2 and "_Finder" not in left


def test_a_folder_names_the_package(folder):
    trusted = LOAD.format(options=", trust_remote_code=True")
    code = "from transformers import AutoModelForCausalLM\n" + trusted
    result = run(code, folder)
    assert result.returncode == 0 and "memattn.models.decoder" in result.stdout, result.stderr
    blocked = "import transformers\nsys.modules['memattn'] = None\n" + code
    result = run(blocked, folder, package=False)
    assert result.returncode and "memattn" in result.stderr.splitlines()[-1]
    assert "ImportError" in result.stderr.splitlines()[-1] or "ModuleNotFound" in result.stderr


def test_a_configuration_is_what_it_was(folder, tmp_path):
    written = json.loads((folder / "config.json").read_text())
    assert written["auto_map"]["AutoModelForCausalLM"] == "modeling_memattn.MemAttnForCausalLM"
    assert (folder / FILE).is_file()
    config = AutoConfig.from_pretrained(folder)
    assert not hasattr(config, "auto_map") and "auto_map" not in config.to_dict()
    # loaded by the folder's own file or not, no code of the package is copied
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    MemAttnForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == {FILE}
    assert json.loads((tmp_path / "config.json").read_text()) == written
    # entries of others stay, and those that a hub has marked as its own go
    marked = {"AutoModel": "me/repo--modeling_memattn.MemAttnModel", "AutoTokenizer": "own.Words"}
    again = MemAttnConfig.from_dict(written | {"auto_map": marked})
    assert again.auto_map == {"AutoTokenizer": "own.Words"}
    again.save_pretrained(tmp_path / "again")
    kept = json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"]
    assert kept == written["auto_map"] | again.auto_map
