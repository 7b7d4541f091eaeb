"""The benchmark of whole models beside Llama, which gets their weights."""

import pytest

from memattn.bench import run

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {"B": 1, "H": 2, "layers": 2, "hidden": 16, "vocabulary": 32, "new": 3}


def test_models_run_beside_llama(capsys):
    record = run.run(
        ["models"], kinds=["causal", "segmented", "generate-future"], seq_lens=[9], shape=SHAPE,
        directions=["forward", "forward+backward"], device="cpu", quick=True,
    )  # fmt: skip
    assert {row["competitor"] for row in record["rows"]} == {"memattn", "llama, sdpa", "naive"}
    assert len(record["rows"]) == 9
    assert not any(row.get("reason") for row in record["rows"])  # why a peer did not run
    printed = capsys.readouterr().out
    assert "segmented B=1 T=9" in printed and "generate-future B=1 T=9 +3" in printed


def test_shape_names_what_models_have():
    with pytest.raises(ValueError, match="shape must have names from B, .*, got heads"):
        run.run(["models"], kinds=["generate"], shape={"heads": 2}, device="cpu", quick=True)
