"""The model of a checkpoint, read from its config.json: of a run directory of train.py, or a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from etils import epath

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.run import Config


def is_hugging_face(path: str) -> bool:
    """Whether `path` is a Hugging Face folder (True) or a run directory (False), told by its config.json.

    Raises:
      ValueError: if it is neither.
    """
    return "model_type" in _read(path)


def read_model(path: str) -> ModelConfig:
    """The model of either kind of folder; backends that a run names, which are those of its machine, are "auto" again.

    Raises:
      ValueError: if it is neither, or a model that is not implemented.
    """
    content = _read(path)
    try:
        model = ModelConfig.from_hf(content) if "model_type" in content else Config.from_json(json.dumps(content)).model
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{epath.Path(path) / 'config.json'}: {error}") from error
    return model.with_auto_backends()


def model_to_train(path: str) -> ModelConfig:
    """The same as a run that starts from it takes it: with float32 parameters. Raises as `read_model`."""
    return dataclasses.replace(read_model(path), param_dtype="float32")


def with_generation_config(model: ModelConfig, path: str) -> ModelConfig:
    """A Hugging Face folder's model with the end-of-text tokens that its generation_config.json names besides its own.

    Raises:
      ValueError: if that file cannot be read, or names what is no token.
    """
    file = epath.Path(path) / "generation_config.json"
    if not file.exists():
        return model
    try:
        content = json.loads(file.read_text())
        named = content.get("eos_token_id")
        more = named if isinstance(named, list) else [] if named is None else [named]
        ids = dict.fromkeys([*model.eos_token_ids, *more])
        known = len(ids) == len(model.eos_token_ids)
        return model if known else dataclasses.replace(model, eos_token_id=tuple(ids))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: {error}; copy it from the checkpoint again") from error


def _read(path: str) -> dict[str, Any]:
    file = epath.Path(path) / "config.json"
    if not file.exists():
        raise ValueError(f"{path} holds no config.json; name a run directory of train.py or a Hugging Face folder")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if isinstance(content, dict) and ("model_type" in content or isinstance(content.get("model"), dict)):
        return content
    raise ValueError(f"{file} is neither a run's config nor a Hugging Face one (no model_type); name another folder")
