"""DeepSeek-V3 in JAX and Flax: the public API."""

from dsv3_jax.checkpoint.hugging_face import load_hf, save_hf
from dsv3_jax.config import ModelConfig
from dsv3_jax.infer import Completion, Engine, SamplingParams
from dsv3_jax.model import DeepSeekV3, ModelOutput

__all__ = ["Completion", "DeepSeekV3", "Engine", "ModelConfig", "ModelOutput", "SamplingParams", "load_hf", "save_hf"]
