"""The persistent compilation cache: a program compiled once on a machine is read back at the next start."""

from __future__ import annotations

import os

import jax


def cache_compilations(folder: str) -> None:
    """Keeps compiled programs under `folder`/xla (a local path, or gs:// where its driver is installed)."""
    jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
