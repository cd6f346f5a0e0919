"""The record that goes into every checkpoint beside its arrays: what it is of, and by what to tell that it is whole."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from dsv3_jax.checkpoint.checksums import checksums
from dsv3_jax.checkpoint.paths import by_path
from dsv3_jax.config import Config


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array as it was saved."""

    dtype: str
    shape: tuple[int, ...]
    checksum: int


@dataclasses.dataclass(frozen=True)
class Record:
    """What a checkpoint says about itself."""

    step: int
    """Optimizer steps taken."""
    tokens: int
    """Tokens seen in them."""
    config: dict[str, Any]
    """The resolved config, as plain values."""
    counters: dict[str, Any]
    """Whatever else the trainer keeps, as plain values."""
    arrays: dict[str, dict[str, Stored]]
    """Every array, by item and path."""

    @classmethod
    def of(cls, step: int, config: Config, counters: dict[str, Any], items: dict[str, Any]) -> Record:
        """The record of `items`, trees of arrays by name; every process has to call this (see `checksums`)."""
        arrays = {}
        for name, tree in items.items():
            sums = checksums(tree)
            arrays[name] = {
                path: Stored(array.dtype.name, tuple(array.shape), sums[path]) for path, array in by_path(tree).items()
            }
        return cls(step, config.schedules.tokens_before(step), dataclasses.asdict(config), counters, arrays)

    def to_json(self) -> dict[str, Any]:
        """As JSON values, with a digest of them all."""
        values = dataclasses.asdict(self)
        return {"record": values, "sha256": _digest(values)}

    @classmethod
    def from_json(cls, values: Any) -> Record:
        """Reads what `to_json` gave.

        Raises:
          ValueError: if it is anything else.
        """
        if not isinstance(values, dict) or _digest(values.get("record")) != values.get("sha256"):
            raise ValueError("its record does not match its own digest")
        record = dict(values["record"])
        record["arrays"] = {
            name: {path: Stored(one["dtype"], tuple(one["shape"]), one["checksum"]) for path, one in arrays.items()}
            for name, arrays in record["arrays"].items()
        }
        return cls(**record)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
