"""``memattn estimate --scale`` without a model: the page of all systems, ``docs/scaling.md``."""

from collections.abc import Sequence
from typing import Any

import torch

from memattn.evaluate.scale import ScaleLine, fsdp_units, scale, scale_line

SIZES: dict[str, Any] = dict(
    vocab_size=32000,
    hidden_size=2048,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=8,
    max_position_embeddings=1 << 20,
)
BANK = dict(num_memory_tokens=65536, num_chapters=256)
# by the name of the preset: a title, keywords, and what its tokens need of other devices
SYSTEMS: dict[str, tuple[str, dict[str, Any], str]] = {
    "segmented": (
        "Segmented decoder",
        dict(segment_len=None, window_size=1024),
        "The edge of keys and values before its own tokens: "
        "`memattn.distributed.sequence_parallel_segmented_attention`, which exists.",
    ),
    "vanilla": (
        "Vanilla decoder",
        {},
        "Keys and values of all earlier tokens; the last device gets most. Not built.",
    ),
    "future": (
        "Future-attention LM",
        dict(source="relative"),
        "As the vanilla decoder, and keys and values of the positions ahead for the loss. Future "
        "keys by distance are weights, which every device has. Not built.",
    ),
    "memory_transformer": (
        "Memory transformer",
        BANK,
        "As the vanilla decoder: its tokens share nothing through the bank, which is a weight. The "
        "bank is outside the blocks, so it is gathered once and stays whole through both passes; "
        "a sequence's route is a mean of its hidden states, one vector for each layer, which is "
        "not counted. Not built.",
    ),
    "titans": (
        "Titans",
        dict(variant="mag", window_size=1024),
        "The window's edge, and the weights and momentum that the memory has learned before its "
        "tokens, in float32, from one device to the next: that is little, but devices wait for "
        "each other, unless several sequences follow one another. The memory's first weights are "
        "weights of its block and are gathered with it. Not built.",
    ),
    "shiftable": (
        "Shiftable attention",
        dict(num_specialists=8, rank=64),
        "As the vanilla decoder, once more for each open specialist, whose keys and values are its "
        "own. Not built.",
    ),
}
DTGMA: dict[str, Any] = dict(
    input_dim=784, hidden_dim=2048, num_classes=10, n_layers=12, n_heads=16
)
TASKS = 8
HEAD = """# On many devices

Written by `{command}`: memory and communication of a training step, counted from the shapes of
the models. Decoders have {layers} layers of {hidden} features, {heads} heads with {kv} for keys
and a vocabulary of {vocab}; they read one sequence of {total} tokens that all devices share.

Weights are sharded by FSDP2 as `memattn train` does under `accelerate launch`
(`distributed_strategy: fsdp`, `mixed_precision: bf16`): each block is a unit, and what is outside
the blocks another. What is sharded: weights, gradients and both moments of AdamW, in float32.
What is gathered, in bfloat16: each block before its forward and again before its backward, and
the rest once. What is reduced, in float32: gradients. A parameter is cut along its first
dimension, so one of fewer rows than devices is padded to a row for each of them: that is why the
bytes of a step grow with the devices.

- **kept**: the device's shards of weights, gradients and moments.
- **whole**: weights that are whole at once: what is outside the blocks, and two blocks.
- **weights**: received in a step; **gradients**: sent in a step.
- **activations**: inputs of the blocks, which gradient checkpointing keeps, and logits in
  float32, of its own tokens. What one block computes again comes on top.
- **exchanged**: received from devices that hold other tokens, in the forward pass, by the device
  that gets most. The backward pass sends gradients of as many bytes back.

Four processes on the CPU gather and reduce exactly the bytes that are predicted for small
decoders of every kind, and exchange those of the segmented one (`tests/test_scale.py`,
`tests/test_sequence_parallel.py`). Kept shards are checked there too; the columns of whole
weights and activations are not, and nothing here was run on GPUs.
"""


def page(devices: Sequence[int], total_len: int, command: str) -> str:
    """The page, as Markdown.

    Args:
        devices: Numbers of devices.
        total_len: Tokens of the sequence that they share.
        command: What writes the page.

    Raises:
        ValueError: If the sequence is too short for the devices.
    """
    from memattn.models import MemAttnConfig

    parts = [
        HEAD.format(
            command=command,
            layers=SIZES["num_hidden_layers"],
            hidden=SIZES["hidden_size"],
            heads=SIZES["num_attention_heads"],
            kv=SIZES["num_key_value_heads"],
            vocab=SIZES["vocab_size"],
            total=f"{total_len:,}",
        )
    ]
    for preset, (title, options, needs) in SYSTEMS.items():
        config = getattr(MemAttnConfig, preset)(**{**SIZES, **options})
        lines = list(scale(config, devices, total_len))
        told = ", ".join(f"`{name}={value!r}`" for name, value in options.items())
        parts += [f"## {title}\n", f"`MemAttnConfig.{preset}`{told and ' with '}{told}.\n"]
        parts += [f"Exchanged: {needs}\n", table(lines), ""]
    parts += [f"## DTG-MA\n\n{_dtgma(devices)}"]
    return "\n".join(parts)


def _dtgma(devices: Sequence[int]) -> str:
    from memattn.dtgma import DTGMAModel

    with torch.device("meta"):
        model = DTGMAModel(**DTGMA)
        for task in range(TASKS):
            model.register_task(task)
            if task < TASKS - 1:
                model.freeze_task(task)
    units = fsdp_units(model)
    lines = [scale_line(units, n, None, None) for n in devices]
    told = ", ".join(f"{name}={value!r}" for name, value in DTGMA.items())
    return (
        f"`DTGMAModel({told})`, {TASKS} tasks of which the last is trained.\n\n"
        "A sample's tokens stay on one device, so there is nothing to exchange; activations "
        "depend on the batch and are not counted. The model has no blocks of its own to shard by: "
        "on paper it is one unit, whole from the forward to the end of the backward. Columns of "
        "frozen tasks have no gradients and no moments; only the trained column is reduced. "
        "`train_continual` runs in one process.\n\n" + table(lines)
    )


def table(lines: Sequence[ScaleLine]) -> str:
    """The lines as a table of Markdown."""
    heads = ("devices", "kept", "whole", "weights", "gradients", "activations", "exchanged")
    rows = [[str(line.devices), *(_size(value) for value in line[1:])] for line in lines]
    ruled = f"|{'---:|' * len(heads)}"
    return "\n".join(
        [f"| {' | '.join(heads)} |", ruled, *(f"| {' | '.join(row)} |" for row in rows)]
    )


def _size(value: int | None) -> str:
    """Bytes in the unit that gives three digits."""
    if value is None:
        return ""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= size:
            number = value / size
            return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"
    return f"{value} B"
