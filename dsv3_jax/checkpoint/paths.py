"""The arrays of a tree by their paths, whatever containers hold them."""

from __future__ import annotations

from typing import Any

import jax


def by_path(tree: Any) -> dict[str, Any]:
    """Every leaf of `tree` under its path, such as `params/embed/weight`, in the order of the tree."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
