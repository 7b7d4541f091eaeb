"""transformers' auto classes load the models of this package, whoever imported what first."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from memattn import _auto_classes
from memattn.models import MemAttnConfig, MemAttnForCausalLM
from memattn.models.folder_code import FILE

ROOT = Path(__file__).parent.parent
SIZES = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
LOAD = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]{options})
print(type(model).__module__, model(torch.arange(9)[None]).logits.double().sum().item())
"""
MODELS_WAIT = "assert 'memattn.models' not in sys.modules\n"
# the module that was waited for is as everybody finds it
WHAT_IS_LEFT = """
module = sys.modules["transformers.models.auto.configuration_auto"]
print(*(getattr(x, "name", "") for x in sys.meta_path))
print(*(type(x).__name__ for x in [module.__loader__, module.__spec__.loader]))
"""
# what one process imports, and what forks of it then run: each import is paid once
STEPS = [
    (
        "import sys",
        {"alone": "import memattn\nassert not {'torch', 'transformers'} & {*sys.modules}"},
    ),
    (
        "import torch",
        {
            "before": "import memattn\nimport transformers.generation.utils\n"
            + (MODELS_WAIT + LOAD.format(options="") + WHAT_IS_LEFT)
        },
    ),
    (
        "from transformers import AutoConfig",
        {
            "between": "import memattn\n" + MODELS_WAIT + LOAD.format(options="") + WHAT_IS_LEFT,
            "trusted": LOAD.format(options=", trust_remote_code=True"),
            "missing": "sys.modules['memattn'] = None\n"
            + LOAD.format(options=", trust_remote_code=True"),
            "adapters": "import memattn.models\nassert 'peft' not in sys.modules\n"
            + "from peft import LoraConfig, LoraModel\n"
            + "print(LoraModel.target_module_mapping['memattn'])\n"
            + "print(any(getattr(x, 'name', '') == 'peft.utils.constants' for x in sys.meta_path))",
        },
    ),
]
FORKS = """
import json, os, sys, traceback
known = {}
for shared, codes in json.loads(sys.argv[2]):
    exec(shared, known)
    for name, code in codes.items():
        pid = os.fork()
        if pid == 0:
            file = os.open(os.path.join(sys.argv[3], name), os.O_CREAT | os.O_WRONLY)
            os.dup2(file, 1)
            os.dup2(file, 2)
            try:
                exec(code, known)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        os.waitpid(pid, 0)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    MemAttnForCausalLM(MemAttnConfig.segmented(segment_len=4, **SIZES)).save_pretrained(path)
    return path


def logits(folder):
    return MemAttnForCausalLM.from_pretrained(folder)(torch.arange(9)[None]).logits.double().sum()


@pytest.fixture(scope="module")
def printed(folder, tmp_path_factory):
    """What each of the programs printed, in a process that had imported nothing else before."""
    where = tmp_path_factory.mktemp("printed")
    subprocess.run(
        [sys.executable, "-c", FORKS, folder, json.dumps(STEPS), where],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))},
        cwd="/",
        timeout=120,
        check=True,
    )
    return {path.name: path.read_text().splitlines() for path in where.iterdir()}


@pytest.mark.parametrize("order", ["before", "between"])
def test_a_folder_loads_from_any_import_order(folder, printed, order):
    assert printed["alone"] == []  # neither package is loaded by this one
    (where, total), waited_for, loaders = (line.split() for line in printed[order][-3:])
    assert where == "memattn.models.decoder", printed[order]
    assert float(total) == pytest.approx(logits(folder).item(), abs=1e-5)
    assert loaders == ["SourceFileLoader"] * 2 and _auto_classes.HOME not in waited_for


def test_peft_that_comes_later_knows_where_adapters_belong(printed):
    pytest.importorskip("peft")
    assert printed["adapters"][-2:] == ["['q_proj', 'v_proj']", "False"]


def test_a_folder_names_the_package(printed):
    assert printed["trusted"][-1].startswith("memattn.models.decoder"), printed["trusted"]
    last = printed["missing"][-1]
    assert "memattn" in last and ("ImportError" in last or "ModuleNotFound" in last)


def test_what_others_put_in_place_stays():
    class Auto:
        @classmethod
        def from_pretrained(cls, name):
            return cls, name

        for_model = from_pretrained

    own = vars(Auto)["from_pretrained"]
    _auto_classes._watch(SimpleNamespace(AutoConfig=Auto))
    _auto_classes._watch(SimpleNamespace(AutoConfig=Auto))  # the package was loaded again
    watched = Auto.from_pretrained
    other = classmethod(lambda cls, name: ("other", watched(name)))
    setattr(Auto, "from_pretrained", other)  # noqa: B010 (the checker knows a method there)
    for _ in range(2):
        assert Auto.from_pretrained("x") == ("other", (Auto, "x"))
    assert vars(Auto)["from_pretrained"] is other and Auto.for_model("y") == (Auto, "y")
    assert vars(Auto)["for_model"] is own


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
