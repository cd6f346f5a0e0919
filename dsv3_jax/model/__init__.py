"""The DeepSeek-V3 model and its training loss, one idea of the paper per file."""

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
