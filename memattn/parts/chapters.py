"""Chapters made from texts: their tensors, which of them are open, and their file.

``PartConfig.chapter_layout`` names the tensors that a part keeps per token and layer. They are
collected while the model reads a text in ``Chapters.recording``. As long as the chapter is open,
``Chapters.opened`` gives them to the part in every call of the model.
"""

import json
import math
import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memattn.checks import must
from memattn.files import read_metadata, read_tensors, write_tensors

FILE, FORMAT = "chapters.safetensors", "memattn-chapters-1"
TOKENS = "tokens"  # name of the text's tokens in the file


class OpenChapter(NamedTuple):
    """The tensors of an open chapter for one part in one layer."""

    tensors: Mapping[str, Tensor]  # by name, one row for each token
    weight: float


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """Description of a chapter: its origin and whether it is open.

    Attributes:
        name: Its name.
        source: The user's name for the text, such as a file name.
        num_tokens: Tokens of the text.
        sha256: Checksum of the text, or of its tokens if tokens were given.
        made_at: When it was made, UTC, ISO 8601.
        model: The model that read the text.
        weights: Checksum of the model's weights at that time.
        context_len: Tokens that the model read at a time.
        prefix: Tokens before each piece; their states are not kept.
        is_open: Whether every token attends to it.
        weight: Its weight when open; 1 is the weight of one learned chapter.
    """

    name: str
    source: str
    num_tokens: int
    sha256: str
    made_at: str
    model: str
    weights: str
    context_len: int
    prefix: tuple[int, ...] = ()
    is_open: bool = False
    weight: float = 1.0


class Chapters:
    """The chapters of one model, by name, in the order in which they were made.

    Chapters are not parameters: they are neither trained nor in a ``state_dict``. A closed chapter
    has no effect.

    Args:
        layout: Features that the model's parts keep per token, by ``layers.<i>.<part>.<tensor>``.
        model: Type and sizes of the model.
    """

    def __init__(self, layout: Mapping[str, int], model: Mapping[str, Any]) -> None:
        self.layout = dict(layout)
        self.model = dict(model)
        self._chapters: dict[str, Chapter] = {}
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self._opened: dict[str, tuple[OpenChapter, ...]] = {}  # by "layers.<i>.<part>"
        self._recorded: dict[str, list[Tensor]] | None = None

    def __iter__(self) -> Iterator[Chapter]:
        return iter(self._chapters.values())

    def __len__(self) -> int:
        return len(self._chapters)

    def __contains__(self, name: object) -> bool:
        return name in self._chapters

    def __getitem__(self, name: str) -> Chapter:
        self._check_known(name)
        return self._chapters[name]

    def _check_known(self, *names: str) -> None:
        for name in names:
            if name not in self._chapters:
                known = ", ".join(self._chapters) or "none, as there are no chapters"
                must("name", f"be one of {known}", repr(name))

    def tokens(self, name: str) -> Tensor:
        """The tokens of a chapter's text, int64 ``[n]``."""
        self._check_known(name)
        return self._tensors[name][TOKENS].long()

    def add(self, chapter: Chapter, tokens: Tensor, kept: Mapping[str, Tensor]) -> None:
        """Add a chapter, or replace the one of that name.

        Args:
            chapter: Its description.
            tokens: Tokens of its text, ``[n]``.
            kept: Tensors ``[n, features]`` by their names in the layout.

        Raises:
            ValueError: If the tensors do not fit the model.
        """
        shapes = {name: (len(tokens), features) for name, features in self.layout.items()}
        self._check_shapes("kept", kept, shapes)
        self._chapters[chapter.name] = chapter
        self._tensors[chapter.name] = {TOKENS: tokens.int(), **kept}
        self._update()

    @staticmethod
    def _check_shapes(
        argument: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        for name in sorted(tensors.keys() ^ shapes.keys()):
            must(argument, f"{'not have' if name in tensors else 'have'} {name}", "others")
        for name, shape in shapes.items():
            if tuple(tensors[name].shape) != shape:
                allowed = f"have {name} of shape {list(shape)}"
                must(argument, allowed, list(tensors[name].shape))

    def open(self, *names: str, weight: float | None = None) -> None:
        """Open chapters: from now on every token of every sequence attends to them.

        Args:
            names: At least one name.
            weight: Their weight; 1 is the weight of one learned chapter. None keeps the present
                weight, initially 1.

        Raises:
            ValueError: If a name is unknown, or the weight is not positive and finite.
        """
        if not names:
            must("names", "have at least one name", "none")
        self._check_known(*names)
        if weight is not None and not 0.0 < weight < math.inf:
            must("weight", "be positive and finite", weight)
        for name in names:
            chapter = self._chapters[name]
            self._chapters[name] = replace(
                chapter, is_open=True, weight=chapter.weight if weight is None else float(weight)
            )
        self._update()

    def close(self, *names: str) -> None:
        """Close these chapters; without names, all."""
        self._check_known(*names)
        for name in names or tuple(self._chapters):
            self._chapters[name] = replace(self._chapters[name], is_open=False)
        self._update()

    def delete(self, *names: str) -> None:
        """Delete these chapters from the model."""
        if not names:
            must("names", "have at least one name", "none")
        self._check_known(*names)
        for name in dict.fromkeys(names):
            del self._chapters[name], self._tensors[name]
        self._update()

    @contextmanager
    def only(self, *names: str, weight: float | None = None) -> Generator[None, None, None]:
        """Context in which only these chapters are open."""
        before = dict(self._chapters)
        self.close()
        try:
            if names:
                self.open(*names, weight=weight)
            yield
        finally:
            self._chapters = {
                name: replace(chapter, is_open=before[name].is_open, weight=before[name].weight)
                if name in before
                else chapter
                for name, chapter in self._chapters.items()
            }
            self._update()

    def _update(self) -> None:
        """Group the open chapters by layer and part."""
        opened: dict[str, list[OpenChapter]] = {}
        for chapter in self:
            places: dict[str, dict[str, Tensor]] = {}
            for name in self.layout if chapter.is_open else ():
                place, _, tensor = name.rpartition(".")
                places.setdefault(place, {})[tensor] = self._tensors[chapter.name][name]
            for place, tensors in places.items():
                opened.setdefault(place, []).append(OpenChapter(tensors, chapter.weight))
        self._opened = {place: tuple(chapters) for place, chapters in opened.items()}

    def opened(self, layer: int, part: str, device: torch.device) -> tuple[OpenChapter, ...]:
        """The open chapters of a part in a layer; the same object until they change."""
        if self._recorded is not None:
            return ()  # a chapter is recorded without other chapters
        chapters = self._opened.get(f"layers.{layer}.{part}", ())
        if any(tensor.device != device for c in chapters for tensor in c.tensors.values()):
            prefix = f"layers.{layer}.{part}."
            for kept in self._tensors.values():
                for name in kept:
                    kept[name] = kept[name].to(device) if name.startswith(prefix) else kept[name]
            self._update()
            chapters = self._opened[f"layers.{layer}.{part}"]
        return chapters

    @property
    def is_recording(self) -> bool:
        """Whether tensors are being recorded."""
        return self._recorded is not None

    @contextmanager
    def recording(self) -> Generator[dict[str, list[Tensor]], None, None]:
        """Record the tensors of one sequence in each call; all chapters are closed meanwhile."""
        self._recorded = {}
        try:
            yield self._recorded
        finally:
            self._recorded = None

    def record(self, layer: int, part: str, kept: Mapping[str, Tensor]) -> None:
        """Record ``[n, features]`` of a part in a layer."""
        assert self._recorded is not None
        for name, tensor in kept.items():
            key = f"layers.{layer}.{part}.{name}"
            self._recorded.setdefault(key, []).append(tensor.detach().clone())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all chapters to a safetensors file, atomically."""
        about = {"model": self.model, "chapters": [asdict(chapter) for chapter in self]}
        tensors = {
            f"{number}.{name}": tensor
            for number, chapter in enumerate(self)
            for name, tensor in self._tensors[chapter.name].items()
        }
        write_tensors(path, tensors, {"format": FORMAT, "about": json.dumps(about)})

    def load(self, path: str | os.PathLike[str], *, weights: str | None = None) -> None:
        """Load the chapters of a file that ``save`` wrote; those that were open are opened.

        Args:
            path: The file.
            weights: Required checksum of the weights; None accepts any.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, of another model, or has a name that is taken; then
                no chapter is loaded.
        """
        tensors, metadata = read_tensors(path, "Chapters.save")
        model, chapters = _described(path, metadata)
        for name, value in self.model.items():
            if model.get(name) != value:
                must(
                    "path",
                    f"be of a model with {name} {value!r}",
                    f"{path} with {model.get(name)!r}",
                )
        for chapter in chapters:
            if chapter.name in self:
                must("path", "have no chapter that is here already", repr(chapter.name))
        shapes: dict[str, tuple[int, ...]] = {}
        for number, chapter in enumerate(chapters):
            shapes[f"{number}.{TOKENS}"] = (chapter.num_tokens,)
            for name, features in self.layout.items():
                shapes[f"{number}.{name}"] = (chapter.num_tokens, features)
        self._check_shapes(os.fspath(path), tensors, shapes)
        for chapter in chapters:
            if weights not in (None, chapter.weights):
                allowed = "have chapters that these weights have made"
                must("path", allowed, f"{chapter.name!r} of {chapter.model}")
        for number, chapter in enumerate(chapters):
            kept = {name: tensors[f"{number}.{name}"] for name in self.layout}
            self.add(chapter, tensors[f"{number}.{TOKENS}"], kept)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Chapters":
        """The chapters of a file, without the model.

        Raises:
            FileNotFoundError, ValueError: As ``load`` does.
        """
        tensors, metadata = read_tensors(path, "Chapters.save")
        model, _ = _described(path, metadata)
        kept = {name.partition(".")[2]: t for name, t in tensors.items() if t.dim() == 2}
        chapters = cls({name: tensor.shape[1] for name, tensor in kept.items()}, model)
        chapters.load(path)
        return chapters

    def write(self, path: str | os.PathLike[str]) -> None:
        """Save all chapters; if there are none, delete the file."""
        if len(self):
            self.save(path)
        elif os.path.exists(path):
            os.remove(path)


def list_chapters(path: str | os.PathLike[str]) -> list[Chapter]:
    """Descriptions of the chapters of a file; their tensors are not read.

    Raises:
        FileNotFoundError, ValueError: As ``Chapters.load`` does.
    """
    return _described(path, read_metadata(path, "Chapters.save"))[1]


def _described(
    path: str | os.PathLike[str], metadata: Mapping[str, str]
) -> tuple[dict[str, Any], list[Chapter]]:
    """The model and the chapters described by the metadata of a file."""
    if metadata.get("format") != FORMAT:
        must("path", f"be a file of format {FORMAT}", f"{path} of {metadata.get('format')}")
    try:
        about = json.loads(metadata["about"])
        return dict(about["model"]), [_chapter(values) for values in about["chapters"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"path must describe its chapters, got {path} ({error})") from error


def _chapter(values: Any) -> Chapter:
    """A chapter from the values that a file holds of it."""
    named: dict[str, Any] = {**values, "prefix": tuple(values["prefix"])}
    return Chapter(**named)
