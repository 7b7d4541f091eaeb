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
    ran = [row for row in record["rows"] if not row.get("reason")]
    assert {row["competitor"] for row in ran} == {"memattn", "llama, sdpa", "naive"}
    assert len(ran) == 9
    left = [(row["competitor"], row["reason"]) for row in record["rows"] if row not in ran]
    assert left == 2 * [("memattn, compiled", "not run: takes long to compile")]
    printed = capsys.readouterr().out
    assert "segmented B=1 T=9" in printed and "generate-future B=1 T=9 +3" in printed


@pytest.mark.slow
@pytest.mark.usefixtures("new_programs")
def test_a_compiled_model_gives_the_gradients_of_the_model():
    record = run.run(
        ["models"], kinds=["causal"], seq_lens=[9], shape=SHAPE | {"layers": 1},
        directions=["forward+backward"], peers=["memattn, compiled"], device="cpu",
    )  # fmt: skip
    ours, compiled = record["rows"]
    assert compiled["reason"] is None and compiled["seconds"] is not None
    assert ours["competitor"] == "memattn"


def test_shape_names_what_models_have():
    with pytest.raises(ValueError, match="shape must have names from B, .*, got heads"):
        run.run(["models"], kinds=["generate"], shape={"heads": 2}, device="cpu", quick=True)
