"""Memory of the training step with a bounded receive buffer, compared with one for the worst case.

    python benchmarks/receive_buffer.py [--topology v5p:2x2x2] [--receive-factor 1.5]

Prints one JSON line. In the worst case all tokens of the expert group are routed to one device, which then receives |expert|
times the rows that a device sends. With a smaller buffer the exchange takes more rounds, and drops nothing either.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from machine import machine

from dsv3_jax.config import Config, MeshConfig, TrainConfig
from dsv3_jax.config.cli import load_config
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.plan.program import compile_program
from dsv3_jax.plan.topology import chip_of, tpu_devices


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5p:2x2x2", help="topology to compile for")
    parser.add_argument(
        "--receive-factor", type=float, default=1.5, help="rows of the buffer, over the rows that a device sends"
    )
    flags = parser.parse_args()
    devices = tpu_devices(flags.topology)
    model = dataclasses.replace(
        load_config("configs/v3_671b.py").model,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_nextn_predict_layers=0,
        vocab_size=8192,
        n_routed_experts=32,
    )

    def step_bytes(receive_factor: float) -> int:
        config = Config(
            model=dataclasses.replace(model, receive_factor=receive_factor),
            mesh=MeshConfig(expert=len(devices)),
            train=TrainConfig(batch_size=len(devices), sequence_length=4096),
        )
        return compile_program(config, make_mesh(config.mesh, devices), chip_of(flags.topology)).total_bytes

    bounded, worst = step_bytes(flags.receive_factor), step_bytes(float(len(devices)))
    result = {
        "benchmark": "receive_buffer",
        "topology": flags.topology,
        "expert_axis": len(devices),
        "receive_factor": flags.receive_factor,
        "total_bytes": bounded,
        "total_bytes_of_the_worst_case_buffer": worst,
        "ratio": bounded / worst,
        **machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
