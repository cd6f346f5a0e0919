"""What a run says while it trains: metrics.jsonl, TensorBoard, and the picture at the end."""

from __future__ import annotations

import json
from typing import Any

from tensorboardX import SummaryWriter

from dsv3_jax.checkpoint.run_directory import RunDirectory


class MetricsLog:
    """Appends one JSON object a logged step, digits in full, and the same to TensorBoard; a context manager.

    A continued run first drops the lines after the checkpoint it continues from: those steps are taken again.
    """

    def __init__(self, run: RunDirectory, first_step: int, *, writes: bool = True) -> None:
        """Args: writes: whether this process writes; the others of a run only keep the rows."""
        self.path = run.metrics_file
        self.rows = [row for row in read_metrics(run) if row["step"] <= first_step]
        self._board: SummaryWriter | None = None
        if writes:
            self._write_all()
            self._board = SummaryWriter(str(run.tensorboard), purge_step=first_step + 1 if first_step else None)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()

    def write(self, row: dict[str, Any]) -> None:
        """Logs one step; `row` has `step` and numbers."""
        self.rows.append(row)
        if self._board is None:
            return
        if "://" in str(self.path):
            self._write_all()  # An object in a store cannot be appended to: gcsfs would overwrite it with the row.
        else:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, row["step"])

    def _write_all(self) -> None:
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))


def read_metrics(run: RunDirectory) -> list[dict[str, Any]]:
    """The rows logged so far; a line cut short by a crash is left out."""
    if not run.metrics_file.exists():
        return []
    rows = []
    for line in run.metrics_file.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def write_report(run: RunDirectory, rows: list[dict[str, Any]]) -> None:
    """Draws the run's curves into report.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "cross entropy (nats a token)": ("main_loss", "mtp_loss", "heldout_loss"),
        "gradient norm": ("grad_norm",),
        "learning rate": ("learning_rate",),
        "largest load violation": ("max_violation",),
    }
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, marker="o" if name == "heldout_loss" else None)
        axis.set(title=title, xlabel="step")
        if len(names) > 1:
            axis.legend()
    with run.report_file.open("wb") as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)
