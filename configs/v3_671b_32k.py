"""First of the two phases that extend DeepSeek-V3 from 4K to 128K tokens (arXiv 2412.19437, section 4.3): 32K.

    python train.py --config configs/v3_671b_32k.py --init-from gs://bucket/v3_671b --run-dir gs://bucket/v3_671b_32k \
        --data.source path/to/text

1,000 steps of 1,920 sequences of 32,768 tokens at the last learning rate of pre-training, with YaRN. It starts from any
checkpoint of the model, a run or a Hugging Face folder, and takes its tokenizer. Adam's moments start from zero, so the first
20 steps warm up.
"""

from __future__ import annotations

import dataclasses

from dsv3_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RopeScaling, TrainConfig


def config(model: ModelConfig) -> Config:
    """Return the config of the 32K phase for `model`, that of a checkpoint, with YaRN of factor 40."""
    return Config(
        model=dataclasses.replace(
            model, max_position_embeddings=32_768, rope_scaling=RopeScaling(factor=40.0), dtype="bfloat16", remat="full"
        ),
        mesh=MeshConfig(expert=64, context=8, fsdp=-1),
        data=DataConfig(source="data/long_text"),
        optimizer=OptimizerConfig(learning_rate=7.3e-6, final_learning_rate=7.3e-6, warmup_steps=20),
        # No bias updates, and the last lambda, as at the end of pre-training.
        train=TrainConfig(
            steps=1000,
            batch_size=1920,
            micro_batch_size=64,
            sequence_length=32_768,
            mtp_loss_weight=0.1,
            bias_update_speed=0.0,
        ),
    )
