"""TaskMask: both forms hold the pairs they were built from; bad input is told."""

import copy
import re

import pytest
import torch
from task_mask_factories import make_mask, make_pairs

from memattn import TaskMask

FORMS = ["graph", "dense", "blocks", "full", "nothing"]


def pairs_of_graph(edges, query_node, key_node):
    """The definition of the graph form, pair by pair."""
    N, T, S = len(edges), len(query_node), len(key_node)
    mask = torch.zeros(N, T, S, dtype=torch.bool)
    for t in range(N):
        for i in range(T):
            for j in range(S):
                mask[t, i, j] = edges[t, query_node[i], key_node[j]]
    return mask


@pytest.mark.parametrize(("T", "S"), [(1, 1), (31, 33), (128, 256), (129, 127), (300, 40)])
@pytest.mark.parametrize("heads", [(), (2,)])
@pytest.mark.parametrize("form", ["dense", "blocks", "full", "nothing"])
def test_dense_form_gives_back_its_pairs(form, heads, T, S):
    pairs = make_pairs(form, 2, T, S, heads, torch.Generator().manual_seed(0))
    mask = TaskMask.from_dense(pairs)
    for task in range(2):
        expected = pairs[task] if heads else pairs[task][None]
        assert torch.equal(mask.dense(task), expected)


@pytest.mark.parametrize("nodes", [1, 3, 32, 33, 70])
def test_graph_form_is_the_definition(nodes):
    generator = torch.Generator().manual_seed(nodes)
    edges = torch.rand(2, nodes, nodes, generator=generator) < 0.5
    query_node, key_node = (torch.randint(nodes, (n,), generator=generator) for n in (29, 17))
    mask = TaskMask.from_graph(edges, query_node, key_node)
    pairs = pairs_of_graph(edges, query_node, key_node)
    assert torch.equal(torch.stack([mask.dense(t)[0] for t in range(2)]), pairs)


@pytest.mark.parametrize("nodes", [2, 33])
def test_both_forms_class_tiles_alike(nodes):
    graph = make_mask(form="graph", n=3, T=400, S=300, nodes=nodes, H=2)
    dense = TaskMask.from_dense(torch.stack([graph.dense(t) for t in range(3)]))
    for name in ("query_counts", "key_counts", "query_tiles", "key_tiles"):
        assert torch.equal(getattr(graph.tensors, name), getattr(dense.tensors, name)), name
    assert 0 < graph.tile_density() <= 1


def test_tiles_in_lists_are_those_that_hold_pairs():
    mask = make_mask(form="blocks", n=2, T=270, S=400)
    tensors = mask.tensors
    for task in range(2):
        pairs = mask.dense(task)[0]
        for q in range(3):
            full, partial = tensors.query_counts[task, 0, q].tolist()
            listed = tensors.query_tiles[task, 0, q].tolist()
            for k in range(4):
                tile = pairs[q * 128 : (q + 1) * 128, k * 128 : (k + 1) * 128]
                assert (k in listed[:full]) == tile.all().item()
                assert (k in listed[full : full + partial]) == bool(tile.any() and not tile.all())
                assert (k in listed[: full + partial]) == (
                    q in tensors.key_tiles[task, 0, k, : tensors.key_counts[task, 0, k].sum()]
                )


def test_a_graph_of_a_long_sequence_is_small():
    T, n_tasks, nodes = 8192, 8, 16
    node = torch.arange(T) * nodes // T
    edges = torch.eye(nodes, dtype=torch.bool).expand(n_tasks, -1, -1)
    mask = TaskMask.from_graph(edges, node, node)
    assert mask.nbytes < 100 * (n_tasks * (nodes**2 + (T // 128) ** 2) + 2 * T) / 8
    assert mask.nbytes < T * T / 8  # one bit for each pair would be more, for one task alone
    assert mask.tile_density() == 1 / nodes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("H", [1, 2])
def test_saves_and_loads(form, H, tmp_path):
    mask = make_mask(form=form, n=3, T=150, S=140, H=H)
    mask.save(tmp_path / "mask.safetensors")
    loaded = TaskMask.load(tmp_path / "mask.safetensors")
    assert repr(loaded) == repr(mask)
    for task in range(3):
        assert torch.equal(loaded.dense(task), mask.dense(task))
    for a, b in zip(loaded.tensors, mask.tensors, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert [f.name for f in tmp_path.iterdir()] == ["mask.safetensors"]


def test_moves_copies_and_prints_itself():
    mask = make_mask(form="graph", n=3, T=150, S=140, H=2)
    meta = mask.to("meta")
    assert meta.device.type == "meta" and mask.device.type == "cpu"
    assert torch.equal(copy.deepcopy(mask).dense(1), mask.dense(1))
    text = repr(mask)
    for part in ("3 tasks", "2 heads", "150 x 140", "graph of 4 nodes", "% of tiles", "cpu"):
        assert part in text


def test_keeps_its_own_edges():
    edges = torch.eye(2, dtype=torch.bool)[None].clone()
    mask = TaskMask.from_graph(edges, torch.tensor([0, 1]), torch.tensor([0, 1]))
    edges.fill_(True)
    assert torch.equal(mask.dense(0)[0], torch.eye(2, dtype=torch.bool))


def test_plot_shows_what_is_allowed():
    from matplotlib.figure import Figure

    pairs = torch.zeros(2, 600, 300, dtype=torch.bool)
    pairs[0, :300, :150] = True
    pairs[1, 300:, 150:] = True
    mask = TaskMask.from_dense(pairs)
    pictures = []
    for task in (0, 1, None):
        ax = mask.plot(task, ax=Figure().add_subplot())
        pictures.append(torch.from_numpy(ax.images[0].get_array().data.copy()))
    white = torch.ones(3)
    y, x = (n // 2 for n in pictures[0].shape[:2])
    assert (pictures[0][:y, :x] != white).any(-1).all()
    assert (pictures[0][y:] == 1).all() and (pictures[1][:y] == 1).all()
    assert torch.equal(pictures[2][:y], pictures[0][:y])
    assert torch.equal(pictures[2][y:], pictures[1][y:])
    assert not torch.equal(pictures[2][0, 0], pictures[2][-1, -1])


EDGES = torch.ones(2, 3, 3, dtype=torch.bool)
NODE = torch.tensor([0, 1, 2])
GRAPH = dict(edges=EDGES, query_node=NODE, key_node=NODE)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            torch.ones(2, 3, 3),
            "mask must have dtype torch.bool (True = allowed), got torch.float32",
        ),
        (EDGES[0], "mask must have axes [N, T, S] or [N, H, T, S], got shape [3, 3]"),
        (EDGES[:, :0], "mask must have no empty axis, got shape [2, 0, 3]"),
    ],
)
def test_bad_pairs_are_told(mask, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TaskMask.from_dense(mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(edges=EDGES.float()), "edges must have dtype torch.bool (True = allowed)"),
        (dict(edges=EDGES[0]), "edges must have axes [N, G, G] or [N, H, G, G]"),
        (dict(edges=EDGES[:, :2]), "edges must have shape [N=2, H=1, G=2, G2=2], got [2, 1, 2, 3]"),
        (dict(query_node=NODE.float()), "query_node must have dtype torch.int32 or torch.int64"),
        (dict(key_node=NODE[None]), "key_node must be a vector with a node for each position"),
        (dict(key_node=NODE[:0]), "key_node must be a vector with a node for each position"),
        (dict(query_node=NODE + 1), "query_node must have nodes from 0 to G - 1 = 2, got 1 to 3"),
        (dict(key_node=NODE - 1), "key_node must have nodes from 0 to G - 1 = 2, got -1 to 1"),
        (dict(key_node=NODE.to("meta")), "key_node must be on the device of edges, cpu, got meta"),
    ],
)
def test_bad_graphs_are_told(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TaskMask.from_graph(**{**GRAPH, **change})


def test_no_tensor_is_told():
    with pytest.raises(TypeError, match="mask must be a tensor, got list"):
        TaskMask.from_dense([[True]])
    with pytest.raises(TypeError, match="query_node must be a tensor, got list"):
        TaskMask.from_graph(**{**GRAPH, "query_node": [0]})


def test_bad_tasks_and_heads_are_told():
    mask = TaskMask.from_graph(**GRAPH)
    with pytest.raises(ValueError, match="task must be at least 0 and below n_tasks=2, got 2"):
        mask.dense(2)
    with pytest.raises(ValueError, match=re.escape("head must be below n_heads=1, got 1")):
        mask.plot(head=1)


@pytest.mark.parametrize("task", [-1, 9])
def test_a_density_is_of_a_task(task):
    with pytest.raises(ValueError, match=f"below n_tasks=2, got {task}"):
        TaskMask.from_graph(**GRAPH).tile_density(task)
    with pytest.raises(TypeError, match="task must be an integer, got bool"):
        TaskMask.from_graph(**GRAPH).tile_density(True)


def test_goes_to_devices_only():
    with pytest.raises(TypeError, match="device must be a device, got torch.float16"):
        TaskMask.from_graph(**GRAPH).to(torch.float16)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_keeps_its_own_nodes(dtype, tmp_path):
    node = torch.tensor([0, 1], dtype=dtype)
    mask = TaskMask.from_graph(torch.eye(2, dtype=torch.bool)[None], node, node)
    mask.save(tmp_path / "mask")  # one tensor, twice
    node.fill_(0)
    assert torch.equal(mask.dense(0)[0], torch.eye(2, dtype=torch.bool))
    assert torch.equal(TaskMask.load(tmp_path / "mask").dense(0), mask.dense(0))


@pytest.mark.parametrize("form", ["dense", "graph"])
def test_files_whose_tensors_do_not_fit_are_told(form, tmp_path):
    """A kernel would read other memory."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    mask, path = make_mask(form=form, n=2, T=150, S=140), tmp_path / "mask"
    mask.save(path)
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        worse = [tensor[:-1].clone(), tensor.double(), None]
        if tensor.dtype != torch.bool and name != "bits":
            worse += [tensor + 10**6, tensor - 10**6]
        for other in worse:
            changed = {n: t for n, t in (tensors | {name: other}).items() if t is not None}
            save_file(changed, path, metadata=about)
            with pytest.raises(ValueError, match="path must hold"):
                TaskMask.load(path)
    save_file(tensors, path, metadata=about | {"n_keys": "none"})
    with pytest.raises(ValueError, match="path must hold the tensors and sizes"):
        TaskMask.load(path)


def test_broken_files_are_told(tmp_path):
    path = tmp_path / "mask.safetensors"
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        TaskMask.load(path)
    path.write_bytes(b"no mask")
    with pytest.raises(ValueError, match="path must be a whole safetensors file"):
        TaskMask.load(path)
    from safetensors.torch import save_file

    save_file({"bits": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="path must hold a mask of format"):
        TaskMask.load(path)


@pytest.mark.parametrize(("folder", "file"), [(0o755, 0o644), (0o700, 0o600)])
def test_a_saved_mask_is_for_everyone_who_may_read_the_folder(tmp_path, folder, file):
    tmp_path.chmod(folder)
    TaskMask.from_graph(**GRAPH).save(tmp_path / "mask")
    assert (tmp_path / "mask").stat().st_mode & 0o777 == file


def test_a_failed_save_leaves_nothing(tmp_path):
    mask = TaskMask.from_graph(**GRAPH)
    (tmp_path / "target").mkdir()
    with pytest.raises(OSError):
        mask.save(tmp_path / "target")
    with pytest.raises(OSError, match="path must be in a folder that exists"):
        mask.save(tmp_path / "no" / "folder")
    assert [f.name for f in tmp_path.iterdir()] == ["target"]
