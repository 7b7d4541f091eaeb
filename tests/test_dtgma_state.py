"""DTG-MA: damaged files, state dicts, and what stays frozen."""

import json

import pytest
import torch
from dtgma_factories import make_model, make_x
from safetensors import safe_open
from safetensors.torch import save_file

from memattn import DTGMAModel


def make_full_model(**options) -> DTGMAModel:
    """Two tasks, with a mask and prototypes."""
    model = make_model(reads={0: (), "a": ()}, frozen=False, n_layers=1, **options)
    model.set_mask("a", torch.eye(5, dtype=torch.bool))
    model.gather_prototypes("a", make_x(4), torch.tensor([0, 1, 1, 0]))
    return model


# ---- damaged files ----

# what is changed about tensors and metadata, and what is said about it
DAMAGE = [
    (lambda t, own, a: t.pop(f"{own}column.head.bias"), "missing tensors column.head.bias"),
    (lambda t, own, a: t.update({f"{own}new": torch.ones(1)}), "unexpected tensors new"),
    (lambda t, own, a: t.update({"new": torch.ones(1)}), "unexpected tensors new"),
    (
        lambda t, own, a: t.update({f"{own}column.head.bias": torch.ones(1)}),
        r"column.head.bias must have shape \[2\], got \[1\]",
    ),
    (
        lambda t, own, a: t.update({f"{own}column.head.bias": torch.ones(2).half()}),
        "column.head.bias must have dtype torch.float32, got torch.float16",
    ),
    (lambda t, own, a: t.update({f"{own}mask": torch.ones(5)}), "mask must have dtype torch.bool"),
    (
        lambda t, own, a: t.update({f"{own}prototypes": torch.ones(3, 64)}),
        r"prototypes must have shape \[classes=2, F\], got \[3, 64\]",
    ),
    (
        lambda t, own, a: t.update({f"{own}prototypes": torch.ones(2, 63)}),
        "prototypes must have features of tokens of E=16, got 63",
    ),
    (lambda t, own, a: t.pop("shared.tokens.projection.bias"), "missing tensors tokens.proj"),
    (
        lambda t, own, a: t.update({"shared.tokens.projection.bias": torch.ones(1)}),
        r"tokens.projection.bias must have shape \[16\], got \[1\]",
    ),
    (lambda t, own, a: a.clear(), "metadata have no entry '(task|options)'"),
    (lambda t, own, a: a.update(num_classes="2", tasks=[{}]), "metadata have"),
    (lambda t, own, a: a.update(reads=["b"], tasks=3), r"\['b'\] are not all|wrong entry 'tasks'"),
]


def damaged(path, own: str, change) -> None:
    """Rewrite a file with a change."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        form = file.metadata()["format"]
    change(tensors, own, about)
    save_file(tensors, path, {"format": form, "about": json.dumps(about)})


@pytest.mark.parametrize(("change", "message"), DAMAGE)
def test_a_damaged_task_changes_nothing(tmp_path, change, message):
    path = tmp_path / "a"
    make_full_model().save_task("a", path)
    damaged(path, "task.", change)
    model = make_model(reads={}, seed=9, n_layers=1, shared="first_task")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=f"path must .*, got {path}: .*{message}"):
        model.load_task(path)
    assert model.tasks == ()
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(p, after[name]) for name, p in before.items())
    assert all(p.requires_grad for p in after.values())


@pytest.mark.parametrize(("change", "message"), DAMAGE)
def test_a_damaged_model_is_not_read(tmp_path, change, message):
    path = tmp_path / "model"
    make_full_model().save(path)
    damaged(path, "tasks.1.", change)
    with pytest.raises(ValueError, match=f"path must .*, got {path}: .*{message}"):
        DTGMAModel.load(path)


@pytest.mark.parametrize("about", [{}, {"about": "{"}, {"about": "[]"}])
def test_metadata_must_be_whole(tmp_path, about):
    for kind, read in {"Task": make_model(reads={}).load_task, "Model": DTGMAModel.load}.items():
        path = tmp_path / kind
        save_file({"a": torch.ones(1)}, path, {"format": f"memattn.DTGMA{kind}/1", **about})
        with pytest.raises(ValueError, match=f"path must .*, got {path}: "):
            read(path)


def test_options_must_build_a_model(tmp_path):
    path = tmp_path / "model"
    make_full_model().save(path)
    damaged(path, "", lambda tensors, own, about: about["options"].update(depth=3))
    with pytest.raises(ValueError, match=f"path must .*, got {path}: .*'depth'"):
        DTGMAModel.load(path)


def test_a_file_of_a_reader_wants_frozen_tasks(tmp_path):
    model = make_model(reads={0: (), 1: (0,)})
    model.save_task(1, tmp_path / "1")
    other = make_model(reads={0: ()}, frozen=False)  # the same task
    with pytest.raises(ValueError, match="path must hold a task that reads frozen tasks of this"):
        other.load_task(tmp_path / "1")
    assert other.tasks == (0,)


def test_a_file_needs_a_folder(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    model = make_model(reads={0: ()})
    path = tmp_path / "none" / "file"
    for write in (model.save, lambda path: model.save_task(0, path)):
        with pytest.raises(FileNotFoundError, match=f"path must be in a folder .*, got {path}"):
            write(path)

    def fill_the_disk(tensors, target, metadata):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fill_the_disk)
    with pytest.raises(OSError, match=f"path must be a file .*, got {tmp_path}.*: I/O error: No s"):
        model.save(tmp_path / "file")


# ---- state dicts ----


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_comes_back(assign):
    model, x = make_full_model(), make_x(4)
    other = make_model(reads={0: (), "a": ()}, frozen=False, n_layers=1, seed=5)
    other.set_mask(0, torch.eye(5, dtype=torch.bool))  # the model has none
    other(x, [0, "a", 0, "a"])  # masks are built
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert other.load_state_dict(state, assign=assign).missing_keys == []
    assert torch.equal(other(x, [0, "a", 0, "a"]), model(x, [0, "a", 0, "a"]))
    assert torch.equal(other.prototypes("a"), model.prototypes("a"))
    assert other.prototypes(0) is None
    assert other.state_dict().keys() == state.keys()


def test_a_state_dict_is_of_the_same_tasks():
    state = make_full_model().state_dict()
    other = make_model(reads={0: ()}, frozen=False, n_layers=1)
    before = other(make_x(2), 0)
    wanted = r"state_dict must hold the tasks .*DTGMAModel.save and load.*, got {'0': 2, '1': 2}"
    with pytest.raises(ValueError, match=wanted):
        other.load_state_dict(state)
    other.register_task("a", 3)
    with pytest.raises(ValueError, match=wanted):
        other.load_state_dict(state)
    assert torch.equal(other(make_x(2), 0), before)
    other.remove_task("a")
    assert other.load_state_dict(state, strict=False).unexpected_keys
    assert torch.equal(other(make_x(2), 0), make_full_model()(make_x(2), 0))


# ---- what stays frozen ----


@pytest.mark.parametrize("shared", ["frozen", "first_task"])
def test_what_is_frozen_requires_no_gradient(shared):
    model = make_model(reads={0: ()}, frozen=False, shared=shared)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert model.requires_grad_(False) is model
    assert not any(p.requires_grad for p in model.parameters())
    model.requires_grad_()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    model.freeze_task(0)
    model.register_task(1)
    model.requires_grad_()
    assert sum(p.requires_grad for p in model.parameters()) == len(model.get_task_parameters(1))
