"""What lies beside a tokenizer.json in a Hugging Face folder: tokenizer_config.json, which names the special tokens."""

from __future__ import annotations

import json
from typing import Any

from etils import epath

from dsv3_jax.config.checks import require


def tokenizer_folder(tokenizer: str | epath.PathLike) -> epath.Path:
    """The folder of a tokenizer given as a tokenizer.json or as its folder."""
    path = epath.Path(tokenizer).expanduser()
    return path if path.is_dir() else path.parent


def tokenizer_config(tokenizer: str | epath.PathLike) -> dict[str, Any]:
    """The content of tokenizer_config.json; empty if there is none.

    Raises:
      ValueError: if it is no JSON object.
    """
    file = tokenizer_folder(tokenizer) / "tokenizer_config.json"
    if not file.exists():
        return {}
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); copy it from the checkpoint again") from error
    require(isinstance(config, dict), f"{file} holds no JSON object; copy it from the checkpoint again")
    return config


def named_tokens(tokenizer: str | epath.PathLike) -> dict[str, str]:
    """The special tokens by what they are for, "bos_token", "eos_token" and others, as tokenizer_config.json names them."""
    named = {}
    for name, token in tokenizer_config(tokenizer).items():
        content = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(content, str):
            named[name] = content
    return named
