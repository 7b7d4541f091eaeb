"""``memattn estimate``."""

from pathlib import Path
from typing import Any

from memattn.checks import check_int, must


def estimate(
    model: str | None = None,
    config: str | None = None,
    base_model: str | None = None,
    options: dict[str, Any] | None = None,
    seq_len: int | None = None,
    dense_layers: tuple[int, ...] = (),
    scale: tuple[int, ...] = (),
    json: str | None = None,
    out: str | None = None,
) -> int:
    """Count the parameters and FLOPs of a model, part by part.

    No weights are allocated. FLOPs are those of one forward pass of one sequence: products with
    weight matrices, and attention products for the keys that a token sees. For a memory
    transformer, the count published by its authors is printed as well.

    Args:
        model: The name of a preset, or a folder with a saved model or a run.
        config: Configuration of a training run, in place of a model.
        base_model: Folder of the pretrained model, instead of the one in the configuration.
        options: Keywords of the preset, such as '{"hidden_size": 768}'.
        seq_len: Tokens in the sequence; by default that of the configuration.
        dense_layers: Layers of decoders without memory to compare with a memory transformer.
        scale: Numbers of devices: print the bytes that a training step keeps and sends instead.
            Without a model, print the page of all systems.
        json: File to write the numbers to.
        out: File for the page of --scale; by default it is printed.
    """
    if scale:
        unread = {"config": config, "base_model": base_model, "json": json}
        for name, value in {**unread, "dense_layers": dense_layers or None}.items():
            if value is not None:
                must(name, "be left out with --scale", value)
        return _scale(scale, model, options, seq_len, out)
    from memattn.cli._runs import config_of_model, config_of_run, empty_model_of_run
    from memattn.evaluate import estimate as run_estimate
    from memattn.evaluate.estimate_attached import estimate_attached
    from memattn.evaluate.published import print_published, published_model
    from memattn.files import write_json
    from memattn.train import load_config

    if out is not None:
        must("out", "be left out without --scale", out)
    if (model is None) == (config is None):
        must("model", "be given, or --config, but not both", "neither" if model is None else "both")
    run = None if config is None else load_config(config)
    is_pretrained = run is not None and run.model.model_path is not None
    if base_model is not None and not is_pretrained:
        must("base_model", "be left out without a pretrained model in --config", base_model)
    if run is not None:
        if options:
            must("options", "be left out with --config", options)
        seq_len = seq_len or run.data.seq_len
        model_config = config_of_run(run, base_model)
    else:
        model_config = config_of_model(str(model), options or {})
    if model_config is not None:
        result = run_estimate(model_config, seq_len)
    else:
        assert run is not None
        empty = empty_model_of_run(run, base_model)
        result = estimate_attached(empty, seq_len or 0, run.model.memory_adapter)
    if json is not None:
        write_json(json, result.to_dict())
    result.print(str(config or model))
    if model_config is not None and published_model(model_config) is not None:
        print_published(model_config, result, dense_layers)
    elif dense_layers:
        must("dense_layers", "be left out for a model without chapter memory", dense_layers)
    return 0


def _scale(
    devices: tuple[int, ...],
    model: str | None,
    options: dict[str, Any] | None,
    seq_len: int | None,
    out: str | None,
) -> int:
    """Print the bytes of a training step on many devices, for a model or for all systems."""
    import sys

    from memattn.cli._runs import config_of_model
    from memattn.evaluate.scale import scale
    from memattn.evaluate.scale_page import page, table
    from memattn.files import write_text

    for n in devices:
        check_int("scale", n, 1)
    if model is None:
        if options:
            must("options", "be left out without a model", options)
        total = 1 << 20 if seq_len is None else seq_len
        given = "" if seq_len is None else f" --seq_len {seq_len}"
        command = f"memattn estimate --scale {' '.join(map(str, devices))}{given}"
        text = page(devices, total, command)
    else:
        made = config_of_model(model, options or {})
        total = made.max_position_embeddings if seq_len is None else seq_len
        text = table(list(scale(made, devices, total))) + "\n"
    if out is None:
        sys.stdout.write(text)
    else:
        write_text(Path(out), text)
    return 0
