"""The compilation cache: what one process compiles, the next one reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

PROGRAM = """
import logging, sys
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(message)s")
import jax, jax.numpy as jnp
from dsv3_jax.parallel.devices import cache_compilations
cache_compilations(sys.argv[1])
# However fast this machine compiles it.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
def f(x):
    return jnp.sort(jnp.sin(x) @ x.T, axis=0)
print(jax.jit(f)(jnp.ones((7, 7))).shape)
"""


def hits(folder: Path) -> int:
    """Programs that a fresh process reads from the cache under `folder`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=True)
    assert "(7, 7)" in done.stdout
    return done.stdout.count("Persistent compilation cache hit for 'jit_f'")


def test_a_second_process_reads_what_the_first_compiled(tmp_path: Path) -> None:
    assert hits(tmp_path) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["xla"]
    assert any((tmp_path / "xla").iterdir())
    assert hits(tmp_path) == 1
