"""Run in two processes: models with attached parts under DDP and FSDP2 learn as in one process."""

import os

import pytest
import torch
from accelerate import Accelerator
from adapter_factories import ScaledConfig, make_attached, make_base
from model_factories import enable_checkpointing, logits_of, make_tokens
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from memattn.adapters import (
    MemoryAdapter,
    adapters_of,
    attach_memory,
    detach_memory,
    disable_adapters,
    set_adapter,
)
from memattn.parts.chapter_memory import ChapterMemoryConfig
from memattn.train import TrainingConfig
from memattn.train.distributed import full_tensor, leave_process_group, prepare_model

# of 32 chapters a process selects a few: the others must not be waited for
MEMORY = ChapterMemoryConfig(
    num_memory_tokens=64, use_chapters=True, num_chapters=32, top_k_chapters=1
)
CASES = {"ddp": ("ddp", False), "fsdp": ("fsdp", False), "fsdp-checkpointing": ("fsdp", True)}


def make_model(checkpointing):
    """A float32 model with an adapter of two parts that runs, and one that does not."""
    model = make_attached(dtype=torch.float32, part=[ScaledConfig(at="after_mlp"), MEMORY])
    attach_memory(model, ScaledConfig(), name="idle")
    set_adapter(model, "default")
    if checkpointing:
        enable_checkpointing(model, use_reentrant=False)
    return model.train()


def learn(model, tokens, backward):
    """Three steps on the losses that add up over rows; the last loss."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        output = model(tokens, labels=tokens)
        # load balance is no mean over rows: it is there, and does not count
        backward(output.lm_loss + 0.1 * output.toy_loss + 0.0 * output.load_balance_loss)
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
    return output.toy_loss.detach()


def check(case, folder, accelerator):
    strategy, checkpointing = CASES[case]
    tokens, rank = make_tokens(T=10), accelerator.process_index
    single = make_model(checkpointing=False)
    expected_loss = learn(single, tokens, torch.Tensor.backward)
    expected = dict(single.named_parameters())
    model = make_model(checkpointing)
    config = TrainingConfig(distributed_strategy=strategy)
    wrapped = prepare_model(accelerator, model, config)
    loss = learn(wrapped, tokens[rank : rank + 1], accelerator.backward)
    loss = accelerator.reduce(loss, "mean")
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-6)
    for name, parameter in model.named_parameters():
        whole = full_tensor(parameter)
        torch.testing.assert_close(whole, expected[name].detach(), rtol=0, atol=1e-6, msg=name)

    adapter = adapters_of(wrapped)["default"]
    state_dict = None
    if strategy == "fsdp":
        for call in (lambda: detach_memory(model), lambda: adapter.save_pretrained(folder / "no")):
            with pytest.raises(ValueError, match="sharded"):
                call()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state_dict = get_model_state_dict(model, options=options)
    main = accelerator.is_main_process
    adapter.save_pretrained(folder / case, state_dict=state_dict, is_main_process=main)
    accelerator.wait_for_everyone()
    loaded = make_base(dtype=torch.float32)
    MemoryAdapter.from_pretrained(loaded, folder / case)
    assert not torch.equal(
        logits_of(loaded, tokens), logits_of(make_base(dtype=torch.float32), tokens)
    )
    logits = logits_of(single.eval(), tokens)
    torch.testing.assert_close(logits_of(loaded, tokens), logits, rtol=0, atol=1e-5)
    disable_adapters(wrapped)


def check_all(rank, folder):
    """All cases in one of two processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    # these must be there, and are not read
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    store = f"file://{folder.parent / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    for case in CASES:
        check(case, folder, Accelerator(cpu=True))
    leave_process_group()
