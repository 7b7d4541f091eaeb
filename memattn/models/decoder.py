"""The composable decoder: pre-norm blocks built from the parts in its configuration."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils.generic import can_return_tuple

from memattn.checks import check_rank, must
from memattn.models.block import MemAttnBlock
from memattn.models.cache import MemAttnCache, choose_cache, has_padding
from memattn.models.config import MemAttnConfig
from memattn.models.generation import MemAttnGenerationMixin
from memattn.models.hf_names import register_class_name
from memattn.models.outputs import MemAttnCausalLMOutput, MemAttnModelOutput
from memattn.models.packed_call import packed_call
from memattn.models.plain_decoder import decoder_step, newest_of
from memattn.models.plain_step import linear_step, norm_step
from memattn.models.plain_training import output_weight
from memattn.models.pretrained import MemAttnPreTrainedModel
from memattn.models.served import OWN, served_call
from memattn.models.token_loss import label_share, next_token_loss
from memattn.nn import make_norm, sequence_positions
from memattn.ops._dispatch import untaken_transform
from memattn.parts import PartContext, SequenceBounds
from memattn.parts.base import is_bare
from memattn.parts.chapters import Chapters
from memattn.parts.losses import LossSums
from memattn.parts.packing import PackedRows, take_keywords
from memattn.parts.padding import check_lengths, check_positions, mask_bounds
from memattn.parts.together import chapter_layout, check_inputs
from memattn.parts.token_order import repeat_last


class MemAttnModel(MemAttnPreTrainedModel):
    """The decoder without its output layer; see ``MemAttnForCausalLM``."""

    def __init__(self, config: MemAttnConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions, self.rotary = config.build_positions(), config.build_rotary()
        self.layers = nn.ModuleList(
            MemAttnBlock(config, i) for i in range(config.num_hidden_layers)
        )
        self.shared_parts = nn.ModuleDict(config.build_shared_parts())
        self.norm = make_norm(config.norm, config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        sizes = dict(
            model_type=config.model_type,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
        )
        self.chapters = Chapters(chapter_layout(config.named_parts(), config.sizes), sizes)
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
        output_losses: bool | None = None,
        hidden_to_keep: int = 0,
        may_pack: bool = True,
        **part_inputs: Tensor | None,
    ) -> MemAttnModelOutput:
        """Hidden states ``[B, T, E]``; the arguments are those of ``MemAttnForCausalLM``.

        ``last_hidden_state`` has the ``hidden_to_keep`` newest tokens (0: all); on the CPU a plain
        last layer computes only these. ``may_pack``: whether a row may hold several documents.
        """
        options: dict[str, Any] = dict(
            past_key_values=past_key_values,
            cu_seqlens=cu_seqlens,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        if self.config._attn_implementation not in OWN:
            options |= {"attention_mask": attention_mask, "hidden_to_keep": hidden_to_keep}
            return served_call(self, input_ids, inputs_embeds, position_ids, options, part_inputs)
        keywords = take_keywords(part_inputs) if part_inputs else {}
        given = check_inputs(self.config.named_parts(), part_inputs)
        begins = past_key_values is None and cu_seqlens is None
        if keywords or (begins and position_ids is not None):
            packed = packed_call(
                self,
                MemAttnModel.forward,
                keywords,
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                part_inputs=given,
                hidden_to_keep=hidden_to_keep,
                may_pack=may_pack,
                output_losses=output_losses,
                **options,
            )
            if packed is not None:
                return packed
        if (input_ids is None) == (inputs_embeds is None):
            must("input_ids", "be given, or inputs_embeds, but not both", "both or neither")
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
        unkept = {"packed documents": cu_seqlens is not None}
        unkept["gradient checkpointing"] = self.gradient_checkpointing and self.training
        cache = choose_cache(past_key_values, use_cache, self.config, unkept, self.training)

        offset = 0 if cache is None else cache.position
        limit, device = self.config.position_limit, hidden_states.device
        if cache is not None:
            cache.append_columns(B, T, attention_mask, device, max_length=limit)
            seq_start = cache.begin_at(device)
            bounds = SequenceBounds(None, None)  # the state of each part has its own bounds
            order = cache.order
        else:
            bounds, order = mask_bounds(attention_mask, B, T, cu_seqlens)
            seq_start = bounds.seq_start
        if attention_mask is not None:
            attention_mask = attention_mask[:, attention_mask.shape[1] - T :]
        if order is not None:  # from here on each row's tokens are contiguous
            hidden_states = order.put(hidden_states)
            attention_mask = order.put(order.present)
            position_ids = None if position_ids is None else order.put(position_ids)
            given = {name: order.put_input(name, value) for name, value in given.items()}
        positions = sequence_positions(
            hidden_states, offset=offset, seq_start=seq_start, cu_seqlens=cu_seqlens
        )
        if cache is None:
            check_lengths(positions, attention_mask, limit)
        if position_ids is not None and not begins:
            check_positions(position_ids, positions, attention_mask)
        present, ends_early = None, False
        if attention_mask is not None and has_padding(cache, bounds):
            present = attention_mask != 0
            ends_early = cache is None or cache.ends_early
        if self.embed_positions is not None:
            known = positions if present is None else torch.where(present, positions, 0)
            hidden_states = hidden_states + self.embed_positions(known.clamp(min=0))

        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        context = PartContext(
            positions=positions,
            present=present,
            bounds=bounds,
            cu_seqlens=cu_seqlens,
            offset=offset,
            rotary_embedding=self.rotary,
            measure_losses=self.training if output_losses is None else output_losses,
            library=self.chapters if len(self.chapters) or self.chapters.is_recording else None,
            inputs=given,
            newest_only=hidden_to_keep > 0,
            order=order,
        )
        all_hidden_states: list[Tensor] = []
        sums, carry = LossSums(), {}
        layers: Any = self.layers
        if self.config.num_hidden_layers < len(layers):
            # only the first ones, if the model is its own early-exit assistant
            layers = layers[: self.config.num_hidden_layers]
        last = len(layers) - 1
        stepped = (
            None if output_hidden_states else decoder_step(layers, hidden_states, context, cache)
        )
        if stepped is not None:
            hidden_states, layers = stepped, ()
        elif self.rotary is not None:
            context.rotary = self.rotary(positions, hidden_states.dtype)
        shared = dict(self.shared_parts.items())
        for i, layer in enumerate(layers):
            if output_hidden_states:
                shown = hidden_states if order is None else order.columns(hidden_states)
                all_hidden_states.append(shown)
                # the next layer reads the returned tensor, so that gradients reach it
                hidden_states = shown if order is None else order.put(shown)
            layer_cache = None if cache is None else cache.layers[i]
            # if rows end early, their last tokens are before the newest columns
            if hidden_to_keep and i == last and not (output_hidden_states or ends_early):
                context.newest = newest_of(hidden_to_keep, layer, self.norm, context)
            outputs = layer.call(hidden_states, carry, context, layer_cache, shared)
            hidden_states, losses, carry = outputs
            sums.add(losses)
        normed = norm_step(self.norm, hidden_states)
        hidden_states = self.norm(hidden_states) if normed is None else normed
        means, counts = sums.means()
        if order is not None:
            hidden_states = order.columns(hidden_states)
            present = order.present
        if present is not None and not self.training and ends_early:
            # generation continues from the last column, also in a row whose tokens ended before it
            hidden_states = repeat_last(hidden_states, present)
        outputs: Any = MemAttnModelOutput(
            last_hidden_state=hidden_states[:, -hidden_to_keep:],
            past_key_values=cache,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
            losses=means or None,
            loss_counts=counts or None,
        )
        if cu_seqlens is not None:
            order = PackedRows(cu_seqlens, torch.ones_like(hidden_states[..., 0], dtype=torch.bool))
        outputs.order = order
        return outputs


class MemAttnForCausalLM(MemAttnPreTrainedModel, MemAttnGenerationMixin):
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
    _tp_plan = {"lm_head": "colwise_gather_output"}
    accepts_loss_kwargs = True  # the trainer of transformers passes num_items_in_batch

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register_class_name(cls)  # FSDP2 creates subclasses, too

    def __init__(self, config: MemAttnConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # transformers would derive it from the class name
        self.model = MemAttnModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def chapters(self) -> Chapters:
        """The model's chapters, open or closed."""
        return self.model.chapters

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
        skip_logits: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_losses: bool | None = None,
        **part_inputs: Tensor | None,
    ) -> MemAttnCausalLMOutput:
        """Predict the next token at every position.

        Args:
            input_ids: Tokens, int64 ``[B, T]``.
            attention_mask: ``[B, T]``, 1 for tokens and 0 for padding, which may be anywhere in a
                row; with ``past_key_values`` also ``[B, position + T]``. Positions, segments and
                windows count tokens only. Outside training, padding repeats the output of the token
                before it. If the mask of earlier columns no longer marks a row's newest tokens,
                they are removed from the cache.
            position_ids: ``[B, T]`` or ``[1, T]``. The model itself counts positions from the start
                of each sequence. If ``position_ids`` restart with 0 within a row, a new document
                starts there, independent of the others; otherwise they must equal the model's
                positions. A compiled program takes packed rows by ``cu_seq_lens_q``.
            past_key_values: State of earlier calls, which this call extends in place.
            inputs_embeds: Embedded tokens ``[B, T, E]``, instead of ``input_ids``.
            labels: int64 ``[B, T]``, the tokens themselves (shifted by the model); -100 for no
                loss. With padding inside a row, a token predicts the row's next token.
            use_cache: Whether to use and return a cache; None means ``config.use_cache``, but False
                in training mode and with ``cu_seqlens``.
            cu_seqlens: int32 ``[n+1]``, the bounds of packed documents, with ``B = 1``; attention
                and positions restart in each, and the first token of each is not predicted.
            logits_to_keep: Compute logits only for this number of last tokens, or for the given
                indices; 0 means all.
            num_items_in_batch: Divide the summed loss by this number instead of by the number of
                labels of this call: for gradient accumulation. Losses of parts, which are means,
                are weighted by this call's share of the labels.
            skip_logits: Whether ``logits`` may be None, with labels: the cross-entropy is then
                computed by pieces of the tokens, and its gradient with it, so that ``B T``
                rows of the vocabulary are never stored.
            output_hidden_states: Whether to return the output of the embedding and of each block.
            output_attentions: Not supported, since fused attention keeps no weights.
            output_losses: Whether to measure the losses of parts; None means in training mode and
                with labels.
            part_inputs: Extra inputs of parts, by the names in their ``inputs``. Also
                ``shift_labels``, int64 ``[B, T]``, the label of each column (already shifted, -100
                for no loss), instead of ``labels``. Also the arguments of collators without
                padding, which must agree: ``cu_seq_lens_q`` and ``cu_seq_lens_k``, bounds of
                documents in the ``B T`` columns; ``max_length_q`` and ``max_length_k``, at least
                the longest document; ``seq_idx [B, T]``, the index of each token's document.

        Returns:
            ``logits [B, T, vocab_size]``, ``past_key_values`` if a cache is used, and
            ``hidden_states`` with ``output_hidden_states``. With labels, ``lm_loss`` is the
            cross-entropy. ``loss`` equals ``lm_loss``; in training mode each of the ``losses`` of
            parts, times its coefficient, is added. ``losses`` are means over the layers.

        Raises:
            TypeError: If ``past_key_values`` is not a ``MemAttnCache``, or an argument is unknown.
            ValueError: If shapes do not fit, a value of the mask is neither 0 nor 1, positions
                differ, a sequence exceeds ``max_position_embeddings`` (if it is a limit), a cache
                belongs to another model, or is used with packed documents or checkpointing.
            NotImplementedError: If ``output_attentions`` is set.
        """
        # the trainer of transformers evaluates no loss unless all arguments named labels are given
        shift_labels = part_inputs.pop("shift_labels", None)
        has_labels = labels is not None or shift_labels is not None
        if output_losses is None:
            output_losses = self.training or has_labels
        # wrappers and hooks of the model get the hidden states of all tokens
        keeps = type(logits_to_keep) is int and logits_to_keep > 0 and not has_labels
        keeps = keeps and type(self.model) is MemAttnModel and is_bare(self.model)
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
            output_losses=output_losses,
            return_dict=True,
            **({"hidden_to_keep": logits_to_keep} if keeps else {}),
            **part_inputs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        last_hidden = outputs.last_hidden_state[:, kept]
        if skip_logits and not has_labels:
            must("skip_logits", "be False without labels", skip_logits)
        for name, given in {"labels": labels, "shift_labels": shift_labels}.items():
            if given is not None and given.shape != last_hidden.shape[:2]:
                must(name, f"have shape {list(last_hidden.shape[:2])}", list(given.shape))
        if labels is not None and shift_labels is None and outputs.order is not None:
            whole = labels.new_full(outputs.order.present.shape, -100)
            whole[:, kept] = labels
            shift_labels = outputs.order.next_labels(whole)[:, kept].contiguous()
        weight = None
        # a user-defined loss function needs logits
        own_loss = self.loss_function is ForCausalLMLoss and untaken_transform() is None
        if skip_logits and own_loss:
            weight = output_weight(self.lm_head)
        logits = loss = lm_loss = None
        if weight is None:
            logits = linear_step(self.lm_head, last_hidden)
            if logits is None:
                logits = self.lm_head(last_hidden)
        if has_labels:
            options: dict[str, Any] = dict(
                labels=labels, num_items_in_batch=num_items_in_batch, shift_labels=shift_labels
            )
            if weight is not None:
                lm_loss = next_token_loss(last_hidden, weight, **options)
            else:
                vocab_size = self.config.vocab_size
                lm_loss = self.loss_function(logits=logits, vocab_size=vocab_size, **options)
            loss = lm_loss
            share = label_share(labels, shift_labels, num_items_in_batch)
            for name, mean in (outputs.losses or {}).items() if self.training else ():
                loss = loss + self.config.losses[name] * share * mean
        return MemAttnCausalLMOutput(
            loss=loss,
            logits=None if skip_logits else logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            lm_loss=lm_loss,
            losses=outputs.losses,
            loss_counts=outputs.loss_counts,
        )
