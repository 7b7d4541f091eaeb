"""DTG-MA models and inputs for tests, and the model's function in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from memattn import DTGMAModel

READS = {0: (), 1: (0,), "two": (), 3: (1, "two")}  # task 3 reads task 0 through task 1
CLASSES = {0: 2, 1: 3, "two": 2, 3: 2}


def make_model(*, reads=READS, frozen=True, seed=0, **options) -> DTGMAModel:
    """A small model with tasks; perturbed, so that no bias is alike."""
    torch.manual_seed(seed)
    options = dict(hidden_dim=16, num_classes=2, n_heads=2, n_tokens=4) | options
    model = DTGMAModel(options.pop("input_dim", 12), **options)
    for task, others in reads.items():
        model.register_task(task, CLASSES.get(task), reads=others)
        if frozen or any(task in later for later in reads.values()):
            model.freeze_task(task)
    return model.eval()


def make_x(n: int, features: int = 12, seed: int = 1, dtype=torch.float32) -> Tensor:
    return torch.randn(n, features, generator=torch.Generator().manual_seed(seed)).to(dtype)


def define(model: DTGMAModel, x: Tensor, task, masks: dict) -> Tensor:
    """Logits of one task, with explicit sequences and masks, from tokens on."""
    columns = [task]
    for name in columns:
        columns += [other for other in model.reads(name) if other not in columns]
    parameters = {name: named_parameters(model, name) for name in columns}
    tokens = model.tokens(x)
    hidden = {}
    for name in columns:
        nodes = parameters[name].get("column.nodes")
        own = [] if nodes is None else [nodes.expand(len(x), -1, -1)]
        hidden[name] = torch.cat([tokens, *own], 1)
    L = hidden[task].shape[1]

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (model.n_heads, -1)).transpose(1, 2)

    def linear(name, part: str, t: Tensor) -> Tensor:
        own = parameters[name]
        return F.linear(t, own[f"layers.{part}.weight"], own[f"layers.{part}.bias"])

    for i, layer in enumerate(model.layers):
        norms = layer.attention_norm, layer.ffn_norm
        normed = {name: norms[0](h) for name, h in hidden.items()}
        q, k, v = (
            {n: heads(linear(n, f"{i}.attention.{p}_proj", h)) for n, h in normed.items()}
            for p in "qkv"
        )
        for name in columns:
            seen = [name, *model.reads(name)]
            allowed = masks.get(name, torch.ones(L, L, dtype=torch.bool))
            others = allowed.new_ones(*allowed.shape[:-1], L * (len(seen) - 1))
            allowed = torch.cat([allowed, others], -1)
            scores = q[name] @ torch.cat([k[n] for n in seen], 2).mT / q[name].shape[-1] ** 0.5
            weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
            out = (weights @ torch.cat([v[n] for n in seen], 2)).transpose(1, 2).flatten(2)
            h = hidden[name] + linear(name, f"{i}.attention.o_proj", out)
            up = linear(name, f"{i}.ffn.up", norms[1](h)).relu()
            hidden[name] = h + linear(name, f"{i}.ffn.down", up)
    read_out = hidden[task][:, -model.n_nodes :] if model.n_nodes else hidden[task]
    own = parameters[task]
    return F.linear(read_out.mean(1), own["column.head.weight"], own["column.head.bias"])


def named_parameters(model: DTGMAModel, task) -> dict[str, Tensor]:
    """Parameters of a task by name, told by identity from those of the whole model."""
    own = {id(p) for p in model.get_task_parameters(task)}
    found = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in own:
            continue
        parts = name.split(".")
        if parts[0] == "columns":
            found[".".join(["column", *parts[2:]])] = parameter
        else:  # layers.<i>.<...>.full.<number> or .bias.<number>
            kind = {"full": "weight"}.get(parts[-2], parts[-2])
            found[".".join([*parts[:-2], kind])] = parameter
    return found
