"""Fine-tuning of all parameters of a checkpoint on conversations, with the loss on the assistant's messages.

    python train.py --config configs/chat.py --init-from path/to/hf_folder --data.source chats.jsonl

Each line of the source is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}. The
checkpoint provides the model, its tokenizer and its chat template. The line printed at start says how many rows the
conversations fill, and how many conversations are cut at the end of a row: an epoch is that many rows over
`--train.batch-size` steps. Two or three epochs are usual (the report takes two, section 5.1); held-out conversations (2%)
show when the model starts to overfit.
"""

from __future__ import annotations

from dsv3_jax.config import CheckpointConfig, Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig


def config(model: ModelConfig) -> Config:
    """Return the config of fine-tuning for `model`, that of a checkpoint; sequences of at most 4,096 tokens."""
    return Config(
        model=model,
        mesh=MeshConfig(fsdp=-1),
        data=DataConfig(
            kind="chat",
            # Conversations that share a row are unrelated: the report masks them from one another (section 5.1).
            cross_document_attention=False,
        ),
        optimizer=OptimizerConfig(
            # The report fine-tunes with a cosine from 5e-6 to 1e-6 (section 5.1).
            learning_rate=5e-6,
            final_learning_rate=1e-6,
            # AdamW needs some steps to estimate the scale of the gradients.
            warmup_steps=20,
            # Decay would pull pre-trained weights towards zero, and a run this short gains nothing from it.
            weight_decay=0.0,
            # Moments of gradients this small need float32.
            moment_dtype="float32",
        ),
        train=TrainConfig(
            steps=500,
            batch_size=64,
            sequence_length=min(4096, model.max_position_embeddings),
            # The loss weight of the last third of pre-training (section 4.2).
            mtp_loss_weight=0.1,
            # Pre-training has balanced the experts' loads; its last phase does not update the biases either (section 4.2).
            bias_update_speed=0.0,
            log_every=5,
            eval_every=50,
        ),
        checkpoint=CheckpointConfig(every=100),
    )
