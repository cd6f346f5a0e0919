"""Our reading and writing of safetensors against the safetensors library, and every way a file can be broken."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from dsv3_jax.checkpoint.tensor_files import DTYPES, Outgoing, read_header, shards, write_file
from tests.checkpoint.tiny import assert_identical, load

_DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]


def _tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"a.matrix": (7, 5), "a.vector": (3,), "deep": (2, 3, 4), "empty": (0, 4)}
    return {f"{name}.{np.dtype(d)}": rng.standard_normal(shape).astype(d) for name, shape in shapes.items() for d in _DTYPES}


def whole(shape: tuple[int, ...]) -> Any:
    """The box of a whole matrix."""
    return tuple((0, size) for size in shape)


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    expected = _tensors()
    save_file(expected, tmp_path / "x.safetensors", metadata={"format": "pt"})
    stored = read_header(epath.Path(tmp_path / "x.safetensors"))
    assert {name: (DTYPES[t.dtype], t.shape) for name, t in stored.items()} == {
        name: (array.dtype, array.shape) for name, array in expected.items()
    }
    assert_identical(
        {name: band for name, t in stored.items() if t.shape[0] for _, band in t.bands(t.shape[0], whole(t.matrix_shape))},
        {n: a for n, a in expected.items() if a.size},
    )


def test_bands_cover_the_rows_in_order(tmp_path: Path) -> None:
    matrix = np.arange(35, dtype=np.float32).reshape(7, 5)
    save_file({"other": np.ones(3, np.float32), "m": matrix}, tmp_path / "x.safetensors")
    stored = read_header(epath.Path(tmp_path / "x.safetensors"))["m"]
    bands = list(stored.bands(3, whole(matrix.shape)))
    assert [rows for rows, _ in bands] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    for rows, values in bands:
        np.testing.assert_array_equal(values, matrix[rows])


@pytest.mark.parametrize("rows", [2, 3, 7])
@pytest.mark.parametrize("box", [((0, 7), (0, 5)), ((2, 6), (0, 5)), ((2, 6), (1, 4)), ((6, 7), (4, 5)), ((3, 3), (0, 2))])
def test_a_box_is_cut_out_of_the_matrix(tmp_path: Path, box: Any, rows: int) -> None:
    matrix = np.arange(35, dtype=np.float32).reshape(7, 5)
    save_file({"other": np.ones(3, np.float32), "m": matrix}, tmp_path / "x.safetensors")
    stored = read_header(epath.Path(tmp_path / "x.safetensors"))["m"]
    (top, bottom), (left, right) = box
    covered = []
    for band, values in stored.bands(rows, box):
        np.testing.assert_array_equal(values, matrix[band, left:right], strict=True)
        assert band.stop % rows == 0 or band.stop == bottom
        covered += range(band.start, band.stop)
    assert covered == list(range(top, bottom))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel's own count of bytes is read from /proc")
@pytest.mark.parametrize("box", [((0, 4096), (1000, 1100)), ((100, 900), (0, 2048))])
def test_no_byte_beside_the_box_is_read(tmp_path: Path, box: Any) -> None:
    save_file({"m": np.zeros((4096, 2048), np.int8).view(ml_dtypes.float8_e4m3fn)}, tmp_path / "x.safetensors")
    stored = read_header(epath.Path(tmp_path / "x.safetensors"))["m"]

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before, now = bytes_read(), bytes_read()
    itself = now - before
    wanted = sum(values.nbytes for _, values in stored.bands(512, box))
    assert bytes_read() - now - itself == wanted == (box[0][1] - box[0][0]) * (box[1][1] - box[1][0])


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    expected = _tensors()
    write_file(epath.Path(tmp_path / "x.safetensors"), [(n, a.dtype, a.shape) for n, a in expected.items()], expected.values())
    assert_identical(load(tmp_path / "x.safetensors"), expected)
    assert read_header(epath.Path(tmp_path / "x.safetensors")).keys() == expected.keys()


def test_who_writes_a_file_brings_it_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append((os.fstat(handle).st_ino, os.fstat(handle).st_size)))
    path = tmp_path / "x.safetensors"
    write_file(epath.Path(path), [("m", np.dtype(np.float32), (3,))], [np.ones(3, np.float32)])
    assert synced == [(path.stat().st_ino, path.stat().st_size)]


def test_transposed_arrays_are_written_in_row_order(tmp_path: Path) -> None:
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_file(epath.Path(tmp_path / "x.safetensors"), [("m", matrix.dtype, (4, 3))], [matrix.T])
    np.testing.assert_array_equal(load(tmp_path / "x.safetensors")["m"], matrix.T)


def test_shards_are_filled_in_order() -> None:
    def outgoing(name: str, *sizes: int) -> Outgoing:
        tensors = tuple((f"{name}{i}", np.dtype(np.float32), (n,)) for i, n in enumerate(sizes))
        return Outgoing(tensors, lambda: None, lambda _: ())

    content = [outgoing("a", 2), outgoing("b", 2), outgoing("c", 1, 1), outgoing("d", 9), outgoing("e", 1)]
    cut = shards(content, max_bytes=16)
    assert [[o.tensors[0][0] for o in shard] for shard in cut] == [["a0", "b0"], ["c0"], ["d0"], ["e0"]]
    assert shards(content, max_bytes=10**9) == [content]


@pytest.fixture
def good(tmp_path: Path) -> bytes:
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}, tmp_path / "good.safetensors")
    return (tmp_path / "good.safetensors").read_bytes()


def _file(tmp_path: Path, content: bytes) -> epath.Path:
    (tmp_path / "bad.safetensors").write_bytes(content)
    return epath.Path(tmp_path / "bad.safetensors")


def _with_header(header: Any, data: bytes = bytes(32)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_a_file_cut_anywhere_is_refused(good: bytes, tmp_path: Path) -> None:
    read_header(_file(tmp_path, good))
    for length in range(len(good)):
        with pytest.raises(ValueError, match="truncated"):
            read_header(_file(tmp_path, good[:length]))


def test_a_file_with_bytes_to_spare_is_refused(good: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="damaged"):
        read_header(_file(tmp_path, good + b"\0"))


def _entry(begin: int = 0, end: int = 32, shape: Any = (8,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or not a safetensors file"),
        (b"PK\x03\x04" + bytes(60), "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "not a safetensors file"),
        (_with_header(b"not json"), "not JSON"),
        (_with_header(b"\xff\xfe{}"), "not JSON"),
        (_with_header(b"[" * 200_000), "not JSON"),
        (_with_header([1, 2]), "not a JSON object"),
        (_with_header(b'{"a": {"dtype": "F32"}, "a": {}}'), "'a' comes twice"),
        (_with_header({"a": 3}), "describes 'a' as 3"),
        (_with_header({"a": {"dtype": "F32", "shape": [8]}}), "describes 'a'"),
        (_with_header({"a": _entry(shape=(-8,))}), "describes 'a'"),
        (_with_header({"a": _entry(shape=(8.0,))}), "describes 'a'"),
        (_with_header({"a": _entry(dtype=4)}), "describes 'a'"),
        (_with_header({"a": _entry(begin=32, end=0)}), "describes 'a'"),
        (_with_header({"a": _entry(begin=-32, end=0)}), "describes 'a'"),
        (_with_header({"a": _entry(shape=(7,))}), "32 bytes, which is not F32"),
        (_with_header({"a": _entry(dtype="BF16")}), "32 bytes, which is not BF16"),
        (_with_header({"a": _entry(0, 16, (4,)), "b": _entry(8, 24, (4,))}), "'a' and 'b' overlap or leave a gap"),
        (_with_header({"a": _entry(0, 16, (4,)), "b": _entry(24, 32, (2,))}), "'a' and 'b' overlap or leave a gap"),
        (_with_header({"a": _entry(4, 32, (7,))}), "damaged"),
        (_with_header({"a": _entry(0, 64, (16,))}), "truncated"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_header(_file(tmp_path, content))
