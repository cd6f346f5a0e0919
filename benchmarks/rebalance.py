"""Redundant experts at the published sizes: the busiest shard's load over the mean one, without and with copies.

    python benchmarks/rebalance.py [--layers 58] [--seed 0]

Each layer's 256 experts have log-normal loads. Prints one JSON line per setting; uses no device.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from machine import machine

from dsv3_jax.rebalance import rebalance_experts, shard_loads

EXPERTS = 256
SHARDS_AND_SLOTS = (32, 9), (64, 5), (8, 36)
"""The report's prefill (32 redundant experts on 32 GPUs), 64 on 64, and 32 on a host of 8."""
DEVIATIONS = 0.5, 1.0, 2.0
"""Standard deviations of the log loads: the hottest of 256 experts has about 3.5, 10 and 40 times the mean load."""


def measure(counts_LE: np.ndarray, num_shards: int, slots: int) -> dict[str, float]:
    """Return means over the layers, and the largest time to place a layer."""
    seconds, before, after = [], [], []
    for counts_E in counts_LE:
        started = time.perf_counter()
        placement = rebalance_experts(counts_E, num_shards, slots)
        seconds.append(time.perf_counter() - started)
        mean = counts_E.sum() / num_shards
        before.append(counts_E.reshape(num_shards, -1).sum(1).max() / mean)
        after.append(shard_loads(placement, counts_E, num_shards).max() / mean)
    return {
        "busiest_over_mean_before": round(float(np.mean(before)), 3),
        "busiest_over_mean_after": round(float(np.mean(after)), 4),
        "worst_after": round(max(after), 4),
        "seconds_a_layer": round(max(seconds), 3),
    }


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=58, help="layers, each with loads of its own")
    parser.add_argument("--seed", type=int, default=0, help="seed of the loads")
    flags = parser.parse_args()
    for deviation in DEVIATIONS:
        counts_LE = np.random.default_rng(flags.seed).lognormal(sigma=deviation, size=(flags.layers, EXPERTS))
        hottest = round(float(np.mean(counts_LE.max(1) / counts_LE.mean(1))), 1)
        for num_shards, slots in SHARDS_AND_SLOTS:
            setting = {"shards": num_shards, "redundant": num_shards * slots - EXPERTS, "hottest_expert_over_mean": hottest}
            print(json.dumps({"benchmark": "rebalance", **setting, **measure(counts_LE, num_shards, slots), **machine()}))


if __name__ == "__main__":
    main()
