"""The published DeepSeek-V3 (arXiv 2412.19437, section 4.2), for a pod of accelerators.

    python -m dsv3_jax.plan --config configs/v3_671b.py --topology v5p:8x8x8
    python train.py --config configs/v3_671b.py --run-dir gs://bucket/v3_671b \
        --data.source path/to/text --data.tokenizer path/to/tokenizer.json

671,026,419,200 parameters in the main model, 37.55B of them active per token, and one MTP depth. Pre-training reads 4,096
tokens without YaRN. The schedules are the published ones, in tokens: learning rate, batches of 3,072 sequences growing to
15,360 over the first 469B tokens, gamma and lambda. Gradients are accumulated over micro-batches of one sequence for each
of 512 chips; on another slice set `--train.micro-batch-size` to a multiple of its chips. The two phases of long context
that follow are `configs/v3_671b_32k.py` and `configs/v3_671b_128k.py`.

64 devices split the experts, so that each of the eight routing groups is on eight devices; `fsdp` splits parameters, batch and
the experts' weights further, which are then gathered within small groups. The first command without its topology prints the
sharding of every array, and creates none.
"""

from __future__ import annotations

from dsv3_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    model=ModelConfig(
        vocab_size=129280,
        hidden_size=7168,
        num_hidden_layers=61,
        num_nextn_predict_layers=1,
        first_k_dense_replace=3,
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        aux_loss_alpha=1e-4,
        rope_theta=10000.0,
        rope_scaling=None,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        initializer_range=0.006,
        remat="full",
    ),
    mesh=MeshConfig(expert=64, fsdp=-1),
    data=DataConfig(source="data/text", tokenizer="data/tokenizer.json"),
    optimizer=OptimizerConfig(
        learning_rate=2.2e-4,
        warmup_steps=2000,
        constant_tokens=10_000_000_000_000,
        decay_tokens=4_300_000_000_000,
        final_learning_rate=2.2e-5,  # for 333B tokens
        learning_rate_after=((14.633e12, 7.3e-6),),  # for the last 167B
        beta1=0.9,
        beta2=0.95,
        weight_decay=0.1,
        clip_norm=1.0,
        moment_dtype="bfloat16",
    ),
    train=TrainConfig(
        steps=244_108,  # 14.8T tokens
        initial_batch_size=3072,
        batch_size=15360,
        batch_ramp_tokens=469_000_000_000,
        batch_ramp_unit=1024,
        micro_batch_size=512,
        sequence_length=4096,
        mtp_loss_weight=0.3,
        mtp_loss_weight_after=((10e12, 0.1),),
        bias_update_speed=0.001,
        bias_update_speed_after=((14.3e12, 0.0),),
    ),
)
