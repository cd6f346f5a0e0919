"""Lint of the words: docstrings that open with a relative clause, and words that readers stumble over; run by `make lint`."""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = "dsv3_jax", "configs", "benchmarks", "docs", "train.py", "infer.py"
PROSE = "README.md", "CONTRIBUTING.md", "docs/*.md"
HISTORY = "docs/log.md"

OPENINGS = re.compile(r"(What|Whether|Which|How|Where|Who|Whose)\b")
WORDS = re.compile(
    r"\b(whatever|told|at hand|alike|anew|that which|how-manieth|becomes of|beside (?!the point)|besides)\b", re.IGNORECASE
)
ALLOWED_OPENINGS = 30
"""Docstrings that may open with one of `OPENINGS`, such as questions that a function answers with True or False."""


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, those of attributes included."""
    for node in ast.walk(tree):
        for child in getattr(node, "body", []) if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant) and isinstance(child.value.value, str):
                yield child.lineno, child.value.value


def complaints(name: str, text: str) -> tuple[list[str], list[str]]:
    """Docstrings with refused openings, and lines with refused words, of a Python file."""
    found = list(docstrings(ast.parse(text)))
    openings = [f"{name}:{line}: {' '.join(doc.split())[:80]}" for line, doc in found if OPENINGS.match(doc.strip())]
    prose = [(line, doc) for line, doc in found]
    prose += [
        (token.start[0], token.string)
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    ]
    return openings, [f"{name}:{line}: {match[0].strip()!r}" for line, part in prose for match in WORDS.finditer(part)]


def main(folders: list[str]) -> int:
    """Print complaints about `folders`, or about everything; the exit status."""
    openings, words = [], []
    for folder in folders or PYTHON:
        path = ROOT / folder
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            more = complaints(str(file.relative_to(ROOT)), file.read_text(encoding="utf-8"))
            openings += more[0]
            words += more[1]
    for pattern in PROSE if not folders else ():
        for file in sorted(ROOT.glob(pattern)):
            if str(file.relative_to(ROOT)) != HISTORY:
                lines = enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
                words += [
                    f"{file.relative_to(ROOT)}:{at}: {match[0].strip()!r}"
                    for at, line in lines
                    for match in WORDS.finditer(line)
                ]
    if len(openings) > ALLOWED_OPENINGS or (folders and openings):
        print(*openings, f"{len(openings)} docstrings open with a relative clause; {ALLOWED_OPENINGS} may", sep="\n")
    print(*words, sep="\n", end="\n" if words else "")
    return int(bool(words) or len(openings) > ALLOWED_OPENINGS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
