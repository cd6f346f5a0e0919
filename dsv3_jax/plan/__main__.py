"""`python -m dsv3_jax.plan --config C [--mode serve] [--topology v5p:8x8x8 [--slices 2] | --devices N] [--json]`.

Without a topology: parameters by module, and the sharding of each array. With one, the training step is compiled for that
machine, and its memory, its traffic and the least time it can take are printed; --devices N compiles for N CPU devices
instead, which shows that the program exists and what it sends, not what it takes on an accelerator. With --mode serve the
programs of generation are compiled instead.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any, Literal

import rich
from jax.sharding import AbstractMesh

from dsv3_jax.config import Config, MeshConfig
from dsv3_jax.config.checks import PositiveInt, check, check_fields
from dsv3_jax.config.cli import cli_main, parse_with_config
from dsv3_jax.model.flops import flops_per_token
from dsv3_jax.parallel.devices import Chip
from dsv3_jax.parallel.mesh import AXES, check_fits
from dsv3_jax.plan.program import GIB, PROVES, Compiled, Roofline, bound, compile_program
from dsv3_jax.plan.serving import Serving, report_serving
from dsv3_jax.plan.tables import Row, count_parameters, print_memory, print_sharding, print_table, reach, sharding_table
from dsv3_jax.plan.topology import chip_of, mesh_of_all, tpu_devices, use_cpu_devices

_COUNTS = "parameters_main", "parameters_mtp", "parameters_active", "experts", "experts_active"
CPU_PROVES = (
    "Compiled for CPU devices: the traffic is that of the CPU's exchange, the memory that of the CPU's compiler, and neither "
    "says whether the program fits an accelerator; --topology compiles for one."
)


@dataclasses.dataclass(frozen=True)
class PlanFlags:
    """Flags in addition to the fields of the run config."""

    config: str = "configs/tiny.py"
    """Python file that exposes `config`, a Config; the fields below override it."""
    init_from: str | None = None
    """Short for --train.init-from: checkpoint whose model is passed to `config` if that is a function."""
    mode: Literal["train", "serve"] = "train"
    """Programs to compile: the training step, or prefill and decode."""
    serve: Serving = dataclasses.field(default_factory=Serving)
    """Load to serve, with --mode serve. Without any --mesh.* flag the mesh is the one on which a device holds the fewest
    bytes; with some of them, the others are 1."""
    topology: str | None = None
    """TPU slice to compile for: the chip and the chips along each axis, such as v5p:8x8x8."""
    slices: PositiveInt = 1
    """Number of slices, each of that topology; mesh.data runs across them."""
    devices: PositiveInt | None = None
    """Number of CPU devices to compile for, instead of a TPU topology."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def __post_init__(self) -> None:
        check_fields(self, "--")
        check(self.topology is None or self.devices is None, "--topology and --devices exclude each other; keep one")
        check(self.slices == 1 or self.topology is not None, "--slices belongs to --topology; name the topology of one slice")
        if self.mode == "serve":
            check(self.topology is not None or self.devices is not None, "--mode serve takes --topology or --devices; give one")
            check(self.slices == 1, f"--slices is {self.slices}, but --mode serve plans one slice only; leave it out")
        else:
            check(self.serve == Serving(), "--serve.* belongs to --mode serve; add that, or leave --serve.* out")


@cli_main
def main() -> None:
    """Read the flags, compile what they ask for, and print the plan as tables or as one JSON object."""
    flags, config = parse_with_config(PlanFlags, description=__doc__ or "", prepare=_without_mesh_of_training)
    chip = None if flags.topology is None else chip_of(flags.topology)
    if flags.mode == "serve":
        _check_no_training_fields(sys.argv[1:])
    devices = []
    if flags.topology:
        devices = tpu_devices(flags.topology, flags.slices)
    elif flags.devices:
        devices = use_cpu_devices(flags.devices)  # Before any use of JAX: later it takes no more CPU devices.
    if flags.mode == "serve":
        mesh_config = config.mesh if any(argument.startswith("--mesh.") for argument in sys.argv[1:]) else None
        report_serving(config.model, flags.serve, devices, mesh_config, chip, title=flags.config, json=flags.json)
        return
    # Without devices -1 stands for 1: shardings do not depend on the number of devices.
    mesh: Any = AbstractMesh(tuple(max(size, 1) for size in dataclasses.astuple(config.mesh)), AXES)
    if devices:
        mesh = mesh_of_all(config.mesh, devices, "fsdp")
        check_fits(config, mesh)
    result: dict[str, Any] = count_parameters(config.model)
    rows = sharding_table(config, mesh)
    arrays = [row._asdict() for row in rows]
    result |= {"devices": mesh.size, "mesh": dict(mesh.shape), "sharding": {array.pop("path"): array for array in arrays}}
    program = limits = None
    if devices:
        program = compile_program(config, mesh, chip, flags.slices)
        limits = None if chip is None or not program.fits else bound(config, mesh, program, chip)
        result |= _program_json(config, program, chip, limits)
        result["reachable_devices"], result["reachable_hosts"] = reach(config.model, mesh)
    if flags.json:
        print(json.dumps(result))
        return
    modules = ((name, f"{count:,}") for name, count in result["modules"].items())
    totals = ((name.replace("_", " "), f"{result[name]:,}") for name in _COUNTS)
    print_table(("module", "parameters"), modules, totals, title=flags.config)
    print_sharding(rows, mesh)
    if program is not None:
        machine = f"{flags.slices} x {flags.topology}" if flags.topology else f"{flags.devices} CPU devices"
        _print_program(config, program, chip, limits, rows, machine)
        rich.print(
            f"The experts of a token live on at most {result['reachable_devices']} of the {mesh.shape['expert']} devices of "
            f"its expert group, on at most {result['reachable_hosts']} hosts."
        )
        rich.print(CPU_PROVES if chip is None else PROVES)


def _without_mesh_of_training(flags: PlanFlags, config: Config) -> Config:
    """Return the config; in mode "serve" with the default mesh in place of its own, which is for training."""
    return dataclasses.replace(config, mesh=MeshConfig()) if flags.mode == "serve" else config


def _check_no_training_fields(arguments: Sequence[str]) -> None:
    groups = tuple(f"--{field.name}." for field in dataclasses.fields(Config) if field.name not in ("model", "mesh"))
    for name in (argument.partition("=")[0] for argument in arguments):
        if name.startswith(groups) and name.replace("_", "-") != "--train.init-from":
            raise ValueError(f"{name} would change nothing of what --mode serve compiles; leave it out")


def _program_json(config: Config, program: Compiled, chip: Chip | None, limits: Roofline | None) -> dict[str, Any]:
    model, train, figures = config.model, config.train, dataclasses.asdict(program)
    return {
        **{name: figures[name] for name in ("argument_bytes", "temporary_bytes", "total_bytes")},
        "hbm_bytes": None if chip is None else int(chip.hbm_gib * GIB),
        "fits": program.fits,
        "batch_size": train.batch_size,
        "micro_batches": train.micro_batches,
        "sequence_length": train.sequence_length,
        "dtype": model.dtype,
        "param_dtype": model.param_dtype,
        "moment_dtype": config.optimizer.moment_dtype,
        "remat": model.remat,
        "mtp_depths": model.num_nextn_predict_layers,
        **{name: figures[name] for name in ("kernels", "collectives")},
        "flops_per_token": flops_per_token(model, train.sequence_length)._asdict(),
        "roofline_seconds": None if limits is None else limits._asdict(),
        "compile_seconds": program.compile_seconds,
    }


def _print_program(
    config: Config, program: Compiled, chip: Chip | None, limits: Roofline | None, arrays: list[Row], machine: str
) -> None:
    parts = f" of {config.train.micro_batches} micro-batches" if config.train.micro_batches > 1 else ""
    optimizer = sum(row.bytes_per_device for row in arrays if row.path.startswith("optimizer/"))
    variables = sum(row.bytes_per_device for row in arrays if row.path.startswith(("params/", "router/")))
    rows: dict[str, Sequence[int | None]] = {
        "parameters": [variables],
        "optimizer": [optimizer],
        "temporaries": [program.temporary_bytes],
        "in all, by the compiler": [program.total_bytes],
    }
    title = f"training step{parts} compiled for {machine} in {program.compile_seconds:.0f} s"
    print_memory(("a device", "GiB"), rows, chip, program.fits, title)
    if program.collectives:
        traffic = []
        for one in program.collectives:
            kind = one.kind + (", more if an expert exchange needs further rounds" if one.data_dependent else "")
            axis = one.axis + (", between slices" if one.across_slices else "")
            traffic.append((kind, axis, str(one.count), f"{one.bytes / 1e9:.3f}"))
        columns = "collective", "along", "times a step", "GB sent a step and device"
        print_table(columns, traffic, texts=2)
    if program.kernels:
        rich.print(f"Pallas kernels in the program: {', '.join(program.kernels)}.")
    flops = flops_per_token(config.model, config.train.sequence_length)
    rich.print(
        f"{flops.causal / 1e9:.1f} GFLOP to train on a token, with causal attention ({flops.non_causal / 1e9:.1f} without): 6 "
        "for each weight that it is multiplied with, and in each layer 6 N (H + P + W) for each key it attends to."
    )
    if limits is not None and chip is not None:
        rich.print(
            f"Least time of a step: arithmetic {limits.compute_seconds:.2f} s at {chip.bf16_flops / 1e12:.0f} TFLOP/s, HBM "
            f"{limits.hbm_seconds:.2f} s at {chip.hbm_bytes / 1e9:.0f} GB/s, links {limits.link_seconds:.2f} s at "
            f"{chip.ici_bytes / 1e9:.0f} GB/s (between slices {chip.dcn_bytes / 1e9:.1f}): "
            f"{limits.step_seconds:.2f} s if all overlap."
        )


if __name__ == "__main__":
    main()
