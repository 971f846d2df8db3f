"""Tiny configurations of the families that the tests load, one for each way of building a MoE."""

from random_checkpoints import mixtral_config
from transformers import DeepseekV2Config, OlmoeConfig, Qwen3MoeConfig

_SMALL = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "eos_token_id": 1,
    "bos_token_id": 0,
}

FAMILIES = {
    "mixtral": mixtral_config(),
    "olmoe": OlmoeConfig(**_SMALL, intermediate_size=64, num_experts=16, num_experts_per_tok=4),
    "qwen3_moe": Qwen3MoeConfig(
        **_SMALL,
        intermediate_size=256,
        moe_intermediate_size=64,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        tie_word_embeddings=True,
        mlp_only_layers=[0],
    ),
    "deepseek_v2": DeepseekV2Config(
        **_SMALL | {"num_key_value_heads": 4},
        intermediate_size=256,
        moe_intermediate_size=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        kv_lora_rank=64,
        q_lora_rank=None,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        n_group=1,
        topk_group=1,
    ),
}
