"""Chapters of texts: closed they change no bit, open every token sees them, deleted are gone."""

import dataclasses

import pytest
import torch
from adapter_factories import make_attached, make_base
from model_factories import SIZES, logits_of, make_model, make_tokens
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from memattn import ChapterMemoryConfig, MemAttnConfig, MemAttnForCausalLM, MemoryAdapter
from memattn.adapters import attach_memory, set_adapter
from memattn.chapters import (
    chapter_from_text,
    chapters_of,
    load_chapters,
    refresh_chapters,
    stale_chapters,
)
from memattn.evaluate import audit
from memattn.nn import MemoryCrossAttention, StandardMemoryBank
from memattn.parts import chapters as chapters_file

MEMORY = dict(
    num_memory_tokens=24,
    use_chapters=True,
    num_chapters=8,
    top_k_chapters=2,
    routing_block_size=4,
    routing_window_size=7,
)
TEXT = make_tokens(1, 40, seed=3)[0]


def strategy(name):
    return dict(routing_strategy_train=name, routing_strategy_inference=name)


def make(kind, dtype=torch.float64, **options):
    """A model of the package, or one of transformers with a memory."""
    if kind != "own":
        return make_attached(kind, dtype, part=ChapterMemoryConfig(**MEMORY | options))
    return make_model("chapters", dtype, **MEMORY | options)


@pytest.mark.parametrize("kind", ["own", "llama", "gpt2"])
def test_filled_listed_opened_closed_and_deleted(kind):
    model, tokens = make(kind), make_tokens()
    before = logits_of(model, tokens)
    made = chapter_from_text(model, TEXT, source="tests", context_len=16)
    again = chapter_from_text(model, TEXT.flip(0), name="flipped")
    chapters = chapters_of(model)
    assert list(chapters) == [made, again] == [chapters["chapter-1"], chapters["flipped"]]
    assert (made.name, made.source, made.num_tokens) == ("chapter-1", "tests", 40)
    assert made.sha256 != again.sha256 and made.weights == again.weights
    assert made.model == type(model).__name__ and made.made_at.endswith("+00:00")
    assert torch.equal(chapters.tokens("chapter-1"), TEXT)
    assert torch.equal(logits_of(model, tokens), before)  # closed

    chapters.open("chapter-1")
    opened = logits_of(model, tokens)
    assert (opened != before).any(-1).all()  # every token of every row
    chapters.open("flipped", weight=0.5)
    assert not torch.equal(logits_of(model, tokens), opened)
    assert chapters["flipped"].is_open and chapters["flipped"].weight == 0.5
    # what a chapter holds does not depend on those that are open
    third = chapter_from_text(model, TEXT, name="third", context_len=16)
    assert third.sha256 == made.sha256
    chapters.close()
    chapters.open("third")
    assert torch.equal(logits_of(model, tokens), opened)
    chapters.delete("third", "flipped")
    assert torch.equal(logits_of(model, tokens), before)
    chapters.delete("chapter-1")
    assert not len(chapters) and torch.equal(logits_of(model, tokens), before)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("own", dict(quantize_memory=True, num_shared_chapters=1)),
        ("qwen3", dict(**strategy("sequence"), combine="independent", memory_block_variant="B")),
    ],
)
def test_open_chapters_are_exact(kind, options):
    """Nothing leaks, and decoding and split prefill give what one pass gives."""
    model = make(kind, **options)
    chapter_from_text(model, TEXT, name="text")
    chapters_of(model).open("text")
    assert audit(model, seq_len=18).verdict.startswith("all 0")


@pytest.mark.parametrize("combine", ["joint", "independent"])
def test_an_open_chapter_counts_as_one_of_the_bank(combine):
    """Against explicit softmax over the selected chapter and 5 further memory tokens."""
    torch.manual_seed(0)
    attention = MemoryCrossAttention(24, 16, 2, combine=combine, zero_output=False).double()
    bank = StandardMemoryBank(12, 16, 4, init_std=1.0).double()
    x, states = torch.randn(2, 6, 24).double(), torch.randn(5, 16).double()
    indices, weights = torch.tensor([[0], [3]]).int(), torch.tensor([[0.7], [0.4]]).double()
    chapter = attention.project_states(states)
    out = attention(x, bank, indices, weights, open_chapters=[(chapter, 2.0)])

    heads = lambda y: y.unflatten(-1, (2, -1)).transpose(-3, -2)
    query = heads(attention.q_proj(x))
    rows = torch.cat([bank(indices[:, 0].long()), states.expand(2, 5, 16)], 1)  # [2, 3 + 5, 16]
    scores = query @ heads(attention.k_proj(rows)).mT * attention.head_dim**-0.5
    values, w = heads(attention.v_proj(rows)), weights[..., None, None]
    if combine == "joint":
        prior = torch.cat([w.expand(2, 1, 1, 3), w.new_full((2, 1, 1, 5), 2.0 * 3 / 5)], -1)
        expected = (scores + prior.log()).softmax(-1) @ values
    else:
        own = w * (scores[..., :3].softmax(-1) @ values[..., :3, :])
        expected = own + 2.0 * (scores[..., 3:].softmax(-1) @ values[..., 3:, :])
    expected = attention.o_proj(expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["own", "llama"])
def test_generates_with_open_chapters(kind):
    model, tokens = make(kind), make_tokens()
    chapter_from_text(model, TEXT, name="text")
    options = dict(max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(tokens))
    plain = model.generate(tokens, **options)
    chapters_of(model).open("text", weight=8.0)
    cached = model.generate(tokens, **options)
    assert torch.equal(cached, model.generate(tokens, **options, use_cache=False))
    assert not torch.equal(cached, plain)
    # a cache projects open chapters once, and again when others are open
    with torch.no_grad():
        outputs = model(tokens[:, :-2], use_cache=True)
        chapters_of(model).close()
        closed = model(tokens[:, -2:-1], past_key_values=outputs.past_key_values).logits
        chapters_of(model).open("text")
        opened = model(tokens[:, -1:], past_key_values=outputs.past_key_values).logits
    assert torch.isfinite(closed).all() and torch.isfinite(opened).all()
    assert model.generate(tokens, **options, num_beams=2).shape == cached.shape


@pytest.mark.parametrize("kind", ["own", "llama"])
def test_chapters_come_back_with_the_model(kind, tmp_path, monkeypatch):
    model, tokens = make(kind, torch.float32), make_tokens()
    chapter_from_text(model, TEXT, name="open")
    chapter_from_text(model, TEXT.flip(0), name="closed")
    chapters_of(model).open("open", weight=2.0)
    logits, known = logits_of(model, tokens), list(chapters_of(model))

    def load():
        if kind == "own":
            return AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        base = make_base(kind, torch.float32)
        return MemoryAdapter.from_pretrained(base, tmp_path / "model").model

    saver = model if kind == "own" else MemoryAdapter(model, "default")
    saver.save_pretrained(tmp_path / "model")
    loaded = load()
    assert torch.equal(logits_of(loaded, tokens), logits)
    assert list(chapters_of(loaded)) == known and stale_chapters(loaded) == []

    # a failed save leaves the file whole
    chapters_of(model).delete("open")
    monkeypatch.setattr(chapters_file, "write_tensors", _fail)
    with pytest.raises(OSError, match="disk full"):
        saver.save_pretrained(tmp_path / "model")
    monkeypatch.undo()
    assert list(chapters_of(load())) == known
    saver.save_pretrained(tmp_path / "model")
    assert [chapter.name for chapter in chapters_of(load())] == ["closed"]
    chapters_of(model).delete("closed")
    saver.save_pretrained(tmp_path / "model")
    assert not len(chapters_of(load()))


def _fail(*args):
    raise OSError("disk full")


def test_chapters_of_another_model_are_refused(tmp_path):
    model = make("own")
    chapter_from_text(model, TEXT, name="text")
    path = tmp_path / "chapters.safetensors"
    chapters_of(model).save(path)
    with pytest.raises(ValueError, match="path must have no chapter that is here already, got 'te"):
        load_chapters(model, path)
    chapters_of(model).delete("text")
    load_chapters(model, path)
    assert chapters_of(model)["text"].num_tokens == 40
    cases = [
        (make("own", num_hidden_layers=3), "path must be of a model with num_layers 3, got .* wit"),
        (make("llama"), "path must be of a model with model_type 'llama', got .* with 'memattn'"),
        (
            make("own", memory_layer_placement="last_k", memory_layer_k=1),
            "must not have 0.layers.0",
        ),
    ]
    for other, message in cases:
        with pytest.raises(ValueError, match=message):
            load_chapters(other, path)
        assert not len(chapters_of(other))
    other = make("own")
    with torch.no_grad():
        other.model.embed_tokens.weight += 0.1
    with pytest.raises(ValueError, match="path must have chapters that these weights have made"):
        load_chapters(other, path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="path must be a whole safetensors file"):
        load_chapters(make("own"), path)


def test_a_chapter_is_made_again_after_training():
    model = make("own")
    chapter_from_text(model, TEXT, name="text")
    chapters_of(model).open("text", weight=2.0)
    with torch.no_grad():
        model.model.embed_tokens.weight += 0.1
    assert stale_chapters(model) == ["text"]
    old = logits_of(model, TEXT[None])
    refresh_chapters(model)
    assert stale_chapters(model) == [] and chapters_of(model)["text"].weight == 2.0
    assert chapters_of(model)["text"].is_open
    assert not torch.equal(logits_of(model, TEXT[None]), old)
    fresh = make("own")
    fresh.load_state_dict(model.state_dict())
    chapter_from_text(fresh, TEXT, name="text")
    chapters_of(fresh).open("text", weight=2.0)
    assert torch.equal(logits_of(fresh, TEXT[None]), logits_of(model, TEXT[None]))


def test_what_is_refused(tmp_path):
    model = make("own")
    plain = MemAttnForCausalLM(MemAttnConfig.vanilla(**SIZES))
    narrow = make("own", use_low_rank_memory=True, low_rank_mode="reduced_dim", memory_rank=8)
    for other in (plain, narrow):
        with pytest.raises(ValueError, match="model must have a part that keeps chapters, such as"):
            chapter_from_text(other, TEXT)
    with pytest.raises(ValueError, match="model must be a model of memattn or have attached parts"):
        chapters_of(torch.nn.Linear(2, 2))
    two = make("llama")
    attach_memory(two, dict(kind="chapter_memory", num_memory_tokens=8), name="two")
    set_adapter(two, "default", "two")
    with pytest.raises(ValueError, match="model must run exactly one adapter .*, got default, two"):
        chapter_from_text(two, TEXT)
    assert not len(MemoryAdapter(two, "two").chapters)
    chapter_from_text(model, TEXT, name="text")
    chapters = chapters_of(model)
    cases = [
        (lambda: chapter_from_text(model, TEXT, name="text"), "name must be new, got 'text'"),
        (lambda: chapter_from_text(model, TEXT, name=" "), "name must be a text that is not empty"),
        (lambda: chapter_from_text(model, TEXT[:0]), "text must have at least one token, got none"),
        (lambda: chapter_from_text(model, "x"), "tokenizer must be given for a model that was not"),
        (lambda: chapter_from_text(model, TEXT[None]), r"text must have 1 axes \[n\], got shape"),
        (lambda: chapter_from_text(model, TEXT, context_len=0), "context_len must be at least 1"),
        (lambda: chapters.open("none"), "name must be one of text, got 'none'"),
        (lambda: chapters.open(), "names must have at least one name, got none"),
        (lambda: chapters.open("text", weight=0.0), "weight must be positive and finite, got 0.0"),
        (lambda: chapters.delete(), "names must have at least one name, got none"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="text must be a text or a tensor of tokens, got list"):
        chapter_from_text(model, [1, 2])
    assert len(chapters) == 1 and not chapters["text"].is_open


@pytest.mark.parametrize("kind", ["own", "llama"])
def test_training_goes_on_with_open_chapters(kind):
    model, tokens = make(kind).train(), make_tokens()
    gradients = {}
    for opened in (False, True, True):
        if opened and "text" not in chapters_of(model):
            with torch.inference_mode():  # what is kept takes part in training all the same
                chapter_from_text(model, TEXT, name="text")
            chapters_of(model).open("text")
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        for name, parameter in model.named_parameters():
            if "attention.k_proj" in name or "attention.v_proj" in name:
                gradients.setdefault(name, []).append(parameter.grad.clone())
    assert model.training and any("chapter_memory" in name for name in gradients)
    for name, (closed, opened, again) in gradients.items():
        assert torch.isfinite(opened).all() and torch.equal(opened, again)
        assert "chapter_memory" not in name or not torch.equal(opened, closed)


def test_a_model_learns_to_read():
    """Texts about two words each: an open chapter tells which; that of another text does not."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = MemAttnForCausalLM(
        MemAttnConfig.memory_transformer(
            num_memory_tokens=8, num_chapters=2, top_k_chapters=1, initializer_range=0.1, **sizes
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    chapters, generator = chapters_of(model), torch.Generator().manual_seed(0)
    draw = lambda n, *shape: torch.randint(n, shape, generator=generator)

    def loss(words, text):
        """Of words that follow others, with a chapter of a text open, or without."""
        rows = words[draw(2, 16, 2)]
        if text is not None:
            chapter_from_text(model, text[draw(2, 20)], name="text")
            chapters.open("text")
        result = F.cross_entropy(model(rows[:, :1]).logits[:, 0], rows[:, 1])
        if text is not None:
            chapters.delete("text")
        return result

    for _ in range(200):
        words = torch.randperm(16, generator=generator)[:2]
        optimizer.zero_grad()
        loss(words, words).backward()
        optimizer.step()
    opened, closed, control = 0.0, 0.0, 0.0
    with torch.no_grad():
        for _ in range(16):
            words = torch.randperm(16, generator=generator)
            opened += loss(words[:2], words[:2]).item() / 16
            control += loss(words[:2], words[2:4]).item() / 16
            closed += loss(words[:2], None).item() / 16
    assert opened < min(closed, control) - 0.3, (opened, closed, control)


def test_a_file_holds_all_that_is_known(tmp_path):
    model = make("own")
    made = chapter_from_text(model, TEXT, name="text", source="a book")
    chapters_of(model).save(tmp_path / "file")
    chapters = chapters_file.Chapters.read(tmp_path / "file")
    assert list(chapters) == [made] and chapters.layout == chapters_of(model).layout
    chapters.open("text")
    chapters.save(tmp_path / "file")
    (read,) = chapters_file.list_chapters(tmp_path / "file")
    assert read == dataclasses.replace(made, is_open=True)
