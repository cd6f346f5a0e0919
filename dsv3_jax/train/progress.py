"""The progress bar of a run: step, loss, speed, the largest load violation and the time left."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class ProgressBar:
    """A bar on a terminal; where the output is no terminal, a line every tenth of the run. A context manager."""

    def __init__(self, first_step: int, steps: int, *, shows: bool = True) -> None:
        """Args: shows: whether this process prints; only one of a run should."""
        self._shows = shows
        self._steps = steps
        self._line_every = max(steps // 10, 1)
        self._printed = first_step // self._line_every
        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
        self._console = Console()
        self._progress = Progress(*columns, console=self._console, disable=not (shows and self._console.is_terminal))
        self._task = self._progress.add_task("compiling", total=steps, completed=first_step)

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, row: dict[str, float]) -> None:
        """Shows a logged row of metrics."""
        if not self._shows:
            return
        step = int(row["step"])
        text = (
            f"step {step}  loss {row['main_loss']:.3f}  {row['tokens_per_second']:,.0f} tokens/s  "
            f"violation {row['max_violation']:.2f}"
        )
        self._progress.update(self._task, completed=step, description=text)
        if not self._console.is_terminal and step // self._line_every > self._printed:
            self._printed = step // self._line_every
            print(f"{text}  of {self._steps} steps", flush=True)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if not self._shows:
            return
        self._progress.print(text) if self._console.is_terminal else print(text, flush=True)
