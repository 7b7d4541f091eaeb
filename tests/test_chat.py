"""Conversations: loading, chat templates, which tokens are answers, and rows of whole ones."""

import json
import sys
import types

import pytest
import torch
from chat_templates import CHATML, GEMMA, LLAMA2, MARKED, QWEN3

from memattn.data import (
    Conversation,
    PaddedBatches,
    WholeBatches,
    encode_chat,
    load_conversations,
    load_tokenizer,
    split_documents,
    tokenize_conversations,
)
from memattn.data.batches import IGNORE

HELLO = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Hi, user?"},
    {"role": "assistant", "content": " Hié \n"},
]
THOUGHT = [*HELLO[:3], {"role": "assistant", "content": "<think>\nso\n</think>\n\nHi"}]
EARLY = [HELLO[0], {"role": "assistant", "content": "<think>\na\n</think>\n\nb"}, *HELLO[2:]]


@pytest.fixture(scope="module")
def plain_tokenizer():
    return load_tokenizer("bytes")


@pytest.fixture
def tokenizer(plain_tokenizer):
    yield plain_tokenizer
    plain_tokenizer.chat_template = None


def row(messages):
    return json.dumps({"messages": messages})


@pytest.mark.parametrize(
    ("template", "messages", "answers"),
    [
        (CHATML, HELLO, ["Hi<|im_end|>\n", " Hié \n<|im_end|>\n"]),
        (QWEN3, HELLO, ["Hi<|im_end|>\n", "<think>\n\n</think>\n\n Hié \n<|im_end|>\n"]),
        (QWEN3, THOUGHT, ["Hi<|im_end|>\n", "<think>\nso\n</think>\n\nHi<|im_end|>\n"]),
        (QWEN3, EARLY, ["b<|im_end|>\n", "<think>\n\n</think>\n\n Hié \n<|im_end|>\n"]),
        (LLAMA2, HELLO, [" Hi <|eos|>", " Hié <|eos|>"]),
        (GEMMA, HELLO, ["Hi<end_of_turn>\n", "Hié<end_of_turn>\n"]),
        (MARKED, HELLO, ["Hi<|im_end|>", " Hié \n<|im_end|>"]),
        (CHATML, HELLO[1:], ["Hi<|im_end|>\n", " Hié \n<|im_end|>\n"]),  # begins with an answer
        (CHATML, [{"role": "system", "content": "Hi"}, *HELLO[:2]], ["Hi<|im_end|>\n"]),
    ],
)
def test_answers_are_what_the_model_writes(tokenizer, template, messages, answers):
    tokenizer.chat_template = template
    chat = encode_chat(tokenizer, messages)
    assert tokenizer.decode(chat.ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert [tokenizer.decode(chat.ids[a:b]) for a, b in chat.answers] == answers
    inside = {i for a, b in chat.answers for i in range(a, b)}
    assert [i in inside for i in range(len(chat.ids))] == chat.trained
    # what stands before an answer is the prompt that generation gives
    last = chat.answers[-1][0]
    prompt = tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(chat.ids[:last]) == prompt


def test_names_what_does_not_fit_a_template(tokenizer):
    with pytest.raises(ValueError, match=r"data.chat_template must name a file with a chat templ"):
        encode_chat(tokenizer, HELLO)
    tokenizer.chat_template = GEMMA
    with pytest.raises(ValueError, match=r"fit the chat template \(a conversation must start wit"):
        encode_chat(tokenizer, HELLO[1:])
    tokenizer.chat_template = CHATML.replace("m.content", "m.content | length | string")
    with pytest.raises(
        ValueError, match=r"messages\[1\] must be rendered by .* it stands, got 'Hi'"
    ):
        encode_chat(tokenizer, HELLO)


def test_loads_rows_of_messages(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(f"{row(HELLO)}\n{row(HELLO[:1])}\n")
    conversations = load_conversations(tmp_path)
    assert conversations == [Conversation("", HELLO)]  # nobody answers in the other one
    asked = []

    class Rows(list):
        column_names = ("prompt", "messages")

    def load_dataset(name, subset, split):
        asked.append(split)
        if not split.endswith("_sft"):
            raise ValueError(f'Unknown split "{split}".')
        return Rows([{"messages": HELLO, "prompt": "Hi"}])

    names = ["train_sft", "test_sft", "train_gen"]
    fake = types.SimpleNamespace(
        load_dataset=load_dataset, get_dataset_split_names=lambda name, subset: names
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.warns(UserWarning, match="owner/chats has no split train: train_sft is read"):
        assert load_conversations("owner/chats") == conversations
    assert asked == ["train", "train_sft"]
    with pytest.raises(ValueError, match="split must be one of train_sft, test_sft, train_gen for"):
        load_conversations("owner/chats", split="dev")
    with pytest.raises(
        ValueError, match="messages_field must be one of prompt, messages, got text"
    ):
        load_conversations("owner/chats", split="test_sft", messages_field="text")


def test_names_what_is_wrong_with_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    for text, message in [
        ('{"text": "x"}', r'a.jsonl:1 must be an object with a list of messages, .* in "messages"'),
        (row([{"role": "user"}]), "a.jsonl:1 must be an object with a list of messages"),
        (row(HELLO[:1]), "source must hold conversations with answers, got .*a.jsonl"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_conversations(path)
    with pytest.raises(FileNotFoundError, match="source must be a file or folder that exists"):
        load_conversations(tmp_path / "no.jsonl")
    with pytest.raises(ValueError, match="source must hold conversations, not documents, got wiki"):
        load_conversations("wiki")
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(ValueError, match="source must be a .jsonl file or a folder with some"):
        load_conversations(tmp_path / "b.txt")


def conversations(count):
    """All different, of different lengths."""
    return [
        Conversation("", [{**m, "content": m["content"] + "x" * (7 * i % 11)} for m in HELLO])
        for i in range(count)
    ]


def test_long_conversations_end_after_a_whole_answer(tokenizer, tmp_path):
    tokenizer.chat_template = LLAMA2
    chat = encode_chat(tokenizer, HELLO)
    (_, first), (begin, whole) = chat.answers
    said = [Conversation("", HELLO)]
    for room, length, note in [
        (whole, whole, ""),
        (whole - 1, first, "1 of 2 answers do not fit whole into rows of"),
        (first, first, "1 of 2 answers"),
        (first - 1, first - 1, "2 of 2 answers do not fit whole .*, and 0 of 1 conversations"),
    ]:
        for _ in range(2):  # made, then read from the cache
            tokens, told = tokenize_conversations(said, tokenizer, room, cache_dir=tmp_path)
            assert tokens.ids.tolist() == chat.ids[:length]
            assert tokens.trained is not None and tokens.trained.tolist() == chat.trained[:length]
            assert told.startswith(note.split(".*")[0]) and bool(told) == bool(note)
    with pytest.raises(ValueError, match="seq_len must leave room for an answer .*, got 5"):
        tokenize_conversations(said, tokenizer, 5)
    assert begin > first
    tokenizer.chat_template = CHATML
    tokens, _ = tokenize_conversations(said, tokenizer, whole, cache_dir=tmp_path)
    assert tokens.ids.tolist() != chat.ids  # another template is another entry of the cache


@pytest.mark.parametrize("kind", [WholeBatches, PaddedBatches])
def test_only_answers_are_targets(tokenizer, kind):
    tokenizer.chat_template = CHATML
    said = conversations(9)
    tokens, note = tokenize_conversations(said, tokenizer, 200)
    assert not note and tokens.trained is not None
    options = {"pad_token_id": 0} if kind is PaddedBatches else {}
    batches = kind(tokens, batch_size=2, seq_len=200, **options)
    seen = []
    for batch in batches.one_epoch():
        kept = batch["labels"] != IGNORE
        assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
        rows = zip(batch["input_ids"], kept, strict=True)
        if kind is WholeBatches:
            bounds = batch["cu_seqlens"].tolist()
            assert batch["input_ids"].shape == (1, bounds[-1]) and bounds[-1] <= 2 * 200
            pieces = zip(bounds[:-1], bounds[1:], strict=True)
            rows = [(batch["input_ids"][0, a:b], kept[0, a:b]) for a, b in pieces]
        for ids, trained in rows:
            chat = next(
                c
                for c in (encode_chat(tokenizer, s.messages) for s in said)
                if c.ids == ids[: len(c.ids)].tolist() and not trained[len(c.ids) :].any()
            )
            assert trained[: len(chat.ids)].tolist() == chat.trained
            seen.append(len(chat.ids))
    assert sorted(seen) == sorted(tokens.bounds.diff().tolist())


def test_rows_hold_whole_documents_with_little_room_left(tokenizer):
    tokenizer.chat_template = CHATML
    tokens, _ = tokenize_conversations(conversations(60), tokenizer, 400)
    batches = WholeBatches(tokens, batch_size=1, seq_len=400, seed=3)
    ends = {int(batch["cu_seqlens"][-1]) for batch in batches.one_epoch()}
    assert len(ends) > 1 and max(ends) <= 400
    assert len(tokens.ids) > 0.8 * 400 * batches.num_rows
    epochs = [
        sorted(tuple(next(batches)["input_ids"][0].tolist()) for _ in range(batches.num_rows))
        for _ in range(2)
    ]
    assert epochs[0] == epochs[1]
    with pytest.raises(
        ValueError, match="seq_len must be at least .*, the longest document, got 9"
    ):
        WholeBatches(tokens, batch_size=1, seq_len=9)


def test_ranks_share_the_rows(tokenizer):
    tokenizer.chat_template = CHATML
    tokens, _ = tokenize_conversations(conversations(20), tokenizer, 300)
    whole = next(WholeBatches(tokens, batch_size=2, seq_len=300))
    parts = [
        next(WholeBatches(tokens, batch_size=1, seq_len=300, rank=rank, world_size=2))
        for rank in range(2)
    ]
    for name in ("input_ids", "labels"):
        assert torch.equal(torch.cat([part[name] for part in parts], 1), whole[name])


def test_duplicates_stand_on_one_side():
    said = conversations(8)
    split = split_documents([*said, *said], 0.25)
    assert (len(split.train), len(split.held_out)) == (6, 2)
    assert not {c.text for c in split.train} & {c.text for c in split.held_out}
