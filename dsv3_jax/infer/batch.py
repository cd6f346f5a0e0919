"""The completions of a batch file: all lines at once to the engine, each written when it ends."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dsv3_jax.data.chat_template import ChatTemplate, closing_tokens
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.infer.completion_lines import CompletionLines
from dsv3_jax.infer.engine import Engine
from dsv3_jax.infer.prompt_lines import PromptLine
from dsv3_jax.infer.report import Speed
from dsv3_jax.infer.request import Request
from dsv3_jax.infer.sampling import SamplingParams


def submit_lines(
    engine: Engine,
    lines: Sequence[PromptLine],
    defaults: SamplingParams,
    template: ChatTemplate | None,
    tokenizer: Tokenizer,
) -> dict[Request, PromptLine]:
    """Hands all lines to the engine, which begins with the first step.

    Raises:
      ValueError: naming the line, if the engine or the template refuses one.
    """
    submitted: dict[Request, PromptLine] = {}
    closing = () if template is None else closing_tokens(template, tokenizer, engine.config.vocab_size)
    for line in lines:
        prompt, params = line.encoded(template, tokenizer), line.params(defaults)
        try:
            submitted[engine.submit(prompt, params.ending_at(closing) if line.is_chat else params)] = line
        except ValueError as error:
            raise ValueError(f"{line.where}: {error}") from error
    return submitted


def complete_lines(engine: Engine, submitted: dict[Request, PromptLine], completions: CompletionLines, speed: Speed) -> None:
    """Works until every request has ended, and writes each completion when it has."""
    left = dict(submitted)
    with BatchProgress(len(left), len(completions.done)) as progress:
        while left:
            for update in engine.step():
                speed.note(len(update.tokens))
                if update.request.finish_reason is not None:
                    completions.write(left.pop(update.request), update.request.completion)
                    progress.show(len(left), speed)


class BatchProgress:
    """A bar on a terminal; where stderr is no terminal, a line every tenth of the lines. A context manager."""

    def __init__(self, left: int, done: int) -> None:
        """Args: left: lines to complete; done: lines that an earlier start has completed."""
        self._total = left + done
        self._printed = self._tenths(done)
        self._console = Console(stderr=True)
        columns = BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._progress.add_task("compiling", total=self._total, completed=done)

    def __enter__(self) -> BatchProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, left: int, speed: Speed) -> None:
        """Shows how many lines are left."""
        done = self._total - left
        self._progress.update(self._task, completed=done, description=f"lines, {speed.count} tokens")
        if not self._console.is_terminal and self._tenths(done) > self._printed:
            self._printed = self._tenths(done)
            print(f"{done} of {self._total} lines, {speed.count} tokens", file=sys.stderr, flush=True)

    def _tenths(self, done: int) -> int:
        return 10 * done // self._total
