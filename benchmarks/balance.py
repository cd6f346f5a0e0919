"""The bias rule from a skewed start: the largest load violation over the steps of the tiny run, with the rule on and off.

    python benchmarks/balance.py [--steps 200] [--picture docs/balance.png]

The start is that of configs/tiny.py with two changes: every embedding is shifted by one standard deviation along
(1, ..., 1), so that all tokens share a direction, and the gates' columns are shifted against it by 6 to -6 in equal steps, so
that every token prefers the first experts. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from machine import machine

from dsv3_jax.config.cli import load_config
from dsv3_jax.model import init_variables
from dsv3_jax.train.start import save_run_start

CONFIG = load_config("configs/tiny.py")
SKEW = 6.0


def skewed_variables() -> dict[str, Any]:
    """Return the skewed initial variables of the run."""
    variables = init_variables(CONFIG.model, jax.random.key(CONFIG.train.seed))
    params, model = variables["params"], CONFIG.model
    params["embed"]["embedding"] += model.initializer_range
    shift_E = jnp.linspace(SKEW, -SKEW, model.n_routed_experts) / model.hidden_size
    for block in (params["moe_layers"], params["mtp_0"]["block"]):
        block["mlp"]["gate"]["kernel"] += shift_E
    return variables


def violations(folder: Path, gamma: float, steps: int) -> list[float]:
    """The largest violation of every step of a run with this gamma."""
    run = folder / f"gamma_{gamma}"
    train = dataclasses.replace(CONFIG.train, bias_update_speed=gamma)
    save_run_start(str(run), dataclasses.replace(CONFIG, train=train), skewed_variables())
    options = {"train.bias-update-speed": gamma, "train.steps": steps, "train.log-every": 1, "train.eval-every": 0}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "train.py", "--config", "configs/tiny.py", "--run-dir", str(run), "--resume", *flags]
    subprocess.run(command, check=True, stdout=sys.stderr)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["max_violation"] for row in rows]


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="steps of each run")
    parser.add_argument("--picture", help="where to draw the two curves")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        on, off = (violations(Path(folder), gamma, flags.steps) for gamma in (CONFIG.train.bias_update_speed, 0.0))
    if flags.picture:
        draw(on, off, flags.picture)

    def mean(curve: list[float], first: int, last: int) -> float:
        return round(float(np.mean(curve[first:last])), 3)

    marks = {"first 10 steps": (0, 10), "last 10 steps": (-10, len(on))}
    result = {"benchmark": "balance", "gamma": CONFIG.train.bias_update_speed, "steps": flags.steps, "skew": SKEW}
    result |= {f"{name}, rule on": mean(on, *span) for name, span in marks.items()}
    result |= {f"{name}, rule off": mean(off, *span) for name, span in marks.items()}
    print(json.dumps(result | machine()))


def draw(on: list[float], off: list[float], picture: str) -> None:
    """Draw both curves over the steps."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axis.plot(range(1, len(off) + 1), off, label="bias rule off")
    axis.plot(range(1, len(on) + 1), on, label=f"bias rule on, gamma {CONFIG.train.bias_update_speed}")
    axis.set(xlabel="step", ylabel="largest load over the mean, minus 1", title="configs/tiny.py from a skewed router", ylim=0)
    axis.legend()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
