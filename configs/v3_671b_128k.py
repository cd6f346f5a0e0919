"""Second of the two phases that extend DeepSeek-V3 from 4K to 128K tokens (arXiv 2412.19437, section 4.3).

    python train.py --config configs/v3_671b_128k.py --init-from gs://bucket/v3_671b_32k --run-dir gs://bucket/v3_671b_128k \
        --data.source path/to/text

1,000 steps of 480 sequences of 131,072 tokens. It starts from the run of the first phase, `configs/v3_671b_32k.py`, and is
otherwise the same.
"""

from __future__ import annotations

import dataclasses

from dsv3_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RopeScaling, TrainConfig


def config(model: ModelConfig) -> Config:
    """Return the config of the 128K phase for `model`, that of a checkpoint, with YaRN of factor 40."""
    return Config(
        model=dataclasses.replace(
            model, max_position_embeddings=131_072, rope_scaling=RopeScaling(factor=40.0), dtype="bfloat16", remat="full"
        ),
        mesh=MeshConfig(expert=16, context=32, fsdp=-1),
        data=DataConfig(source="data/long_text"),
        optimizer=OptimizerConfig(learning_rate=7.3e-6, final_learning_rate=7.3e-6, warmup_steps=20),
        # No bias updates, and the last lambda, as at the end of pre-training.
        train=TrainConfig(
            steps=1000,
            batch_size=480,
            micro_batch_size=16,
            sequence_length=131_072,
            mtp_loss_weight=0.1,
            bias_update_speed=0.0,
        ),
    )
