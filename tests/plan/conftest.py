"""The TPU compiler, which `make test` adds to the environment."""

from __future__ import annotations

import pytest

from dsv3_jax.plan.topology import find_tpu_compiler


@pytest.fixture(scope="session")
def tpu_compiler() -> str:
    """The path of libtpu; a test that needs it is skipped, by name, where there is none."""
    library = find_tpu_compiler()
    if library is None:
        pytest.skip("the TPU compiler is missing: `make test` adds it (make tpu-compiler)")
    return library
