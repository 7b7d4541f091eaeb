"""A document, as readers of corpora and files give it."""

from typing import NamedTuple


class Document(NamedTuple):
    """One text with its identity."""

    title: str  # "" where it has no name of its own
    text: str
