"""The documentation, held to the code: its commands can be run, and its map of the files is whole."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from dsv3_jax.config.cli import load_config, parse_run
from tests.words import complaints

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PUBLISHED = str(ROOT / "tests/fixtures/published")
CONFIGS = sorted(f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py"))

Options = Callable[[tuple[str, ...]], set[str]]


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """(language, body) of every fenced block of a Markdown text."""
    return re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Lines that run make or a program of ours: continued lines joined, prompts, variables and srun taken off."""
    lines = (
        re.sub(r"^(\$ )?(\w+=\S+ )*(srun (--\S+ )*)?", "", line.strip()) for line in text.replace("\\\n", " ").splitlines()
    )
    return [line for line in lines if re.match(r"(make|python [\w/]+\.py|python -m dsv3_jax\.\w+)( |$)", line)]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def option_names(words: list[str]) -> list[str]:
    return [word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")]


def problems(command: str, options: Options) -> list[str]:
    """What would stop a command before it does any work; `options` gives the options of a program by its words."""
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
        return [f"make has no target {target}" for target in targets if target not in make_targets()]
    program, arguments = (tuple(words[1:3]), words[3:]) if words[1] == "-m" else (tuple(words[1:2]), words[2:])
    file = pathlib.Path(program[-1].replace(".", "/") + ".py") if len(program) == 2 else pathlib.Path(program[0])
    if not (ROOT / file).is_file() and not (ROOT / file.with_suffix("") / "__main__.py").is_file():
        return [f"{file} does not exist"]
    given = option_names(arguments)
    found = [f"{file} has no option --{name}" for name in given if name not in options(program)]
    if program == ("train.py",) and not found and "--help" not in arguments:
        # What the command before it makes is not there.
        arguments = ["configs/tiny.py" if re.fullmatch(r"runs/\w+/config\.json", word) else word for word in arguments]
        if "--init-from" in arguments:
            arguments[arguments.index("--init-from") + 1] = PUBLISHED
        try:
            parse_run(arguments)
        except ValueError as error:
            found.append(str(error))
    return found


# Answers each line of words with one of JSON: the exit code and the output of `python WORDS --help`. One process imports what
# all programs do, and forks for each.
HELP = """
import json, os, pathlib, runpy, sys, tempfile
import dsv3_jax.infer.engine, dsv3_jax.plan.program
for line in sys.stdin:
    words = line.split()
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.argv = [words[-1], "--help"]
            sys.path[0] = "." if words[0] == "-m" else str(pathlib.Path(words[0]).parent)
            if words[0] == "-m":
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(words[0], run_name="__main__")
            sys.exit()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        print(json.dumps([code, output.read().decode()]), flush=True)
"""


@pytest.fixture(scope="module")
def options() -> Iterator[Options]:
    """The options that the `--help` of a program lists; each program is started once."""
    listed: dict[tuple[str, ...], set[str]] = {}
    command, wide = [sys.executable, "-c", HELP], os.environ | {"COLUMNS": "200"}
    with subprocess.Popen(command, cwd=ROOT, env=wide, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as helper:
        assert helper.stdin is not None
        assert helper.stdout is not None

        def of(program: tuple[str, ...]) -> set[str]:
            if program not in listed:
                print(*program, file=helper.stdin, flush=True)
                code, output = json.loads(helper.stdout.readline())
                assert code == 0, f"python {' '.join(program)} --help failed: {output}"
                listed[program] = set(option_names(re.findall(r"--[\w.-]+", output)))
            return listed[program]

        yield of


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_of_the_documents_run(document: str, options: Options, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    blocks = fenced_blocks((ROOT / document).read_text(encoding="utf-8"))
    found = {
        command: problems(command, options)
        for language, body in blocks
        if language in ("", "sh", "bash", "shell", "console")
        for command in commands(body)
    }
    assert {command: what for command, what in found.items() if what} == {}
    if document == "README.md":
        assert {"make train", "make test"} <= {command.partition("#")[0].strip() for command in found}


@pytest.mark.parametrize("config", CONFIGS)
def test_commands_of_the_configs_run(config: str, options: Options, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    load_config(config, PUBLISHED)
    text = (ROOT / config).read_text(encoding="utf-8").split('"""')[1]
    found = commands(text)
    assert any(f"--config {config} " in command for command in found), f"the docstring of {config} gives no command for it"
    assert {command: problems(command, options) for command in found} == {command: [] for command in found}


def test_wrong_commands_are_found(options: Options):
    assert problems("make tests", options) == ["make has no target tests"]
    assert problems("make test ARGS='-k mla' -j2", options) == []
    assert problems("python -m dsv3_jax.nothing --json", options) == ["dsv3_jax/nothing.py does not exist"]
    assert problems("python train.py --run-dirs x  # a comment", options) == ["train.py has no option --run_dirs"]
    assert "give an integer" in problems("python train.py --train.steps many", options)[0]
    assert "does not exist" in problems("python train.py --config configs/nothing.py", options)[0]
    assert problems("python train.py --config runs/a/config.json --resume", options) == []


def test_commands_are_read_from_a_text():
    lines = [
        "$ make test",
        "A=-s make lint",
        "srun --quiet --label python a.py --resume",
        "makes nothing",
        "python a/b.py \\",
        "--resume",
        "ls",
        "    python -m dsv3_jax.plan",
    ]
    assert commands("\n".join(lines)) == [
        "make test",
        "make lint",
        "python a.py --resume",
        "python a/b.py  --resume",
        "python -m dsv3_jax.plan",
    ]


def test_the_map_of_files_is_current() -> None:
    spec = importlib.util.spec_from_file_location("make_map", ROOT / "docs" / "make_map.py")
    make_map = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_map)
    generated = make_map.generate()
    assert make_map.TARGET.read_text(encoding="utf-8") == generated, "docs/files.md is stale; run make map"
    for path in (ROOT / "dsv3_jax").rglob("*.py"):
        assert path.name == "__init__.py" or f"[{path.relative_to(ROOT)}]" in generated


def test_the_core_is_twelve_files_of_an_afternoon() -> None:
    text = (ROOT / "docs" / "core.md").read_text(encoding="utf-8")
    named = re.findall(r"^\d+\. \[([\w/.]+)\]\(\.\./\1\)", text, flags=re.MULTILINE)
    assert len(set(named)) == 12
    assert sum(len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in named) <= 4500


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 160
    assert max(map(len, lines)) <= 120


def test_words_are_found() -> None:
    """The lint sees openings of docstrings, of attributes too, and words in comments, and leaves code and strings alone."""
    text = '"""What it is."""\nx = 1\n"""How many."""\ny = "told"  # as told\n\n\ndef f():\n    """Return it anew."""\n'
    openings, words = complaints("a.py", text)
    assert [line.partition(": ")[0] for line in openings] == ["a.py:1", "a.py:3"]
    assert words == ["a.py:8: 'anew'", "a.py:4: 'told'"]
