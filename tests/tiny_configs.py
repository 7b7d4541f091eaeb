"""Tiny configurations of any decoder of transformers, made from its defaults by names of fields."""

import dataclasses
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

# what a field becomes, and the names of such fields; one that is not here keeps its default
SIZES = """
99 vocab_size decoder_vocab_size vocab_size_per_layer_input
32 hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim
32 input_embedding_size output_embedding_size intermediate_size moe_intermediate_size
32 shared_expert_intermediate_size ffn_dim dim_ff dense_intermediate_size
32 shared_intermediate_size intermediate_size_mlp decoder_ffn_dim encoder_ffn_dim
32 ffn_hidden_size expert_ffn_hidden_size d_ff dff d_inner n_inner
32 shared_experts_intermediate_size moe_shared_expert_intermediate_size feed_forward_size
32 mlp_dim router_hidden_size lru_width moe_latent_size
2 num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth
2 num_decoder_layers num_encoder_layers num_layers_per_stack num_blocks num_key_value_heads
2 swa_num_key_value_heads kv_n_heads num_kv_heads num_global_key_value_heads
2 linear_num_key_heads num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k
2 top_k_experts num_mem_blocks hc_mult hc_count o_groups mamba_n_groups eos_token_id
4 num_attention_heads n_head n_heads num_heads decoder_attention_heads attention_heads
4 encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads
4 swa_num_attention_heads linear_num_heads linear_num_value_heads num_experts num_local_experts
4 n_routed_experts moe_num_experts n_experts index_n_heads index_topk index_topk_blocks
4 rotary_dim rel_extent num_centroids cls_token_id
8 head_dim swa_head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim linear_head_dim
8 linear_key_head_dim linear_value_head_dim mamba_d_head mamba_head_dim dim_head kv_channels
8 query_pre_attn_scalar attention_head_size d_head global_head_dim index_head_dim swa_v_head_dim
8 swa_qk_rope_head_dim mamba_d_state ssm_state_size state_size mamba_dt_rank time_step_rank
8 adapter_rank gated_norm_rank laurel_rank hidden_size_per_layer_input d_rel ple_embed_dim
8 mamba_n_heads mamba_num_heads n_mamba_heads mamba_chunk_size chunk_size block_size
8 attention_chunk_size patch_size
16 kv_lora_rank q_lora_rank o_lora_rank hc_lowrank image_size crop_size
1 n_group num_expert_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts
1 first_k_dense_replace num_dense_layers zero_expert_num num_nextn_predict_layers num_mtp_layers
1 moe_layer_start_index attn_layer_period expert_layer_period num_kv_shared_layers
1 moe_layer_end_index bos_token_id
0 attn_layer_offset expert_layer_offset pad_token_id
5 sliding_window local_attention attention_window_size sliding_window_size
5 local_attention_window_len keep_window_size
64 max_position_embeddings n_positions max_seq_len context_length max_target_positions
64 max_source_positions n_ctx model_max_length
3 sep_token_id
"""
SMALL = {name: int(n) for n, *names in map(str.split, SIZES.strip().splitlines()) for name in names}
BOTH = ["sliding_attention", "full_attention"]
ROPES = {kind: dict(rope_type="default", rope_theta=1e4) for kind in BOTH}
# what the names do not say
FAMILY: dict[str, dict[str, Any]] = {
    "bamba": dict(attn_layer_indices=[1]),
    "bert": dict(is_decoder=True),
    "cohere_compass_text": dict(layer_types=BOTH, rope_parameters=ROPES),
    "dbrx": dict(attn_config=dict(rope_theta=1e4, kv_n_heads=2, clip_qkv=8.0)),
    "deepseek_v2": dict(num_experts_per_tok=2),
    "dots1": dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1),
    "dots3_note_text": dict(
        layer_types=["indexed_attention", "sliding_attention"],
        mlp_layer_types=["dense", "sparse"],
        num_hidden_layers=2,
        num_key_value_heads=4,
        rope_parameters=None,
        per_layer_config={1: dict(head_dim=16, qk_nope_head_dim=8, qk_rope_head_dim=8)},
    ),
    "falcon_h1": dict(mamba_d_ssm=64),
    "gemma3n_text": dict(layer_types=BOTH * 2, num_kv_shared_layers=2, intermediate_size=32,
                         num_hidden_layers=4, activation_sparsity_pattern=None),
    "gemma4_text": dict(layer_types=BOTH * 2, num_kv_shared_layers=2, num_hidden_layers=4,
                        per_layer_config={i: dict(head_dim=16) for i in (1, 3)}),
    "gemma4_unified_text": dict(layer_types=BOTH, num_kv_shared_layers=0,
                                per_layer_config={1: dict(head_dim=16)}),
    **{name: dict(rope_parameters=ROPES["full_attention"] | dict(mrope_section=[2, 1, 1]))
       for name in ("glm4v_text", "qwen2_vl_text", "qwen2_5_vl_text")},
    "reformer": dict(axial_pos_embds_dim=[16, 16], axial_pos_shape=[8, 8]),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(num_hidden_layers=4,
                  layers_block_type=["linear_attention", "hybrid"] * 2),
    "zaya": dict(num_experts_per_tok=1),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention"]),
    "hrm_text": dict(num_layers_per_stack=None, H_cycles=1, L_cycles=1),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "mamba2": dict(num_heads=8),
    "minimax_m3_vl_text": dict(
        num_hidden_layers=2,
        layer_types=["full_attention", "minimax_m3_sparse"],
        mlp_layer_types=["dense", "sparse"],
        index_block_size=4,
        index_topk_blocks=2,
    ),
    "qwen4_exp_text": dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8,
                           indexer_budget=8, indexer_compress_ratio=4),
    "recurrent_gemma": dict(num_hidden_layers=3),
}  # fmt: skip
KINDS = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types", "attn_layers")
FILLED = ("pad_token_id", "head_dim")  # None by default, and not for ever
DROPOUT = ("dropout", "_pdrop", "drop_rate")


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A configuration of a few thousand weights, with each kind of layer that the default has."""
    default = AutoConfig.for_model(model_type)
    return type(default)(**tiny_fields(default))


def tiny_fields(default: PreTrainedConfig) -> dict[str, Any]:
    """What a configuration is given to be tiny."""
    names = [f.name for f in dataclasses.fields(default) if f.init]  # pyright: ignore
    values = {name: vars(default)[name] for name in names if name in vars(default)}
    layers = _layers(values)
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            fields[name] = tiny_fields(value)
        elif name == "rope_parameters" and isinstance(value, dict):
            fields[name] = _rope(value)
        elif isinstance(value, list) and layers and len(value) == layers[1]:
            fields[name] = [value[i] for i in layers[0]]
        elif name.endswith(DROPOUT) and value:
            fields[name] = 0.0
        elif name in SMALL and (value is not None or name in FILLED):
            fields[name] = SMALL[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            fields[name] = 90 + len(fields) % 9
    if layers:
        fields["num_hidden_layers"] = len(layers[0])
    if "kv_lora_rank" in fields or values.get("num_key_value_heads", 0) is None:
        fields["num_key_value_heads"] = SMALL["num_attention_heads"]
    if "is_decoder" in values and not default.is_encoder_decoder:
        fields["is_decoder"] = True
    return fields | FAMILY.get(default.model_type, {})


def _layers(values: dict[str, Any]) -> tuple[list[int], int] | None:
    """Which layers are kept of how many: the first of each combination of kinds."""
    count = values.get("num_hidden_layers")
    lists = [values[name] for name in KINDS if isinstance(values.get(name), list)]
    lists = [kinds for kinds in lists if len(kinds) == count]
    if not lists or count is None:
        return None
    seen: dict[Any, int] = {}
    for i, kinds in enumerate(zip(*lists, strict=True)):
        seen.setdefault(kinds, i)
    kept = sorted(seen.values())
    return (kept if len(kept) > 1 else [0, 1]), count


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    """Frequencies with as many parts as a tiny head has."""
    if any(isinstance(inner, dict) for inner in value.values()):
        return {k: _rope(v) if isinstance(v, dict) else v for k, v in value.items()}
    return value | ({"mrope_section": [2, 1, 1]} if value.get("mrope_section") else {})
