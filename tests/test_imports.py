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
    "data": {"files", "config", "parallel", "model"},
    "checkpoint": {"files", "config", "kernels", "parallel", "model"},
    "train": {"files", "config", "kernels", "parallel", "model", "data", "checkpoint"},
    "infer": {"files", "config", "kernels", "parallel", "model", "data", "checkpoint"},
    "rebalance": {"files", "config", "parallel", "model"},
    "serve": {"config", "data", "infer"},
    "plan": {"config", "kernels", "parallel", "model", "data", "checkpoint", "train", "infer"},
    "evaluate": {"config", "kernels", "parallel", "model", "data", "checkpoint", "train", "infer"},
    "convert": {"files", "config", "kernels", "parallel", "model", "data", "checkpoint", "train", "infer"},
    # The public names, for users; within the package an import goes to the part itself.
    "__init__": {"config", "model", "checkpoint", "infer"},
}

CORE = {
    **dict.fromkeys(("config", "model", "parallel"), None),
    "kernels": "attention latent_attention documents experts grouped quantized backend vma",
    "train": "step state optimizer guards evaluation",
    "infer": "engine request scheduler runner cache sampling multihost",
}
"""The modules of the core, by package; None is all of them. The kernels for one platform are reached by name alone."""
MAX_FILES, MAX_LINES, MAX_CODE, MAX_CORE = 116, 21_450, 13_650, 8_700
MAX_FILE, MAX_FUNCTION = 600, 100


def is_core(module: str) -> bool:
    """Whether a module below dsv3_jax, such as "train.step" or "train", belongs to the core."""
    package, _, name = module.partition(".")
    return package in CORE and (not name or CORE[package] is None or name in CORE[package].split())


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


def test_core_imports_only_core() -> None:
    package, found = ROOT / "dsv3_jax", []
    modules = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    folders = {".".join(path.relative_to(package).parts) for path in package.rglob("*") if path.is_dir()}
    for module, path in modules.items():
        if path.name == "__init__.py" or not is_core(module):
            continue
        for line, name in imported_modules(path, f"dsv3_jax.{module}"):
            head, _, inside = name.partition(".")
            while head == "dsv3_jax" and inside and inside not in modules and inside not in folders:
                inside = inside.rpartition(".")[0]
            if head == "dsv3_jax" and not is_core(inside) and not inside.startswith(("kernels.tpu", "kernels.gpu")):
                found.append(f"{module}:{line} imports {inside}")
    assert found == []
    # Only the dispatchers of the kernels know the platforms' own.
    named = {name for names in CORE.values() if names for name in names.split()}
    assert named <= {path.stem for path in modules.values()}


def code_lines(text: str) -> int:
    """Lines without blank ones, comments and docstrings."""
    strings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            strings.update(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(1 for at, line in lines if line.strip() and not line.strip().startswith("#") and at not in strings)


def test_code_lines_are_counted() -> None:
    assert code_lines('"""Doc."""\n\nx = 1  # one\n# two\n\n\ndef f():\n    """Doc\n    doc."""\n    return """a\n\n"""\n') == 4


def test_sizes_stay_within_their_budgets() -> None:
    """A later issue may raise a sum by what its closing note itemises."""
    package = ROOT / "dsv3_jax"
    texts = {path.relative_to(package): path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))}
    lines = {path: len(text.splitlines()) for path, text in texts.items()}
    assert len(texts) <= MAX_FILES
    assert sum(lines.values()) <= MAX_LINES
    assert sum(map(code_lines, texts.values())) <= MAX_CODE
    core = {path for path in texts if is_core(".".join(path.with_suffix("").parts).removesuffix(".__init__"))}
    assert sum(lines[path] for path in core) <= MAX_CORE
    assert [str(path) for path, count in lines.items() if count > MAX_FILE] == []
    functions = [
        f"{path}: {node.name}"
        for path, text in texts.items()
        if path.parts[:2] not in {("kernels", "tpu"), ("kernels", "gpu")}
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > MAX_FUNCTION
    ]
    assert functions == []
