"""What a Hugging Face folder holds, checked against what its model needs, before any array is made.

Everything here comes from `config.json`, the index and the headers of the safetensors files. Whatever is wrong is
collected and reported at once, since each attempt at a checkpoint of 600 GiB is dear. Pickles are named and never opened.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from etils import epath

from dsv3_jax.checkpoint import fp8
from dsv3_jax.checkpoint.names import IGNORED_SUFFIX, Leaf, copies, leaves, mtp_layers, natural_order
from dsv3_jax.checkpoint.tensor_files import DTYPES, StoredTensor, read_header
from dsv3_jax.config import ModelConfig

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_PICKLES = ".bin", ".pt", ".pth", ".pkl", ".ckpt"
_LISTED = 20


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message lists all of its problems."""

    def __init__(self, path: Any, problems: dict[str, list[str]]) -> None:
        """Joins `problems` (kind -> what it befalls) into one sentence, long lists cut after their count."""
        self.problems = problems
        super().__init__(f"{path} cannot be used: " + "; ".join(_summary(kind, items) for kind, items in problems.items()))


def _summary(kind: str, items: list[str]) -> str:
    listed = ", ".join(items[:_LISTED])
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return f"{kind} ({len(items)}): {listed}{more}"


@dataclasses.dataclass
class _Found:
    """Tensors and problems as they are found."""

    tensors: dict[str, StoredTensor] = dataclasses.field(default_factory=dict)
    problems: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    unreadable: set[str] = dataclasses.field(default_factory=set)
    """Tensors that the index puts in files which cannot be read: already accounted for."""

    def problem(self, kind: str, item: str) -> None:
        self.problems.setdefault(kind, []).append(item)


def check_no_folder(path: Any) -> None:
    """Raises ValueError if `path` exists, unless it is an empty folder: nothing is ever overwritten."""
    target = epath.Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder; choose another path or remove it")


def read_config(folder: epath.Path) -> dict[str, Any]:
    """The dict of `folder`/config.json.

    Raises:
      ValueError: if there is no such folder, file, or JSON object.
    """
    if not folder.exists():
        raise ValueError(f"there is no folder {folder}; give the path of a downloaded Hugging Face checkpoint")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the folder that holds config.json and the safetensors files")
    file = folder / "config.json"
    if not file.exists():
        raise ValueError(f"{folder} holds no config.json; it is not a Hugging Face checkpoint")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); download it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds {type(config).__name__}, not a JSON object; download it again")
    return config


def find_tensors(folder: epath.Path, config: ModelConfig, block: tuple[int, int] | None) -> dict[str, StoredTensor]:
    """Every tensor that `config` needs, and the scales and copies that come with them; all of the right shape and type.

    Args:
      folder: a Hugging Face folder.
      config: its model.
      block: (rows, columns) of a scale's block, None if the config names no FP8 quantisation.

    Raises:
      CheckpointError: listing every missing, unexpected or misshapen tensor and every unusable file.
    """
    found = _Found()
    if _read_files(folder, found):
        _compare(found, config, block)
    if found.problems:
        raise CheckpointError(folder, found.problems)
    return found.tensors


def _read_files(folder: epath.Path, found: _Found) -> bool:
    """Reads every header; False if the folder does not even say which tensors it holds."""
    single, index = folder / SINGLE_FILE, folder / INDEX
    if single.exists() and index.exists():
        found.problem("ambiguous files", f"both {SINGLE_FILE} and {INDEX} are there; remove one of the two")
        return False
    if index.exists():
        return _read_indexed(folder, found)
    if single.exists():
        return _read_file(single, found)
    names = sorted(entry.name for entry in folder.iterdir())
    if shards := [name for name in names if name.endswith(".safetensors")]:
        found.problem("missing files", f"{INDEX}, which says what {_some(shards)} should hold; download it again")
    elif pickles := [name for name in names if name.endswith(_PICKLES)]:
        found.problem("pickle files", f"{_some(pickles)}; pickles are never opened, save the model as safetensors")
    else:
        found.problem("missing files", f"neither {SINGLE_FILE} nor {INDEX} is there; download the weights")
    return False


def _read_indexed(folder: epath.Path, found: _Found) -> bool:
    try:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
        plain = all(isinstance(name, str) and epath.Path(name).name == name for name in files)
    except (ValueError, KeyError, TypeError, AttributeError):
        plain = False
    if not plain:
        found.problem("unusable files", f"{INDEX} has no weight_map from tensors to files of this folder; download it again")
        return False
    for name in files:
        if not _read_file(folder / name, found):
            found.unreadable |= {tensor for tensor, file in weight_map.items() if file == name}
    for tensor, file in weight_map.items():
        if tensor not in found.unreadable and (tensor not in found.tensors or found.tensors[tensor].file.name != file):
            found.problem("tensors not where the index says", f"{tensor} in {file}")
            found.unreadable.add(tensor)
    return True


def _read_file(file: epath.Path, found: _Found) -> bool:
    """Adds the tensors of one file; False if it cannot be read."""
    if not file.exists():
        found.problem("missing files", file.name)
        return False
    try:
        tensors = read_header(file)
    except (ValueError, OSError) as error:
        found.problem("unusable files", f"{file.name}: {error}; download it again")
        return False
    for name in sorted(set(tensors) & set(found.tensors)):
        found.problem("tensors in two files", f"{name} in {found.tensors[name].file.name} and {file.name}")
    found.tensors |= tensors
    return True


def _compare(found: _Found, config: ModelConfig, block: tuple[int, int] | None) -> None:
    """Adds what is missing, unexpected, misshapen or of a wrong type."""
    needed = {name: leaf for leaf in leaves(config) for name in leaf.names}
    embedding, head = (needed[name] for name in ("model.embed_tokens.weight", "lm_head.weight"))
    optional = {copy: embedding if copy.endswith("embed_tokens.weight") else head for copy in copies(config)}
    described = needed | optional
    scales = {name + fp8.SCALE_SUFFIX for name in described if _is_fp8(found.tensors.get(name))}

    missing = (set(needed) | scales) - set(found.tensors) - found.unreadable
    missing -= _missing_mtp(found, config, missing)
    for name in sorted(missing, key=natural_order):
        found.problem("missing tensors", name)
    for name in sorted(set(found.tensors) - set(described) - scales, key=natural_order):
        if not name.endswith(IGNORED_SUFFIX):
            found.problem("unexpected tensors", name)
    for name in sorted(set(described) & set(found.tensors), key=natural_order):
        _check_tensor(found, name, described[name], block)


def _missing_mtp(found: _Found, config: ModelConfig, missing: set[str]) -> set[str]:
    """The missing tensors of the MTP layers, if those are missing as a whole: one problem, and there is a remedy."""
    prefixes = tuple(f"{layer}." for layer in mtp_layers(config))
    if not prefixes or any(name.startswith(prefixes) for name in (*found.tensors, *found.unreadable)):
        return set()
    found.problem(
        "missing MTP layers",
        f"{', '.join(mtp_layers(config))}; the file was saved without them (transformers drops them), so set "
        "num_nextn_predict_layers to 0 in config.json to use the main model alone",
    )
    return {name for name in missing if name.startswith(prefixes)}


def _check_tensor(found: _Found, name: str, leaf: Leaf, block: tuple[int, int] | None) -> None:
    tensor = found.tensors[name]
    if tensor.shape != leaf.stored:
        found.problem("misshapen tensors", f"{name} is {list(tensor.shape)}, not {list(leaf.stored)}")
    elif not _is_fp8(tensor):
        if tensor.dtype not in DTYPES:
            found.problem("tensors of a wrong type", f"{name} is {tensor.dtype}")
    elif not leaf.is_matrix:
        found.problem("tensors of a wrong type", f"{name} is {tensor.dtype}; only matrices of linear layers can be")
    elif block is None:
        found.problem("tensors of a wrong type", f"{name} is {tensor.dtype}, but config.json has no quantization_config")
    elif (scale := found.tensors.get(name + fp8.SCALE_SUFFIX)) is not None:
        expected = fp8.scale_shape(leaf.stored, block)
        if scale.shape != expected:
            found.problem("misshapen tensors", f"{name}{fp8.SCALE_SUFFIX} is {list(scale.shape)}, not {list(expected)}")
        if scale.dtype not in DTYPES or _is_fp8(scale):
            found.problem("tensors of a wrong type", f"{name}{fp8.SCALE_SUFFIX} is {scale.dtype}")


def _is_fp8(tensor: StoredTensor | None) -> bool:
    return tensor is not None and DTYPES.get(tensor.dtype) == fp8.FP8


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
