"""Reads what `torch.save` wrote, without PyTorch and without running anything the file says.

Two formats, told apart by their first bytes:

- a zip archive, PyTorch 1.6 and later: NAME/data.pkl is a pickle, NAME/data/KEY the bytes of each
  storage, NAME/byteorder their byte order.
- before 1.6: five pickles one after another (a magic number, the version of the format, the writing
  machine, the object, the keys of the storages), then each storage as its length and its bytes.

A pickle is a program for a stack machine, and unpickling one may call any function. Here a machine
of our own (`_Pickle`) runs the few instructions that dicts, lists, numbers and tensors consist of
and refuses every other, as it refuses every global name but those in `_GLOBALS`.
`pickle.Unpickler` with a `find_class` would not do: a file can crash it, for one with a key of a
million nested tuples, whose hash overflows the C stack.
"""

from __future__ import annotations

import io
import os
import pickletools
import zipfile
from collections.abc import Callable
from os import PathLike
from typing import IO, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastconv.checkpoint import widen_bfloat16

__all__ = ["is_torch_file", "read"]

ZIP_START = b"PK\x03\x04"
PICKLE_START = b"\x80"
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001

# The storages of torch, by the type of their elements in a file.
_STORAGES = {
    "torch FloatStorage": "f4",
    "torch DoubleStorage": "f8",
    "torch HalfStorage": "f2",
    "torch BFloat16Storage": "bfloat16",
    "torch LongStorage": "i8",
    "torch IntStorage": "i4",
    "torch ShortStorage": "i2",
    "torch CharStorage": "i1",
    "torch ByteStorage": "u1",
    "torch BoolStorage": "bool",
}


class _Storage(NamedTuple):
    """A storage as the pickle names it; its bytes are elsewhere in the file."""

    type: str
    key: str
    length: int

    @property
    def nbytes(self) -> int:
        return self.length * _stored_dtype(self.type).itemsize


class _View(NamedTuple):
    """A tensor as the pickle describes it; `_Tensors` checks offset, shape and strides."""

    storage: _Storage
    offset: Any
    shape: Any
    strides: Any


ReadStorage: TypeAlias = Callable[[_Storage], NDArray[Any]]


def is_torch_file(start: bytes) -> bool:
    """Whether a file that begins with these bytes (4 are enough) may be one of torch.save."""
    return start.startswith((ZIP_START, PICKLE_START))


def read(path: str | PathLike[str]) -> Any:
    """The saved object: dicts, lists, tuples, numbers, strings, and an array for each tensor.

    Arrays have the strides of their tensors; tensors that share a storage share memory. bfloat16
    becomes float32, everything else keeps its type. Devices and `requires_grad` are forgotten.
    Raises FileNotFoundError, or ValueError for a file that is damaged, that holds anything but
    weights, or whose parts contradict each other.
    """
    with open(path, "rb") as file:
        try:
            if file.read(len(ZIP_START)) == ZIP_START:
                return _read_zip(file)
            file.seek(0)
            return _read_legacy(file)
        except Exception as error:  # whatever a damaged file makes of the readers
            message = str(error) or type(error).__name__
            raise ValueError(f"{path}: not a readable weight file of PyTorch: {message}") from error


def _read_zip(file: IO[bytes]) -> Any:
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        # PyTorch compresses nothing, so what would become larger than the file is an attack.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise ValueError("a compressed zip archive, which PyTorch never writes")
        if sum(entry.file_size for entry in entries.values()) > size:
            raise ValueError(f"its parts claim to be larger than the file of {size} bytes")
        name = next((n for n in entries if n.endswith("/data.pkl") and n.count("/") == 1), None)
        if name is None:
            raise ValueError("a zip archive without data.pkl")
        folder = name.removesuffix("data.pkl")
        if f"{folder}constants.pkl" in entries:
            raise ValueError("a TorchScript program; save its state_dict() instead")
        byteorder = f"{folder}byteorder"
        order = archive.read(byteorder) if byteorder in entries else b"little"
        if order not in (b"little", b"big"):
            raise ValueError(f"unknown byte order {order[:20]!r}")
        tree = _Pickle(io.BytesIO(archive.read(name))).run()

        def read_storage(storage: _Storage) -> NDArray[Any]:
            entry = entries.get(f"{folder}data/{storage.key}")
            if entry is None:
                raise ValueError(f"storage {storage.key!r} is missing")
            _check_length(storage, entry.file_size)
            return _elements(storage.type, archive.read(entry), order == b"big")

        return _Tensors(read_storage).fill(tree)


def _read_legacy(file: IO[bytes]) -> Any:
    if _Pickle(file).run() != _MAGIC_NUMBER:
        raise ValueError("a pickle, but not one of torch.save")
    if _Pickle(file).run() != _LEGACY_VERSION:
        raise ValueError(f"not version {_LEGACY_VERSION} of the format")
    _machine, tree, keys = (_Pickle(file).run() for _ in range(3))
    size = os.fstat(file.fileno()).st_size
    places: dict[str, tuple[int, int]] = {}  # key of a storage: where its bytes are, and how many
    storages: dict[str, _Storage] = {}
    _Walk(lambda view: storages.update({view.storage.key: view.storage})).visit(tree)
    for key in keys if isinstance(keys, list) else ():
        if key not in storages:
            raise ValueError(f"storage {key!r} belongs to no tensor")
        length = int.from_bytes(file.read(8), "little")
        if length != storages[key].length:
            _check_length(storages[key], length * _stored_dtype(storages[key].type).itemsize)
        places[key] = file.tell(), storages[key].nbytes
        file.seek(storages[key].nbytes, os.SEEK_CUR)
    if file.tell() > size:
        raise ValueError(f"cut off: {size} bytes, its storages need {file.tell()}")

    def read_storage(storage: _Storage) -> NDArray[Any]:
        if storage.key not in places:
            raise ValueError(f"storage {storage.key!r} is missing")
        start, nbytes = places[storage.key]
        _check_length(storage, nbytes)
        file.seek(start)
        return _elements(storage.type, file.read(nbytes), big_endian=False)

    return _Tensors(read_storage).fill(tree)


def _stored_dtype(kind: str) -> np.dtype[Any]:
    return np.dtype("u2" if kind == "bfloat16" else "u1" if kind == "bool" else kind)


def _check_length(storage: _Storage, nbytes: int) -> None:
    if nbytes != storage.nbytes:
        raise ValueError(
            f"storage {storage.key!r} has {nbytes} bytes, its {storage.length} elements of type "
            f"{storage.type} need {storage.nbytes}"
        )


def _elements(kind: str, content: bytes, big_endian: bool) -> NDArray[Any]:
    stored = np.frombuffer(content, _stored_dtype(kind).newbyteorder(">" if big_endian else "<"))
    if big_endian:
        stored = stored.astype(_stored_dtype(kind))
    if kind == "bfloat16":
        return widen_bfloat16(stored)
    # Any byte but 0 counts as true, and numpy wants the bytes 0 and 1 alone.
    return stored != 0 if kind == "bool" else stored


class _Tensors:
    """Makes arrays of the tensors in a tree; each storage is read once."""

    def __init__(self, read_storage: ReadStorage) -> None:
        self._read_storage = read_storage
        self._storages: dict[_Storage, NDArray[Any]] = {}

    def fill(self, tree: Any) -> Any:
        return _Walk(self._tensor).visit(tree)

    def _tensor(self, view: _View) -> NDArray[Any]:
        storage, offset, shape, strides = view
        sizes = (offset, *_tuple_of(shape), *_tuple_of(strides))
        if any(type(n) is not int or n < 0 for n in sizes) or len(shape) != len(strides):
            raise ValueError(
                f"a tensor of offset {_shown(offset)}, shape {_shown(shape)} and strides "
                f"{_shown(strides)}"
            )
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if 0 not in shape and last >= storage.length:
            raise ValueError(
                f"a tensor of offset {offset}, shape {shape} and strides {strides} reaches outside "
                f"of its storage of {storage.length} elements"
            )
        if storage not in self._storages:
            self._storages[storage] = self._read_storage(storage)
        elements = self._storages[storage]
        if 0 in shape:
            return np.zeros(shape, elements.dtype)
        steps = tuple(s * elements.itemsize for s in strides)
        return np.ndarray(shape, elements.dtype, elements, offset * elements.itemsize, steps)


def _tuple_of(value: Any) -> tuple[Any, ...]:
    return value if type(value) is tuple else (None,)


def _shown(value: Any) -> str:
    """For messages: numbers and tuples of them as they are, of anything else the type."""
    if type(value) is int or (type(value) is tuple and all(type(n) is int for n in value)):
        return str(value)
    return type(value).__name__


class _Walk:
    """Replaces every tensor of a tree by function(view)."""

    MAX_DEPTH = 50

    def __init__(self, function: Callable[[_View], Any]) -> None:
        self._function = function
        self._done: dict[int, Any] = {}  # by id: a file may hold one thing in many places

    def visit(self, tree: Any, depth: int = 0) -> Any:
        if id(tree) not in self._done:
            if depth > self.MAX_DEPTH:
                raise ValueError(f"nested more than {self.MAX_DEPTH} levels deep")
            self._done[id(tree)] = self._replaced(tree, depth + 1)
        return self._done[id(tree)]

    def _replaced(self, tree: Any, depth: int) -> Any:
        if isinstance(tree, _View):
            return self._function(tree)
        if isinstance(tree, _Storage | _Name):
            raise ValueError(f"a {type(tree).__name__.strip('_').lower()} without a tensor")
        if isinstance(tree, dict):
            return {key: self.visit(value, depth) for key, value in tree.items()}
        if isinstance(tree, list | tuple):
            return type(tree)(self.visit(value, depth) for value in tree)
        return tree


# The machine that runs pickles.


class _Name(NamedTuple):
    """A global name that the pickle has put on the stack: one of _STORAGES or _FUNCTIONS."""

    name: str


def _ordered_dict(items: Any = ()) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for key, value in items:  # written so by Python 2; Python 3 fills an empty one
        result[_key(key)] = value
    return result


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _View:
    """Whatever follows is requires_grad, hooks (always empty) and metadata."""
    if not isinstance(storage, _Storage):
        raise ValueError(f"a tensor on a {type(storage).__name__} instead of a storage")
    return _View(storage, offset, shape, strides)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _ordered_dict,
    "torch._utils _rebuild_tensor": _rebuild_tensor,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
}
_GLOBALS = _STORAGES.keys() | _FUNCTIONS.keys()

_IGNORED = frozenset(("PROTO", "FRAME"))
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset(
    (
        "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
        "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING",
    )
)  # fmt: skip
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Source(NamedTuple):
    """What pickletools reads from. It has no tell(), which would be asked at each instruction."""

    read: Callable[[int], bytes]
    readline: Callable[[], bytes]


class _Pickle:
    """Runs the pickle at the present place of a file, up to its end.

    The instructions are those of `pickletools`, which also decodes them; only the few that follow
    are known. Nothing is called but `_FUNCTIONS`.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._source: Any = _Source(file.read, file.readline)
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []  # a stack for each MARK that is still open
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        for opcode, argument, _ in pickletools.genops(self._source):
            if opcode.name == "STOP":
                return self._pop()
            self._execute(opcode.name, argument)
        raise ValueError("a pickle without an end")

    def _execute(self, name: str, argument: Any) -> None:
        if name in _IGNORED:
            return
        if name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            self._stack.append(argument)
        elif name in _EMPTY:
            self._stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            self._stack[-_TUPLES[name] :] = [tuple(self._take(_TUPLES[name]))]
        elif name in _INSTRUCTIONS:
            _INSTRUCTIONS[name](self, argument)
        else:
            raise ValueError(f"the instruction {name}, which no weights need")

    def _take(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise ValueError("a pickle that takes more from its stack than there is")
        return self._stack[-count:]

    def _pop(self) -> Any:
        [value] = self._take(1)
        self._stack.pop()
        return value

    def _pop_mark(self) -> list[Any]:
        """What was pushed since the last MARK."""
        if not self._outer:
            raise ValueError("a pickle that closes what it did not open")
        values, self._stack = self._stack, self._outer.pop()
        return values

    def _top(self, kind: type) -> Any:
        [value] = self._take(1)
        if type(value) is not kind:
            raise ValueError(f"a {type(value).__name__} in the place of a {kind.__name__}")
        return value

    def _mark(self, _: Any) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def _tuple(self, _: Any) -> None:
        values = tuple(self._pop_mark())
        self._stack.append(values)

    def _append(self, _: Any) -> None:
        value = self._pop()
        self._top(list).append(value)

    def _appends(self, _: Any) -> None:
        values = self._pop_mark()
        self._top(list).extend(values)

    def _set_item(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self._top(dict)[_key(key)] = value

    def _set_items(self, _: Any) -> None:
        values = self._pop_mark()
        target = self._top(dict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[_key(key)] = value

    def _put(self, number: int) -> None:
        self._memo[number] = self._take(1)[0]

    def _memoize(self, _: Any) -> None:
        self._put(len(self._memo))

    def _get(self, number: int) -> None:
        if number not in self._memo:
            raise ValueError(f"a pickle that uses entry {number} before it is there")
        self._stack.append(self._memo[number])

    def _global(self, name: str) -> None:
        if name not in _GLOBALS:
            raise ValueError(
                f"it asks for {name.replace(' ', '.', 1)[:200]}, which weights do not need and "
                "which is not run; save the state_dict() alone"
            )
        self._stack.append(_Name(name))

    def _stack_global(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("a global name that is no text")
        self._global(f"{module} {name}")

    def _reduce(self, _: Any) -> None:
        arguments, function = self._pop(), self._pop()
        if type(function) is not _Name or function.name not in _FUNCTIONS:
            raise ValueError(f"a call of something that is no function: {type(function).__name__}")
        if type(arguments) is not tuple:
            raise ValueError(f"a call with a {type(arguments).__name__} as arguments")
        self._stack.append(_FUNCTIONS[function.name](*arguments))

    def _build(self, _: Any) -> None:
        """The attributes of an object: only a state_dict has some (_metadata), and they go."""
        self._pop()
        self._top(dict)

    def _persistent_id(self, _: Any) -> None:
        """Names a storage: ("storage", type, key, device, length), before 1.6 with a view."""
        match self._pop():
            case ("storage", _Name(name), str(key), _, int(length), *view) if (
                name in _STORAGES and length >= 0
            ):
                if view not in ([], [None]):
                    raise ValueError("views of storages, written by PyTorch before 0.4")
                self._stack.append(_Storage(_STORAGES[name], key, length))
            case _:
                raise ValueError("a storage that is not described as PyTorch does")


_INSTRUCTIONS: dict[str, Callable[[_Pickle, Any], None]] = {
    "MARK": _Pickle._mark,
    "TUPLE": _Pickle._tuple,
    "APPEND": _Pickle._append,
    "APPENDS": _Pickle._appends,
    "SETITEM": _Pickle._set_item,
    "SETITEMS": _Pickle._set_items,
    "BINPUT": _Pickle._put,
    "LONG_BINPUT": _Pickle._put,
    "MEMOIZE": _Pickle._memoize,
    "BINGET": _Pickle._get,
    "LONG_BINGET": _Pickle._get,
    "GLOBAL": _Pickle._global,
    "STACK_GLOBAL": _Pickle._stack_global,
    "REDUCE": _Pickle._reduce,
    "BUILD": _Pickle._build,
    "BINPERSID": _Pickle._persistent_id,
}


def _key(value: Any) -> Any:
    """`value`, if it may be a key of a dict. Tuples may not: the hash of a deep one is a crash."""
    if value is not None and type(value) not in (str, int, float, bool):
        raise ValueError(f"a dict with a key of type {type(value).__name__}")
    return value
