"""Workers of a preparation that start at once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from types import SimpleNamespace

import pytest


@pytest.fixture(autouse=True, scope="module")
def quick_workers() -> Iterator[None]:
    """Forks them from one process that has imported everything, where a user's are started one by one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dsv3_jax.data.prepare"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv3_jax.data.prepare.multiprocessing", SimpleNamespace(get_context=lambda _: context))
        yield
