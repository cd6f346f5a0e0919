"""The flags of infer.py that serve."""

from __future__ import annotations

import pytest

from dsv3_jax.config.cli import parse_flags
from dsv3_jax.serve import ServeOptions
from dsv3_jax.serve.cli import Flags
from tests.model.tiny import CONFIG


def parsed(*arguments: str) -> Flags:
    return parse_flags(Flags, ["--checkpoint", "here", *arguments])


def test_a_server_has_its_options_and_a_batch() -> None:
    flags = parsed("--serve", "--port", "9", "--max-queue", "3", "--timeout", "1.5")
    assert flags.server == ServeOptions(port=9, max_queue=3, timeout=1.5)
    batches = [parsed(*given).sizes(CONFIG)["max_batch"] for given in ((), ("--serve",), ("--serve", "--max-batch", "3"))]
    assert batches == [1, 8, 3]


def test_to_serve_is_one_thing_to_do() -> None:
    assert parsed().one_shot
    assert not parsed("--serve").one_shot
    with pytest.raises(ValueError, match="--interactive and --serve are different things to do"):
        parsed("--serve", "--interactive")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--serve --temperature 0.2",
            "--temperature would change nothing; each request has its own sampling parameters, leave it out",
        ),
        ("--serve --max-tokens 9", "--max-tokens would change nothing"),
        ("--serve --stop x", "--stop would change nothing"),
        ("--port 9", "--port would change nothing; it belongs to --serve, leave it out"),
        ("--prompt x --max-queue 3", "--max-queue would change nothing"),
    ],
)
def test_what_would_be_ignored_is_refused(arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed(*arguments.split())


def test_options_are_refused_before_a_model_is_read() -> None:
    with pytest.raises(ValueError, match="max_queue is -1; it cannot be negative"):
        parsed("--serve", "--max-queue", "-1")
