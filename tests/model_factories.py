"""Tiny models with random weights, for the tests of models."""

import torch
from torch import Tensor, nn

from memattn.models import MemAttnConfig, MemAttnForCausalLM

VOCAB = 53
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=40,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
# name: preset, its options
SYSTEMS = {
    "vanilla": (MemAttnConfig.vanilla, {}),
    "segments": (
        MemAttnConfig.segmented,
        dict(segment_len=5, window_size=None, num_persistent_tokens=0),
    ),
    "window": (
        MemAttnConfig.segmented,
        dict(segment_len=None, window_size=4, num_persistent_tokens=3),
    ),
    "both": (
        MemAttnConfig.segmented,
        dict(segment_len=7, window_size=4, num_persistent_tokens=2),
    ),
    "future": (
        MemAttnConfig.future,
        dict(
            future_dim=5,
            source="computed",
            source_rank=3,
            max_position_embeddings=160,
        ),
    ),
    "learned": (
        MemAttnConfig.future,
        dict(
            future_dim=7,
            start_layer=1,
            max_position_embeddings=160,
            position_embedding="learned",
            norm="layer",
            mlp="gelu",
        ),
    ),
    "chapters": (
        MemAttnConfig.memory_transformer,
        dict(
            num_memory_tokens=24,
            num_chapters=8,
            num_shared_chapters=1,
            top_k_chapters=2,
            routing_strategy_train="hybrid",
            routing_strategy_inference="hybrid",
            routing_block_size=4,
            routing_window_size=7,
        ),
    ),
    **{
        f"titans-{variant}": (
            MemAttnConfig.titans,
            dict(
                variant=variant,
                window_size=5,
                segment_len=9,
                num_persistent_tokens=2,
                memory_expansion=2,
                chunk_size=9,
                conv_size=3,
                max_norm=1.0,
                **options,
            ),
        )
        for variant, options in {
            "lmm": dict(
                position_embedding="continuous_axial",
                position_segment_len=6,
                neural_mem_weight_residual=True,
            ),
            "mac": dict(
                num_longterm_mem_tokens=2, value_residual=True, neural_mem_weight_residual=True
            ),
            "mac_parallel": {},
            "mag": dict(value_residual=True, neural_mem_weight_residual=True),
            "mal": dict(
                position_embedding="axial", position_segment_len=7, max_position_embeddings=160
            ),
        }.items()
    },
}


def make_config(system: str = "both", **sizes) -> MemAttnConfig:
    """The configuration of a tiny model."""
    preset, options = SYSTEMS[system]
    return preset(**options | SIZES | sizes)


def make_model(system: str = "both", dtype: torch.dtype = torch.float64, **sizes):
    """A tiny model whose every parameter is random, so that no zero or one hides a leak."""
    torch.manual_seed(0)
    model = MemAttnForCausalLM(make_config(system, **sizes)).to(dtype).eval()
    return perturb(model)


def perturb(model: nn.Module) -> nn.Module:
    """Add noise to every parameter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.2 * noise.to(parameter.dtype)
    return model


def make_tokens(B: int = 2, T: int = 23, seed: int = 0) -> Tensor:
    """Random tokens ``[B, T]`` without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (B, T), generator=generator)


def logits_of(model: nn.Module, tokens: Tensor, **inputs) -> Tensor:
    """Logits of one pass without a cache."""
    with torch.no_grad():
        return model(tokens, use_cache=False, **inputs).logits


def pad_left(rows: list[Tensor], T: int) -> tuple[Tensor, Tensor]:
    """Rows of tokens padded on the left to ``[B, T]``, and their mask."""
    tokens = torch.zeros(len(rows), T, dtype=torch.long)
    mask = torch.zeros(len(rows), T, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, T - len(row) :], mask[i, T - len(row) :] = row, 1
    return tokens, mask


def enable_checkpointing(model: nn.Module, **options) -> None:
    """Turn activation checkpointing on, by the name that the installed transformers has for it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options or None)
    else:
        model.gradient_checkpointing_enable(options or None)
