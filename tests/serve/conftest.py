"""Engines that the tests share; a server is a second's work, an engine's programs are more."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from dsv3_jax.infer import Engine
from dsv3_jax.infer.request import Update
from tests.serve.running import RunningServer, make_engine, served


@pytest.fixture(scope="package")
def engine() -> Engine:
    return make_engine()


@pytest.fixture(scope="package")
def offline() -> Engine:
    """Another one, to ask without a server; the programs of both are the same."""
    return make_engine()


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[RunningServer]:
    with served(engine) as running:
        yield running


@pytest.fixture
def slow(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The same, with time to do something between its steps."""
    step = engine.step

    def slowly() -> list[Update]:
        time.sleep(0.02)
        return step()

    monkeypatch.setattr(engine, "step", slowly)
    return engine
