"""``memattn audit``."""


def audit(
    model: str,
    seq_len: int | None = None,
    seed: int = 0,
    device: str | None = None,
    json: str | None = None,
) -> int:
    """Check that a model is causal, independent of batch and padding, and decodes as it prefills.

    The audit changes later tokens, other rows and padding, and compares decoding and split prefill
    with one pass: in float64 with noise on all weights, and again in the model's own dtype. It
    prints a table. The exit code is 1 if a check failed.

    Args:
        model: A folder with a saved model, a run folder, a name on the Hugging Face hub, or the
            name of a preset, which is then small and random.
        seq_len: Tokens in a sequence; by default more than twice the model's windows.
        seed: Seed of tokens, weight noise and cuts.
        device: Device, such as cpu or cuda; by default CUDA if there is one.
        json: File to write the report to.
    """
    from rich.console import Console

    from memattn.cli._models import load_model
    from memattn.evaluate import audit as run_audit
    from memattn.files import write_json

    loaded = load_model(model, device)
    with Console(stderr=True).status(f"auditing {model}"):
        report = run_audit(loaded, seq_len=seq_len, seed=seed)
    if json is not None:
        write_json(json, report.to_dict())
    report.print()
    return 0 if report.passed else 1
