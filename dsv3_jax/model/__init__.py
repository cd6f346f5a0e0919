"""What DeepSeek-V3 is; each file one idea of the paper."""

from dsv3_jax.model.losses import Losses, training_loss
from dsv3_jax.model.mla import with_absorbed_weights
from dsv3_jax.model.model import DeepSeekV3, ModelOutput, abstract_variables, init_variables, logical_axes
from dsv3_jax.model.transformer import unstack

__all__ = [
    "DeepSeekV3",
    "Losses",
    "ModelOutput",
    "abstract_variables",
    "init_variables",
    "logical_axes",
    "training_loss",
    "unstack",
    "with_absorbed_weights",
]
