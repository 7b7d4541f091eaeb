"""The composable decoder: pre-norm blocks, each assembled from the parts its config names."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, initialization
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from memattn.models.cache import MemAttnCache, SequenceBounds
from memattn.models.config import MemAttnConfig
from memattn.models.padding import block_bounds, check_mask
from memattn.nn import RotaryEmbedding, SegmentedAttention, SwiGLU, sequence_positions
from memattn.ops._checks import check_rank, must


class MemAttnBlock(GradientCheckpointingLayer):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(self, config: MemAttnConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = SegmentedAttention(
            config.hidden_size,
            config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            segment_len=config.attention.segment_len,
            window_size=config.attention.window_size,
            num_persistent_tokens=config.attention.num_persistent_tokens,
            backend=config.attention.backend,
        )
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        assert config.intermediate_size is not None
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states: Tensor, **sequences: Any) -> Tensor:
        """Map ``[B, T, E]`` to ``[B, T, E]``; ``sequences`` are keywords of the attention."""
        hidden_states = hidden_states + self.attention(
            self.attention_norm(hidden_states), **sequences
        )
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class MemAttnPreTrainedModel(PreTrainedModel):
    """What the models share: configuration, new weights, saving and loading."""

    config: MemAttnConfig
    config_class = MemAttnConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MemAttnBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SegmentedAttention) and module.persistent_key is not None:
            std = self.config.initializer_range
            initialization.normal_(module.persistent_key, std=std)
            initialization.normal_(module.persistent_value, std=std)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # attention is chosen by config.attention, not by transformers' registry
        return False


class MemAttnModel(MemAttnPreTrainedModel):
    """The decoder without its output layer; see ``MemAttnForCausalLM``."""

    def __init__(self, config: MemAttnConfig) -> None:
        super().__init__(config)
        assert config.head_dim is not None and config.rope_parameters is not None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_parameters["rope_theta"])
        self.layers = nn.ModuleList(MemAttnBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MemAttnCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states ``[B, T, E]``; the arguments are those of ``MemAttnForCausalLM``."""
        if (input_ids is None) == (inputs_embeds is None):
            both = "both or neither"
            must("input_ids", "be given, or inputs_embeds, but not both", both)
        if output_attentions:
            raise NotImplementedError(
                "output_attentions must be False, got True; fused attention keeps no weights"
            )
        hidden_states: Tensor
        if inputs_embeds is not None:
            check_rank("inputs_embeds", inputs_embeds, "B T E")
            hidden_states = inputs_embeds
        else:
            assert input_ids is not None
            check_rank("input_ids", input_ids, "B T")
            hidden_states = self.embed_tokens(input_ids)
        B, T, _ = hidden_states.shape
        cache = self._choose_cache(past_key_values, use_cache, cu_seqlens)

        offset = 0 if cache is None else cache.position
        seq_start = None  # in columns since the cache began
        if cache is not None:
            bounds = cache.append_columns(B, T, attention_mask, hidden_states.device)
            if cache.seq_start is not None and cache.seq_start.any():
                seq_start = cache.seq_start.to(hidden_states.device)
        else:
            bound = _mask_bounds(attention_mask, B, T, cu_seqlens)
            bounds, seq_start = [bound] * len(self.layers), bound.seq_start
        positions = sequence_positions(
            hidden_states, offset=offset, seq_start=seq_start, cu_seqlens=cu_seqlens
        )
        if position_ids is not None:
            _check_positions(position_ids, positions, attention_mask)
        rotary = self.rotary(positions, hidden_states.dtype)

        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        all_hidden_states: list[Tensor] = []
        for i, (layer, bound) in enumerate(zip(self.layers, bounds, strict=True)):
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            hidden_states = layer(
                hidden_states,
                rotary=rotary,
                cu_seqlens=cu_seqlens,
                seq_start=bound.seq_start,
                seq_end=bound.seq_end,
                cache=None if cache is None else cache.layers[i],
            )
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=cache,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
        )

    def _choose_cache(
        self, cache: MemAttnCache | None, use_cache: bool | None, cu_seqlens: Tensor | None
    ) -> MemAttnCache | None:
        """The cache given, a new one where one is wanted, or None."""
        packed = cu_seqlens is not None
        checkpointing = self.gradient_checkpointing and self.training
        for what, is_on in (("cu_seqlens", packed), ("gradient checkpointing", checkpointing)):
            if is_on and cache is not None:
                must("past_key_values", f"be None with {what}", type(cache).__name__)
            if is_on and use_cache:
                must("use_cache", f"not be True with {what}", use_cache)
        if cache is not None and not isinstance(cache, MemAttnCache):
            must("past_key_values", "be a MemAttnCache", type(cache).__name__, TypeError)
        if use_cache is None:
            use_cache = self.config.use_cache and not (self.training or packed)
        return MemAttnCache(self.config) if cache is None and use_cache else cache


class MemAttnForCausalLM(MemAttnPreTrainedModel, GenerationMixin):
    """A language model: the decoder, and an output layer tied to the embedding by default.

    Args:
        config: Sizes and parts of the model.

    Example:
        >>> sizes = dict(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
        >>> model = MemAttnForCausalLM(MemAttnConfig.segmented(segment_len=64, **sizes))
        >>> input_ids = torch.randint(256, (2, 100))
        >>> model(input_ids, labels=input_ids).loss.backward()
        >>> tokens = model.eval().generate(input_ids, max_new_tokens=20, do_sample=False)
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    accepts_loss_kwargs = True  # the trainer of transformers passes num_items_in_batch

    def __init__(self, config: MemAttnConfig) -> None:
        super().__init__(config)
        self.model = MemAttnModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MemAttnCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Predict the next token at every position.

        Args:
            input_ids: Tokens, int64 ``[B, T]``.
            attention_mask: ``[B, T]``, 1 for tokens and 0 for padding on the left, the right or
                both; with ``past_key_values`` also ``[B, position + T]``. Each row's ones are one
                contiguous block.
            position_ids: ``[B, T]`` or ``[1, T]``. The model counts positions from the start of
                each sequence by itself; these are only checked to say the same.
            past_key_values: State of earlier calls, which this call extends in place.
            inputs_embeds: Embedded tokens ``[B, T, E]``, instead of ``input_ids``.
            labels: int64 ``[B, T]``, the tokens themselves (they are shifted here); -100 where
                there is no loss.
            use_cache: Whether to return the state of the sequences; None means as the
                configuration says, but not in training mode and not with ``cu_seqlens``.
            cu_seqlens: int32 ``[n+1]``, the bounds of packed documents, with ``B = 1``; attention
                and positions restart in each.
            logits_to_keep: Compute logits for the last so many tokens only, or for the given
                indices; 0 means all.
            num_items_in_batch: Divide the summed loss by this number, instead of by the number of
                labels here: for gradient accumulation.
            output_hidden_states: Whether to return the output of the embedding and of each block.
            output_attentions: Not supported, since fused attention keeps no weights.

        Returns:
            ``logits [B, T, vocab_size]``, ``loss`` if labels are given, ``past_key_values`` if a
            cache is used and ``hidden_states`` if asked for.

        Raises:
            TypeError: If ``past_key_values`` is not a ``MemAttnCache``.
            ValueError: If shapes do not fit, a row of the mask is not one block of ones, positions
                differ, or a cache meets packed documents or gradient checkpointing.
            NotImplementedError: If ``output_attentions`` is set.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            if labels.shape != logits.shape[:2]:
                must("labels", f"have shape {list(logits.shape[:2])}", list(labels.shape))
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        """Let ``generate()`` begin with a ``MemAttnCache`` instead of a ``DynamicCache``."""
        kind = generation_config.cache_implementation
        if kind is not None:
            must("cache_implementation", "be None", repr(kind))
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = cache = MemAttnCache(self.config)
            if generation_config.is_assistant:
                cache.activate_past_recording()
        return super()._prepare_cache_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )


def _mask_bounds(
    attention_mask: Tensor | None, B: int, T: int, cu_seqlens: Tensor | None
) -> SequenceBounds:
    """The bounds that a padding mask describes, without a cache."""
    if attention_mask is None:
        return SequenceBounds(None, None)
    if cu_seqlens is not None:
        must("attention_mask", "be None with cu_seqlens", "a tensor")
    check_mask(attention_mask, B, (T,))
    start, end = block_bounds(attention_mask)
    if not torch.compiler.is_compiling() and not start.any() and (end == T).all():
        return SequenceBounds(None, None)
    return SequenceBounds(start.to(torch.int32), end.to(torch.int32))


def _check_positions(
    position_ids: Tensor, positions: Tensor, attention_mask: Tensor | None
) -> None:
    """Raise unless ``position_ids`` are the positions that the model counts, but for padding."""
    T = positions.shape[1]
    if position_ids.dim() != 2 or position_ids.shape[1] != T:
        must("position_ids", f"have shape [B, T={T}]", list(position_ids.shape))
    if torch.compiler.is_compiling():
        return
    wrong = position_ids != positions
    if attention_mask is not None:
        wrong = wrong & (attention_mask[:, -T:] != 0)
    if wrong.any():
        must(
            "position_ids",
            "count from the start of each sequence (packed documents are given by cu_seqlens)",
            f"others in row {int(wrong.nonzero()[0, 0])}",
        )
