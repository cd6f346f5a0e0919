"""Ablation of multi-token prediction: configs/tiny.py with and without it, at equal tokens, over several seeds.

    python benchmarks/mtp_ablation.py [--seeds 0 1 2] [--steps 400]

Both runs of a seed start from the same main parameters and see the same batches. Prints a JSON line for each run: the loss
of all held-out text, and with MTP the share of drafted tokens that greedy verification accepts. The last line
holds the means.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
from machine import machine


def run(seed: int, depths: int, steps: int, folder: str) -> dict[str, Any]:
    """Train and score one run."""
    name = f"{folder}/{depths}_{seed}"
    options = {"train.seed": seed, "model.num-nextn-predict-layers": depths, "train.steps": steps, "train.eval-every": 0}
    flags = [text for option, value in options.items() for text in (f"--{option}", str(value))]
    train = [sys.executable, "train.py", "--config", "configs/tiny.py", "--run-dir", name, *flags]
    subprocess.run(train, check=True, stdout=sys.stderr)
    with open(f"{name}/summary.json") as file:
        summary = json.load(file)
    return {
        "mtp": depths > 0,
        "seed": seed,
        "heldout_loss": summary["heldout_loss"],
        "heldout_bits_per_byte": summary["heldout_bits_per_byte"],
        "mtp_acceptance": summary["mtp_acceptance"],
    }


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the parameters and the data order")
    parser.add_argument("--steps", type=int, default=400, help="steps of each run")
    flags = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in flags.seeds:
            for depths in (1, 0):
                rows.append(run(seed, depths, flags.steps, folder))
                print(json.dumps(rows[-1]), flush=True)

    def mean(mtp: bool, name: str) -> float:
        return round(float(np.mean([row[name] for row in rows if row["mtp"] == mtp])), 5)

    result = {"benchmark": "mtp_ablation", "steps": flags.steps, "seeds": flags.seeds}
    for name in ("heldout_loss", "heldout_bits_per_byte"):
        result |= {f"{name}, mtp": mean(True, name), f"{name}, no mtp": mean(False, name)}
    result["mtp_acceptance"] = mean(True, "mtp_acceptance")
    print(json.dumps(result | machine()))


if __name__ == "__main__":
    main()
