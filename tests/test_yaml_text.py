"""Text in configurations stays text, from files and from the command line."""

import pytest

from memattn.cli._parser import build_parser, normalise
from memattn.cli.plot import plot
from memattn.cli.train import train
from memattn.study import FutureStudy, load_study
from memattn.train import DataConfig, ModelConfig, TrainConfig, TrainingConfig, load_config
from memattn.yaml_text import dump_yaml, load_yaml

# what YAML, or a second look at it, would take for something else
TEXTS = [
    *(
        "---",
        "null",
        "~",
        "1",
        "1.0",
        "1e3",
        "-3E-4",
        "1.0e5",
        ".5e+3",
        "true",
        "yes",
        "0x10",
        "1_000",
        ".nan",
        "inf",
    ),
    *("[a]", "{a: b}", "a: b", "- a", "# x", "&a", "*a", "!!int 1", "'q'", '"q"', "@x", "%", "|"),
    *("2020-01-01", "<<", "=", "...", " x ", "\n\n", "null\n", "\t", "a #b", "é\u2028\x85", "${x}"),
]


def with_text(field, text):
    """A configuration with a text in one of its fields."""
    model = ModelConfig(preset="vanilla")
    if field == "output_dir":
        return TrainConfig(model=model, training=TrainingConfig(output_dir=text))
    if field == "options":
        return TrainConfig(model=ModelConfig(preset="vanilla", options={"x": text, "y": [text, 1]}))
    if field in ("preset", "model_path"):
        return TrainConfig(model=ModelConfig(**{field: text}))
    if field == "dataset_names":
        return TrainConfig(model=model, data=DataConfig(dataset_name=[text, "wiki"]))
    return TrainConfig(model=model, data=DataConfig(**{field: text}))


@pytest.mark.parametrize(
    "field",
    [
        *("document_separator", "dataset_name", "dataset_names", "dataset_subset", "dataset_split"),
        *("text_field", "tokenizer", "cache_dir", "preset", "model_path", "output_dir", "options"),
    ],
)
def test_every_text_field_of_a_file_is_read_as_it_is_written(tmp_path, field):
    path = tmp_path / "config.yaml"
    for text in TEXTS:
        config = with_text(field, text)
        path.write_text(config.to_yaml())
        read = load_config(path)
        assert read == config, text
        assert read.to_yaml() == config.to_yaml(), text


def test_a_study_is_read_as_it_is_written(tmp_path):
    config = FutureStudy(
        out="1e3",
        sizes={"norm": "null", "hidden_size": 8},
        data=DataConfig(document_separator="---", tokenizer="~"),
    )
    (tmp_path / "study.yaml").write_text(config.to_yaml())
    assert load_study("future", tmp_path / "study.yaml") == config


def parse(function, *arguments):
    parser, build = build_parser(function, prog="memattn")
    return build(parser.parse_args(normalise(list(arguments))))


@pytest.mark.parametrize("text", [text for text in TEXTS if text.strip() != "null"])
def test_text_of_the_command_line_is_not_parsed(text):
    assert parse(train, f"--data.document_separator={text}")["data"].document_separator == text
    assert parse(plot, "attention", "model", f"--text={text}")["text"] == text


def test_null_on_the_command_line_means_none():
    values = parse(train, "--model.preset", "null", "--model.model_path=null_model")
    assert values["model"] == ModelConfig(model_path="null_model")


def test_values_of_one_option_are_parsed_once():
    values = parse(train, "--model.options", '{a: "1", b: 1, c: "null", d: ["~", 2e-1]}')
    assert values["model"].options == {"a": "1", "b": 1, "c": "null", "d": ["~", 0.2]}
    values = parse(train, "--data.dataset_name", '[a, "1"]')
    assert values["data"].dataset_name == ["a", "1"]
    assert type(values["data"].dataset_name[1]) is str


def test_a_file_for_the_command_line_is_read_as_text_too(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(
        'data: {document_separator: "---", seq_len: "16"}\n'
        "training: {max_grad_norm: null, base_model_lr: 3e-4}\n"
    )
    values = parse(train, "--config", str(path))
    assert values["data"] == DataConfig(document_separator="---", seq_len=16)
    assert type(values["data"].document_separator) is str
    assert values["training"] == TrainingConfig(max_grad_norm=None, base_model_lr=3e-4)
    with pytest.raises(SystemExit):
        parse(train, "--config", str(path), "--print_config")
    printed = load_yaml(capsys.readouterr().out)
    assert printed["data"]["document_separator"] == "---"


def test_values_are_written_so_that_they_are_read():
    values = {"x": TEXTS, "y": [1, 1.0, 1e-5, None, True, {"z": 3e22}]}
    assert load_yaml(dump_yaml(values)) == values


@pytest.mark.parametrize("text", ["3e-4", "1.0e5", "1.E+5", "-2.5e3", ".5e3", "1e3"])
def test_a_number_needs_neither_point_nor_sign(text):
    value = load_yaml(text)
    assert value == float(text) and isinstance(value, float)
    assert load_yaml(dump_yaml({"a": value})) == {"a": value}
