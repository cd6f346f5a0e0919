"""Imports run one way: files, config -> kernels, parallel -> model -> data, train, checkpoint, infer -> the programs.

And what is imported from elsewhere is what pyproject.toml depends on, no more and no less.
"""

from __future__ import annotations

import ast
import importlib.metadata
import pathlib
import re
import sys
import tomllib
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parent.parent

# What each part of dsv3_jax may import, besides itself. A part is a folder, or a file that stands on its own.
MAY_IMPORT = {
    "files": set(),
    "config": set(),
    "kernels": {"config"},
    "parallel": {"config", "kernels"},
    "model": {"config", "kernels", "parallel"},
    "data": {"files", "config", "parallel"},
    "checkpoint": {"files", "config", "kernels", "parallel", "model"},
    "train": {"files", "config", "kernels", "parallel", "model", "data", "checkpoint"},
    "infer": {"files", "config", "kernels", "parallel", "model", "data", "checkpoint"},
    "serve": {"config", "data", "infer"},
    "plan": {"config", "kernels", "parallel", "model", "data", "checkpoint", "train", "infer"},
    "evaluate": {"config", "kernels", "parallel", "model", "data", "checkpoint", "train", "infer"},
    "convert": {"config", "kernels", "parallel", "model", "data", "checkpoint", "train", "infer"},
    # The public names, for users; within the package an import goes to the part itself.
    "__init__": {"config", "model", "checkpoint", "infer"},
}


def imported_modules(file: pathlib.Path, module: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of a file, wherever in it; `from a import b` gives a.b, since b may be a module."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            source = ".".join([*package, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def arrows(package: pathlib.Path) -> Iterator[tuple[str, str, str]]:
    """(where, importing part, imported part) of every import between two parts of a package."""
    parts = {path.stem for path in package.iterdir() if path.is_dir() or path.suffix == ".py"} - {"__init__", "__pycache__"}
    for file in sorted(package.rglob("*.py")):
        inside = file.relative_to(package)
        part = inside.parts[0].removesuffix(".py")
        for line, name in imported_modules(file, ".".join([package.name, *inside.with_suffix("").parts])):
            head, *rest = name.split(".")
            if head != package.name:
                continue
            imported = rest[0] if rest and rest[0] in parts else "__init__"
            if imported != part:
                yield f"{package.name}/{inside}:{line}", part, imported


def backward_arrows(package: pathlib.Path) -> list[str]:
    """One sentence for every import that MAY_IMPORT does not allow."""
    return [
        f"{where}: {part} imports {imported}"
        for where, part, imported in arrows(package)
        if imported not in MAY_IMPORT.get(part, set())
    ]


def test_no_arrow_runs_back():
    assert backward_arrows(ROOT / "dsv3_jax") == []


def test_the_walk_sees_the_package():
    seen = {(part, imported) for _, part, imported in arrows(ROOT / "dsv3_jax")}
    assert {("model", "config"), ("model", "kernels"), ("train", "model"), ("infer", "model")} <= seen


def test_every_part_has_a_place_in_the_order():
    package = ROOT / "dsv3_jax"
    parts = {file.relative_to(package).parts[0].removesuffix(".py") for file in package.rglob("*.py")}
    assert parts <= set(MAY_IMPORT)


def test_dependencies_are_what_is_imported():
    files = [*(ROOT / "dsv3_jax").rglob("*.py"), *ROOT.glob("*.py")]
    imported = {name.partition(".")[0] for file in files for _, name in imported_modules(file, "dsv3_jax.part.file")}
    distributions = importlib.metadata.packages_distributions()
    used = {distributions[name][0] for name in imported - set(sys.stdlib_module_names) - {"dsv3_jax"}}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w-]+", requirement)[0] for requirement in project["dependencies"]}
    assert {name.lower().replace("_", "-") for name in used} == {name.lower().replace("_", "-") for name in declared}


def test_the_tpu_compiler_is_the_one_that_jax_asks_for():
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    (wanted,) = (need.partition(";")[0].strip() for need in importlib.metadata.requires("jax") if need.startswith("libtpu"))
    new = sys.version_info >= (3, 12)
    (pinned,) = (pin.partition(";")[0].strip() for pin in groups["tpu-compiler"] if (">=" in pin) == new)
    assert pinned == wanted


def test_arrows_that_run_back_are_found(tmp_path: pathlib.Path):
    """Every way of writing an import, at the top or in a function; imports of other packages do not count."""
    package = tmp_path / "dsv3_jax"
    files = {
        "__init__.py": "from dsv3_jax.model import thing",
        "model/__init__.py": "import jax.train\nfrom dsv3_jax.config import ModelConfig",
        "model/absolute.py": "def late():\n    import dsv3_jax.train.step",
        "model/relative.py": "from ..train import step\nfrom .absolute import late",
        "kernels/public.py": "from dsv3_jax import DeepSeekV3",
        "config/parent.py": "from dsv3_jax import model",
        "train/step.py": "from dsv3_jax.model import thing",
        "newcomer.py": "import dsv3_jax.config",
    }
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    assert backward_arrows(package) == [
        "dsv3_jax/config/parent.py:1: config imports model",
        "dsv3_jax/kernels/public.py:1: kernels imports __init__",
        "dsv3_jax/model/absolute.py:2: model imports train",
        "dsv3_jax/model/relative.py:1: model imports train",
        "dsv3_jax/newcomer.py:1: newcomer imports config",
    ]
