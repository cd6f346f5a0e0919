"""The table of what programs take of a device's memory, and whether they fit."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from dsv3_jax.parallel.devices import Chip
from dsv3_jax.plan.compiled import GIB


def amount(value: float) -> str:
    """Two decimals, or three digits where they would show less."""
    return f"{value:.2f}" if abs(value) >= 1 or not value else f"{value:.3g}"


def print_memory(
    console: Console,
    columns: Sequence[str],
    rows: dict[str, Sequence[int | None]],
    chip: Chip | None,
    fits: bool | None,
    title: str | None = None,
) -> None:
    """Prints bytes in GiB, the chip's memory below them, and the verdict.

    Args:
      console: where to.
      columns: headings: of the names, and of each program.
      rows: by name, the bytes of each program; None is unknown.
      chip: None for CPU devices.
      fits: None says nothing of it.
      title: of the table.
    """
    table = Table(*columns, title=title)
    programs = table.columns[1:]
    for column in programs:
        column.justify = "right"
    hbm = None if chip is None else chip.hbm_gib * GIB
    for name, sizes in {**rows, "HBM a program can use": [hbm] * len(programs)}.items():
        table.add_row(name, *("?" if size is None else amount(size / GIB) for size in sizes))
    console.print(table)
    if fits is not None:
        console.print("It fits." if fits else "[bold]It does not fit.[/bold]")
