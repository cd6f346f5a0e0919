"""Reading documents: names, order, replacement, JSONL, and what bad sources get."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from dsv3_jax.data.sources import Document, read_source


def test_folder_gives_sorted_documents_named_by_posix_path(tmp_path: Path) -> None:
    for name, text in {
        "b.txt": "two",
        "a/z.py": "one",
        "a/b/c.md": "zero",
        ".git/x": "no",
        "a/.hidden": "no",
        "empty.txt": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    documents, binary = read_source(str(tmp_path))
    assert documents == [Document("a/b/c.md", "zero"), Document("a/z.py", "one"), Document("b.txt", "two")]
    assert binary == []


def test_single_file_is_one_document_with_its_line_ends(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(b"caf\xc3\xa9\r\n\tend\n")
    documents, _ = read_source(str(tmp_path / "one.txt"))
    assert documents == [Document("one.txt", "café\r\n\tend\n")]
    assert documents[0].num_bytes == 12


def test_bytes_that_are_not_utf8_are_replaced_and_marked(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 noir")
    (tmp_path / "plain.txt").write_bytes(b"plain")
    documents, _ = read_source(str(tmp_path))
    assert documents == [Document("latin.txt", "caf\ufffd noir", replaced=True), Document("plain.txt", "plain")]


def test_binary_files_are_passed_over_and_named(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "text.txt").write_text("text")
    documents, binary = read_source(str(tmp_path))
    assert [document.name for document in documents] == ["text.txt"]
    assert binary == ["image.png"]


def test_jsonl_gives_one_document_a_line(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "one\ntwo", "id": 7}), "", '{"text": "half \\ud800 pair \\ud83d\\ude00"}', '{"text": ""}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    documents, _ = read_source(str(tmp_path / "a.jsonl"))
    assert documents == [Document("a.jsonl:1", "one\ntwo"), Document("a.jsonl:3", "half \ufffd pair 😀", replaced=True)]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{broken", "is not valid JSON"),
        ('{"content": "x"}', 'has no "text" string'),
        ('{"text": 3}', 'has no "text" string'),
        ('"text"', "is str, not an object"),
        ('{"messages": []}', 'has no "text" string; .*; conversations take data.kind chat'),
    ],
)
def test_bad_jsonl_names_file_and_line(tmp_path: Path, line: str, complaint: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"bad\.jsonl:2 {complaint}"):
        read_source(str(tmp_path))


def test_sources_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere' does not exist"):
        read_source(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"holds no text \(no files but hidden or empty ones\); name UTF-8 text"):
        read_source(str(tmp_path))
    (tmp_path / "a.bin").write_bytes(b"\0")
    for source in (tmp_path, tmp_path / "a.bin"):
        with pytest.raises(ValueError, match=r"holds no text \(binary files \(with a NUL byte\): 1\); name"):
            read_source(str(source))


def test_messages_name_the_option_that_was_given(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--text '.*nowhere' does not exist"):
        read_source(str(tmp_path / "nowhere"), "--text")
    with pytest.raises(ValueError, match=r"^--text '.*' holds no text"):
        read_source(str(tmp_path), "--text")


def test_what_is_no_file_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "link.txt").symlink_to("text.txt")
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    assert read_source(str(tmp_path)) == ([Document("link.txt", "text"), Document("text.txt", "text")], [])


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked.txt").write_text("text")

    def refuse(path: epath.Path, mode: str) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(epath.Path(tmp_path)), "open", refuse)
    with pytest.raises(ValueError, match=r"^data.source '.*': locked.txt cannot be read \(.*Permission denied.*\); make it"):
        read_source(str(tmp_path))


def test_gzipped_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("naïve".encode()))
    documents = [Document("a.jsonl.gz:1", "one"), Document("a.jsonl.gz:2", "two"), Document("b.txt.gz", "naïve")]
    assert read_source(str(tmp_path)) == (documents, [])
    for content in (gzip.compress(b"text" * 99)[:-9], b"no gzip"):
        (tmp_path / "b.txt.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"data\.source '.*': b\.txt\.gz cannot be read"):
            read_source(str(tmp_path))


@pytest.mark.parametrize("name", ["x.json", "x.json.gz"])
@pytest.mark.parametrize("records", [[{"text": "a"}], [{"messages": []}, {"conversations": []}]])
def test_an_array_of_texts_or_conversations_is_refused(tmp_path: Path, name: str, records: list[Any]) -> None:
    data = json.dumps(records, indent=1).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(ValueError, match=r"x\.json(\.gz)? is one JSON array; write one object per line into a \.jsonl file"):
        read_source(str(tmp_path))


@pytest.mark.parametrize("content", ["[1, 2]", '[{"a": 1}]', '[{"text": "a"}, 3]', '{"text": "a"}', "[", "[]"])
def test_other_json_is_a_text_as_any(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    assert [document.text for document in read_source(str(tmp_path))[0]] == [content]
