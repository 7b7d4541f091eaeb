"""``memattn demo``."""


def demo(
    out: str = "runs/demo",
    minutes: float = 7.0,
    corpus: str = "wiki",
    specialty: str = "moby-dick",
    seed: int = 0,
    cache_dir: str = "~/.cache/memattn",
    processes: int | None = None,
    fresh: bool = False,
) -> int:
    """Train every preset on real text at equal tokens and parameters, audit each, and compare them.

    Counted tokens and pairs of the same text stand beside them. Prints the tables and writes
    results.json, curves.png and index.html, a page that needs no other file. Where the machine
    becomes slower meanwhile, all presets get fewer tokens. Ctrl-C leaves a checkpoint: the same
    command goes on from there, and presets that are finished are kept.

    Args:
        out: Folder of the results.
        minutes: Time for training all presets together; measuring comes on top.
        corpus: A corpus (memattn data --list), a text file, a folder or a Hugging Face dataset.
        specialty: The same, another text: what the specialists of a trained model learn.
        seed: The one seed of weights and order.
        cache_dir: Folder for fetched corpora, tokenizers and tokens.
        processes: How many presets train at a time; one for each CPU core where it is not given.
        fresh: Delete an earlier demo in the folder first.
    """
    from memattn.demo import DemoConfig, run_demo

    config = DemoConfig(
        out=out,
        minutes=minutes,
        corpus=corpus,
        specialty=specialty,
        seed=seed,
        cache_dir=cache_dir,
        processes=processes,
    )
    run_demo(config, fresh=fresh)
    return 0
