"""The picture of a run, report.png: its curves over the tokens seen, and where the tokens went."""

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
"""The load, over the mean, from which on the heat map shows no difference."""


def write_report(run: RunDirectory, rows: Rows, model: ModelConfig) -> None:
    """Draws the run's rows and its expert_load.npz into report.png; what goes wrong is printed, and the run goes on."""
    try:
        picture = io.BytesIO()
        draw(rows, ExpertLoad.read(run), model, title=run.path.name).savefig(picture, format="png", dpi=_DPI)
        write_whole(run.report_file, picture.getvalue())
    except Exception as error:  # Whatever it is, it is not worth the run that has been trained.
        print(f"warning: {run.report_file} is not drawn: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def draw(rows: Rows, load: dict[str, np.ndarray], model: ModelConfig, title: str = "") -> Figure:
    """The picture: six panels of curves, and below them the load of every expert, if there is one.

    Args:
      rows: of metrics.jsonl; what a row lacks, or what is no number, is not drawn.
      load: by stack, over the mean, as `ExpertLoad` writes it.
      model: says which layer is the first with experts.
      title: stands above.
    """
    from matplotlib.figure import Figure  # Takes a second, which a run should not wait for at its start.

    names, loads = _layers(load, model)
    heat_height = 1.3 + min(max(0.16 * len(names), 1.2), 6.5) if names else 0.0
    figure = Figure(figsize=(_WIDTH, _CURVES_HEIGHT + heat_height), layout="constrained")
    figure.suptitle(title, parse_math=False)
    grid = figure.add_gridspec(
        3 if names else 2, 3, height_ratios=[1, 1, *([2 * heat_height / _CURVES_HEIGHT] if names else [])]
    )
    axes = [figure.add_subplot(grid[i // 3, i % 3]) for i in range(6)]

    _losses(axes[0], rows)
    _rate_and_batch(axes[1], rows)
    _plain(axes[2], rows, "gradient norm, before clipping", "grad_norm")
    _speed(axes[3], rows)
    _plain(axes[4], rows, "largest violation: most loaded expert over the mean, less 1", "max_violation")
    _acceptance(axes[5], rows)
    for axis in axes:
        _in_tokens(axis, rows)
    for axis in axes[:3]:
        _steps_above(axis, rows)
    if names:
        _heat(figure.add_subplot(grid[2, :]), names, loads)
    return figure


def _points(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """Tokens and values, where both are numbers that can be drawn."""
    pairs = [(row["tokens"], row[name]) for row in rows if "tokens" in row and name in row]
    drawn = [(x, y) for x, y in pairs if y is not None and abs(y) <= _FLOAT32_MAX]  # Nor is NaN.
    return [x for x, _ in drawn], [y for _, y in drawn]


def _curve(axis: Axes, rows: Rows, name: str, **style: Any) -> bool:
    """Draws a curve, of few points with marks, and says whether there is one."""
    x, y = _points(rows, name)
    if not x:
        return False
    axis.plot(x, y, marker="o" if len(x) <= 30 else None, markersize=3, linewidth=1.4, **style)
    return True


def _wide(axis: Axes) -> None:
    """A logarithmic scale where values lie far apart, so that a peak does not flatten all the rest."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axis.lines] or [np.ones(1)])
    if values.min() > 0 and values.max() > 50 * values.min():
        axis.set_yscale("log")


def _counts(value: float, _: float = 0) -> str:
    return humanize(value, 2)


def _percent(value: float, _: float = 0) -> str:
    return f"{100 * value:.3g}%"


def _plainly(value: float, _: float = 0) -> str:
    return f"{value:.3g}"


def _losses(axis: Axes, rows: Rows) -> None:
    axis.set_title("cross entropy, nats a token", fontsize="medium")
    _curve(axis, rows, "main_loss", label="next token", color="C0")
    if any(row.get("mtp_loss") for row in rows):  # Without MTP it is 0.
        _curve(axis, rows, "mtp_loss", label="MTP", color="C1")
    _curve(axis, rows, "heldout_loss", label="held-out", color="black")
    prefix = "heldout_loss/"
    sources = dict.fromkeys(name for row in rows for name in row if name.startswith(prefix))
    for i, name in enumerate(sources):
        _curve(axis, rows, name, label=name.removeprefix(prefix), color=f"C{2 + i % 8}", linestyle="--")
    _wide(axis)
    if axis.lines:
        legend = axis.legend(fontsize="small", ncols=2 if len(axis.lines) > 4 else 1)
        for text in legend.get_texts():
            text.set_parse_math(False)  # Sources are called what their users like.


def _plain(axis: Axes, rows: Rows, title: str, name: str) -> None:
    axis.set_title(title, fontsize="medium")
    _curve(axis, rows, name)
    _wide(axis)


def _rate_and_batch(axis: Axes, rows: Rows) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_title("learning rate", fontsize="medium")
    _curve(axis, rows, "learning_rate", color="C0")
    axis.yaxis.set_major_formatter(_plainly)
    if right := _on_the_right(axis, rows, "batch_size", "sequences a step", drawstyle="steps-pre"):
        axis.set_title("learning rate, and batch size", fontsize="medium")
        right.set_ylim(0, 1.1 * right.get_ylim()[1])
        right.yaxis.set_major_locator(MaxNLocator(integer=True))
        right.yaxis.set_major_formatter(_counts)


def _speed(axis: Axes, rows: Rows) -> None:
    axis.set_title("tokens a second", fontsize="medium")
    _curve(axis, rows, "tokens_per_second", color="C0")
    axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    axis.yaxis.set_major_formatter(_counts)
    if right := _on_the_right(axis, rows, "mfu", "MFU", linestyle="--"):
        axis.set_title("tokens a second, and model FLOPs utilisation", fontsize="medium")
        right.set_ylim(0, 1.5 * right.get_ylim()[1])  # The two run alike: one below the other.
        right.yaxis.set_major_formatter(_percent)


def _acceptance(axis: Axes, rows: Rows) -> None:
    axis.set_title("drafts of the MTP module accepted, held-out", fontsize="medium")
    axis.yaxis.set_major_formatter(_percent)
    if _curve(axis, rows, "mtp_acceptance"):
        axis.set_ylim(0, max(0.05, *axis.get_ylim()))
    else:
        axis.set_yticks([])
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center", color="grey")


def _on_the_right(axis: Axes, rows: Rows, name: str, label: str, **style: Any) -> Axes | None:
    """Draws a curve against a scale of its own on the right, if there is one."""
    if not _points(rows, name)[0]:
        return None
    right = axis.twinx()
    _curve(right, rows, name, color="C1", **style)
    right.set_ylabel(label, color="C1")
    right.tick_params(axis="y", colors="C1")
    axis.tick_params(axis="y", colors="C0")
    return right


def _in_tokens(axis: Axes, rows: Rows) -> None:
    """Tokens along the bottom, from the start of the run to where it is."""
    from matplotlib.ticker import MaxNLocator

    axis.set_xlim(0, 1.02 * max((row["tokens"] for row in rows if "tokens" in row), default=1))
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.xaxis.set_major_formatter(_counts)
    axis.set_xlabel("tokens")
    axis.grid(alpha=0.25)


def _steps_above(axis: Axes, rows: Rows) -> None:
    """The steps along the top, each above the tokens seen by then: unevenly, where batches grow."""
    from matplotlib.ticker import MaxNLocator

    both = sorted({(row["tokens"], row["step"]) for row in rows if "tokens" in row and "step" in row})
    tokens, steps = (np.array([0, *values], float) for values in zip(*both, strict=True)) if both else (np.zeros(1),) * 2
    if len(tokens) < 2 or (np.diff(tokens) <= 0).any() or (np.diff(steps) <= 0).any():
        return

    def along(x: Any, of: np.ndarray, to: np.ndarray) -> np.ndarray:
        """Interpolated, and beyond the last row drawn on as a straight line."""
        x, slope = np.asarray(x, float), (to[-1] - to[-2]) / (of[-1] - of[-2])
        beyond = np.where(x > of[-1], (x - of[-1]) * slope, np.minimum(x, 0) * to[1] / of[1])
        return np.interp(x, of, to) + beyond

    top = axis.secondary_xaxis("top", functions=(lambda x: along(x, tokens, steps), lambda x: along(x, steps, tokens)))
    top.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    top.xaxis.set_major_formatter(_counts)
    top.tick_params(labelsize="small", colors="grey")
    top.set_xlabel("steps", fontsize="small", color="grey")


def _layers(load: dict[str, np.ndarray], model: ModelConfig) -> tuple[list[str], np.ndarray]:
    """Every layer with experts from the bottom up, MTP depths last: their names, and their loads [layers, E]."""
    stacks = sorted(load, key=lambda name: (name.startswith("mtp_"), len(name), name))
    names: list[str] = []
    for stack in stacks:
        if stack.startswith("mtp_"):
            names.append(f"MTP {int(stack.removeprefix('mtp_')) + 1}")
        else:
            names += [str(model.first_k_dense_replace + i) for i in range(len(np.atleast_2d(load[stack])))]
    return names, np.concatenate([np.atleast_2d(load[stack]) for stack in stacks]) if stacks else np.zeros((0, 0))


def _heat(axis: Axes, names: list[str], loads: np.ndarray) -> None:
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.ticker import MaxNLocator

    highest = float(np.clip(loads.max(), 2.0, _HOTTEST))
    scale = TwoSlopeNorm(1.0, vmin=0.0, vmax=highest)
    image = axis.imshow(loads, aspect="auto", interpolation="nearest", cmap="RdBu_r", norm=scale)
    axis.set_title(
        f"load of every expert over the mean of its layer, in the last logged interval (highest {loads.max():.3g})",
        fontsize="medium",
    )
    axis.set_xlabel("expert")
    axis.set_ylabel("layer")
    axis.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    # As many names as can be read, and always those of the MTP depths.
    depths = [i for i, name in enumerate(names) if name.startswith("MTP")]
    every = math.ceil((len(names) - len(depths)) / 20) or 1
    shown = [*range(0, len(names) - len(depths), every), *depths]
    if depths and every > 1 and len(shown) > len(depths) and depths[0] - shown[-len(depths) - 1] < every:
        del shown[-len(depths) - 1]
    axis.set_yticks(shown, [names[i] for i in shown])
    if depths and depths[0] > 0:
        axis.axhline(depths[0] - 0.5, color="black", linewidth=1.0)
    axis.figure.colorbar(image, ax=axis, pad=0.01, extend="max" if loads.max() > highest else "neither", ticks=_ticks(highest))


def _ticks(highest: float) -> list[float]:
    return [0.0, 0.5, 1.0, *np.arange(1.5 if highest < 3 else 2.0, highest + 1e-6, 0.5 if highest < 3 else 1.0)]


# ----------------------------------------------------------------------------------------------------------------------
# Large numbers as people read them: 1.2M tokens, 3.4 hours.


_SUFFIXES = "", "K", "M", "B", "T"


def humanize(number: float, decimals: int = 1) -> str:
    """A count in few digits: 980, 1.2M, 123K, 14.8T; `decimals` at most, and those only below 100."""
    value, power = float(f"{number:.{decimals + 2}g}"), 0  # Rounded first: 999,960 is 1M.
    if abs(value) >= 1e15:
        return f"{value:.3g}"
    while abs(value) >= 1000:
        value, power = value / 1000, power + 1
    digits = f"{value:.{decimals}f}" if abs(value) < 100 else f"{value:.0f}"
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + _SUFFIXES[power]


def in_time(seconds: float) -> str:
    """A duration in its largest unit that it holds twice over: 119 s, 12 min, 2.5 h, 3.0 days."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


# ----------------------------------------------------------------------------------------------------------------------
# Which experts the tokens went to between two logged steps: expert_load.npz of a run.


class ExpertLoad:
    """Sums the loads of the steps since the last log on the devices, and writes them at each log.

    The file holds the last logged interval alone: for each stack of `ModelOutput.load` ("moe_layers" [L, E], "mtp_0" [E], ...)
    float32 loads over the mean of their layer, so that 1 is an even share.
    """

    def __init__(self, run: RunDirectory, *, writes: bool = True) -> None:
        """Args: writes: whether this process writes; the others of a run only keep step with it."""
        self._run = run
        self._writes = writes
        self._sums: dict[str, jax.Array] | None = None

    def accumulate(self, load: dict[str, jax.Array]) -> None:
        """Adds a step's tokens per expert; waits for nothing, so it may be called before the step is done."""
        self._sums = load if self._sums is None else _added(self._sums, load)

    def write(self) -> dict[str, np.ndarray]:
        """Ends the interval: writes its loads over their means, if this process does, and returns them.

        Nothing is written if no step, or no MoE layer, has been seen since the last time.
        """
        sums, self._sums = self._sums or {}, None
        relative = {name: over_mean(np.asarray(load)) for name, load in sums.items()}
        if self._writes and relative:
            write_arrays(self._run.expert_load_file, relative)
        return relative

    @staticmethod
    def read(run: RunDirectory) -> dict[str, np.ndarray]:
        """What was written last; empty if nothing was.

        Raises:
          ValueError: if the file is damaged.
        """
        if not run.expert_load_file.exists():
            return {}
        return read_arrays(run.expert_load_file)


@jax.jit
def _added(sums: dict[str, jax.Array], load: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.add, sums, load)


def over_mean(load: Any) -> np.ndarray:
    """Loads [..., E] over the mean of their layer, float32; 0 in a layer that no token came to."""
    exact = np.asarray(load, np.float64)
    mean = exact.mean(-1, keepdims=True)
    return np.divide(exact, mean, out=np.zeros_like(exact), where=mean > 0).astype(np.float32)
