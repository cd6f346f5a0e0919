"""Fine-tunes a checkpoint on conversations, all of its parameters, learning what the assistant says.

    python train.py --config configs/chat.py --init-from path/to/hf_folder --data.source chats.jsonl

Each line of the source is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}. The
checkpoint brings the model, its tokenizer and its chat template. The line printed at start says how many rows the conversations
fill, and how many are cut at the end of a row: an epoch is that many rows over `--train.batch-size` steps. Two or three
epochs are usual (the report takes two, section 5.1); held-out conversations (2%) show when more of them only learn the
training ones by heart.
"""

from __future__ import annotations

from dsv3_jax.config import CheckpointConfig, Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig


def config(model: ModelConfig) -> Config:
    """The run, for the model of the checkpoint."""
    return Config(
        model=model,
        mesh=MeshConfig(fsdp=-1),
        data=DataConfig(
            kind="chat",
            # Conversations that share a row have nothing to do with each other: the report hides them from one another (5.1).
            cross_document_attention=False,
        ),
        optimizer=OptimizerConfig(
            # The report fine-tunes with a cosine from 5e-6 to 1e-6 (section 5.1): the weights should move, not be unlearnt.
            learning_rate=5e-6,
            final_learning_rate=1e-6,
            # AdamW starts without an idea of the gradients' sizes; a few steps give it one.
            warmup_steps=20,
            # Decay pulls towards zero what pre-training has found, and a run this short gains nothing from it.
            weight_decay=0.0,
            # Moments of gradients this small lose less in float32.
            moment_dtype="float32",
        ),
        train=TrainConfig(
            steps=500,
            batch_size=64,
            sequence_length=min(4096, model.max_position_embeddings),
            # As in the last third of pre-training, where the MTP module is kept in step without leading (section 4.2).
            mtp_loss_weight=0.1,
            # The experts' loads were evened out in pre-training, whose last phase leaves the biases alone, too (section 4.2).
            bias_update_speed=0.0,
            log_every=5,
            eval_every=50,
        ),
        checkpoint=CheckpointConfig(every=100),
    )
