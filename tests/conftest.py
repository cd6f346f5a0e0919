"""What every test stands on: eight CPU devices, no network, and a run in which something was tested."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import pathlib
import sys
import time
from collections.abc import Iterator

import pytest

# Before jax is imported, since it reads these once. The eight devices are there for the sharding tests, the compilation
# cache for the second run: most of the time goes into compiling. An entry that cannot be read is compiled again. LLVM's
# optimization and XLA's fusion emitters cost more than faster code saves (the gradient of a tiny model takes 9.5 s of processor
# time with both off, 14.9 s with the emitters on). Where results are compared with others', the Makefile leaves both on.
FLAGS = "--xla_force_host_platform_device_count=8"
if not os.environ.get("DSV3_JAX_OPTIMIZED"):
    FLAGS += " --xla_backend_optimization_level=0"
    # Later ones lack this flag, and XLA ends a process that names one it does not know.
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".cache" / "jax_tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# Of the 65,530 stretches of memory that Linux lets a process have (vm.max_map_count) XLA takes a few for every kernel that it
# compiles for CPUs: thousands for a model on eight devices. Without any left it crashes, in whichever test that happens to be.
MOST_STRETCHES = 45_000
_SECONDS_BETWEEN_COUNTS = 5.0
_counted = 0.0


@pytest.fixture(autouse=True)
def room_for_programs() -> Iterator[None]:
    """Forgets all compiled programs when they have become too many for one process."""
    yield
    global _counted
    maps = pathlib.Path("/proc/self/maps")
    if "jax" not in sys.modules or not maps.exists() or time.monotonic() - _counted < _SECONDS_BETWEEN_COUNTS:
        return
    if maps.read_bytes().count(b"\n") > MOST_STRETCHES:
        sys.modules["jax"].clear_caches()
        gc.collect()
    _counted = time.monotonic()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run in which every test was skipped has shown nothing, so it fails like one that found no tests."""
    if hasattr(session.config, "workerinput"):  # One of several processes, which sees its share only.
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    ran = any(reporter.stats.get(outcome) for outcome in ("passed", "failed", "error", "xfailed"))
    if exitstatus == pytest.ExitCode.OK and not ran and not session.config.option.collectonly:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.fixture(scope="session")
def tpu_compiler() -> str:
    """The path of libtpu; a test that needs it is skipped, by name, where there is none."""
    from dsv3_jax.plan.topology import find_tpu_compiler  # Imports jax, which reads the variables above.

    library = find_tpu_compiler()
    if library is None:
        pytest.skip("the TPU compiler is missing: `make test` adds it (make tpu-compiler)")
    return library


@pytest.fixture(scope="session")
def cuda_compiler() -> str:
    """The folder of JAX's CUDA plugin; a test that needs it is skipped, by name, where there is none."""
    from tests.h100 import find_cuda_compiler

    folder = find_cuda_compiler()
    if folder is None:
        pytest.skip("the CUDA compiler is missing: `make test-slow` adds it (make cuda-compiler)")
    return folder
