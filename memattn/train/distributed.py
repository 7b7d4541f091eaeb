"""Several processes: sharding, gathering, and errors of the first process."""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from memattn.checks import must
from memattn.models import MemAttnForCausalLM
from memattn.train.config import TrainingConfig


def leave_process_group() -> None:
    """End the process group, if there is one; call it last in a program that trained.

    ``destroy_process_group`` ends gloo's threads only when the last reference to the group is gone.
    A thread that still holds a finished operation needs the interpreter to drop its tensors; if the
    interpreter is shutting down, the process aborts. So references are dropped first: those of
    unused models, and those of device meshes, which DTensor's caches keep.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    # the first process holds the store that the others need to leave
    torch.distributed.barrier()
    group = torch.distributed.group.WORLD
    _collect_garbage()
    torch.distributed.destroy_process_group()
    for mesh in (thing for thing in gc.get_objects() if type(thing) is DeviceMesh):
        getattr(mesh, "_pg_registry", {}).clear()
    # dropping the last reference waits for the threads, which can use the interpreter meanwhile
    del group


def _collect_garbage() -> None:
    """Collect until nothing is found: a graph of autograd frees what it holds one run later."""
    for _ in range(10):  # finalizers may make new garbage each time
        if not gc.collect():
            return


def prepare_model(accelerator: Accelerator, model: nn.Module, config: TrainingConfig) -> nn.Module:
    """Move the model to the device, and wrap it for several processes.

    ``fsdp`` shards each block, as named by transformers' ``_no_split_modules``, and the rest as
    one unit. Weights stay in float32, and are gathered in the dtype of ``mixed_precision``.

    Raises:
        NotImplementedError: For fp16 with fsdp, whose loss scaling is per process, and for modules
            that may leave out some of their weights, which fsdp reduces only if all have gradients.
        NotImplementedError: For ``compile`` with several processes.
        ValueError: If accelerate was told to wrap the model itself.
    """
    if config.compile:
        if accelerator.num_processes > 1:
            got = f"true with {accelerator.num_processes}"
            must("training.compile", "be false with several processes", got, NotImplementedError)
        # decoders of the package have no graph breaks; a break raises an error
        model.compile(fullgraph=isinstance(model, MemAttnForCausalLM))
    if accelerator.distributed_type not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise ValueError(
            "training.distributed_strategy must choose how the model is distributed, "
            f"got {accelerator.distributed_type} from accelerate launch"
        )
    resting = next((m for m in model.modules() if getattr(m, "rests", False)), None)
    if config.distributed_strategy == "fsdp" and accelerator.num_processes > 1:
        if resting is not None:
            got = f"fsdp with {type(resting).__name__}, of which a token may use a part"
            must("training.distributed_strategy", "be ddp", got, NotImplementedError)
        if config.mixed_precision == "fp16":
            must("training.mixed_precision", "be bf16 or no with fsdp", "fp16", NotImplementedError)
        _shard(model.to(accelerator.device), config)
        return accelerator.prepare_model(
            model, evaluation_mode=True
        )  # moves it to the device without DDP
    if resting is not None:
        handler: Any = DistributedDataParallelKwargs(find_unused_parameters=True)
        accelerator.ddp_handler = handler
    return accelerator.prepare_model(model)


def _shard(model: nn.Module, config: TrainingConfig) -> None:
    """Shard the parameters over all processes, block by block."""
    policy = MixedPrecisionPolicy()
    if config.mixed_precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def without_sync(accelerator: Accelerator, model: nn.Module) -> AbstractContextManager:
    """Backward passes that leave gradients unreduced, before the last one of a step."""
    if isinstance(model, FSDPModule):
        return _unsynced_fsdp(model)
    return accelerator.no_sync(model)


class _unsynced_fsdp(AbstractContextManager):
    """``no_sync`` of FSDP2."""

    def __init__(self, model: Any):
        self.model = model

    def __enter__(self) -> None:
        self.model.set_requires_gradient_sync(False)

    def __exit__(self, *error: object) -> None:
        self.model.set_requires_gradient_sync(True)


def reshard(model: nn.Module) -> None:
    """Drop gathered weights that remain after a forward pass without a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor on the CPU; all processes must call it."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor on the device of ``like``, sharded as it is."""
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        # each process has read the same file, so nothing is sent
        return distribute_tensor(
            tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None
        )
    return tensor.to(like.device)


def on_main_process(accelerator: Accelerator, action: Callable[[], None]) -> None:
    """Run an action in the first process; if it fails, all processes raise OSError.

    Raises:
        OSError: With the message of the failure, in every process.
    """
    from accelerate.utils import broadcast_object_list

    failure: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            action()
        except OSError as error:
            if accelerator.num_processes == 1:
                raise
            failure = [str(error)]
    if accelerator.num_processes > 1 and broadcast_object_list(failure)[0] is not None:
        raise OSError(failure[0])


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers, each once (tied weights under their first name)."""
    yield from model.named_parameters()
    saved = model.state_dict(keep_vars=True)
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
