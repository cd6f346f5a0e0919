"""Default config: every part of DeepSeek-V3, small enough for two CPU cores and a few minutes.

    make train
    python train.py --config configs/tiny.py --run-dir runs/tiny

It trains on the standard library of the running Python. The run ends with the bits per byte of the held-out packages, and those
of `gzip -9` and `xz -9` for comparison; `make train` then shows a sample.
"""

from __future__ import annotations

from dsv3_jax.config import CheckpointConfig, Config, InferConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    model=ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=4,
        num_nextn_predict_layers=1,
        first_k_dense_replace=1,
        num_attention_heads=4,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        intermediate_size=512,
        moe_intermediate_size=128,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        max_position_embeddings=1024,
        initializer_range=0.02,
        dtype="float32",
        attention_chunk=256,
        loss_chunk=256,
    ),
    optimizer=OptimizerConfig(learning_rate=3e-3, final_learning_rate=1e-4, warmup_steps=40, moment_dtype="float32"),
    # 400 steps with the published gamma, 0.001, are too few to balance the experts.
    train=TrainConfig(steps=400, batch_size=8, sequence_length=256, eval_every=50, bias_update_speed=0.01),
    checkpoint=CheckpointConfig(every=100),
    infer=InferConfig(prompt="def main(", max_tokens=96, temperature=0.7, top_p=0.9),
)
