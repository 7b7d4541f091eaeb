"""Tiny models of transformers with random weights, and parts to attach to them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import transformers
from model_factories import SIZES as BASE_SIZES
from model_factories import VOCAB, perturb
from torch import nn
from toy_part import RunningMean, ToyConfig

from memattn.adapters import attach_memory
from memattn.parts import Role, register_part

SIZES = BASE_SIZES | dict(head_dim=8, max_position_embeddings=128)
GPT2 = dict(
    vocab_size=VOCAB,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
# name: model, its configuration, what the configuration has beside the sizes
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {}),
    "mistral": ("MistralForCausalLM", "MistralConfig", dict(sliding_window=5)),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", dict(sliding_window=5)),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {}),  # attention and MLP side by side
}
SERIAL = [name for name in ARCHITECTURES if name != "neox"]


class Rows(nn.Module):
    """Rows that all layers of the part read."""

    def __init__(self, hidden_size):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(3, hidden_size))


class ScaledMean(RunningMean):
    """A running mean and a mixture of shared rows, times a scale that starts at zero."""

    def __init__(self, hidden_size, num_rows):
        super().__init__(hidden_size, num_rows)
        self.scale = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden_states, context):
        output = super().forward(hidden_states, context)
        mixture = hidden_states[..., :3].softmax(-1) @ context.shared_module.rows
        return output._replace(hidden_states=self.scale * (output.hidden_states + mixture))


@register_part
@dataclass(frozen=True, kw_only=True)
class ScaledConfig(ToyConfig):
    """The running mean, which starts as nothing, in any place."""

    kind: ClassVar[str] = "scaled"

    at: str = "after_attention"

    @property
    def resolved_place(self):
        return self.at

    def build(self, sizes, layer):
        return ScaledMean(sizes.hidden_size, self.num_rows)

    def run(self, module, hidden_states, context):
        output = module(hidden_states, context)
        if context.attended is None:
            return output
        return output._replace(hidden_states=context.attended + output.hidden_states)

    def build_shared(self, sizes):
        return Rows(sizes.hidden_size)

    def role(self, name, parameter):
        return Role("memory", self.table_lr) if name == "rows" else super().role(name, parameter)


def make_base(architecture="llama", dtype=torch.float64, **options):
    """A model of transformers with random weights."""
    kind, config, own = ARCHITECTURES[architecture]
    sizes = own if architecture == "gpt2" else {**SIZES, **own}
    torch.manual_seed(0)
    return (
        getattr(transformers, kind)(getattr(transformers, config)(**sizes | options))
        .to(dtype)
        .eval()
    )


def make_attached(architecture="llama", dtype=torch.float64, part=None, **options):
    """Such a model with a part whose every parameter is random."""
    model = make_base(architecture, dtype, **options)
    adapter = attach_memory(model, ScaledConfig() if part is None else part)
    perturb_adapter(adapter)
    return model


def perturb_adapter(adapter, seed=1):
    """Add noise to every parameter of an adapter."""
    perturb(nn.ParameterList(adapter.parameters()))
