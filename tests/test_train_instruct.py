"""Instruction fine-tuning: the loop on conversations, and what it refuses."""

import json

import pytest
from chat_templates import CHATML
from safetensors.torch import load_file
from train_factories import tiny_config
from transformers import AutoTokenizer

from memattn.train import train
from memattn.train.metrics import read_metrics
from memattn.train.setup import prepare_data


@pytest.fixture
def chats(tmp_path):
    """Conversations in which every answer is the same, and its template."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"number {i}?"},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for i in range(24)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "chat.jinja").write_text(CHATML)
    return tmp_path


def config(folder, *, data=None, **training):
    own = {
        "dataset_name": str(folder / "chats.jsonl"),
        "chat_template": str(folder / "chat.jinja"),
        "seq_len": 96,
        **(data or {}),
    }
    options = {"training_mode": "instruction_finetuning", "max_steps": 80, "batch_size": 2}
    return tiny_config(folder, preset="vanilla", data=own, **{**options, **training})


@pytest.mark.parametrize("packed", [True, False])
def test_the_answer_is_learnt_and_nothing_else(chats, packed):
    result = train(config(chats, data={"packed": packed}, base_model_lr=2e-2), progress=False)
    # "yes<|im_end|>\n" is the same everywhere, "number 7" is not
    assert result.loss < 0.3 and result.eval_loss is not None and result.eval_loss < 0.3
    rows = read_metrics(result.output_dir / "metrics.csv")
    assert rows[0]["loss"] > 4.0
    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
    assert tokenizer.chat_template == CHATML


def test_a_stopped_run_goes_on_bit_for_bit(chats):
    whole = train(config(chats, max_steps=6, save_steps=3), progress=False)
    folder = str(chats / "again")
    again = train(
        config(chats, max_steps=6, save_steps=3, output_dir=folder),
        resume=whole.output_dir / "checkpoints" / "step-3",
        progress=False,
    )
    a, b = (load_file(r.model_dir / "model.safetensors") for r in (whole, again))
    assert all(a[name].equal(b[name]) for name in a)


def test_says_what_does_not_fit_into_a_row(chats):
    with pytest.warns(
        UserWarning, match="24 of 24 answers do not fit whole into rows of 64 tokens"
    ):
        prepare_data(config(chats, data={"seq_len": 64, "held_out": 0.0}))


def test_names_what_is_missing(chats):
    with pytest.raises(ValueError, match="data.chat_template must name a file with a chat templat"):
        train(config(chats, data={"chat_template": None}), progress=False)
    with pytest.raises(FileNotFoundError, match="data.chat_template must be a file that exists"):
        train(config(chats, data={"chat_template": "no.jinja"}), progress=False)
    with pytest.raises(ValueError, match="data.document_separator must be null for conversations"):
        train(config(chats, data={"document_separator": "\n"}), progress=False)


def test_the_number_of_processes_is_that_of_gpus(chats):
    wanted = r"training.num_gpus must be the number of processes, 1 \(accelerate launch --num_pro"
    with pytest.raises(ValueError, match=wanted + r".*\), got 2"):
        train(config(chats, num_gpus=2), progress=False)
    assert train(config(chats, num_gpus=1, max_steps=1), progress=False).step == 1
