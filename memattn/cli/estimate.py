"""``memattn estimate``."""

from typing import Any


def estimate(
    model: str | None = None,
    config: str | None = None,
    options: dict[str, Any] | None = None,
    seq_len: int | None = None,
    dense_layers: tuple[int, ...] = (),
    json: str | None = None,
) -> int:
    """Count the parameters and FLOPs of a model, part by part.

    Nothing of its size is allocated. FLOPs are those of one forward pass of one sequence: products
    with weight matrices, and what attention multiplies for the keys that a token sees. A memory
    transformer stands beside the published count of its authors.

    Args:
        model: The name of a preset, or a folder with a saved model or a run.
        config: Configuration of a training run, in place of a model.
        options: Keywords of the preset, such as '{"hidden_size": 768}'.
        seq_len: Tokens in the sequence; by default that of the configuration.
        dense_layers: Layers of decoders without memory to set beside a memory transformer.
        json: File to write the numbers to.
    """
    from memattn.checks import must
    from memattn.cli._runs import config_of_model, config_of_run
    from memattn.evaluate import estimate as run_estimate
    from memattn.evaluate.published import print_published, published_model
    from memattn.files import write_json
    from memattn.train import load_config

    if (model is None) == (config is None):
        must("model", "be given, or --config, but not both", "neither" if model is None else "both")
    if config is not None:
        if options:
            must("options", "be left out with --config", options)
        run = load_config(config)
        seq_len = seq_len or run.data.seq_len
        model_config = config_of_run(run)
    else:
        assert model is not None
        model_config = config_of_model(model, options or {})
    result = run_estimate(model_config, seq_len)
    if json is not None:
        write_json(json, result.to_dict())
    result.print(str(config or model))
    if published_model(model_config) is not None:
        print_published(model_config, result, dense_layers)
    elif dense_layers:
        must("dense_layers", "be left out for a model without chapter memory", dense_layers)
    return 0
