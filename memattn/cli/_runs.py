"""The ``--config`` of several commands: the configuration of a training run."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from memattn.checks import must

if TYPE_CHECKING:
    from memattn.train import TrainConfig


class Loaded(NamedTuple):
    """A model and its tokenizer."""

    name: str
    model: Any
    tokenizer: Any
    run: "TrainConfig | None"  # if the model belongs to a run


def load_either(
    model: str | None, config: str | None, base_model: str | None, device: str | None
) -> Loaded:
    """Load a named model, or the model of a run.

    Args:
        model: A folder, a run folder or a name on the hub; None with ``config``.
        config: Configuration of a run, a file.
        base_model: Folder of the pretrained model, instead of the one in the configuration.
        device: Where to run.

    Raises:
        ValueError: If both or neither of the first two are given.
        OSError, ImportError: If something is missing.
    """
    from memattn.cli._models import load_model, load_model_tokenizer
    from memattn.train import load_config

    if (model is None) == (config is None):
        must("model", "be given, or --config, but not both", "neither" if model is None else "both")
    if model is not None:
        file = Path(model).expanduser() / "config.yaml"
        run = load_config(file) if file.is_file() else None
        return Loaded(
            model, load_model(model, device, base_model), load_model_tokenizer(model), run
        )
    assert config is not None
    return _load_run(config, base_model, device)


def _load_run(file: str, base_model: str | None, device: str | None) -> Loaded:
    """The trained model of a run or, before training, its initial model."""
    import torch

    from memattn.cli._models import choose_device, load_model, load_model_tokenizer, weights_folder
    from memattn.train import load_config
    from memattn.train.setup import build_model, run_tokenizer

    run = load_config(file)
    if base_model is not None:
        if run.model.model_path is None:
            must("base_model", f"be left out for {file}, which has no pretrained model", base_model)
        run = replace(run, model=replace(run.model, model_path=base_model))
    folder = run.training.output_dir
    if weights_folder(Path(folder).expanduser()) is not None:
        loaded = load_model(folder, device, base_model)
        return Loaded(folder, loaded, load_model_tokenizer(folder), run)
    where = choose_device(device)
    tokenizer = run_tokenizer(run)
    torch.manual_seed(run.training.seed)
    model = build_model(run.model, tokenizer).to(where).eval()
    sys.stderr.write(f"nothing is trained in {folder} yet: this is what training starts from\n")
    return Loaded(file, model, tokenizer, run)


def config_of_run(run: "TrainConfig", base_model: str | None) -> Any:
    """The configuration of a run's decoder; None if its base is another kind of model.

    The text is read only if needed.
    """
    from memattn.train.setup import preset_config, run_tokenizer

    if run.model.model_path is not None:
        return _config_of_base(run, base_model)
    size = run.model.options.get("vocab_size")
    if size is None:
        trained = run.data.tokenizer in (None, "bpe")
        size = run.data.vocab_size or 4096 if trained else len(run_tokenizer(run))
    return preset_config(run.model, vocab_size=size)


def _config_of_base(run: "TrainConfig", base_model: str | None) -> Any:
    """The configuration of a run's pretrained decoder, with specialists; else None."""
    from transformers import AutoConfig

    from memattn.models import MemAttnConfig
    from memattn.parts.specialists import SpecialistsConfig
    from memattn.train.attached import is_attached
    from memattn.train.pretrained import find_pretrained

    config = AutoConfig.from_pretrained(find_pretrained(base_model or str(run.model.model_path)))
    if not isinstance(config, MemAttnConfig) or is_attached(run.model):
        return None
    if run.model.specialists is None:
        return config
    parts = [*config.parts, SpecialistsConfig(**run.model.specialists)]
    return MemAttnConfig.from_dict({**config.to_dict(), "parts": parts})


def empty_model_of_run(run: "TrainConfig", base_model: str | None) -> Any:
    """The pretrained model of a run with its LoRA, on the ``meta`` device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import memattn.models  # registers its models
    from memattn.train.attached import attach
    from memattn.train.pretrained import find_pretrained

    assert memattn.models
    config = AutoConfig.from_pretrained(find_pretrained(base_model or str(run.model.model_path)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        if run.model.lora is not None:
            attach(model, replace(run.model, memory_adapter=None))
    return model


def config_of_model(model: str, options: dict[str, Any]) -> Any:
    """The configuration of a preset with these options, or that of a saved model."""
    from transformers import AutoConfig

    from memattn.cli._models import find_model
    from memattn.models import PRESETS, MemAttnConfig

    if model in PRESETS:
        try:
            return PRESETS[model](**options)
        except TypeError as error:
            raise ValueError(f"options: {error}") from error
    if options:
        must("options", f"be left out for {model}, which is no preset", options)
    folder = find_model(model)
    assert folder is not None  # it is no preset
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, MemAttnConfig):
        must("model", "be a decoder of memattn", f"{model}, of type {config.model_type}")
    return config
