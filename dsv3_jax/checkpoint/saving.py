"""From arrays to the tensors of a checkpoint, one at a time, written by one process or shared out among several.

Every process goes through all tensors in the same order, since what of one lies elsewhere has to travel. File i belongs
to process i modulo their number, and they take turns tensor by tensor: while one writes, so do the others.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from dsv3_jax.checkpoint.folder import INDEX, CheckpointError, check_no_folder
from dsv3_jax.checkpoint.fp8 import FP8, SCALE_SUFFIX, quantise, scale_shape
from dsv3_jax.checkpoint.multihost import all_or_none, first_alone, same_everywhere, take
from dsv3_jax.checkpoint.names import Leaf, copies, leaves, natural_order
from dsv3_jax.checkpoint.tensor_files import Outgoing, write_file
from dsv3_jax.config import ModelConfig
from dsv3_jax.files import folder_to_disk, names_to_disk
from dsv3_jax.kernels.quantized import is_quantized


def checked_arrays(config: ModelConfig, variables: dict[str, Any]) -> list[tuple[Leaf, Any]]:
    """Every leaf and its array.

    Raises:
      CheckpointError: listing every array that is missing, unexpected, misshapen or of a wrong type.
    """
    arrays, needed = traverse_util.flatten_dict(variables), {leaf.path: leaf for leaf in leaves(config)}
    problems = {
        "missing arrays": ["/".join(path) for path in needed if path not in arrays],
        "unexpected arrays": ["/".join(map(str, path)) for path in arrays if path not in needed],
        "misshapen arrays": [
            f"{'/'.join(path)} is {list(arrays[path].shape)}, not {list(leaf.shape)}"
            for path, leaf in needed.items()
            if path in arrays and arrays[path].shape != leaf.shape
        ],
        "arrays of a wrong type": [
            f"{'/'.join(path)} is {arrays[path].dtype}, not {leaf.dtype(config)}"
            for path, leaf in needed.items()
            if path in arrays and arrays[path].dtype != leaf.dtype(config) and not is_quantized(arrays[path])
        ],
        "arrays in FP8, which are for inference; load the model without keep_fp8 to write it": [
            "/".join(path) for path in needed if is_quantized(arrays.get(path))
        ],
    }
    if found := {kind: items for kind, items in problems.items() if items}:
        raise CheckpointError("the tree of variables", found)
    return [(leaf, _host_view(arrays[path])) for path, leaf in needed.items()]


def _host_view(array: Any) -> Any:
    """The same memory as a numpy array if it is the host's and in one piece; otherwise the array as it is."""
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    in_one_piece = len(array.sharding.device_set) == 1 and array.is_fully_addressable
    return np.asarray(array) if in_one_piece and all(d.platform == "cpu" for d in array.devices()) else array


def processes_of(variables: dict[str, Any]) -> int:
    """How many processes the arrays are spread over: all there are, unless this one has everything."""
    spread = any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in jax.tree.leaves(variables))
    return jax.process_count() if spread else 1


def outgoing_tensors(config: ModelConfig, arrays: Sequence[tuple[Leaf, Any]], fp8: bool) -> list[Outgoing]:
    """Every tensor of the file, layer by layer."""
    outgoing: dict[str, Outgoing] = {}
    for leaf, array in arrays:
        dtype = leaf.dtype(config)
        for index, name in zip(np.ndindex(*leaf.stack), leaf.names, strict=True):
            fetch, stored = partial(take, array, index), partial(_stored, leaf, dtype)
            if fp8 and leaf.is_fp8:
                scales = (name + SCALE_SUFFIX, np.dtype(np.float32), scale_shape(leaf.stored))
                outgoing[name] = Outgoing(((name, FP8, leaf.stored), scales), fetch, partial(_quantised, name, stored))
            else:
                outgoing[name] = Outgoing(((name, dtype, leaf.stored),), fetch, partial(_alone, stored))
    for copy, original in copies(config).items():
        ((_, dtype, shape),) = outgoing[original].tensors
        outgoing[copy] = Outgoing(((copy, dtype, shape),), outgoing[original].fetch, outgoing[original].encode)
    return [outgoing[name] for name in sorted(outgoing, key=natural_order)]


def _stored(leaf: Leaf, dtype: np.dtype, part: Any) -> np.ndarray:
    """One tensor of a leaf as the file holds it, from what `take` gave."""
    values = np.asarray(part).view(dtype)
    return values.reshape(leaf.stored[::-1]).T if leaf.is_matrix else values


def _alone(stored: partial[np.ndarray], part: Any) -> tuple[np.ndarray]:
    return (stored(part),)


def _quantised(name: str, stored: partial[np.ndarray], part: Any) -> tuple[np.ndarray, np.ndarray]:
    try:
        return quantise(stored(part))
    except ValueError as error:
        raise ValueError(f"{name} cannot be exported: {error}") from None


def write_tensors(folder: epath.Path, files: list[list[Outgoing]], processes: int) -> None:
    """The safetensors files, and from process 0 their index.

    A process that fails goes on taking its turns until all can raise.
    """
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    me = jax.process_index() if processes > 1 else 0
    with all_or_none(processes):
        if not folder.exists():
            raise ValueError(f"process {me} does not see {folder}; save to a file system that all processes share")
    with all_or_none(processes):
        failure: Exception | None = None
        for start in range(0, len(files), processes):
            turns, mine = _turns(files[start : start + processes], me), start + me
            try:
                if failure is None and mine < len(files):
                    tensors = [tensor for outgoing in files[mine] for tensor in outgoing.tensors]
                    encoded = (outgoing.encode(part) for outgoing, part in turns)
                    write_file(folder / names[mine], tensors, itertools.chain.from_iterable(encoded))
            except Exception as error:
                if processes == 1:
                    raise
                failure = error
            for _ in turns:  # The rest of the others'.
                pass
        if failure is not None:
            raise failure
    with first_alone(processes) as first:
        if first:
            _write_index(folder, names, files)


def _turns(files: Sequence[Sequence[Outgoing]], me: int) -> Iterator[tuple[Outgoing, Any]]:
    """Fetches the first tensor of each file, the second of each, and so on; yields those of file `me` as they come."""
    for turn in itertools.zip_longest(*files):
        mine: list[tuple[Outgoing, Any]] = []
        for number, outgoing in enumerate(turn):
            if outgoing is not None:
                part = outgoing.fetch()
                mine += [(outgoing, part)] if number == me else []
        yield from mine


def _write_index(folder: epath.Path, names: list[str], files: list[list[Outgoing]]) -> None:
    weight_map = {
        name: file
        for file, content in zip(names, files, strict=True)
        for outgoing in content
        for name, _, _ in outgoing.tensors
    }
    total = sum(outgoing.nbytes for content in files for outgoing in content)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


@contextlib.contextmanager
def new_folder(target: epath.Path, processes: int) -> Iterator[epath.Path]:
    """A folder to fill beside `target`, renamed to it if all goes well on all processes and removed if not.

    It is on the disk before it is renamed, as far as process 0 can see to that: what others write, they have to bring there.
    """
    target = target.resolve()
    # A process id may be another's as well, in another container.
    number = same_everywhere(secrets.randbelow(2**31), processes)
    partial_folder, is_ours = target.parent / f".{target.name}.partial-{number:08x}", False
    try:
        with first_alone(processes) as first:
            if first:
                target.parent.mkdir(parents=True, exist_ok=True)
                partial_folder.mkdir()
                is_ours = True
        yield partial_folder
        with first_alone(processes) as first:
            if first:
                folder_to_disk(partial_folder)
                check_no_folder(target)  # Another export may have been quicker.
                if target.exists():
                    target.rmdir() if "://" in str(target) else os.rmdir(target)  # That of etils removes what came since.
                partial_folder.rename(target)
                names_to_disk(target.parent)
    except BaseException:
        if is_ours and partial_folder.exists():
            partial_folder.rmtree()
        raise
