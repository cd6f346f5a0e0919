"""How programs are compiled: the persistent cache, and what the TPU compiler is asked for by name."""

from __future__ import annotations

import os

import jax

TPU_OPTIONS = {
    # Splits each ragged all-to-all into a start and a done, so that the shared expert is computed while rows travel.
    "xla_tpu_enable_async_ragged_all_to_all": "true",
}
"""Options of the training step's program on TPUs; the only place they are set. docs/log.md says what others were tried."""


def cache_compilations(folder: str) -> None:
    """Keeps compiled programs under `folder`/xla, so that one is compiled once on a machine and read back at the next start.

    Of several processes JAX has only the first write it.
    """
    jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
