"""Completion of a file of prompts (JSON lines): all are queued at once, each completion is written as soon as it ends."""

from __future__ import annotations

import dataclasses
import difflib
import fcntl
import json
import pathlib
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dsv3_jax.config import ModelConfig
from dsv3_jax.config.checks import check
from dsv3_jax.data.chat_template import (
    ASSISTANT,
    ChatTemplate,
    Message,
    closing_tokens,
    encode_prompt,
    read_messages,
    read_switches,
    read_tools,
)
from dsv3_jax.data.sources import paired
from dsv3_jax.data.storage import digest
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.files import write_whole
from dsv3_jax.infer.engine import Engine
from dsv3_jax.infer.report import Speed
from dsv3_jax.infer.request import Completion, Request, token_ids
from dsv3_jax.infer.sampling import SamplingParams


def encode_lines(
    lines: Sequence[PromptLine],
    config: ModelConfig,
    template: ChatTemplate | None,
    tokenizer: Tokenizer,
    *,
    switches: Mapping[str, Any] | None = None,
    plain: bool = False,
) -> list[list[int]]:
    """Return the token ids of each line's prompt.

    Args:
      lines: the lines.
      config: the model.
      template: chat template; None if no line needs one.
      tokenizer: the checkpoint's.
      switches: variables of the template for all lines.
      plain: special tokens that a "prompt" spells are text.

    Raises:
      ValueError: naming the line, if its prompt is empty, or the template refuses it.
    """
    encoded = []
    for line in lines:
        try:
            encoded.append(line.encoded(config, template, tokenizer, switches or {}, plain))
        except ValueError as error:
            raise ValueError(f"{line.where}: {error}") from error
    return encoded


def submit_lines(
    engine: Engine,
    lines: Iterable[tuple[PromptLine, list[int]]],
    defaults: SamplingParams,
    template: ChatTemplate | None,
    tokenizer: Tokenizer,
) -> dict[Request, PromptLine]:
    """Queue every line with its ids for `step`; return the line of each request. Chats also end at `closing_tokens`.

    Raises:
      ValueError: naming the first line that the engine refuses; those before it stay queued.
    """
    submitted: dict[Request, PromptLine] = {}
    closing = () if template is None else closing_tokens(template, tokenizer, engine.config.vocab_size)
    for line, prompt in lines:
        try:
            params = line.params(defaults)
            submitted[engine.submit(prompt, params.ending_at(closing) if line.is_chat else params)] = line
        except ValueError as error:
            raise ValueError(f"{line.where}: {error}") from error
    return submitted


def read_otherwise_before(
    lines: Sequence[PromptLine], ids: Sequence[list[int]], config: ModelConfig, tokenizer: Tokenizer
) -> PromptLine | None:
    """Return the first line for which version 0.2.0 made other ids; None if there is none.

    It read no special tokens in prompts, put the BOS token in front of all of them, marked those that messages spell, closed an
    answer at the end, and left roles and nulls as they are.
    """
    bos = [] if config.bos_token_id is None else [config.bos_token_id]
    for line, now in zip(lines, ids, strict=True):
        if line.is_chat:
            spelt = any(token in json.dumps(line.content, ensure_ascii=False) for token in tokenizer.added_ids)
            if spelt or not line.is_as_written or line.content[-1]["role"] == ASSISTANT:  # type: ignore[index]
                return line
        elif isinstance(line.content, str) and now != bos + tokenizer.encode(line.content):
            return line
    return None


def complete_lines(engine: Engine, submitted: dict[Request, PromptLine], completions: CompletionLines, speed: Speed) -> int:
    """Step the engine until all requests have ended; write each completion as it ends; return the number of errors.

    stderr shows the progress: a bar if it is a terminal, else one line after every tenth of the batch.
    """
    left, done, failed = dict(submitted), len(completions.done), 0
    total = done + len(left)
    console = Console(stderr=True)
    columns = BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("compiling", total=total, completed=done)
        while left:
            for update in engine.step():
                speed.note(len(update.tokens))
                if update.request.finish_reason is None:
                    continue
                completions.write(left.pop(update.request), update.request.completion)
                done += 1
                failed += update.request.error is not None
                progress.update(bar, completed=done, description=f"lines, {speed.count} tokens")
                if not console.is_terminal and 10 * done // total > 10 * (done - 1) // total:
                    print(f"{done} of {total} lines, {speed.count} tokens", file=sys.stderr, flush=True)
    return failed


# ----------------------------------------------------------------------------------------------------------------------
# Prompts of a batch file: one JSON object a line, all of them checked before anything is generated.


SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingParams))
CHAT_KEYS = "tools", "chat_template_kwargs"
KEYS = ("prompt", "messages", "id", "add_special_tokens", *CHAT_KEYS, *SAMPLING)


@dataclasses.dataclass(frozen=True)
class PromptLine:
    """One line of a batch file: a prompt or chat messages, and the sampling parameters that it sets."""

    index: int
    """Number of the line in the file, from 0; empty lines count too."""
    where: str
    """<path>:<line number from 1>, the beginning of error messages."""
    content: str | list[int] | list[Message]
    is_chat: bool
    """True if `content` is a list of chat messages; False for text or token ids."""
    id: str | int | None
    sampling: dict[str, Any]
    """The `SamplingParams` fields that the line itself sets, by name."""
    tools: list[Any] | None = None
    switches: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Variables of the chat template."""
    add_special_tokens: bool = True
    """False: a prompt is text alone, without special tokens in it or in front."""
    is_as_written: bool = True
    """True if `content` is what the file holds, without roles or nulls changed."""

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """Return `defaults` with the line's own fields. Without a seed of its own it gets defaults.seed + index, mod 2^32."""
        seed = (defaults.seed + self.index) % 2**32
        return dataclasses.replace(defaults, **({"seed": seed} | self.sampling))

    def encoded(
        self,
        config: ModelConfig,
        template: ChatTemplate | None,
        tokenizer: Tokenizer,
        switches: Mapping[str, Any],
        plain: bool,
    ) -> list[int]:
        """Return the ids of the prompt; arguments and errors as of `encode_lines`."""
        if self.is_chat:
            assert template is not None
            return encode_prompt(template, tokenizer, self.content, tools=self.tools, **{**switches, **self.switches})
        content: Any = self.content
        if not self.add_special_tokens and isinstance(content, str):
            content = tokenizer.encode_documents([content])[0]
        return token_ids(content, config, tokenizer, plain=plain)


@dataclasses.dataclass(frozen=True)
class PromptLines:
    """All lines of a batch file but the empty ones."""

    lines: list[PromptLine]
    digest: str
    """Hexadecimal hash of the file's bytes."""

    @property
    def need_template(self) -> bool:
        """True if at least one line holds chat messages, which only a chat template can encode."""
        return any(line.is_chat for line in self.lines)


def read_prompt_lines(path: str) -> PromptLines:
    """Read a batch file and check the fields of every line; empty lines are skipped, but counted.

    Raises:
      ValueError: naming the first faulty line and its fault; or if the file does not exist or has no line.
    """
    file = epath.Path(path).expanduser()
    check(file.is_file(), f"--batch-file {path} does not exist; name a file with one JSON object a line")
    data = file.read_bytes()
    texts = enumerate(data.split(b"\n"))
    lines = [_line(index, f"{path}:{index + 1}", text) for index, text in texts if text.strip()]
    check(bool(lines), f'--batch-file {path} is empty; write one object a line, such as {{"prompt": "..."}}')
    return PromptLines(lines, digest(data))


def _line(index: int, where: str, text: bytes) -> PromptLine:
    try:
        values = json.loads(text.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON ({error}); each line must be one object") from error
    check(isinstance(values, dict), f"{where} is {type(values).__name__}, not an object; each line must be one object")
    unknown = [key for key in values if key not in KEYS]
    if unknown:
        (nearest,) = difflib.get_close_matches(unknown[0], KEYS, n=1, cutoff=0)
        raise ValueError(f'{where} has the unknown key "{unknown[0]}"; the nearest is "{nearest}" (all: {", ".join(KEYS)})')
    values = {key: value for key, value in values.items() if value is not None}  # As over HTTP.
    kinds = [key for key in ("prompt", "messages") if key in values]
    check(len(kinds) == 1, f'{where} has {" and ".join(kinds) or "no prompt"}; give either "prompt" or "messages"')
    is_chat = kinds == ["messages"]
    misplaced = [key for key in (("add_special_tokens",) if is_chat else CHAT_KEYS) if key in values]
    check(not misplaced, f'{where} has "{" and ".join(misplaced)}" with "{kinds[0]}", where it means nothing; leave it out')
    name, special = values.get("id"), values.get("add_special_tokens", True)
    is_text = isinstance(name, str) and paired(name) == name
    is_integer = isinstance(name, int) and not isinstance(name, bool)
    check(name is None or is_text or is_integer, f"{where}: id is {name!r}; use an integer or valid Unicode text")
    check(isinstance(special, bool), f"{where}: add_special_tokens is {special!r}; use true or false")
    try:
        content: Any = read_messages(values["messages"]) if is_chat else _prompt(values["prompt"])
        tools, switches = read_tools(values.get("tools")), read_switches(values.get("chat_template_kwargs"))
        sampling = _sampling(values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    is_as_written = content == values["messages" if is_chat else "prompt"]
    return PromptLine(index, where, content, is_chat, name, sampling, tools, switches, special, is_as_written)


def _prompt(prompt: Any) -> str | list[int]:
    is_ids = isinstance(prompt, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt)
    check(isinstance(prompt, str) or is_ids, f"prompt is {prompt!r:.100}; use a string or a list of token ids")
    return prompt


def _sampling(values: dict[str, Any]) -> dict[str, Any]:
    """Return the `SamplingParams` fields among `values`, logit_bias with integer keys. Raises ValueError for a wrong value."""
    fields = {name: values[name] for name in SAMPLING if name in values}
    biases = fields.get("logit_bias")
    if isinstance(biases, dict):  # The keys of JSON are texts.
        fields["logit_bias"] = {int(key) if key.isdecimal() else key: bias for key, bias in biases.items()}
    SamplingParams(**fields)
    return fields


# ----------------------------------------------------------------------------------------------------------------------
# Completions of a batch file: one JSON object a line, in the order in which they end. A second start continues the file.


class CompletionLines:
    """Output file, locked from creation until the context exits. Each completion is flushed as soon as it is written."""

    def __init__(
        self, path: str, settings: dict[str, Any], indices: Collection[int], read_otherwise: PromptLine | None = None
    ) -> None:
        """Open and lock the file; create it with <path>.settings.json, or check it and cut off an incomplete last line.

        Args:
          path: the file, which may hold completions of an earlier start.
          settings: JSON values that an existing file must have been made with, or that a new one is made with.
          indices: indices of all prompts of the batch; a line of the file with another index is an error.
          read_otherwise: a prompt of which version 0.2.0 made other ids, so that its files are not continued; None for none.

        Raises:
          ValueError: if it has other settings or other lines, is locked by another process, or fails `check_place`.
        """
        self._path = pathlib.Path(path).expanduser()
        settings, settings_path = json.loads(json.dumps(settings)), pathlib.Path(f"{self._path}.settings.json")
        check_place(path)
        is_new = not self._path.exists() or not self._path.stat().st_size
        if not is_new:
            self._check_same_settings(settings, settings_path, read_otherwise)
        self._file = self._path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_new:
                write_whole(epath.Path(settings_path), json.dumps(settings, indent=2) + "\n")
            self.done = self._read(indices)
            """Indices of the prompts completed by earlier starts; `write` adds none."""
        except BlockingIOError as error:
            self._file.close()
            raise ValueError(f"{self._path} is being written by another process; wait until it has ended") from error
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> CompletionLines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, line: PromptLine, completion: Completion) -> None:
        """Append the completion of one prompt as a line of JSON, and flush it."""
        values: dict[str, Any] = {"index": line.index} | ({} if line.id is None else {"id": line.id})
        values |= {"text": completion.text, "tokens": completion.tokens, "finish_reason": completion.finish_reason}
        if completion.error is not None:
            values["error"] = completion.error
        if completion.logprobs is not None:
            values["logprobs"] = [entry._asdict() for entry in completion.logprobs]
        self._file.write(json.dumps(values, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n")
        self._file.flush()

    def _check_same_settings(self, settings: dict[str, Any], path: pathlib.Path, read_otherwise: PromptLine | None) -> None:
        remedy = f"name another file, or delete {self._path.name} to start over"
        try:
            before = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self._path} exists, but the settings it was made with cannot be read ({error}); {remedy}"
            ) from error
        before = before if isinstance(before, dict) else {}
        if "token_ids" not in before and "token_ids" in settings:
            check(
                read_otherwise is None,
                f"{self._path} was begun by an older version, which made other tokens of "
                f"{read_otherwise and read_otherwise.where} (special tokens in prompts and answers were text); {remedy}",
            )
            before |= {name: settings[name] for name in ("token_ids", "ends") if name in settings}
        for name, value in settings.items():
            there = before.get(name)
            check(there == value, f"{self._path} was made with {name} {there!r}, not {value!r}; {remedy}")

    def _read(self, indices: Collection[int]) -> set[int]:
        """Return the prompt indices in the file; cut off a last line without newline. Raises ValueError for a faulty line."""
        *lines, torn = self._path.read_bytes().split(b"\n")
        done: set[int] = set()
        for number, line in enumerate(lines, 1):
            try:
                index = json.loads(line)["index"]
            except (ValueError, TypeError, KeyError):
                index = None
            is_one = isinstance(index, int) and index in indices
            check(is_one, f"{self._path}:{number} is no completion of this batch; restore the file, or delete it to start over")
            done.add(index)
        self._file.truncate(self._path.stat().st_size - len(torn))
        return done


def check_place(path: str, prompts: str | None = None) -> None:
    """Raise ValueError if the folder of `path` is missing, or if `path` is itself a folder or the same file as `prompts`."""
    place = pathlib.Path(path).expanduser()
    check(place.parent.is_dir(), f"{place.parent} does not exist; make the folder for {place.name}")
    check(not place.is_dir(), f"{path} is a folder; name a file for the completions")
    is_same = prompts is not None and place.exists() and place.samefile(pathlib.Path(prompts).expanduser())
    check(not is_same, f"{path} holds the prompts; name another file for the completions")
