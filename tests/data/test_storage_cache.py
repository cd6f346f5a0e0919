"""Files made once: whole or absent, remade when broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv3_jax.data.storage import digest, load_or_make


def read_number(path: Path) -> int:
    return int(path.read_text())


def test_digest_separates_its_parts() -> None:
    assert digest("ab", "c") != digest("a", "bc")
    assert digest("ab") == digest(b"ab")
    assert digest("a") != digest("a", "")


def test_made_once(tmp_path: Path) -> None:
    made = []

    def write(path: Path) -> None:
        made.append(path)
        path.write_text("7")

    path = tmp_path / "deep" / "number"
    assert [load_or_make(path, read_number, write) for _ in range(3)] == [7, 7, 7]
    assert len(made) == 1
    path.write_text("seven")
    assert load_or_make(path, read_number, write) == 7
    assert len(made) == 2


def test_failed_write_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "number"
    path.write_text("broken")

    def write(draft: Path) -> None:
        draft.write_text("half of")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        load_or_make(path, read_number, write)
    assert [entry.name for entry in tmp_path.iterdir()] == ["number"]
    assert path.read_text() == "broken"
