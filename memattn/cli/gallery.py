"""``memattn gallery``."""


def gallery(
    text: str,
    out: str = "gallery",
    steps: int = 200,
    epochs: int = 10,
    cache_dir: str = "~/.cache/memattn",
) -> int:
    """Train a small model of each system, and draw one picture of what is special about it.

    Args:
        text: A corpus, such as wiki, a text file or a folder of such, for the language models.
        out: Folder of the pictures, one by the name of each system.
        steps: Optimizer steps of each language model.
        epochs: Passes over scikit-learn's digits, on which DTG-MA learns.
        cache_dir: Folder for fetched corpora, tokenizers and tokens.
    """
    from rich.console import Console

    from memattn.gallery import draw_gallery

    console = Console()
    report = lambda path: console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    draw_gallery(text, out, steps=steps, epochs=epochs, cache_dir=cache_dir, on_picture=report)
    return 0
