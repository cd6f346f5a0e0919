"""Several real processes of one program, train.py or infer.py, which meet over a socket."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.cli.conftest import plain_environment


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


@contextlib.contextmanager
def running(folder: Path, *processes: tuple[str, ...], devices: int, slurm: bool = False) -> Iterator[list[subprocess.Popen]]:
    """Processes of one program, each with its arguments to Python and so many CPU devices."""
    environment = plain_environment(devices)
    port, count = free_port(), len(processes)
    children = []
    for index, arguments in enumerate(processes):
        meeting: list[str] = []
        own = environment
        if slurm:
            own = environment | {
                "JAX_COORDINATOR_PORT": port,
                "SLURM_JOB_ID": "7",
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": str(count),
                "SLURM_STEP_NUM_TASKS": str(count),
                "SLURM_PROCID": str(index),
                "SLURM_LOCALID": str(index),
            }
        elif count > 1:
            meeting = ["--distributed.coordinator", f"localhost:{port}", "--distributed.num-processes", str(count)]
            meeting += ["--distributed.process-id", str(index)]
        command = [sys.executable, *arguments, *meeting]
        children.append(
            subprocess.Popen(command, cwd=folder, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    try:
        yield children
    finally:
        for child in children:
            child.kill()
            child.communicate()
