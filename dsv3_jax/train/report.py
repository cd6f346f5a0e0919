"""The report of a run: report.png with its curves and expert loads, expert_load.npz, and numbers in human-readable form."""

from __future__ import annotations

import io
import math
import sys
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config import ModelConfig
from dsv3_jax.files import read_arrays, write_arrays, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]

_DPI = 120
_WIDTH, _CURVES_HEIGHT = 15.0, 7.5
_FLOAT32_MAX = 3.5e38
_HOTTEST = 4.0
"""Upper end of the heat map's scale, as a multiple of the mean load."""


def write_report(run: RunDirectory, rows: Rows, model: ModelConfig) -> None:
    """Draw the run's rows and its expert_load.npz into report.png; an error is printed, and the run goes on."""
    try:
        picture = io.BytesIO()
        draw(rows, ExpertLoad.read(run), model, title=run.path.name).savefig(picture, format="png", dpi=_DPI)
        write_whole(run.report_file, picture.getvalue())
    except Exception as error:  # No picture is worth a trained run.
        print(f"warning: {run.report_file} is not drawn: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def draw(rows: Rows, load: dict[str, np.ndarray], model: ModelConfig, title: str = "") -> Figure:
    """Return a figure with six panels of curves, and below them a heat map of the load of every expert, if `load` has any.

    Args:
      rows: of metrics.jsonl; missing and non-finite values are left out.
      load: by stack, over the mean, as `ExpertLoad` writes it.
      model: gives the first layer with experts.
      title: of the picture.
    """
    from matplotlib.figure import Figure  # Takes a second, at the end of a run rather than at its start.

    names, loads = _layers(load, model)
    heat_height = 1.3 + min(max(0.16 * len(names), 1.2), 6.5) if names else 0.0
    figure = Figure(figsize=(_WIDTH, _CURVES_HEIGHT + heat_height), layout="constrained")
    figure.suptitle(title, parse_math=False)
    ratios = [1, 1, 2 * heat_height / _CURVES_HEIGHT] if names else [1, 1]
    grid = figure.add_gridspec(len(ratios), 3, height_ratios=ratios)
    axes = [figure.add_subplot(grid[i // 3, i % 3]) for i in range(6)]

    _losses(axes[0], rows)
    _rate_and_batch(axes[1], rows)
    _panel(axes[2], rows, "gradient norm, before clipping", "grad_norm")
    _set_log_scale(axes[2])
    _speed(axes[3], rows)
    _panel(axes[4], rows, "largest violation: most loaded expert over the mean, less 1", "max_violation")
    _set_log_scale(axes[4])
    _acceptance(axes[5], rows)
    for axis in axes:
        _tokens_below(axis, rows)
    for axis in axes[:3]:
        _steps_above(axis, rows)
    if names:
        _heat_map(figure.add_subplot(grid[2, :]), names, loads)
    return figure


def _points(rows: Rows, name: str) -> list[tuple[float, float]]:
    """Return (tokens, value) of each row whose metric `name` is a finite float32 number."""
    pairs = [(row["tokens"], row[name]) for row in rows if "tokens" in row and name in row]
    return [(x, y) for x, y in pairs if y is not None and abs(y) <= _FLOAT32_MAX]


def _curve(axis: Axes, rows: Rows, name: str, **style: Any) -> bool:
    """Draw a metric over the tokens, with marks if it has few points; return True if it has any."""
    points = _points(rows, name)
    if points:
        axis.plot(*zip(*points, strict=True), marker="o" if len(points) <= 30 else None, markersize=3, linewidth=1.4, **style)
    return bool(points)


def _set_log_scale(axis: Axes) -> None:
    """Set a logarithmic y scale if all values drawn are positive and the highest is over 50 times the lowest."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axis.lines] or [np.ones(1)])
    if values.min() > 0 and values.max() > 50 * values.min():
        axis.set_yscale("log")


def _count(value: float, _: float = 0) -> str:
    return humanize(value, 2)


def _percent(value: float, _: float = 0) -> str:
    return f"{100 * value:.3g}%"


def _panel(axis: Axes, rows: Rows, title: str, name: str, **style: Any) -> bool:
    axis.set_title(title, fontsize="medium")
    return _curve(axis, rows, name, **style)


def _losses(axis: Axes, rows: Rows) -> None:
    _panel(axis, rows, "cross entropy, nats a token", "main_loss", label="next token", color="C0")
    if any(row.get("mtp_loss") for row in rows):  # Without MTP it is 0.
        _curve(axis, rows, "mtp_loss", label="MTP", color="C1")
    _curve(axis, rows, "heldout_loss", label="held-out", color="black")
    prefix = "heldout_loss/"
    sources = dict.fromkeys(name for row in rows for name in row if name.startswith(prefix))
    for i, name in enumerate(sources):
        _curve(axis, rows, name, label=name.removeprefix(prefix), color=f"C{2 + i % 8}", linestyle="--")
    _set_log_scale(axis)
    if axis.lines:
        legend = axis.legend(fontsize="small", ncols=2 if len(axis.lines) > 4 else 1)
        for text in legend.get_texts():
            text.set_parse_math(False)  # The name of a source may contain $.


def _rate_and_batch(axis: Axes, rows: Rows) -> None:
    _panel(axis, rows, "learning rate", "learning_rate", color="C0")
    axis.yaxis.set_major_formatter("{x:.3g}")
    if right := _on_the_right(axis, rows, "batch_size", "sequences a step", drawstyle="steps-pre"):
        axis.set_title("learning rate, and batch size", fontsize="medium")
        right.set_ylim(0, 1.1 * right.get_ylim()[1])
        right.locator_params(axis="y", integer=True)
        right.yaxis.set_major_formatter(_count)


def _speed(axis: Axes, rows: Rows) -> None:
    _panel(axis, rows, "tokens a second", "tokens_per_second", color="C0")
    axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    axis.yaxis.set_major_formatter(_count)
    if right := _on_the_right(axis, rows, "mfu", "MFU", linestyle="--"):
        axis.set_title("tokens a second, and model FLOPs utilisation", fontsize="medium")
        right.set_ylim(0, 1.5 * right.get_ylim()[1])  # The two curves have one shape: keep them apart.
        right.yaxis.set_major_formatter(_percent)


def _acceptance(axis: Axes, rows: Rows) -> None:
    axis.yaxis.set_major_formatter(_percent)
    if _panel(axis, rows, "drafts of the MTP module accepted, held-out", "mtp_acceptance"):
        axis.set_ylim(0, max(0.05, *axis.get_ylim()))
    else:
        axis.set_yticks([])
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center", color="grey")


def _on_the_right(axis: Axes, rows: Rows, name: str, label: str, **style: Any) -> Axes | None:
    """Draw a metric against a y axis of its own on the right; return this axis, or None if it has no points."""
    if not _points(rows, name):
        return None
    right = axis.twinx()
    _curve(right, rows, name, color="C1", **style)
    right.set_ylabel(label, color="C1")
    right.tick_params(axis="y", colors="C1")
    axis.tick_params(axis="y", colors="C0")
    return right


def _tokens_below(axis: Axes, rows: Rows) -> None:
    """Set the x axis to tokens, from 0 to just beyond the last row, with its label and a grid."""
    axis.set_xlim(0, 1.02 * max((row["tokens"] for row in rows if "tokens" in row), default=1))
    axis.locator_params(axis="x", nbins=6)
    axis.xaxis.set_major_formatter(_count)
    axis.set_xlabel("tokens")
    axis.grid(alpha=0.25)


def _steps_above(axis: Axes, rows: Rows) -> None:
    """Draw a scale of the steps along the top, uneven if batches grow; none if tokens or steps do not increase."""
    both = sorted({(row["tokens"], row["step"]) for row in rows if "tokens" in row and "step" in row})
    tokens, steps = np.array([(0, 0), *both], float).T
    if len(tokens) < 2 or (np.diff(tokens) <= 0).any() or (np.diff(steps) <= 0).any():
        return

    def interpolate(x: Any, of: np.ndarray, to: np.ndarray) -> np.ndarray:
        """Return `x` mapped from the points `of` to the points `to`: linear between them and beyond both ends."""
        x, slope = np.asarray(x, float), (to[-1] - to[-2]) / (of[-1] - of[-2])
        beyond = np.where(x > of[-1], (x - of[-1]) * slope, np.minimum(x, 0) * to[1] / of[1])
        return np.interp(x, of, to) + beyond

    functions = lambda x: interpolate(x, tokens, steps), lambda x: interpolate(x, steps, tokens)
    top = axis.secondary_xaxis("top", functions=functions)
    top.locator_params(axis="x", nbins=5, integer=True)
    top.xaxis.set_major_formatter(_count)
    top.tick_params(labelsize="small", colors="grey")
    top.set_xlabel("steps", fontsize="small", color="grey")


def _layers(load: dict[str, np.ndarray], model: ModelConfig) -> tuple[list[str], np.ndarray]:
    """Return the names and loads [layers, E] of all layers with experts, from the bottom up, MTP depths last."""
    stacks = sorted(load, key=lambda name: (name.startswith("mtp_"), len(name), name))
    names: list[str] = []
    for stack in stacks:
        if stack.startswith("mtp_"):
            names.append(f"MTP {int(stack.removeprefix('mtp_')) + 1}")
        else:
            names += [str(model.first_k_dense_replace + i) for i in range(len(np.atleast_2d(load[stack])))]
    return names, np.concatenate([np.atleast_2d(load[stack]) for stack in stacks]) if stacks else np.zeros((0, 0))


def _heat_map(axis: Axes, names: list[str], loads: np.ndarray) -> None:
    from matplotlib.colors import TwoSlopeNorm

    highest = float(np.clip(loads.max(), 2.0, _HOTTEST))
    scale = TwoSlopeNorm(1.0, vmin=0.0, vmax=highest)
    image = axis.imshow(loads, aspect="auto", interpolation="nearest", cmap="RdBu_r", norm=scale)
    title = f"load of every expert over the mean of its layer, in the last logged interval (highest {loads.max():.3g})"
    axis.set_title(title, fontsize="medium")
    axis.set_xlabel("expert")
    axis.set_ylabel("layer")
    axis.locator_params(axis="x", nbins=16, integer=True)
    # At most about 20 layers are named, and all MTP depths, whose names must not touch that of the layer below.
    num_layers = sum(not name.startswith("MTP") for name in names)
    every = math.ceil(num_layers / 20) or 1
    shown = list(range(0, num_layers, every))
    if num_layers < len(names):
        if every > 1 and num_layers - shown[-1] < every:
            shown.pop()
        shown += range(num_layers, len(names))
        if num_layers > 0:
            axis.axhline(num_layers - 0.5, color="black", linewidth=1.0)
    axis.set_yticks(shown, [names[i] for i in shown])
    spacing = 0.5 if highest < 3 else 1.0
    ticks = [0.0, 0.5, 1.0, *np.arange(1.0 + spacing, highest + 1e-6, spacing)]
    axis.figure.colorbar(image, ax=axis, pad=0.01, extend="max" if loads.max() > highest else "neither", ticks=ticks)


# ----------------------------------------------------------------------------------------------------------------------
# Human-readable numbers: 1.2M tokens, 3.4 hours


_SUFFIXES = "", "K", "M", "B", "T"


def humanize(number: float, decimals: int = 1) -> str:
    """Return a count in few digits: 980, 1.2M, 123K, 14.8T, 1e+15; at most `decimals` decimals, below 100 only."""
    value, power = float(f"{number:.{decimals + 2}g}"), 0  # Rounded first: 999,960 is 1M.
    if abs(value) >= 1e15:
        return f"{value:.3g}"
    while abs(value) >= 1000:
        value, power = value / 1000, power + 1
    digits = f"{value:.{decimals}f}" if abs(value) < 100 else f"{value:.0f}"
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + _SUFFIXES[power]


def in_time(seconds: float) -> str:
    """Return a duration in the largest unit of which it holds two: 119 s, 12 min, 2.5 h, 3.0 days."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


# ----------------------------------------------------------------------------------------------------------------------
# Load of the experts between two logged steps: expert_load.npz


class ExpertLoad:
    """Expert loads, summed on the devices between two logged steps, and written at each log.

    The file holds the last interval: for each stack of `ModelOutput.load` ("moe_layers" [L, E], "mtp_0" [E], ...)
    float32 loads over the mean of their layer, so that 1 is an even share.
    """

    def __init__(self, run: RunDirectory, *, writes: bool = True) -> None:
        """Args: writes: True in the process that writes; the others only take part in the sums."""
        self._run = run
        self._writes = writes
        self._sums: dict[str, jax.Array] | None = None

    def accumulate(self, load: dict[str, jax.Array]) -> None:
        """Add a step's tokens per expert to the sums of the interval, on the devices, without waiting for the step."""
        self._sums = load if self._sums is None else _add(self._sums, load)

    def write(self) -> dict[str, np.ndarray]:
        """End the interval: return its loads over their means ({} without steps); the process that writes also writes them."""
        sums, self._sums = self._sums or {}, None
        relative = {name: _over_mean(np.asarray(load)) for name, load in sums.items()}
        if self._writes and relative:
            write_arrays(self._run.expert_load_file, relative)
        return relative

    @staticmethod
    def read(run: RunDirectory) -> dict[str, np.ndarray]:
        """Return the loads in the run's expert_load.npz, {} if there is no file; ValueError if it is damaged."""
        return read_arrays(run.expert_load_file) if run.expert_load_file.exists() else {}


@jax.jit
def _add(sums: dict[str, jax.Array], load: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.add, sums, load)


def _over_mean(load: Any) -> np.ndarray:
    """Return loads [..., E] over the mean of their layer, float32; 0 in a layer without tokens."""
    exact = np.asarray(load, np.float64)
    mean = exact.mean(-1, keepdims=True)
    return np.divide(exact, mean, out=np.zeros_like(exact), where=mean > 0).astype(np.float32)
