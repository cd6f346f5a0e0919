"""Command lines of the programs: flags of their own, and every field of the run config under its dotted name.

`python train.py --config configs/tiny.py --train.steps 200 --mesh.expert 4` reads the file, sets the fields and checks
the result. tyro reads values by the types of the dataclasses and writes `--help` from their docstrings, with the
defaults of the chosen file. A mistake is a ValueError of one line, which `cli_main` prints.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import io
import os
import pathlib
import runpy
import shlex
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import tyro

from dsv3_jax.config.checks import check
from dsv3_jax.config.model import FORMER_EXCHANGES, ExpertExchange, ModelConfig, RopeScaling
from dsv3_jax.config.run import Config, group_type, model_to_train

Flags = TypeVar("Flags")

_TYPE_NAMES = {
    int: "an integer",
    float: "a number",
    str: "text",
    bool: "True or False",
    types.NoneType: "None",
    tuple[int, ...]: "several integers",
    tuple[str, str]: "two texts",
    tuple[str, str, str]: "three texts",
    tuple[str, ...]: "several texts",
    tuple[tuple[str, float], ...]: "texts, each followed by a number",
    tuple[tuple[float, float], ...]: "pairs of numbers",
}


@dataclasses.dataclass(frozen=True)
class DistributedFlags:
    """Address, number and index by which the processes of a run find each other; automatic on Cloud TPU and under SLURM."""

    coordinator: str | None = None
    """host:port of process 0."""
    num_processes: int | None = None
    """Number of processes; 1, without coordinator and process_id, runs a single process even under SLURM or on a pod."""
    process_id: int | None = None
    """Index of this process, from 0."""

    def __post_init__(self) -> None:
        given = [value is not None for value in dataclasses.astuple(self)]
        check(
            self.alone or any(given) == all(given),
            "--distributed.coordinator, .num-processes and .process-id belong together; give all three or none, or "
            "--distributed.num-processes 1 for a process by itself",
        )
        count, index = self.num_processes, self.process_id
        if count is not None and index is not None:
            check(0 <= index < count, f"--distributed.process-id is {index}; it must lie in 0..{count - 1} (num-processes - 1)")

    @property
    def alone(self) -> bool:
        """True if num_processes is 1 and the other two are None: a single process, which looks for no others."""
        return self.num_processes == 1 and self.coordinator is None and self.process_id is None


@dataclasses.dataclass(frozen=True)
class RunFlags:
    """Flags of train.py in addition to the fields of the run config."""

    config: str = "configs/tiny.py"
    """Python file that defines `config`, a Config or a function that makes one from the model of --init-from; or the
    config.json of a run. The fields below override it."""
    init_from: str | None = None
    """Short for --train.init-from."""
    run_dir: str | None = None
    """Folder of the run; None for runs/NAME after the Python file NAME.py, or for the folder of the config.json."""
    resume: bool = False
    """Continue from the newest checkpoint in the folder of the run; without any, start the run."""
    profile: str | None = None
    """Steps to trace into the run's profile/, the first and the one after the last: 10:13 traces steps 10, 11 and 12."""
    distributed: DistributedFlags = DistributedFlags()
    """Address, number and index by which the processes of a run find each other."""


class RunArguments(NamedTuple):
    """The command line of a run, resolved: the file's config with the overrides applied, and the flags."""

    config: Config
    run_dir: str
    resume: bool
    profile: str | None
    distributed: DistributedFlags


def load_config(path: str, init_from: str | None = None, stand_in: ModelConfig | None = None) -> Config:
    """Run a Python file, as in `configs/`, and return its `config`; or return the Config that a run's config.json holds.

    A `config` that is a function is called with the model of the checkpoint `init_from`, or with `stand_in` if that is None.

    Raises:
      ValueError: if the file is missing, does not run, exposes no `config` or a contradictory one, or needs `init_from`.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        others = sorted(str(other) for other in file.parent.glob("*.py"))
        remedy = f"there are {', '.join(others)}" if others else "name a Python file that exposes `config`"
        raise ValueError(f"config file {path!r} does not exist; {remedy}")
    if file.suffix == ".json":
        try:
            return Config.from_json(file.read_text())
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"config file {path!r} is not a run's config: {error}") from error
    try:
        exposed = runpy.run_path(str(file))
    except ValueError as error:
        raise ValueError(f"config file {path!r}: {error}") from error
    except Exception as error:  # Of any type: the file is a program.
        raise ValueError(f"config file {path!r} does not run ({type(error).__name__}: {error}); correct it") from error
    check("config" in exposed, f"config file {path!r} exposes no `config`; end it with config = Config(...)")
    config = exposed["config"]
    if callable(config):
        model = stand_in if init_from is None else model_to_train(init_from)
        remedy = "name the checkpoint with --init-from: a run directory or a Hugging Face folder"
        check(model is not None, f"config file {path!r} makes its config from the model of a checkpoint; {remedy}")
        config = config(model)
    check(isinstance(config, Config), f"`config` of {path!r} is a {type(config).__name__}; it must be a dsv3_jax.config.Config")
    return config


def parse_run(argv: Sequence[str] | None = None, description: str | None = None) -> RunArguments:
    """Parse the command line of train.py, `argv` or else sys.argv[1:]; `description` opens the text of `--help`.

    Raises:
      ValueError: naming the field, on an unknown name, a value of the wrong type, or a config that contradicts itself.
      SystemExit: with code 0, after printing the help for `--help` or `-h`.
    """
    flags, config = parse_with_config(RunFlags, argv, description)
    file = pathlib.Path(flags.config)
    run_dir = flags.run_dir or (str(file.parent) if file.suffix == ".json" else os.path.join("runs", file.stem))
    return RunArguments(config, run_dir, flags.resume, flags.profile, flags.distributed)


def parse_with_config(
    flags_type: type[Flags],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    prepare: Callable[[Flags, Config], Config] = lambda flags, config: config,
) -> tuple[Flags, Config]:
    """Parse `argv` into a `flags_type`, whose field `config` is the path of a config file, and that file's Config, overridden.

    `prepare` may replace the file's config first. `train.init_from` is the default of `data.tokenizer`. Raises as `parse_run`.
    """
    given, wants_help = _tokenize(argv)
    flag_types, field_types = _leaf_types(flags_type), _leaf_types(Config)
    _check_known(given, flag_types | field_types)
    flags = _build_flags(flags_type, {name: _read(name, given[name], flag_types[name]) for name in flag_types if name in given})
    overrides = {name: _read(name, given[name], field_types[name]) for name in field_types if name in given}
    if (init_from := getattr(flags, "init_from", None)) is not None:
        overrides["train.init_from"] = init_from
    stand_in = ModelConfig() if wants_help else None
    config = prepare(flags, load_config(typing.cast(Any, flags).config, overrides.get("train.init_from"), stand_in))
    if wants_help:
        _print_help(flags_type, flags, description, config)
    config = _override(config, overrides)
    if config.train.init_from is not None and config.data.tokenizer is None:
        config = _override(config, {"data.tokenizer": config.train.init_from})
    return flags, config


def parse_flags(flags_type: type[Flags], argv: Sequence[str] | None = None, description: str | None = None) -> Flags:
    """Parse `argv` into a `flags_type`, for a program without a run config; fields without a default are required.

    Raises as `parse_run`, and ValueError for a missing flag.
    """
    given, wants_help = _tokenize(argv)
    flag_types = _leaf_types(flags_type)
    _check_known(given, flag_types)
    if wants_help:
        _print_help(flags_type, None, description)
    return _build_flags(flags_type, {name: _read(name, values, flag_types[name]) for name, values in given.items()})


def how_to_resume() -> str:
    """Return the shell command "python <script> ..." that repeats this process with --resume and without --profile."""
    kept, dropping = [sys.argv[0]], False
    for argument in sys.argv[1:]:
        if argument.startswith("--"):
            dropping = argument.partition("=")[0] in ("--resume", "--profile")
        if not dropping:
            kept.append(argument)
    return f"python {shlex.join([*kept, '--resume'])}"


class OneLineParser(argparse.ArgumentParser):
    """argparse parser that raises ValueError for wrong arguments, without printing the usage."""

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(f"{message}; see --help")


def cli_main(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate `main`: a ValueError, NotImplementedError or OSError becomes one line on stderr and exit code 2.

    Ctrl-C prints one line and exits with 130, a closed pipe behind the output exits with 1 silently.
    With DSV3_JAX_TRACEBACK set in the environment all of these are raised as they are.
    """

    @functools.wraps(main)
    def program(*args: Any, **kwargs: Any) -> None:
        try:
            main(*args, **kwargs)
        except (ValueError, NotImplementedError, OSError, KeyboardInterrupt) as error:
            if os.environ.get("DSV3_JAX_TRACEBACK"):
                raise
            if isinstance(error, BrokenPipeError):  # The reader of the output is gone.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Else the flush at exit fails again.
                sys.exit(1)
            if isinstance(error, KeyboardInterrupt):
                print("interrupted", file=sys.stderr)
                sys.exit(130)
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return program


def _tokenize(argv: Sequence[str] | None) -> tuple[dict[str, list[str]], bool]:
    """Return ({name with _ for -: values after its last `--name`}, True for --help or -h); ValueError if a value is first."""
    given: dict[str, list[str]] = {}
    values: list[str] | None = None
    for token in sys.argv[1:] if argv is None else argv:
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            # The last of several wins.
            values = given[name.replace("-", "_")] = [value] if equals else []
        elif token == "-h":
            given["help"] = []
        elif values is None:
            raise ValueError(f"{token!r} belongs to no option; write --name value")
        else:
            values.append(token)
    return given, given.pop("help", None) is not None


def _leaf_types(cls: Any, prefix: str = "") -> dict[str, Any]:
    """Return the type of every option by its dotted name; of an optional group, such as model.rope_scaling, NoneType."""
    leaves: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        group = group_type(hint)
        if group is None or group is not hint:
            leaves[prefix + name] = hint if group is None else types.NoneType
        if group is not None:
            leaves |= _leaf_types(group, f"{prefix}{name}.")
    return leaves


def _check_known(given: dict[str, list[str]], known: dict[str, Any]) -> None:
    def likeness(name: str, candidate: str) -> float:
        # The last part counts twice: people forget the group, or put a field into the wrong one.
        last = difflib.SequenceMatcher(None, name.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return last + difflib.SequenceMatcher(None, name, candidate).ratio()

    before = None
    for name in given:
        if name not in known:
            nearest = max(known, key=functools.partial(likeness, name))
            lacks_value = before is not None and known[before] is not bool and not given[before]
            remedy = f"; a value of --{before} that opens with dashes is written --{before}=--..." if lacks_value else ""
            raise ValueError(f"--{name} does not exist; the nearest is --{nearest} (--help lists all){remedy}")
        before = name


def _read(name: str, values: list[str], hint: Any) -> Any:
    """Return the value of option `name`, parsed by tyro as type `hint` (bool without value: True); ValueError if that fails."""
    if hint is bool and not values:
        return True
    if hint == ExpertExchange:
        values = [FORMER_EXCHANGES.get(value, value) for value in values]
    shown = " ".join(values)
    # A single value may open with a dash.
    arguments = [f"--value={shown}"] if len(values) == 1 else ["--value", *values]
    holder = dataclasses.make_dataclass("holder", [("value", hint)])
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(holder, args=arguments, config=(tyro.conf.FlagConversionOff,), add_help=False).value
    except SystemExit:
        given = f"is {shown!r}" if values else "has no value"
        is_text = hint is str or (typing.get_origin(hint) is not tuple and str in typing.get_args(hint))
        remedy = f"put it in quotes: --{name} {shown!r}" if is_text and len(values) > 1 else f"give {_type_name(hint)}"
        raise ValueError(f"--{name} {given}; {remedy}") from None


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(map(_type_name, typing.get_args(hint)))
    return _TYPE_NAMES.get(hint, str(hint))


def _split(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return ({name without a dot: value}, {group before the first dot: {rest of the name: value}})."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        group, dot, rest = name.partition(".")
        if dot:
            groups.setdefault(group, {})[rest] = value
    return {name: value for name, value in values.items() if "." not in name}, groups


def _build_flags(flags_type: type[Flags], values: dict[str, Any]) -> Flags:
    for name in _required(flags_type):
        check(name in values, f"--{name} is missing (--help lists all)")
    own, groups = _split(values)
    hints = typing.get_type_hints(flags_type)
    return flags_type(**own, **{name: hints[name](**inner) for name, inner in groups.items()})


def _required(cls: Any) -> list[str]:
    missing = dataclasses.MISSING
    return [field.name for field in dataclasses.fields(cls) if field.default is missing is field.default_factory]


def _override(config: Any, overrides: dict[str, Any], path: str = "") -> Any:
    """Return `config` with dotted fields replaced, each dataclass built once; a group that is None starts from its defaults."""
    changes, groups = _split(overrides)
    for name, inner in groups.items():
        check(name not in changes, f"--{path}{name} None contradicts --{path}{name}.{min(inner)}; keep one of the two")
        current = getattr(config, name)
        if current is None:
            current = group_type(typing.get_type_hints(type(config))[name])()
        changes[name] = _override(current, inner, f"{path}{name}.")
    return dataclasses.replace(config, **changes)


def _print_help(flags_type: Any, flags: Any, description: str | None, config: Config | None = None) -> None:
    """Print tyro's help, with the defaults of `flags` and `config`, and exit with 0."""
    if flags is None:
        flags = flags_type(**dict.fromkeys(_required(flags_type), tyro.MISSING))
    parts = [("flags", Annotated[flags_type, tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff])]
    defaults = [flags]
    description = f"{description or ''}\n\nNames may be written with - or _."
    if config is not None:
        parts.append(("fields", Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]))
        if config.model.rope_scaling is None:
            # tyro lists the fields of a group only if there is one.
            config = _override(config, {"model.rope_scaling.factor": RopeScaling().factor})
            description += " This config has no model.rope_scaling: setting one of its fields turns it on."
        else:
            description += " --model.rope_scaling None turns YaRN off."
        defaults.append(config)
    everything = dataclasses.make_dataclass("everything", parts)
    tyro.cli(
        everything,
        args=["--help"],
        default=everything(*defaults),
        description=description.strip(),
        use_underscores=True,
        prog=pathlib.Path(sys.argv[0]).name,
        config=(tyro.conf.AvoidSubcommands,),
    )
