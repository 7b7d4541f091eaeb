"""The training example of shiftable attention: a generalist, then specialists beside it."""

import random
import runpy
from pathlib import Path

import torch

from memattn.models import ShiftableLanguageModel
from memattn.train.attached import load_model_folder

ROOT = Path(__file__).parent.parent
main = runpy.run_path(str(ROOT / "examples/train_sma_lm.py"))["main"]
SIZES = "--d_model 16 --num_heads 2 --num_layers 2 --dim_feedforward 32 --max_len 32"
TRAINING = "--vocab_size 300 --base_steps 3 --special_steps 3 --batch_size 2 --held_out 0.1"


def write(path: Path, words: str, documents: int = 30) -> str:
    draw = random.Random(0)
    texts = (f"{i} " + " ".join(draw.choices(words.split(), k=25)) for i in range(documents))
    path.write_text("\n\n".join(texts))
    return str(path)


def test_a_generalist_and_a_specialist_are_trained_one_after_the_other(tmp_path, capsys):
    general = write(tmp_path / "general.txt", "the sea wind ship sails under over bright dark")
    special = write(tmp_path / "special.txt", "SELECT FROM WHERE a b c = < 1 2 3")
    out = tmp_path / "out"
    options = [*SIZES.split(), *TRAINING.split(), "--output_dir", str(out), "--format", "pt"]
    options += ["--cache_dir", str(tmp_path / "cache")]
    assert main(["--general_corpus", general, *options]) == 0
    assert "general loss" in capsys.readouterr().out
    assert main(["--special_corpus", special, *options]) == 0
    printed = capsys.readouterr().out
    for line in ("special loss: ", "general loss: ", "gates on the special corpus:\nLayer 0: ["):
        assert line in printed
    assert "with the base gate forced, logits are bit-equal to base" in printed
    base, trained = (
        load_model_folder(out / name / "model") for name in ("base_lm", "shiftable_lm")
    )
    assert (out / "shiftable_lm" / "model" / "model.safetensors").is_file()

    # the files of the torch format, read as they are
    weights = torch.load(out / "shiftable_lm.pt", weights_only=True)
    base_weights = torch.load(out / "base_lm.pt", weights_only=True)
    assert all(torch.equal(weights[name], base_weights[name]) for name in base_weights)
    model = ShiftableLanguageModel(base, num_specialists=1, scope="prefix")
    model.load_state_dict(weights)
    ids = torch.randint(300, (2, 9))
    logits, gates = model.eval()(ids, return_gates=True)
    same = trained.state_dict()
    assert weights.keys() == same.keys() and all(weights[n].equal(same[n]) for n in same)
    torch.testing.assert_close(logits, trained.eval()(ids).logits)
    assert gates[-1].shape == (2, 2)
    # its gate was taught whose text is which
    found = [float(line.split(": [")[1].split()[0]) for line in printed.splitlines()
             if line.startswith("Layer ")]  # fmt: skip
    special_gates, general_gates = found[: len(gates)], found[len(gates) :]
    assert min(general_gates) > max(special_gates)
    assert not logits.equal(base.eval()(ids).logits)

    # again, it goes on, which here means that nothing is left to do
    assert main(["--special_corpus", special, *options]) == 0
    assert capsys.readouterr().out == printed


def test_says_what_is_wrong(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "one.txt").write_text("one text")
    out = ["--output_dir", str(tmp_path / "out")]
    for options, message in (
        ([], "general_corpus must be given, or special_corpus, got neither"),
        (["--general_corpus", str(tmp_path / "empty.txt")], "general_corpus must hold text, got /"),
        (["--general_corpus", str(tmp_path / "one.txt")], "general_corpus must have two documents"),
        (["--special_corpus", "wiki"], "output_dir must have a finished base, got no /"),
        (["--general_corpus", str(tmp_path / "no.txt")], "source must be a file or folder that"),
    ):
        assert main([*options, *out]) == 2
        assert message in capsys.readouterr().err
