"""A 16B-class DeepSeek-V3 for one host with eight accelerators of 80 GB or more.

    python train.py --config configs/v3_16b.py --run-dir runs/v3_16b \
        --data.source path/to/text --data.tokenizer path/to/tokenizer.json

The sizes are those of Moonlight-16B-A3B, the published model of this class: 27 layers of width 2048, queries without a
latent, 6 of 64 experts per token in one group, two shared experts. One MTP depth is added. The eight devices split the
experts, and every other parameter and the optimizer state along the same axis. A step is 262,144 tokens, and the run 26B
tokens. `python -m dsv3_jax.plan --config configs/v3_16b.py` prints the parameters.
"""

from __future__ import annotations

from dsv3_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    model=ModelConfig(
        vocab_size=163840,
        hidden_size=2048,
        num_hidden_layers=27,
        num_nextn_predict_layers=1,
        first_k_dense_replace=1,
        num_attention_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        intermediate_size=11264,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.446,
        rope_theta=50000.0,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        initializer_range=0.006,
        remat="full",
    ),
    mesh=MeshConfig(expert=8),
    data=DataConfig(source="data/text", tokenizer="data/tokenizer.json"),
    optimizer=OptimizerConfig(learning_rate=4.2e-4, final_learning_rate=4.2e-5, warmup_steps=2000),
    train=TrainConfig(steps=100_000, batch_size=64, sequence_length=4096),
)
