"""metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
import pathlib

import pytest
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.train.logging import MetricsLog, read_metrics

NAMES = ("loss", "main_loss", "mtp_loss", "balance_loss", "grad_norm", "learning_rate", "max_violation")


@pytest.fixture
def run(tmp_path: pathlib.Path) -> RunDirectory:
    return RunDirectory(str(tmp_path))


def row(step: int) -> dict[str, float]:
    """A row of figures without a short decimal form."""
    return {"step": step, **{name: math.pi / step * 3**i for i, name in enumerate(NAMES)}, "tokens": 64 * step}


def test_rows_come_back_to_the_bit(run: RunDirectory) -> None:
    rows = [row(step) for step in (2, 4, 6)]
    rows[0] |= {"loss": 0.1 + 0.2, "grad_norm": 5e-324, "learning_rate": 1 - 2**-53}
    with MetricsLog(run, 0) as log:
        for each in rows:
            log.write(each)
            # Written at once: a run that is killed keeps what it said.
            assert json.loads(run.metrics_file.read_text().splitlines()[-1]) == each
        assert log.rows == rows
    assert read_metrics(run) == rows
    assert [float(value).hex() for value in read_metrics(run)[0].values()] == [float(v).hex() for v in rows[0].values()]
    assert run.metrics_file.read_text().count("\n") == 3


def test_an_object_store_gets_every_row_each_time(run: RunDirectory) -> None:
    """Objects cannot be appended to; gcsfs takes an append for an overwrite."""
    written: list[str] = []

    class Object:
        def __str__(self) -> str:
            return "gs://bucket/metrics.jsonl"

        def write_text(self, text: str) -> None:
            written.append(text)

    with MetricsLog(run, 0) as log:
        log.path = Object()
        for step in (1, 2):
            log.write(row(step))
    assert [json.loads(line) for line in written[-1].splitlines()] == [row(1), row(2)]


def test_only_the_process_that_writes_leaves_a_trace(run: RunDirectory) -> None:
    with MetricsLog(run, 0, writes=False) as log:
        log.write(row(1))
        assert log.rows == [row(1)]
    assert not run.metrics_file.exists()
    assert not run.tensorboard.exists()


def test_a_continued_run_drops_the_steps_it_takes_again(run: RunDirectory) -> None:
    with MetricsLog(run, 0) as log:
        for step in range(1, 8):
            log.write(row(step))
    before = run.metrics_file.read_text().splitlines(keepends=True)
    with MetricsLog(run, 5) as log:
        assert [each["step"] for each in log.rows] == [1, 2, 3, 4, 5]
        assert run.metrics_file.read_text() == "".join(before[:5])
        log.write(row(6))
    assert run.metrics_file.read_text() == "".join(before[:6])
    with MetricsLog(run, 0) as log:
        assert log.rows == []
    assert run.metrics_file.read_text() == ""


def test_a_line_cut_short_is_left_out_and_not_written_onto(run: RunDirectory) -> None:
    with MetricsLog(run, 0) as log:
        for step in (1, 2, 3):
            log.write(row(step))
    whole = run.metrics_file.read_text()
    last_line = whole.rindex("\n", 0, -1) + 1
    for end in range(last_line + 1, len(whole) - 1):
        run.metrics_file.write_text(whole[:end])
        assert read_metrics(run) == [row(1), row(2)]
    with MetricsLog(run, 2) as log:
        log.write(row(3))
    assert run.metrics_file.read_text() == whole


def test_a_restart_that_fails_loses_no_row(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    with MetricsLog(run, 0) as log:
        log.write(row(1))
    before = run.metrics_file.read_text()

    def fail(path: epath.Path, text: str) -> int:
        with path.open("w") as file:
            file.write(text[:10])
        raise OSError("No space left on device")

    monkeypatch.setattr(type(run.metrics_file), "write_text", fail)
    with pytest.raises(OSError, match="No space"):
        MetricsLog(run, 1)
    assert run.metrics_file.read_text() == before


def test_rows_are_never_appended_on_an_object_store(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr("dsv3_jax.train.logging.write_whole", lambda path, text: written.append(text))
    with MetricsLog(run, 0) as log:
        log.path = epath.Path("gs://bucket/run/metrics.jsonl")
        for step in (1, 2):
            log.write(row(step))
    assert [[json.loads(line)["step"] for line in text.splitlines()] for text in written] == [[], [1], [1, 2]]


def test_a_run_without_metrics_has_no_rows(run: RunDirectory) -> None:
    assert read_metrics(run) == []


def scalars(folder: pathlib.Path) -> list[tuple[int, str, float]]:
    """(step, name, value) of every scalar in the event files, whose records are [length, crc, data, crc]."""
    found = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            data = data[12 + length + 4 :]
    return found


def test_tensorboard_gets_the_same(run: RunDirectory) -> None:
    with MetricsLog(run, 0) as log:
        log.write(row(3))
        log.write(row(6))
    expected = [(step, name, value) for step in (3, 6) for name, value in row(step).items() if name != "step"]
    found = scalars(pathlib.Path(run.tensorboard))
    assert [(step, name) for step, name, _ in found] == [(step, name) for step, name, _ in expected]
    assert [value for *_, value in found] == pytest.approx([value for *_, value in expected], rel=1e-6)


def test_a_full_disk_costs_no_row(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Needs no mount: /dev/full takes the place of both files."""
    full = epath.Path("/dev/full")
    opens = EventsWriter.__init__
    monkeypatch.setattr("dsv3_jax.train.logging._FLUSH_SECONDS", 0)  # A file is written to at a flush only.
    with MetricsLog(run, 0) as log:
        log.write(row(1))
        log._board.flush()
        with monkeypatch.context() as patch, open("/dev/full", "wb", buffering=0) as file:
            patch.setattr(log, "path", full)
            patch.setattr("dsv3_jax.train.logging.write_whole", lambda path, text: full.write_text(text))
            patch.setattr(log._board._writer._py_recordio_writer, "_writer", file)
            patch.setattr(EventsWriter, "__init__", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            for step in (2, 3):
                log.write(row(step))
            assert log.rows == [row(1), row(2), row(3)]
        messages = capsys.readouterr().err.splitlines()
        reason = "cannot be written (No space left on device); the run goes on, and tries again at the next log"
        assert messages == [f"warning: {run.path}/{name} {reason}" for name in ("metrics.jsonl", "tensorboard")]
        assert EventsWriter.__init__ is opens
        log.write(row(4))
        messages = capsys.readouterr().err.splitlines()
        assert messages == [
            f"warning: {run.path}/{name} can be written again, and lacks nothing" for name in ("metrics.jsonl", "tensorboard")
        ]
    assert capsys.readouterr().err == ""
    assert read_metrics(run) == [row(step) for step in (1, 2, 3, 4)]
    found = {(step, name) for step, name, _ in scalars(pathlib.Path(run.tensorboard))}
    assert found == {(step, name) for step in (1, 2, 3, 4) for name in row(step) if name != "step"}


def test_what_failed_last_is_tried_once_more_at_the_end(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with MetricsLog(run, 0) as log:
        log.write(row(1))
        with monkeypatch.context() as patch:
            patch.setattr(log, "path", epath.Path("/dev/full"))
            log.write(row(2))
        assert "metrics.jsonl cannot be written" in capsys.readouterr().err
        assert read_metrics(run) == [row(1)]
    assert "metrics.jsonl can be written again, and lacks nothing" in capsys.readouterr().err
    assert read_metrics(run) == [row(1), row(2)]


def test_a_continued_run_hides_the_steps_it_takes_again_from_tensorboard(run: RunDirectory) -> None:
    for first_step in (0, 2):
        with MetricsLog(run, first_step) as log:
            log.write(row(first_step + 1))
    events = []
    for file in sorted(pathlib.Path(run.tensorboard).iterdir(), key=lambda file: file.stat().st_mtime_ns):
        data = file.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[12 + length + 4 :]
    assert [event.step for event in events if event.session_log.status == SessionLog.START] == [3]
