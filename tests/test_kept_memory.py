"""Memories that are kept: what was read once is known, from a file."""

import random

import pytest
import torch
from memory_facts import draw_facts, train_on_facts
from model_factories import make_model, make_tokens

from memattn.cli import main
from memattn.cli.memorize import text_blocks
from memattn.data import load_tokenizer
from memattn.models import KeptMemory, MemAttnCache
from memattn.testing import assert_within_budget
from memattn.viz import visualize_model_state


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The folder of a model that remembers facts, and a book with some."""
    folder = tmp_path_factory.mktemp("facts")
    train_on_facts(folder / "model")
    facts = draw_facts(random.Random(3), 6)
    book = folder / "book.txt"
    book.write_text("".join(f"{thing}{number}" for thing, number in facts.items()) + "." * 600)
    return folder, facts


def ask(capsys, folder, thing, *options):
    command = ["generate", str(folder / "model"), "--prompt", thing, "--temperature", "0"]
    assert main([*command, "--max_new_tokens", "1", *options]) == 0
    return capsys.readouterr().out.strip()


def test_facts_of_a_text_are_recalled_with_its_memory_and_not_without(learned, capsys):
    folder, facts = learned
    state = folder / "book.memory"
    command = ["memorize", str(folder / "book.txt"), "--model", str(folder / "model")]
    assert main([*command, "--out", str(state), "--piece", "100", "--no_measure"]) == 0
    assert "read 613 tokens" in capsys.readouterr().out
    memory = ["--memory", str(state)]
    answers = {thing: ask(capsys, folder, thing, *memory) for thing in facts}
    guesses = {thing: ask(capsys, folder, thing) for thing in facts}
    right = sum(answers[thing] == thing + number for thing, number in facts.items())
    guessed = sum(guesses[thing] == thing + number for thing, number in facts.items())
    assert right >= 5, answers
    assert guessed <= 2, guesses


def test_state_of_a_file_is_drawn(learned, tmp_path, capsys):
    folder, _ = learned
    model, book = str(folder / "model"), tmp_path / "short.txt"
    book.write_text("A1B2\n" * 9)
    state = str(tmp_path / "book.memory")
    assert main(["memorize", str(book), "--model", model, "--out", state]) == 0
    metrics = KeptMemory.load(state).metrics["model.layers.0.attention"]
    assert metrics["tokens"][-1] == 46 and (metrics["update"] > 0).all()
    page, picture = tmp_path / "state.html", tmp_path / "state.png"
    assert main(["plot", "state", state, "--out", str(page)]) == 0
    assert main(["plot", "state", model, "--text", "A1B2", "--out", str(picture)]) == 0
    assert page.read_text().count("<svg") == 1 and "update of the weights" in page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert main(["plot", "state", state, "--text", "A", "--out", str(page)]) == 2
    assert "text must be left out" in capsys.readouterr().err
    assert main(["plot", "state", str(tmp_path / "none"), "--out", str(page)]) == 2
    assert "text must be given to plot the state of a model" in capsys.readouterr().err


@pytest.mark.parametrize("variant", ("lmm", "mac"))
def test_reading_in_pieces_and_from_a_file_is_reading_at_once(variant, tmp_path):
    system, ids, T = f"titans-{variant}", make_tokens(1, 67), 60
    model = make_model(system, torch.float32)
    with torch.no_grad():
        expected = make_model(system, torch.float64)(ids, use_cache=False).logits[:, T:]
        plain = model(ids, use_cache=False).logits[:, T:]
        kept = KeptMemory.of(model)
        kept.read(model, ids[:, :36], piece_len=10)
        kept.save(tmp_path / "state")
        kept = KeptMemory.load(tmp_path / "state", model)
        kept.read(model, ids[:, 36:T], piece_len=9)
        found = model(ids[:, T:], past_key_values=kept.cache).logits
    assert_within_budget("logits", found, plain, expected)
    once = KeptMemory.of(model)
    once.read(model, ids[:, :T])
    for layer, measures in once.metrics.items():
        for name, measure in measures.items():
            torch.testing.assert_close(kept.metrics[layer][name], measure)


def test_a_state_of_another_model_is_refused(learned, tmp_path, capsys):
    folder, _ = learned
    model = make_model("titans-lmm")
    kept = KeptMemory.of(model)
    with pytest.raises(ValueError, match="hold sequences to be saved"):
        kept.save(tmp_path / "none")
    kept.read(model, make_tokens(1, 5))
    kept.save(tmp_path / "other")
    cache = MemAttnCache(model.config)
    model(make_tokens(2, 5), past_key_values=cache)
    cache.save(tmp_path / "cache")
    for name, reason in (
        ("other", "memory must be of this model"),
        ("cache", "memory must be a file that memattn memorize wrote"),
        ("absent", "memory must be a file that memattn memorize wrote"),
    ):
        command = ["generate", str(folder / "model"), "--prompt", "A"]
        assert main([*command, "--memory", str(tmp_path / name)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert reason in line and name in line
    with pytest.raises(TypeError, match="model must have layers with a neural memory"):
        KeptMemory.of(make_model("window"))


def test_memorize_keeps_the_old_file_where_it_fails_and_goes_on_where_asked(
    learned, tmp_path, capsys
):
    folder, _ = learned
    model, state = str(folder / "model"), tmp_path / "state"
    book = tmp_path / "book.txt"
    book.write_text("A1B2")
    command = ["memorize", str(book), "--model", model, "--out", str(state)]
    assert main(command) == 0
    before = state.read_bytes()
    book.write_bytes(b"C3\xff\xfe")
    assert main(command) == 2
    assert "book must be text in UTF-8" in capsys.readouterr().err
    book.write_text("")
    assert main(command) == 2
    assert "book must have at least one token" in capsys.readouterr().err
    assert state.read_bytes() == before
    book.write_text("C3")
    assert main([*command, "--memory", str(state)]) == 0
    loaded, tokenizer = KeptMemory.load(state), load_tokenizer("bytes")
    whole = make_whole(folder, tokenizer, "A1B2C3")
    assert loaded.num_tokens == whole.num_tokens
    for ours, theirs in zip(loaded.cache.layers, whole.cache.layers, strict=True):
        for name, x in ours.state.items():
            torch.testing.assert_close(x, theirs.state[name])


@pytest.mark.parametrize("options", (["--temperature", "0"], ["--seed", "3", "--top_k", "9"]))
def test_text_goes_on_behind_a_memory_as_behind_the_text(learned, tmp_path, capsys, options):
    folder, _ = learned
    model, state, book = str(folder / "model"), str(tmp_path / "state"), tmp_path / "book.txt"
    book.write_text("A1B2C3")
    assert main(["memorize", str(book), "--model", model, "--out", state]) == 0
    capsys.readouterr()
    command = ["generate", model, "--max_new_tokens", "6", *options, "--prompt"]
    assert main([*command, "B", "--memory", state]) == 0
    behind = capsys.readouterr().out
    assert main([*command, "A1B2C3B"]) == 0
    assert "A1B2C3" + behind == capsys.readouterr().out


def test_a_book_is_never_overwritten(learned, tmp_path, capsys):
    folder, _ = learned
    book = tmp_path / "book.txt"
    book.write_text("A1B2")
    out = str(tmp_path / "." / "book.txt")
    assert main(["memorize", str(book), "--model", str(folder / "model"), "--out", out]) == 2
    assert "out must be another file than book" in capsys.readouterr().err
    assert book.read_text() == "A1B2"


def make_whole(folder, tokenizer, text):
    from memattn.cli._models import load_model

    model = load_model(str(folder / "model"), "cpu")
    kept = KeptMemory.of(model)
    kept.read(model, torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]]))
    return kept


def test_a_text_is_cut_behind_lines(tmp_path):
    text = "one line\n" * 20_000 + "x" * 2_000_000 + " end"
    file = tmp_path / "text"
    file.write_text(text)
    with file.open() as opened:
        blocks = list(text_blocks(opened))
    assert "".join(blocks) == text and len(blocks) > 3
    assert all(block.endswith("\n") for block in blocks[:2])
    assert max(map(len, blocks)) <= 17 * 65536


def test_state_of_a_live_cache_is_drawn(tmp_path):
    model = make_model("titans-mag", torch.float32)
    cache = MemAttnCache(model.config)
    with pytest.raises(ValueError, match="state must hold sequences"):
        visualize_model_state(cache, tmp_path / "state.png")
    with torch.no_grad():
        model(make_tokens(2, 12), past_key_values=cache)
    visualize_model_state(cache, tmp_path / "state.svg", row=1, title="a & b")
    drawn = (tmp_path / "state.svg").read_text()
    assert drawn.count("<image") >= 4  # two layers of two memories
    with pytest.raises(ValueError, match="row must be from 0 to 1, got 2"):
        visualize_model_state(cache, tmp_path / "state.png", row=2)
    with pytest.raises(TypeError, match="state must be a KeptMemory"):
        visualize_model_state(3, tmp_path / "state.png")
