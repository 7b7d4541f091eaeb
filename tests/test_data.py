"""Documents, tokenizers and batches."""

import json
import sys
import types
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memattn.data import (
    Conversation,
    Document,
    PackedBatches,
    PaddedBatches,
    Tokens,
    WholeBatches,
    load_documents,
    load_tokenizer,
    split_documents,
    tokenize_documents,
    train_tokenizer,
)
from memattn.data.batches import IGNORE

TEXTS = [f"Tale {i}: {'the wind and the sea ' * (i % 5 + 1)}ends." for i in range(40)]
DOCUMENTS = [Document(f"tale {i}", text) for i, text in enumerate(TEXTS)]


def make_tokens(*lengths: int) -> Tokens:
    """Documents of these lengths; every token is another number."""
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return Tokens(torch.arange(sum(lengths), dtype=torch.int32), bounds, 0)


# documents


def test_reads_files_and_folders(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("one\n---\ntwo")
    (tmp_path / "b/c.md").write_text("# three")
    rows = [{"title": "T", "body": "four"}, {"body": "five é"}, {"body": "  "}]
    (tmp_path / "b/d.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "b/e.bin").write_bytes(b"\xff")
    assert load_documents(tmp_path / "a.txt") == [Document("a.txt", "one\n---\ntwo")]
    assert load_documents(str(tmp_path / "a.txt"), separator="\n---\n") == [
        Document("a.txt #0", "one"),
        Document("a.txt #1", "two"),
    ]
    documents = load_documents(tmp_path, text_field="body")
    assert documents == [
        Document("a.txt", "one\n---\ntwo"),
        Document("b/c.md", "# three"),
        Document("T", "four"),
        Document("", "five é"),
    ]
    both = load_documents([tmp_path / "a.txt", tmp_path / "b/c.md"])
    assert [document.title for document in both] == ["a.txt", "c.md"]


def test_names_what_is_wrong_with_a_source(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"text": 3}\n')
    (tmp_path / "c.jsonl").write_text("{\n")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").mkdir()
    (tmp_path / "e.txt").write_text("  \n")
    for source, error, message in [
        (tmp_path / "no.txt", FileNotFoundError, "source must be a file or folder that exists, g"),
        ("no/such/file.jsonl", FileNotFoundError, "source must be a file or folder that exists"),
        ("wikki", ValueError, "source must be a corpus .wiki, .*owner/name., got 'wikki'"),
        (tmp_path / "b.jsonl", ValueError, r'b.jsonl:2 must be an object with text in "text", got'),
        (tmp_path / "c.jsonl", ValueError, "c.jsonl:1 must be JSON, got"),
        (tmp_path / "d.txt", ValueError, "source must be UTF-8 text, got .*d.txt"),
        (tmp_path / "empty", ValueError, "source must hold files of type .txt, .md, .jsonl, got"),
        (tmp_path / "e.txt", ValueError, "source must hold text, got .*e.txt"),
        ([], ValueError, "source must hold text, got nothing"),
    ]:
        with pytest.raises(error, match=message):
            load_documents(source)
    with pytest.raises(ValueError, match="split must be None for .*a.txt, which is no Hugging"):
        load_documents(tmp_path / "a.txt", split="train")
    with pytest.raises(ValueError, match="separator must be None for wiki, which is no text file"):
        load_documents("wiki", separator="\n")


def test_loads_a_hugging_face_dataset(monkeypatch):
    def load_dataset(name, subset, split):
        if name == "no/hub":
            raise ConnectionError("could not reach the hub")
        assert (name, subset, split) == ("owner/tales", "small", "train")
        rows = FakeRows({"body": text, "title": None} for text in TEXTS[:2])
        rows.column_names = ["body", "title"]
        return rows

    class FakeRows(list):
        column_names: list

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    options = {"subset": "small", "text_field": "body"}
    documents = load_documents("owner/tales", **options)
    assert documents == [Document("", text) for text in TEXTS[:2]]
    with pytest.raises(ValueError, match="text_field must be one of body, title, got text"):
        load_documents("owner/tales", subset="small")
    with pytest.raises(ConnectionError, match="Hugging Face dataset no/hub must be on a hub that"):
        load_documents("no/hub")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'memattn\[hub\]'"):
        load_documents("owner/tales")


def test_the_two_sides_share_no_document():
    copies = [
        Document("another name", TEXTS[3]),
        Document("TALE  4", "another text under a known title"),
        Document("", TEXTS[5].upper() + "\n"),
        # a chain: known text under a new title, then that title with a new text
        Document("chain", TEXTS[6]),
        Document("Chain", "the end of the chain"),
    ]
    split = split_documents(DOCUMENTS + copies, 0.25, seed=1)
    assert sorted(split.train + split.held_out) == sorted(DOCUMENTS)
    assert len(split.held_out) == 10
    assert not {d.text for d in split.train} & {d.text for d in split.held_out}


def test_a_split_depends_on_texts_and_seed_alone():
    split = split_documents(DOCUMENTS, 0.2)
    again = split_documents(reversed(DOCUMENTS), 0.2)
    assert set(split.held_out) == set(again.held_out)
    assert split == split_documents(DOCUMENTS, 0.2)
    assert set(split.held_out) != set(split_documents(DOCUMENTS, 0.2, seed=1).held_out)
    assert len(split_documents(DOCUMENTS, 0.001).held_out) == 1
    assert split_documents(DOCUMENTS, 0.0) == (DOCUMENTS, [])


def test_of_one_document_the_end_is_held_out():
    one = Document("tale", " ".join(f"word{i}" for i in range(100)))
    split = split_documents([one, one], 0.1)
    (train,), (held_out,) = split
    assert f"{train.text} {held_out.text}" == one.text
    assert 0.1 * len(one.text) <= len(held_out.text) <= 0.1 * len(one.text) + 6
    assert split_documents([one], 0.0) == ([one], [])
    (train,), (held_out,) = split_documents([Document("", "x" * 50)], 0.2)  # no word ends
    assert (len(train.text), len(held_out.text)) == (40, 10)


def test_refuses_a_split_with_an_empty_side():
    with pytest.raises(ValueError, match="documents must have text enough to hold its end out"):
        split_documents([Document("", "x")], 0.1)
    said = Conversation("", [{"role": "user", "content": "a"}])
    with pytest.raises(ValueError, match="documents must be at least 2 different ones .* got 1"):
        split_documents([said, said], 0.1)
    with pytest.raises(ValueError, match=r"held_out must be in \[0, 1\), got 1.0"):
        split_documents(DOCUMENTS, 1.0)


# tokenizers


@pytest.mark.parametrize("vocab_size", [None, 300], ids=["bytes", "bpe"])
def test_tokenizers_give_back_any_text(tmp_path, vocab_size):
    from transformers import AutoTokenizer

    path = tmp_path / "tokenizer"
    if vocab_size is None:
        tokenizer = load_tokenizer("bytes")
        tokenizer.save_pretrained(path)
        assert len(tokenizer) == 259
    else:
        tokenizer = train_tokenizer(TEXTS, vocab_size, path)
        assert len(tokenizer) == 300
        again = train_tokenizer(TEXTS, vocab_size)
        assert again.get_vocab() == tokenizer.get_vocab()
    text = "  the sea,\n\n\tÜber 漢字 🙂 , isn't it ?"
    for one in (tokenizer, load_tokenizer(path), AutoTokenizer.from_pretrained(path)):
        ids = one(text).input_ids
        assert one.decode(ids) == text
        special = (one.bos_token_id, one.eos_token_id, one.pad_token_id)
        assert special == (0, 1, 2) and not set(ids) & set(special)


def test_names_what_is_wrong_with_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="vocab_size must be at least 259, got 10"):
        train_tokenizer(TEXTS, 10)
    with pytest.raises(OSError, match="tokenizer must be 'bytes', a folder with a tokenizer or"):
        load_tokenizer(tmp_path)


def test_tokens_are_the_documents_between_marks(tmp_path, monkeypatch):
    tokenizer = load_tokenizer("bytes")
    tokens = tokenize_documents(DOCUMENTS, tokenizer, cache_dir=tmp_path)
    assert tokens.num_documents == len(DOCUMENTS)
    assert tokens.num_bytes == len("".join(TEXTS)) == len(tokens.ids) - 2 * len(DOCUMENTS)
    for i, text in enumerate(TEXTS):
        ids = tokens.ids[tokens.bounds[i] : tokens.bounds[i + 1]]
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert tokenizer.decode(ids[1:-1]) == text

    (kept,) = tmp_path.rglob("*.safetensors")
    written = kept.stat().st_mtime_ns
    again = tokenize_documents(DOCUMENTS, tokenizer, cache_dir=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again[:2], tokens[:2], strict=True))
    assert again.num_bytes == tokens.num_bytes and kept.stat().st_mtime_ns == written
    # other texts and other tokenizers have other names; a damaged file is made anew
    tokenize_documents(DOCUMENTS[1:], tokenizer, cache_dir=tmp_path)
    tokenize_documents(DOCUMENTS, train_tokenizer(TEXTS, 300), cache_dir=tmp_path)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    kept.write_bytes(kept.read_bytes()[:50])
    again = tokenize_documents(DOCUMENTS, tokenizer, cache_dir=tmp_path)
    assert torch.equal(again.ids, tokens.ids)
    assert kept.stat().st_size > 50
    with pytest.raises(ValueError, match="documents must not be empty, got none"):
        tokenize_documents([], tokenizer)


# batches

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)
SIZES = {"batch_size": st.integers(1, 3), "seq_len": st.integers(2, 9), "world_size": st.just(1)}


@settings(deadline=None, max_examples=30)
@given(lengths=LENGTHS, seed=st.integers(0, 3), **SIZES)
def test_packed_rows_have_every_token_once_an_epoch(lengths, seed, **sizes):
    tokens = make_tokens(*lengths)
    n, rows = len(tokens.ids), sizes["batch_size"] * sizes["seq_len"]
    batches = PackedBatches(tokens, seed=seed, **sizes)
    stream, starts = [], set(tokens.bounds[:-1].tolist())
    for batch in (next(batches) for _ in range(-(-2 * n // rows))):
        ids, labels, bounds = batch["input_ids"][0], batch["labels"][0], batch["cu_seqlens"]
        assert ids.shape == (rows,) and ids.dtype == labels.dtype == torch.int64
        assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == rows
        assert set(range(0, rows, sizes["seq_len"])) <= set(bounds.tolist())
        for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
            piece = ids[begin:end]
            # a piece is a run of one document
            assert torch.equal(piece, torch.arange(int(piece[0]), int(piece[0]) + len(piece)))
            assert not starts & set(piece[1:].tolist())
            assert labels[begin] == -100 and torch.equal(labels[begin + 1 : end], piece[1:])
        stream += ids.tolist()
    assert sorted(stream[:n]) == sorted(stream[n : 2 * n]) == list(range(n))


@settings(deadline=None, max_examples=30)
@given(lengths=LENGTHS, seed=st.integers(0, 3), **SIZES)
def test_padded_rows_have_every_token_once_an_epoch(lengths, seed, **sizes):
    tokens = make_tokens(*lengths)
    batches = PaddedBatches(tokens, pad_token_id=999, seed=seed, **sizes)
    seen: Counter = Counter()
    pieces = sum(-(-length // sizes["seq_len"]) for length in lengths)
    assert batches.num_rows == pieces
    rows = 0
    for batch in batches.one_epoch():
        mask = batch["attention_mask"].bool()
        assert mask[:, 0].all() and (mask.long().diff(dim=1) <= 0).all()
        assert mask.any(0).all()  # no column is padding alone
        assert (batch["input_ids"][~mask] == 999).all() and (batch["labels"][~mask] == -100).all()
        assert (batch["labels"][:, 0] == -100).all()
        targets = batch["labels"] != -100
        assert torch.equal(batch["labels"][targets], batch["input_ids"][targets])
        assert targets.sum() == mask.sum() - len(mask)
        seen.update(batch["input_ids"][mask].tolist())
        rows += len(mask)
    assert seen == dict.fromkeys(range(len(tokens.ids)), 1) and rows == pieces


def make_batches(kind: str, **options):
    tokens = make_tokens(5, 1, 17, 8, 30, 2, 9)
    if kind == "packed":
        return PackedBatches(tokens, seq_len=4, **options)
    return PaddedBatches(tokens, seq_len=4, pad_token_id=999, **options)


def rows_of(kind: str, batch: dict) -> tuple:
    """A batch as rows."""
    if kind == "padded":
        return tuple(map(tuple, batch["input_ids"].tolist()))
    return tuple(map(tuple, batch["input_ids"].view(-1, 4).tolist()))


@pytest.mark.parametrize("kind", ["packed", "padded"])
@pytest.mark.parametrize("epoch", [True, False], ids=["one_epoch", "endless"])
def test_ranks_together_see_what_one_process_sees(kind, epoch):
    one = make_batches(kind, batch_size=6, shuffle=not epoch)
    ranks = [
        make_batches(kind, batch_size=2, rank=rank, world_size=3, shuffle=not epoch)
        for rank in range(3)
    ]
    if epoch:
        whole = list(one.one_epoch())
        shares = list(zip(*(rank.one_epoch() for rank in ranks), strict=True))
        assert len(whole) == len(shares) == -(-one.num_rows // 6)
    else:
        whole = [next(one) for _ in range(9)]
        shares = [tuple(next(rank) for rank in ranks) for _ in range(9)]
    for batch, parts in zip(whole, shares, strict=True):
        targets = [part["labels"][part["labels"] != IGNORE] for part in parts]
        assert torch.equal(torch.cat(targets), batch["labels"][batch["labels"] != IGNORE])
        if not epoch:
            assert sum((rows_of(kind, part) for part in parts), ()) == rows_of(kind, batch)


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_batches_resume_anywhere_and_on_other_ranks(kind):
    batches = make_batches(kind, batch_size=4)
    stream = [rows_of(kind, next(batches)) for _ in range(12)]  # more than an epoch
    half = make_batches(kind, batch_size=4)
    for _ in range(7):
        next(half)
    state = half.state_dict()
    assert state == {"position": 28} | ({"rows_drawn": True} if kind == "packed" else {})
    again = make_batches(kind, batch_size=4)
    again.load_state_dict(state)
    assert [rows_of(kind, next(again)) for _ in range(5)] == stream[7:]
    second = make_batches(kind, batch_size=2, rank=1, world_size=2)
    second.load_state_dict(state)
    assert [rows_of(kind, next(second)) for _ in range(5)] == [rows[2:] for rows in stream[7:]]


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_the_order_is_drawn_from_seed_and_epoch(kind):
    def epochs(**options):
        batches = make_batches(kind, batch_size=1, **options)
        rows = 18 if kind == "packed" else batches.num_rows
        return [[rows_of(kind, next(batches)) for _ in range(rows)] for _ in range(2)]

    first, second = epochs()
    assert first != second
    assert epochs() == [first, second]
    assert epochs(seed=1) != [first, second]
    if kind == "padded":
        kept, again = epochs(shuffle=False)
        assert kept == again and kept != first


def test_rows_of_a_batch_are_of_unlike_documents():
    """Rows beside each other in a document are not read together, though none is lost."""
    tokens = make_tokens(*[40] * 20)
    batch = next(PackedBatches(tokens, batch_size=8, seq_len=10))
    documents = set((batch["input_ids"][0, ::10] // 40).tolist())
    assert len(documents) > 4  # two, if the rows of a document came one after another


def test_a_position_without_an_order_is_of_rows_one_after_another():
    tokens = make_tokens(*[40] * 20)
    older = PackedBatches(tokens, batch_size=8, seq_len=10)
    older.load_state_dict({"position": 8})
    documents = (next(older)["input_ids"][0] // 40).unique_consecutive()
    assert len(documents) == 2
    older.load_state_dict(older.state_dict())
    assert older.state_dict() == {"position": 16, "rows_drawn": False}


@pytest.mark.parametrize("kind", ["packed", "whole", "padded"])
def test_batches_say_whose_text_it_is(kind):
    """Of each token, where a row has pieces of several documents, cut or not."""
    lengths = (5, 1, 17, 8, 30, 2, 9)
    domains = torch.tensor([1, 0, 1, 0, 0, 1, 1])
    weights = torch.tensor([0.5, 3.0])
    tokens = make_tokens(*lengths)._replace(domains=domains, domain_weights=weights)
    of_token = domains.repeat_interleave(torch.tensor(lengths))
    if kind == "padded":
        batches = PaddedBatches(tokens, seq_len=4, batch_size=3, pad_token_id=999)
    elif kind == "packed":
        batches = PackedBatches(tokens, seq_len=4, batch_size=3)
    else:
        batches = WholeBatches(tokens, seq_len=31, batch_size=2)
    for batch in (next(batches) for _ in range(12)):
        ids, labels = batch["input_ids"], batch["domain_labels"]
        assert torch.equal(batch["domain_label_weights"], weights[labels])
        assert labels.dtype == torch.int64
        assert labels.shape == ((len(ids), 1) if kind == "padded" else ids.shape)
        there = ids != 999
        assert torch.equal(labels.expand_as(ids)[there], of_token[ids[there]])


def test_names_what_is_wrong_with_batches():
    tokens = make_tokens(3)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        PackedBatches(tokens, batch_size=0, seq_len=4)
    with pytest.raises(ValueError, match="seq_len must be at least 2, got 1"):
        PackedBatches(tokens, batch_size=1, seq_len=1)
    with pytest.raises(ValueError, match="rank must be below world_size=2, got 2"):
        PackedBatches(tokens, batch_size=1, seq_len=4, rank=2, world_size=2)
    with pytest.raises(ValueError, match="position must be at least 0, got -1"):
        PackedBatches(tokens, batch_size=1, seq_len=4).load_state_dict({"position": -1})
