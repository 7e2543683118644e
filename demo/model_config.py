"""The demo's dimensions: DeepSeek-V3 in small. Every matrix that k-quants store has rows of a multiple of 256."""

from __future__ import annotations

from transformers import DeepseekV3Config

__all__ = ["CONTEXT_LENGTH", "VOCAB_SIZE", "demo_config"]

CONTEXT_LENGTH = 8192
VOCAB_SIZE = 3264


def demo_config() -> DeepseekV3Config:
    """6 layers, the first one dense; 16 routed experts of which 4 in 2 of 4 groups, 1 shared expert; 8 MLA heads."""
    return DeepseekV3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        n_shared_experts=1,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        first_k_dense_replace=1,
        q_lora_rank=256,
        kv_lora_rank=256,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        max_position_embeddings=CONTEXT_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        num_mtp_layers=0,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
