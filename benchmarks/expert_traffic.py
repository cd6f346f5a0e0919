"""Traffic across the expert axis per token and layer, from the routes of a real batch, compared with the least possible.

    python benchmarks/expert_traffic.py --checkpoint runs/tiny [--devices 4]

Prints one JSON line. A row is sent for each choice whose expert lives on another device. The least possible is one row for
each other device that a token's experts live on, there and back: what an exchange could do that sent a token once to each
device and summed its outputs there.
"""

from __future__ import annotations

import argparse
import json

import jax
import numpy as np
from machine import machine

from dsv3_jax.config import DataConfig
from dsv3_jax.data.corpus import load_corpus
from dsv3_jax.data.tokens import document_windows
from dsv3_jax.infer.load import load_model
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.parallel.all_to_all import receive_rows


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/tiny", help="a run directory, or a Hugging Face folder")
    parser.add_argument("--devices", type=int, default=4, help="size of the expert axis")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    flags = parser.parse_args()
    model = load_model(flags.checkpoint)
    config = model.config
    for what, number in (("experts", config.n_routed_experts), ("sequences", flags.batch)):
        if flags.devices < 2 or number % flags.devices:
            raise SystemExit(f"--devices is {flags.devices}; it must be at least 2 and divide the {number} {what}")
    experts = config.n_routed_experts // flags.devices
    text = load_corpus(DataConfig()).validation
    windows = document_windows(
        text, model.tokenizer, config, batch_size=flags.batch, sequence_length=min(256, config.max_position_embeddings)
    )
    batch = next(iter(windows.sample(1)))
    apply = jax.jit(DeepSeekV3(config).apply, static_argnames="hidden_states")
    routes_LBTK = np.asarray(apply(model.variables, batch.tokens_BT, hidden_states=True).routes)

    layers, sequences, length, chosen = routes_LBTK.shape
    source_B = np.arange(sequences) * flags.devices // sequences
    target_LBTK = routes_LBTK // experts
    away_LBTK = target_LBTK != source_B[None, :, None, None]
    reached = [
        np.unique(targets[away]).size
        for targets, away in zip(target_LBTK.reshape(-1, chosen), away_LBTK.reshape(-1, chosen), strict=True)
    ]
    rows, least = away_LBTK.sum() / away_LBTK[..., 0].size, float(np.mean(reached))
    # Rows that each device receives, by layer: what the receive buffer has to hold.
    received_LZ = np.stack([np.bincount(target.reshape(-1), minlength=flags.devices) for target in target_LBTK])
    width = 2 * config.hidden_size  # bfloat16
    per_device = sequences * length * chosen // flags.devices
    print(
        json.dumps(
            {
                "benchmark": "expert_traffic",
                "checkpoint": model.origin,
                "expert_axis": flags.devices,
                "layers": layers,
                "tokens": sequences * length,
                "rows_per_token_and_layer": rows,
                "least_rows_per_token_and_layer": least,
                "ratio": rows / least,
                "forward_bytes_per_token_and_layer": 2 * rows * width,
                "least_forward_bytes_per_token_and_layer": 2 * least * width,
                "fullest_receiver_over_sent": received_LZ.max() / per_device,
                "receive_rows": receive_rows(per_device, config.receive_factor),
                **machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
