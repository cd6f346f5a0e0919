"""Configuration: the architecture (`ModelConfig`) and a run (`Config`)."""

from dsv3_jax.config.model import ModelConfig, RopeScaling
from dsv3_jax.config.run import CheckpointConfig, Config, DataConfig, InferConfig, MeshConfig, OptimizerConfig, TrainConfig

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "InferConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RopeScaling",
    "TrainConfig",
]
