"""recall and loss_by_position: against decoding, and against sums by hand."""

import json

import pytest
import torch
import torch.nn.functional as F
from test_evaluate import TEXTS, make_model, make_tokenizer
from torch import nn
from transformers import MistralConfig
from transformers.modeling_outputs import CausalLMOutput

from memattn import MemAttnConfig, MemAttnForCausalLM
from memattn.cli import main
from memattn.data import load_tokenizer
from memattn.data.tasks import Facts, Haystack, MultiQueryRecall, Needle, draw_sample
from memattn.evaluate import loss_by_position, perplexity, recall
from memattn.evaluate.recall import reach_of
from memattn.viz.recall import plot_recall


class Knowing(nn.Module):
    """A model that has the text before it, and errs at some positions."""

    def __init__(self, vocab_size, wrong=()):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.vocab_size, self.wrong = vocab_size, wrong

    def forward(self, input_ids, use_cache=False):
        following = input_ids.roll(-1, 1)
        for position in self.wrong:
            following[:, position] = (following[:, position] + 1) % self.vocab_size
        return CausalLMOutput(logits=30.0 * F.one_hot(following, self.vocab_size).float())


def tiny(**options):
    torch.manual_seed(0)
    config = MemAttnConfig.segmented(
        **dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2) | options
    )
    return MemAttnForCausalLM(config).eval()


def test_a_model_that_knows_is_right_and_one_error_costs_one_answer():
    task = MultiQueryRecall(vocab_size=60, num_pairs=4)
    knowing = recall(Knowing(60), task, lengths=[20, 40], samples=3, batch_size=2)
    assert [cell.accuracy for cell in knowing.cells] == [1.0, 1.0]
    assert knowing.cells[0].loss < 1e-6 and knowing.cells[0].chance == 0.25
    first = [draw_sample(task, 20, None, 0, i).answers[0][0] for i in range(3)]
    erring = recall(Knowing(60, [first[0] - 1]), task, lengths=[20], samples=1).cells[0]
    assert (erring.accuracy, erring.exact) == (0.75, 0.0) and erring.loss > 7.0


def test_an_answer_is_right_where_greedy_decoding_writes_it():
    model = tiny(segment_len=8)
    # a model that repeats one token is right where that token is the answer
    tokens = torch.zeros(1, 15, dtype=torch.long)
    written = int(model(tokens).logits[0, -1].argmax())

    class Fixed:
        name, has_depth = "fixed", False

        def draw(self, length, depth, generator):
            from memattn.data.tasks import Sample

            answer = written if generator.random() < 0.5 else (written + 1) % 60
            return Sample([0] * (length - 1) + [answer], [(length - 1, length)], 9, 1 / 60)

    report = recall(model, Fixed(), lengths=[16], samples=12, batch_size=5)
    samples = [draw_sample(Fixed(), 16, None, 0, i) for i in range(12)]
    greedy = model.generate(tokens, max_new_tokens=1, do_sample=False)[0, -1].item()
    right = [sample.ids[-1] == greedy for sample in samples]
    assert 0 < sum(right) < 12 and report.cells[0].accuracy == sum(right) / 12


def test_depths_and_reach_are_reported():
    tokenizer = load_tokenizer("bytes")
    model = tiny(vocab_size=len(tokenizer), window_size=32, segment_len=None)
    task = Needle(haystack=Haystack(tokenizer))
    report = recall(model, task, lengths=[200, 400], depths=[0.0, 1.0], samples=2)
    assert report.reach == reach_of(model) == 64
    assert [(cell.length, cell.depth) for cell in report.cells] == [
        *((200, 0.0), (200, 1.0), (400, 0.0), (400, 1.0))
    ]
    beyond = [cell.beyond_reach for cell in report.cells]
    assert beyond == [float(cell.distance > 64) for cell in report.cells]
    assert beyond[2] == 1.0 and beyond[1] == 0.0
    sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
    assert reach_of(MemAttnForCausalLM(MemAttnConfig.vanilla(**sizes))) is None


def test_reach_of_other_decoders():
    with torch.device("meta"):
        sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=3, num_attention_heads=2)
        config = MistralConfig(**sizes, sliding_window=5)
        assert reach_of(nn.Module()) is None
        windowed = nn.Module()
        windowed.config = config
        assert reach_of(windowed) == 15
        config.sliding_window = None
        assert reach_of(windowed) is None


def test_loss_by_position_adds_up_to_the_loss():
    model, tokenizer = make_model(), make_tokenizer(bos_token="<s>")
    whole = perplexity(model, TEXTS, tokenizer, context_len=6, batch_size=3)
    buckets = loss_by_position(model, TEXTS, tokenizer, context_len=6, batch_size=3)
    assert [(b.first, b.last) for b in buckets] == [(1, 1), (2, 3), (4, 6)]
    assert sum(b.num_tokens for b in buckets) == whole.num_tokens
    mean = sum(b.loss * b.num_tokens for b in buckets) / whole.num_tokens
    assert mean == pytest.approx(whole.loss, rel=1e-12)
    # the first token of each text, by hand; the last window of a text reaches back as far as it can
    ids = [[1, *tokenizer(text)["input_ids"]] for text in TEXTS if text]
    starts = [tokens[:2] for tokens in ids]
    losses = [
        F.cross_entropy(model(torch.tensor([a[:1]])).logits[0], torch.tensor(a[1:])).item()
        for a in starts
    ]
    assert buckets[0].num_tokens == 3
    assert buckets[0].loss == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_bad_input():
    tokenizer = load_tokenizer("bytes")
    model = tiny(vocab_size=len(tokenizer))
    task = Needle(haystack=Haystack(tokenizer))
    for options, message in (
        (dict(lengths=[]), "lengths must not be empty"),
        (dict(lengths=[200], depths=[]), "depths must not be empty"),
        (dict(lengths=[200], samples=0), "samples must be"),
        (dict(lengths=[20]), "length must be at least"),
        (dict(lengths=[200], depths=[2.0]), "depth must be between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            recall(model, task, **options)
    with pytest.raises(ValueError, match="depth must be None"):
        recall(model, Facts(haystack=Haystack(tokenizer)), lengths=[900], depths=[0.5])
    with pytest.raises(ValueError, match="texts must have at least one token"):
        loss_by_position(model, [""], tokenizer)


def test_commands_print_tables_and_write_pictures(tmp_path, capsys):
    tokenizer = load_tokenizer("bytes")
    model = tiny(vocab_size=len(tokenizer), max_position_embeddings=512)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("It rained. It did not stop.\n" * 20)
    where = str(tmp_path / "model")
    out, numbers = tmp_path / "map.png", tmp_path / "map.json"
    options = ["--lengths", "128", "200", "--depths", "0", "1", "--samples", "2"]
    files = ["--haystack", str(tmp_path / "text.txt"), "--out", str(out), "--json", str(numbers)]
    assert main(["evaluate", "needle", where, *options, *files]) == 0
    assert "needle (passkey)" in capsys.readouterr().out
    assert out.stat().st_size > 10_000 and len(json.loads(numbers.read_text())["cells"]) == 4
    assert main(["evaluate", "recall", where, "--num_pairs", "3", "--samples", "2"]) == 0
    shown = capsys.readouterr().out
    assert "multi-query recall, 3 pairs" in shown and "512" in shown
    data = ["--data", str(tmp_path / "text.txt"), "--by_position"]
    assert main(["evaluate", "perplexity", where, *data]) == 0
    assert "tokens before" in capsys.readouterr().out
    assert main(["evaluate", "facts", where, "--story", "qa9"]) == 2
    assert "story must be one of" in capsys.readouterr().err


def test_a_curve_where_there_is_no_depth(tmp_path):
    report = recall(Knowing(60), MultiQueryRecall(vocab_size=60), lengths=[40, 80], samples=1)
    plot_recall(report, tmp_path / "curve.svg")
    assert "chance" in (tmp_path / "curve.svg").read_text()
