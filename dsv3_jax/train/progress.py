"""The progress bar of a run: step, loss, speed, the largest load violation, the tokens seen and the time left."""

from __future__ import annotations

import collections
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column

from dsv3_jax.train.amounts import in_short, in_time

_REMEMBERED_ROWS = 20


class ProgressBar:
    """A bar on a terminal; where the output is no terminal, a line every tenth of the run. A context manager.

    Progress is counted in tokens, for batches may grow. The time left is that of the tokens to come at the speed of the last
    twenty logged rows, with whatever went on between them: held-out losses and checkpoints take time too.
    """

    def __init__(self, first_tokens: int, tokens: int, *, shows: bool = True) -> None:
        """Args: first_tokens: seen before this start; tokens: of the whole run; shows: whether this process prints."""
        self._shows = shows
        self._tokens = tokens
        self._printed = self._tenths(first_tokens)
        self._seen: collections.deque[tuple[float, int]] = collections.deque(maxlen=_REMEMBERED_ROWS + 1)
        description = TextColumn("{task.description}", table_column=Column())  # On a narrow terminal it takes several lines.
        columns = description, BarColumn(bar_width=20), TaskProgressColumn(), TextColumn("{task.fields[amount]}")
        self._console = Console()
        self._progress = Progress(*columns, console=self._console, disable=not (shows and self._console.is_terminal))
        self._task = self._progress.add_task("compiling", total=tokens, completed=first_tokens, amount="")

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, row: dict[str, float]) -> None:
        """Shows a logged row: `step`, `tokens`, `max_violation`, `speed`'s figures; `main_loss` unless the step was skipped."""
        if not self._shows:
            return
        tokens = int(row["tokens"])
        self._seen.append((time.perf_counter(), tokens))
        loss = f"loss {row['main_loss']:.3f}" if "main_loss" in row else "skipped"
        text = f"step {row['step']}  {loss}  {_speed_of(row)}  violation {row['max_violation']:.2f}"
        amount = f"{in_short(tokens)} of {in_short(self._tokens)} tokens"
        if speed := self._speed(row):
            amount += f", {in_time((self._tokens - tokens) / speed)} left"
        self._progress.update(self._task, completed=tokens, description=text, amount=amount)
        if not self._console.is_terminal and self._tenths(tokens) > self._printed:
            self._printed = self._tenths(tokens)
            print(f"{text}  {amount}", flush=True)

    def _tenths(self, tokens: int) -> int:
        return 10 * tokens // self._tokens

    def _speed(self, row: dict[str, float]) -> float | None:
        """Tokens a second, by the clock; with nothing to compare with yet, what the row says, if it does."""
        (then, before), (now, tokens) = self._seen[0], self._seen[-1]
        return (tokens - before) / (now - then) if tokens > before and now > then else row.get("tokens_per_second")

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if not self._shows:
            return
        self._progress.print(text) if self._console.is_terminal else print(text, flush=True)


def _speed_of(row: dict[str, float]) -> str:
    """Tokens a second, and what that comes to; the first row of a start may have none."""
    return f"{row['tokens_per_second']:,.0f} tokens/s{_of_machine(row)}" if "tokens_per_second" in row else "compiled"


def _of_machine(row: dict[str, float]) -> str:
    """What the speed comes to on these devices, if the row says so."""
    if "mfu" in row:
        return f" ({row['mfu']:.1%} MFU)"
    return f" ({row['model_flops_per_second'] / 1e12:.2g} model TFLOP/s)" if "model_flops_per_second" in row else ""
