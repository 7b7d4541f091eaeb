"""Memory and traffic of a training step on many devices, counted without building a model."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from memattn.checks import check_int, must
from memattn.distributed import SequenceShards
from memattn.distributed.shards import Edges

if TYPE_CHECKING:
    from memattn.models import MemAttnConfig
    from memattn.parts.base import Exchange

MASTER = 4  # bytes of a weight, of its gradient and of each moment of AdamW, all in float32
PARAM, REDUCE = 2, 4  # bfloat16 where weights are gathered, float32 where gradients are summed


class FsdpTraffic(NamedTuple):
    """Bytes of one step of FSDP2 on each device, as ``memattn train`` shards a model.

    A device receives ``(n - 1) / n`` of the gathered bytes, and sends ``(n - 1) / n`` of the
    reduced ones.
    """

    gathered: int  # whole weights, padded: each block forward and backward, the rest once
    reduced: int  # whole gradients of what is trained, padded


class ScaleLine(NamedTuple):
    """Bytes on each device; the largest if they differ."""

    devices: int
    kept: int  # its shards of weights, gradients and both moments of AdamW
    whole: int  # weights that are whole at once: beside the blocks, and two blocks
    received: int  # of weights, in a step
    reduced: int  # sent of gradients, in a step
    activations: int | None  # block inputs, which checkpointing keeps, and logits, of its tokens
    exchanged: int | None  # keys, values and states from others in a forward pass


def fsdp_units(model: nn.Module) -> list[list[nn.Parameter]]:
    """Parameters that FSDP2 gathers together: the rest of the model first, then each block."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    units = [list(block.parameters()) for block in blocks]
    inside = {id(parameter) for unit in units for parameter in unit}
    return [[p for p in model.parameters() if id(p) not in inside], *units]


def fsdp_traffic(
    units: Sequence[Sequence[Tensor]], devices: int, *, param_size: int, reduce_size: int
) -> FsdpTraffic:
    """Predict the traffic of a step with one forward and one backward pass.

    Parameters are cut along their first dimension, so one of fewer rows than devices is padded to
    a row for each of them. A block is gathered again for the backward pass; what is outside the
    blocks, such as the embedding or a bank that layers share, stays whole until then.

    Args:
        units: As ``fsdp_units`` gives them.
        devices: Number of devices over which the model is sharded.
        param_size: Bytes of an element of gathered weights.
        reduce_size: Bytes of an element of reduced gradients.
    """
    check_int("devices", devices, 1)
    padding = _padding(devices)
    padded = [sum(map(padding, unit)) for unit in units]
    trained = [sum(padding(p) for p in unit if p.requires_grad) for unit in units]
    gathered = param_size * (padded[0] + 2 * sum(padded[1:]))
    return FsdpTraffic(gathered, reduce_size * sum(trained))


def _padding(devices: int) -> Callable[[Tensor], int]:
    """Elements of a parameter with the rows that padding adds."""

    def padded(parameter: Tensor) -> int:
        rows = parameter.shape[0]
        return -(-rows // devices) * devices * (parameter.numel() // rows)

    return padded


def exchanged_bytes(
    needs: "Sequence[Exchange]", total_len: int, devices: int, element_size: int
) -> int:
    """Bytes that the fullest device gets from others in a forward pass over one sequence.

    Args:
        needs: What the parts of each layer need from other devices.
        total_len: Tokens of the sequence, which the devices share.
        devices: Number of devices.
        element_size: Bytes of a key's or value's element; states are in float32.
    """
    shards = SequenceShards(total_len, devices)
    if devices == 1:
        return 0
    total = 0
    for need in needs:
        if need.spans == (None, None):
            before = shards.bounds(devices - 1)[0]
        else:
            edges = Edges(shards, *need.spans)
            before = max(map(edges.edge_len, range(devices))) + need.first
        tokens = before + min(need.ahead, total_len - shards.shard_len)
        total += need.features * tokens * element_size + 4 * need.state
    return total


def scale(config: "MemAttnConfig", devices: Sequence[int], total_len: int) -> Iterator[ScaleLine]:
    """A training step of a decoder over one sequence that all devices share, for each number.

    Weights are gathered in bfloat16; gradients are reduced, and weights, gradients and moments
    kept, in float32.

    Args:
        config: Configuration of the decoder. Nothing of its size is allocated.
        devices: Numbers of devices.
        total_len: Tokens of the sequence.

    Raises:
        ValueError: If a number is below 1, or the sequence is too short for the devices.
    """
    from memattn.models import MemAttnForCausalLM

    if config.position_limit is not None and total_len > config.position_limit:
        must("total_len", f"be at most position_limit={config.position_limit}", total_len)
    with torch.device("meta"):
        units = fsdp_units(MemAttnForCausalLM(config))
    layers = range(config.num_hidden_layers)
    parts = [part for i in layers for part in config.layer_parts(i).values()]
    needs = [part.exchange(config.sizes) for part in parts]
    for n in devices:
        tokens = SequenceShards(total_len, n).shard_len
        inputs = (len(layers) + 1) * config.hidden_size * PARAM
        activations = tokens * (inputs + config.vocab_size * 4)
        exchanged = exchanged_bytes(needs, total_len, n, PARAM)
        yield scale_line(units, n, activations, exchanged)


def scale_line(
    units: Sequence[Sequence[Tensor]],
    devices: int,
    activations: int | None,
    exchanged: int | None,
) -> ScaleLine:
    """The line of a number of devices: bytes of FSDP2, and those that depend on tokens."""
    padding = _padding(devices)
    traffic = fsdp_traffic(units, devices, param_size=PARAM, reduce_size=REDUCE)
    kept = sum(
        padding(p) // devices * MASTER * (4 if p.requires_grad else 1) for u in units for p in u
    )
    root, *blocks = (sum(map(padding, unit)) for unit in units)
    whole = PARAM * (root + sum(sorted(blocks)[-2:]))
    received, reduced = (size * (devices - 1) // devices for size in traffic)
    return ScaleLine(devices, kept, whole, received, reduced, activations, exchanged)
