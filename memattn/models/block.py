"""One block of the decoder, assembled from the parts its configuration names."""

from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from memattn.models.config import MemAttnConfig
from memattn.nn import GELUMLP, FutureAttention, SegmentedAttention, SwiGLU


class BlockOutput(NamedTuple):
    """Hidden states, and the loss of the block's future attention where there is one."""

    hidden_states: Tensor  # [B, T, E]
    future_loss: Tensor | None  # scalar, float32


class MemAttnBlock(GradientCheckpointingLayer):
    """Attention and MLP, each behind a norm and around a residual.

    Args:
        config: Configuration of the model.
        layer_idx: Number of the block, from 0; not all need have the same attention.
    """

    def __init__(self, config: MemAttnConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        mlp = GELUMLP if config.mlp == "gelu" else SwiGLU
        self.attention_norm = make_norm(config)
        self.attention = _make_attention(config, layer_idx)
        self.mlp_norm = make_norm(config)
        self.mlp = mlp(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        future_rotary: tuple[Tensor, Tensor] | None = None,
        output_future_loss: bool = False,
        **sequences: Any,
    ) -> BlockOutput:
        """Map ``[B, T, E]`` to ``[B, T, E]``; ``sequences`` are keywords of every attention."""
        normed, loss = self.attention_norm(hidden_states), None
        if isinstance(self.attention, FutureAttention):
            attended, loss = self.attention(
                normed, future_rotary=future_rotary, output_loss=output_future_loss, **sequences
            )
        else:
            attended = self.attention(normed, **sequences)
        hidden_states = hidden_states + attended
        return BlockOutput(hidden_states + self.mlp(self.mlp_norm(hidden_states)), loss)


def make_norm(config: MemAttnConfig) -> nn.Module:
    """The norm that the configuration names."""
    if config.norm == "layer":
        return nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps, bias=False)
    return nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


def _make_attention(config: MemAttnConfig, layer_idx: int) -> FutureAttention | SegmentedAttention:
    part, future = config.attention, config.attention.future
    heads: dict[str, Any] = dict(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        backend=part.backend,
    )
    if future is not None and layer_idx in future.layers(config.num_hidden_layers):
        return FutureAttention(
            **heads,
            future_dim=future.future_dim,
            num_positions=config.max_position_embeddings,
            source=future.source,
            source_rank=future.source_rank,
            loss_type=future.loss_type,
            detach_target=future.detach_target,
        )
    return SegmentedAttention(
        **heads,
        segment_len=part.segment_len,
        window_size=part.window_size,
        num_persistent_tokens=part.num_persistent_tokens,
    )
