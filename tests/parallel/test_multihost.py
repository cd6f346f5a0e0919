"""What the processes of a run tell each other: threads with a store between them stand for the processes.

Real processes are in `tests/cli/test_processes.py`.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest
from etils import epath

from dsv3_jax.config import Config
from dsv3_jax.config.cli import DistributedFlags
from dsv3_jax.parallel import multihost

_CLUSTERS = "SLURM_", "OMPI_", "KUBERNETES_", "JAX_COORDINATOR", "TPU_", "MEGASCALE_"


class _Store:
    """The coordination service's key-value store, as far as it is used."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._changed = threading.Condition()

    def key_value_set(self, key: str, value: str) -> None:
        with self._changed:
            assert key not in self._values, f"{key} is told twice"
            self._values[key] = value
            self._changed.notify_all()

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._values, timeout=0.02):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: nobody has told yet")
            return self._values[key]


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Calls a function of the process's index on three processes; what each returns, or raises."""
    here = threading.local()
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: here.index)

    class Turns:
        """Each process counts for itself."""

        def __next__(self) -> int:
            here.turn = getattr(here, "turn", -1) + 1
            return here.turn

    monkeypatch.setattr(multihost, "_turns", Turns())

    def call(function: Callable[[int], Any]) -> list[Any]:
        monkeypatch.setattr(multihost.global_state, "client", _Store())

        def process(index: int) -> Any:
            here.index, here.turn = index, -1
            try:
                return function(index)
            except (ValueError, RuntimeError, OSError) as error:
                return error

        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            return list(pool.map(process, range(3), timeout=30))

    return call


def _said(outcomes: list[Any]) -> list[str]:
    return [f"{type(outcome).__name__}: {outcome}" for outcome in outcomes]


def test_one_process_just_does_it() -> None:
    done: list[str] = []
    multihost.by_first_process(lambda: done.append("by the first"))
    assert multihost.first_process_first(lambda: 3) == 3
    assert multihost.on_every_process(lambda: 4) == 4
    multihost.check_agreement({"a": 1})
    multihost.wait_for_first_process()
    assert done == ["by the first"]
    with pytest.raises(OSError, match="disk"):
        multihost.by_first_process(lambda: _raise(OSError("disk")))


def test_only_the_first_process_does_it_and_before_the_others_go_on(together: Callable[..., list[Any]]) -> None:
    done: list[int] = []

    def process(index: int) -> list[int]:
        multihost.by_first_process(lambda: (time.sleep(0.1), done.append(index)))
        return list(done)

    assert together(process) == [[0], [0], [0]]


def test_what_the_first_process_refuses_ends_all(together: Callable[..., list[Any]]) -> None:
    outcomes = together(lambda index: multihost.by_first_process(lambda: _raise(ValueError("runs/ä holds a run"))))
    assert _said(outcomes) == ["ValueError: runs/ä holds a run"] * 3


def test_what_fails_on_the_first_process_ends_all(together: Callable[..., list[Any]]) -> None:
    outcomes = together(lambda index: multihost.by_first_process(lambda: _raise(OSError("no space"))))
    assert _said(outcomes) == ["OSError: no space", *["ValueError: no space"] * 2]
    outcomes = together(lambda index: multihost.by_first_process(lambda: _raise(RuntimeError("no such thing"))))
    assert _said(outcomes) == ["RuntimeError: no such thing", *["RuntimeError: process 0 failed: no such thing"] * 2]


def test_what_another_process_refuses_ends_all(together: Callable[..., list[Any]]) -> None:
    outcomes = together(
        lambda index: multihost.on_every_process(lambda: _raise(ValueError("no such file")) if index == 2 else index)
    )
    assert _said(outcomes) == ["ValueError: process 2: no such file"] * 3
    outcomes = together(lambda index: multihost.on_every_process(lambda: _raise(OSError("no space")) if index == 1 else index))
    assert _said(outcomes) == ["ValueError: process 1: no space"] * 3
    assert together(lambda index: multihost.on_every_process(lambda: index)) == [0, 1, 2]


def test_the_first_process_goes_first(together: Callable[..., list[Any]]) -> None:
    order: list[int] = []

    def process(index: int) -> int:
        return multihost.first_process_first(lambda: (time.sleep(0.1 if index == 0 else 0), order.append(index), index)[2])

    assert together(process) == [0, 1, 2]
    assert order[0] == 0


@pytest.mark.parametrize(
    ("values", "fragment"),
    [
        (
            [{"train": {"seed": 3}}, {"train": {"seed": 3}}, {"train": {"seed": 4}}],
            "process 2 has train.seed 4, process 0 has 3",
        ),
        ([{"text": "a"}, {"text": "b"}, {"text": "b"}], "process 1 has text 'b', process 0 has 'a'"),
        ([{"newest": None}, {"newest": 5}, {"newest": None}], "process 1 has newest 5, process 0 has None"),
    ],
)
def test_other_values_are_refused_by_name(
    together: Callable[..., list[Any]], values: list[dict[str, Any]], fragment: str
) -> None:
    outcomes = together(lambda index: multihost.check_agreement(values[index]))
    assert len(set(_said(outcomes))) == 1
    assert isinstance(outcomes[0], ValueError)
    assert fragment in str(outcomes[0])


def test_same_configs_agree(together: Callable[..., list[Any]]) -> None:
    values = {"run_dir": "runs/a", "nothing": None, **dataclasses.asdict(Config())}
    assert together(lambda index: multihost.check_agreement(values)) == [None] * 3


def test_a_folder_that_is_not_shared_is_refused(together: Callable[..., list[Any]], tmp_path) -> None:
    (tmp_path / "shared").touch()
    paths = [tmp_path / "shared", tmp_path / "shared", tmp_path / "absent"]
    outcomes = together(lambda index: multihost.check_shared(epath.Path(paths[index])))
    assert (
        _said(outcomes)
        == [
            f"ValueError: process 2: {tmp_path}/absent is not here, though process 0 has written it; name a --run-dir that all "
            "hosts share"
        ]
        * 3
    )
    assert together(lambda index: multihost.check_shared(epath.Path(paths[0]))) == [None] * 3


@pytest.fixture
def initialized(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple]]:
    """The calls of jax.distributed.initialize that got as far as connecting; no cluster is around."""
    calls: list[tuple] = []
    for name in [name for name in os.environ if name.startswith(_CLUSTERS)]:
        monkeypatch.delenv(name)
    # What a start sees is the environment; what comes after is JAX's, and needs the others.
    monkeypatch.setattr(type(multihost.global_state), "initialize", _detect(calls))
    before = jax.config.jax_enable_preemption_service
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    yield calls
    jax.config.update("jax_enable_preemption_service", before)


def _detect(calls: list[tuple]) -> Callable[..., None]:
    """`jax.distributed.initialize` up to the point where it opens connections."""
    from jax._src import clusters

    def initialize(self: Any, coordinator_address=None, num_processes=None, process_id=None, *_: Any, **__: Any) -> None:
        address, number, index, _devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            coordinator_address, num_processes, process_id, None, None, 300
        )
        if address is None:
            raise ValueError("coordinator_address should be defined.")
        calls.append((address, number, index))

    return initialize


def test_where_there_is_no_cluster_one_process_starts_at_once_and_in_silence(
    initialized: list[tuple], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")  # As in any container of a cluster.
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        multihost.join_processes(DistributedFlags())
    assert time.perf_counter() - started < 1
    assert initialized == []
    assert capfd.readouterr() == ("", "")


_STEP = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "16",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (_STEP, [("gpu003:61440", 16, 0)]),
        # A shell of salloc on the login node, or an sbatch script before srun: the job is there, no step is.
        ({name: value for name, value in _STEP.items() if "STEP" not in name}, []),
        # A shell of salloc that Slurm opens on a node is a step of one task, with the task count of the job.
        (_STEP | {"SLURM_STEP_NUM_TASKS": "1"}, []),
    ],
    ids=["srun", "salloc", "interactive step"],
)
def test_slurm_is_found_where_a_step_runs(
    initialized: list[tuple], monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: list[tuple]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    multihost.join_processes(DistributedFlags())
    assert [(address.split(":")[0], *rest) for address, *rest in initialized] == [
        (address.split(":")[0], *rest) for address, *rest in expected
    ]


@pytest.fixture
def tpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in "cluster", "cloud_tpu_cluster":
        monkeypatch.setattr(f"jax._src.clusters.{module}.running_in_cloud_tpu_vm", True)


@pytest.mark.usefixtures("tpu_machine")
def test_two_slices_of_gke_are_found(initialized: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = {"TPU_SKIP_MDS_QUERY": "true", "TPU_WORKER_HOSTNAMES": "host-0,host-1,host-2,host-3", "TPU_WORKER_ID": "2"}
    slices = {"MEGASCALE_COORDINATOR_ADDRESS": "localhost", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
    for name, value in (hosts | slices).items():
        monkeypatch.setenv(name, value)
    multihost.join_processes(DistributedFlags())
    assert initialized == [("localhost:8482", 8, 6)]


@pytest.mark.usefixtures("tpu_machine")
def test_tpu_vms_are_found(initialized: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"agent-worker-number": "3", "worker-network-endpoints": "a:b:127.0.0.1,a:b:10.0.0.2,a:b:10.0.0.3,a:b:10.0.0.4"}
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.get_metadata", lambda key: (told.get(key, ""), 200))
    multihost.join_processes(DistributedFlags())
    assert initialized == [("127.0.0.1:8482", 4, 3)]


def test_the_flags_win(initialized: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in _STEP.items():
        monkeypatch.setenv(name, value)
    multihost.join_processes(DistributedFlags("host:1234", 4, 3))
    assert initialized == [("host:1234", 4, 3)]


def test_a_process_may_be_told_to_stay_alone(initialized: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in _STEP.items():
        monkeypatch.setenv(name, value)
    multihost.join_processes(DistributedFlags(num_processes=1))
    assert initialized == []
    for incomplete in (
        {"num_processes": 2},
        {"coordinator": "host:1"},
        {"num_processes": 1, "process_id": 0},
        {"process_id": 0},
    ):
        with pytest.raises(ValueError, match="give all three or none, or --distributed"):
            DistributedFlags(**incomplete)


@pytest.mark.parametrize("coordinator", ["host0", "host0:", ":port", "1234", ":1234"])
def test_a_coordinator_without_a_host_or_a_port_is_refused(coordinator: str) -> None:
    with pytest.raises(ValueError, match="write host:port of process 0"):
        multihost.join_processes(DistributedFlags(coordinator, 2, 0))


def test_processes_that_do_not_come_together_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: connection\nrefused")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    before = jax.config.jax_enable_preemption_service
    with pytest.raises(ValueError, match=r"did not connect \(DEADLINE_EXCEEDED: connection refused\); start"):
        multihost.join_processes(DistributedFlags("host:1234", 4, 3))
    jax.config.update("jax_enable_preemption_service", before)


def _raise(error: Exception) -> None:
    raise error
