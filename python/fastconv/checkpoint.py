"""Weights and training states in safetensors files; a crash leaves the old file or the new one.

There are two kinds of file, both readable by any safetensors library:

- weights: the tensors of a state_dict under their own names, so
  `torch_model.load_state_dict(load_file(path))` works.
- training state: everything that a resumed run needs, in one file, so that its parts cannot
  disagree. The weights are named model.<name>; optimiser, schedule, random state and position
  follow.

The one metadata entry, "fastconv", is JSON: the kind of the file, `info` about model and data, and
what of the state is not an array. One entry, since the order of several in a safetensors header is
not fixed, and equal states shall make equal files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastconv import cuda

__all__ = [
    "atomic_write",
    "check_available",
    "load_state",
    "load_weights",
    "save_state",
    "save_weights",
]

FORMAT = 1
_KEY = "fastconv"
Arrays = dict[str, NDArray[Any]]


def save_weights(
    path: str | PathLike[str], weights: Mapping[str, Any], info: Mapping[str, Any] | None = None
) -> None:
    """Writes a state_dict (anything numpy takes, by name) and JSON-able information about it."""
    arrays = {name: _host_array(value) for name, value in weights.items()}
    _write(path, arrays, {"kind": "weights", "info": dict(info or {})})


def load_weights(path: str | PathLike[str]) -> tuple[Arrays, dict[str, Any]]:
    """The weights by name, and the information beside them, of either kind of file.

    A safetensors file of another program gives its tensors and an empty information.
    Raises FileNotFoundError, or ValueError for a file that is damaged or of an unknown format.
    """
    arrays, header = _read(path)
    if header.get("kind") == "state":
        prefix = "model."
        arrays = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    return arrays, header.get("info", {})


def save_state(
    path: str | PathLike[str], state: Mapping[str, Any], info: Mapping[str, Any] | None = None
) -> None:
    """Writes a training state: nested dicts and lists of arrays and JSON values.

    state["model"] is the state_dict.
    """
    arrays: Arrays = {}
    tree = _pack(state, "", arrays)
    _write(path, arrays, {"kind": "state", "info": dict(info or {}), "tree": tree})


def load_state(path: str | PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, info) as save_state was given them; tuples come back as lists.

    Raises FileNotFoundError, or ValueError for a file that is damaged or is no training state.
    """
    arrays, header = _read(path)
    if header.get("kind") != "state":
        raise ValueError(f"{path}: not a training state of fastconv")
    return _unpack(header["tree"], arrays), header.get("info", {})


def check_available() -> None:
    """Raises ImportError, with what to install, where the safetensors package is missing."""
    _safetensors()


def atomic_write(path: str | PathLike[str], content: bytes) -> None:
    """Replaces the file in one step: whoever reads it, even after a crash, sees it whole."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself has to reach the disk
    finally:
        os.close(folder)


def _pack(value: Any, name: str, arrays: Arrays) -> Any:
    """The JSON form of a state; its arrays go to `arrays`, each under the path that leads to it."""
    if isinstance(value, Mapping):
        items = [[key, _pack(v, f"{name}{key}.", arrays)] for key, v in value.items()]
        if all(isinstance(key, str) and key[:1] != "$" for key in value):
            return dict(items)
        return {
            "$items": items
        }  # optimisers number their states with integers, which JSON has not as keys
    if isinstance(value, list | tuple):
        return [_pack(v, f"{name}{i}.", arrays) for i, v in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    key = name[:-1]
    arrays[key] = _host_array(value)
    return {"$array": key}


def _host_array(value: Any) -> NDArray[Any]:
    return np.asarray(cuda.to_numpy(value) if cuda.is_device_array(value) else value, order="C")


def _unpack(tree: Any, arrays: Arrays) -> Any:
    if isinstance(tree, list):
        return [_unpack(item, arrays) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "$array" in tree:
        return arrays[tree["$array"]]
    items = tree["$items"] if "$items" in tree else tree.items()
    return {key: _unpack(item, arrays) for key, item in items}


def _write(path: str | PathLike[str], arrays: Arrays, header: dict[str, Any]) -> None:
    metadata = {_KEY: json.dumps({"format": FORMAT, **header})}
    atomic_write(path, _safetensors().numpy.save(arrays, metadata))


def _read(path: str | PathLike[str]) -> tuple[Arrays, dict[str, Any]]:
    library = _safetensors()
    content = Path(path).read_bytes()
    try:
        arrays: Arrays = {name: _array(view) for name, view in library.deserialize(content)}
        # The file is the length of its header (8 bytes, little endian), that as JSON, the tensors.
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
        header: dict[str, Any] = json.loads(metadata.get(_KEY, "{}"))
    except Exception as error:  # whatever a damaged file makes of the reader
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    if header and header.get("format") != FORMAT:
        raise ValueError(f"{path}: format {header.get('format')}, this version reads {FORMAT}")
    return arrays, header


# The types of safetensors as they lie in the file, little endian.
_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
}  # fmt: skip


def _array(view: Mapping[str, Any]) -> NDArray[Any]:
    """A tensor of `safetensors.deserialize`; bfloat16, which numpy has not, becomes float32."""
    kind = view["dtype"]
    if kind not in _TYPES:
        raise ValueError(f"a tensor of type {kind}, known are {', '.join(_TYPES)}")
    stored = np.frombuffer(view["data"], _TYPES[kind]).reshape(view["shape"])
    return widen_bfloat16(stored) if kind == "BF16" else stored


def widen_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The bits of bfloat16 numbers as float32, exactly: they are its upper half."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "weight files need the package safetensors: pip install 'fastconv[train]'"
        ) from error
    return safetensors
