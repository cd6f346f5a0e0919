"""An engine on a mesh of two processes, which are given the same requests, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from dsv3_jax.infer import Engine, SamplingParams
from tests.cli.conftest import ROOT
from tests.cli.processes import free_port
from tests.infer.test_identity import ONE_LAYER
from tests.model.tiny import random_variables


@pytest.mark.slow
def test_two_processes_say_what_one_says() -> None:
    # A later flag counts.
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}
    address, program = f"localhost:{free_port()}", [sys.executable, "-m", "tests.infer.one_of_two_processes"]
    children = [
        subprocess.Popen([*program, address, str(index)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    try:
        found = [json.loads(child.communicate(timeout=500)[0].splitlines()[-1]) for child in children]
    finally:
        for child in children:
            child.kill()
    engine = Engine(ONE_LAYER, random_variables(ONE_LAYER), max_length=64)
    expected = engine.generate([[1, 2, 3], [4] * 9, [7, 8]], SamplingParams(max_tokens=8))
    assert found == [[completion.tokens for completion in expected]] * 2
