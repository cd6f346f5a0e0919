"""`python -m dsv3_jax.plan --config C [--mode serve] [--topology v5p:8x8x8 [--slices 2] | --devices N] [--json]`.

Without a topology: parameters by module, and where each array would live. With one, the training step is compiled for that
machine, and its memory, its traffic and the least time it can take are printed; --devices N compiles for N CPU devices
instead, which shows that the program exists and what it sends, not what it takes on an accelerator. With --mode serve it is the
programs of generation that are compiled (`serve_report.py`).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any, Literal

from jax.sharding import AbstractMesh
from rich.console import Console
from rich.table import Table

from dsv3_jax.config import Config, MeshConfig
from dsv3_jax.config.checks import check
from dsv3_jax.config.cli import cli_main, parse_with_config
from dsv3_jax.model.flops import flops_per_token
from dsv3_jax.parallel.devices import Chip
from dsv3_jax.parallel.mesh import AXES, check_fits
from dsv3_jax.plan.program import GIB, PROVES, Program, Roofline, bound, compile_program
from dsv3_jax.plan.serve_report import report_serving
from dsv3_jax.plan.serving import Serving
from dsv3_jax.plan.tables import Row, count_parameters, print_memory, reach, sharding_table, spec_text
from dsv3_jax.plan.topology import chip_of, mesh_of_all, tpu_devices, use_cpu_devices

_COUNTS = "parameters_main", "parameters_mtp", "parameters_active", "experts", "experts_active"
CPU_PROVES = (
    "Compiled for CPU devices: the traffic is that of the CPU's exchange, the memory that of the CPU's compiler, and neither "
    "says whether the program fits an accelerator."
)


@dataclasses.dataclass(frozen=True)
class PlanFlags:
    """What stands beside the fields of the run config."""

    config: str = "configs/tiny.py"
    """Python file that exposes `config`, a Config; the fields below override it."""
    init_from: str | None = None
    """Short for --train.init-from: the checkpoint whose model the config is a function of."""
    mode: Literal["train", "serve"] = "train"
    """What to compile: the training step, or prefill and decode."""
    serve: Serving = dataclasses.field(default_factory=Serving)
    """What is served, with --mode serve. Of its mesh, fields that are not named are 1; if none is, it is the one that takes
    least memory."""
    topology: str | None = None
    """Accelerator topology to compile for, one slice of it, such as v5p:8x8x8."""
    slices: int = 1
    """How many such slices; mesh.data runs across them."""
    devices: int | None = None
    """Compile for so many CPU devices instead."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def __post_init__(self) -> None:
        check(self.slices >= 1, f"--slices is {self.slices}; it must be at least 1")
        check(self.devices is None or self.devices >= 1, f"--devices is {self.devices}; it must be at least 1")
        check(self.topology is None or self.devices is None, "--topology and --devices exclude each other; keep one")
        check(self.slices == 1 or self.topology is not None, "--slices belongs to --topology; name the topology of one slice")
        if self.mode == "serve":
            check(self.topology is not None or self.devices is not None, "--mode serve takes --topology or --devices")
            check(self.slices == 1, f"--slices is {self.slices}; slices serve each by itself, so leave it out")
        else:
            check(self.serve == Serving(), "--serve.* belongs to --mode serve; add that")


@cli_main
def main() -> None:
    """The command line."""
    flags, config = parse_with_config(PlanFlags, description=__doc__ or "", prepare=_without_mesh_of_training)
    compiled = flags.topology is not None or flags.devices is not None
    chip = None if flags.topology is None else chip_of(flags.topology)
    if flags.mode == "serve":
        _check_no_training_fields(sys.argv[1:])
        devices = tpu_devices(flags.topology) if flags.topology else use_cpu_devices(flags.devices or 1)
        named = any(argument.startswith("--mesh.") for argument in sys.argv[1:])
        serving_mesh = config.mesh if named else None
        report_serving(config.model, flags.serve, devices, serving_mesh, chip, title=flags.config, json=flags.json)
        return
    mesh: Any = _smallest_mesh(config)
    if compiled:  # First of all: once JAX runs, it takes no further CPU devices.
        devices = tpu_devices(flags.topology, flags.slices) if flags.topology else use_cpu_devices(flags.devices or 1)
        mesh = mesh_of_all(config.mesh, devices, "fsdp")
        check_fits(config, mesh)
    result: dict[str, Any] = count_parameters(config.model)
    rows = sharding_table(config, mesh)
    result |= {"devices": mesh.size, "mesh": dict(mesh.shape), "sharding": _sharding_json(rows)}
    program = limits = None
    if compiled:
        program = compile_program(config, mesh, chip, flags.slices)
        limits = None if chip is None or not program.fits else bound(config, mesh, program, chip)
        result |= _program_json(config, program, chip, limits)
        result |= {f"reachable_{places}": count for places, count in reach(config.model, mesh)._asdict().items()}
    if flags.json:
        print(json.dumps(result))
        return
    console = Console()
    _print_parameters(console, flags.config, result)
    _print_sharding(rows, result)
    if program is not None:
        _print_program(console, config, program, chip, limits, flags)
        console.print(
            f"The experts of a token live on at most {result['reachable_devices']} of the {mesh.shape['expert']} devices of "
            f"its expert group, on at most {result['reachable_hosts']} hosts."
        )
        console.print(CPU_PROVES if chip is None else PROVES)


def _without_mesh_of_training(flags: PlanFlags, config: Config) -> Config:
    """Serving takes of the mesh what the command line names: the config's own is that of training."""
    return dataclasses.replace(config, mesh=MeshConfig()) if flags.mode == "serve" else config


def _check_no_training_fields(arguments: Sequence[str]) -> None:
    groups = {field.name for field in dataclasses.fields(Config)} - {"model", "mesh"}
    for argument in arguments:
        name = argument.partition("=")[0]
        group = name.removeprefix("--").partition(".")[0]
        useless = name.startswith("--") and "." in name and group in groups
        if useless and name.replace("_", "-") != "--train.init-from":
            raise ValueError(f"{name} would change nothing of what --mode serve compiles; leave it out")


def _smallest_mesh(config: Config) -> AbstractMesh:
    """The config's mesh with -1 standing for 1: where arrays live does not depend on how many devices there are."""
    sizes = [max(size, 1) for size in dataclasses.astuple(config.mesh)]
    return AbstractMesh(tuple(sizes), AXES)


def _sharding_json(rows: list[Row]) -> dict[str, Any]:
    return {
        row.path: {
            "shape": row.shape,
            "dtype": row.dtype,
            "logical_axes": row.logical_axes,
            "spec": row.spec,
            "bytes_per_device": row.bytes_per_device,
        }
        for row in rows
    }


def _program_json(config: Config, program: Program, chip: Chip | None, limits: Roofline | None) -> dict[str, Any]:
    model, train = config.model, config.train
    return {
        "argument_bytes": program.argument_bytes,
        "temporary_bytes": program.temporary_bytes,
        "total_bytes": program.total_bytes,
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
        "kernels": program.kernels,
        "collectives": None if program.collectives is None else [dataclasses.asdict(one) for one in program.collectives],
        "flops_per_token": flops_per_token(model, train.sequence_length)._asdict(),
        "roofline_seconds": None if limits is None else limits._asdict(),
        "compile_seconds": program.compile_seconds,
    }


def _print_parameters(console: Console, title: str, result: dict[str, Any]) -> None:
    table = Table("module", "parameters", title=title)
    table.columns[1].justify = "right"
    for name, count in result["modules"].items():
        table.add_row(name, f"{count:,}")
    table.add_section()
    for name in _COUNTS:
        table.add_row(name.replace("_", " "), f"{result[name]:,}")
    console.print(table)


def _print_sharding(rows: list[Row], result: dict[str, Any]) -> None:
    """One line an array, as wide as it takes: a table cut to the width of a terminal would cut the paths."""
    print(f"\n{result['devices']} devices: {' x '.join(f'{axis} {size}' for axis, size in result['mesh'].items())}")
    lines = [
        (row.path, str(list(row.shape)), str(row.logical_axes or "-"), spec_text(row.spec), f"{row.bytes_per_device:,}")
        for row in rows
    ]
    lines = [("array", "shape", "logical axes", "split along", "bytes a device"), *lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    print(f"all: {sum(row.bytes_per_device for row in rows):,} bytes a device\n")


def _print_program(
    console: Console, config: Config, program: Program, chip: Chip | None, limits: Roofline | None, flags: PlanFlags
) -> None:
    where = f"{flags.slices} x {flags.topology}" if flags.topology else f"{flags.devices} CPU devices"
    parts = f" of {config.train.micro_batches} micro-batches" if config.train.micro_batches > 1 else ""
    rows: dict[str, Sequence[int | None]] = {
        "parameters": [program.parameter_bytes],
        "optimizer": [program.optimizer_bytes],
        "temporaries": [program.temporary_bytes],
        "in all, by the compiler": [program.total_bytes],
    }
    title = f"training step{parts} compiled for {where} in {program.compile_seconds:.0f} s"
    print_memory(console, ("a device", "GiB"), rows, chip, program.fits, title)
    if program.collectives:
        traffic = Table("collective", "along", "times a step", "GB sent a step and device")
        for column in traffic.columns[2:]:
            column.justify = "right"
        for one in program.collectives:
            more = " and more where rounds repeat" if one.data_dependent else ""
            along = one.axis + (", between slices" if one.across_slices else "")
            traffic.add_row(one.kind + more, along, str(one.count), f"{one.bytes / 1e9:.3f}")
        console.print(traffic)
    if program.kernels:
        console.print(f"Pallas kernels in the program: {', '.join(program.kernels)}.")
    flops = flops_per_token(config.model, config.train.sequence_length)
    console.print(
        f"{flops.causal / 1e9:.1f} GFLOP a token, attention counted causally ({flops.non_causal / 1e9:.1f} if not): six a "
        "weight that a token is multiplied with, and 6 N (H + P + W) a key it attends to, in each layer."
    )
    if limits is not None and chip is not None:
        console.print(
            f"Least time of a step: arithmetic {limits.compute_seconds:.2f} s at {chip.bf16_flops / 1e12:.0f} TFLOP/s, HBM "
            f"{limits.hbm_seconds:.2f} s at {chip.hbm_bytes / 1e9:.0f} GB/s, links {limits.link_seconds:.2f} s at "
            f"{chip.ici_bytes / 1e9:.0f} GB/s (between slices {chip.dcn_bytes / 1e9:.1f}): "
            f"{limits.step_seconds:.2f} s if all overlap."
        )


if __name__ == "__main__":
    main()
