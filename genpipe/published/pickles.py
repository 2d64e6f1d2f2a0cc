"""A reader of pickles that runs nothing: a short list of names, inert stand-ins, tensors as descriptions.

Python's own unpickler calls whatever a file names. This one knows the opcodes that torch writes and the names listed
in `_known`; every other name is recorded and refused. What it hands back are dictionaries, lists, strings, numbers,
StoredTensor and Inert. torch's weights_only mode is as careful, but refuses whole modules and TorchScript archives;
this list is shorter than its own, so one reader serves all containers and checks every tensor against its storage.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import IO, Any

import torch

from genpipe.published.stored import Damaged, Storage, stored_tensor

MAX_PICKLE_BYTES = 64 << 20  # names and shapes only: published files need less than one megabyte
STORAGE_TYPES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip
# What torch.save (protocols 2 to 4) and torch.jit.save write; others could reach the registry of extensions, allocate
# before they read, or name things in a second way.
_OPCODES = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.DUP,
    pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1,
    pickle.LONG4, pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8, pickle.BINSTRING,
    pickle.SHORT_BINSTRING, pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8, pickle.EMPTY_TUPLE, pickle.TUPLE,
    pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.LIST, pickle.APPEND, pickle.APPENDS,
    pickle.EMPTY_DICT, pickle.DICT, pickle.SETITEM, pickle.SETITEMS, pickle.EMPTY_SET, pickle.ADDITEMS,
    pickle.FROZENSET, pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE,
    pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.BUILD, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.BINPERSID,
)  # fmt: skip


class Inert:
    """Stands in for an object of a foreign class: keeps its state, does nothing."""

    def __new__(cls, *arguments: Any, **named: Any) -> Inert:
        inert = super().__new__(cls)
        inert.state = {}
        return inert

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.state: dict[Any, Any]

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and state and isinstance(state[0], dict):  # (state, slots), as protocol 2 has it
            state = state[0]
        self.state = dict(state) if isinstance(state, dict) else {}

    def __setitem__(self, key: Any, value: Any) -> None:
        """Entries of a foreign mapping are not wanted."""

    def append(self, value: Any) -> None:
        """Entries of a foreign sequence are not wanted."""

    def extend(self, values: Any) -> None:
        """As append."""


class _Call:
    """One of our own functions under a foreign name; made anew for each file, so that no file can change it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


class StorageType:
    """Stands for a name such as torch.FloatStorage."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _Limited:
    """At most MAX_PICKLE_BYTES of a file, so that a length given in it cannot ask for more memory than that."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._left = file, MAX_PICKLE_BYTES

    def read(self, size: int) -> bytes:
        return self._spend(self._file.read(min(size, self._left + 1)))

    def readline(self) -> bytes:
        return self._spend(self._file.readline(self._left + 1))

    def readinto(self, buffer: Any) -> int:
        raise Damaged("its pickle holds a buffer")

    def _spend(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise Damaged(f"its pickle is larger than {MAX_PICKLE_BYTES >> 20} MiB")
        return data


class _Unpickler(pickle._Unpickler):  # the one in Python: the one in C can neither be held to a list of opcodes ...
    """... nor kept from allocating for a memo index that the file makes up."""

    dispatch = {opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in _OPCODES}

    def __init__(self, file: Any, known: dict[str, Any], inert: Callable[[str], bool], storage: Callable[..., Any]):
        super().__init__(file, fix_imports=False, encoding="utf-8")
        self._known_names, self._is_inert, self._storage = known, inert, storage
        self.refused: list[str] = []

    def find_class(self, module: str, name: str) -> Any:
        dotted = f"{module}.{name}"
        if dotted not in self._known_names:
            if not self._is_inert(dotted):
                self.refused.append(dotted)
            self._known_names[dotted] = type("Inert", (Inert,), {})
        return self._known_names[dotted]

    def persistent_load(self, pid: Any) -> Any:
        kind, *rest = pid if isinstance(pid, tuple) and pid else (None,)
        if kind == "module" and rest:  # the legacy container puts a class and its source text here
            return rest[0]
        if kind != "storage" or len(rest) not in (4, 5) or not isinstance(rest[0], StorageType):
            raise Damaged("it refers to something that is no storage")
        if len(rest) == 5 and rest[4] is not None:
            raise Damaged("it holds views of storages, as torch wrote them before version 0.4")
        key, numel = rest[1], rest[3]
        if not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise Damaged(f"it has a storage {str(key)[:40]!r} of {str(numel)[:40]} numbers")
        return self._storage(key, rest[0].dtype, numel)


def _known() -> dict[str, Any]:
    """The names that a file may use and what they mean here. Only harmless things may ever be added."""

    def tensor(storage: Any, offset: Any, shape: Any, stride: Any, *unused: Any) -> Any:
        return stored_tensor(storage, offset, shape, stride)

    known: dict[str, Any] = {
        "collections.OrderedDict": OrderedDict,
        "builtins.set": set,
        "__builtin__.set": set,
        "torch.device": _Call(lambda *unused: None),
        "torch.Size": _Call(lambda sizes=(): tuple(sizes)),
        "torch._utils._rebuild_tensor": _Call(tensor),
        "torch._utils._rebuild_tensor_v2": _Call(tensor),
        "torch._utils._rebuild_parameter": _Call(lambda data, *unused: data),
        "torch._utils._rebuild_parameter_with_state": _Call(lambda data, *unused: data),
    }
    known |= {f"torch.{name}Storage": StorageType(dtype) for name, dtype in STORAGE_TYPES.items()}
    known |= {str(dtype): None for dtype in STORAGE_TYPES.values()}
    return known


def torch_script_names() -> dict[str, Any]:
    """What a TorchScript archive may name besides: lists with a type, and values with a type."""
    lists = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")
    names: dict[str, Any] = {f"torch.jit._pickle.{name}": _Call(lambda values: values) for name in lists}
    return {**names, "torch.jit._pickle.restore_type_tag": _Call(lambda value, *unused: value)}


def read_pickle(
    file: IO[bytes],
    storage: Callable[[str, torch.dtype, int], Storage],
    stand_ins: Collection[str] = (),
    torch_script: bool = False,
) -> Any:
    """One pickle from the position of `file` on; afterwards the file stands behind it.

    `storage(key, dtype, numel)` says where a storage lies; `stand_ins` are dotted names that become Inert, in a
    TorchScript archive also all that begin with __torch__. Raises Damaged, naming every global that was refused.
    """
    known = {**_known(), **(torch_script_names() if torch_script else {})}

    def inert(name: str) -> bool:
        return name in stand_ins or (torch_script and name.startswith("__torch__."))

    reader = _Unpickler(_Limited(file), known, inert, storage)
    try:
        result = reader.load()
    except Damaged as error:
        raise _refusal(reader.refused) or error from error
    except RecursionError as error:
        raise _refusal(reader.refused) or Damaged("its pickle is nested too deeply") from error
    except Exception as error:  # an unpickler on made-up input raises nearly everything
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise _refusal(reader.refused) or Damaged(f"its pickle cannot be read: {reason}") from error
    refused = _refusal(reader.refused)
    if refused:
        raise refused
    return result


def _refusal(names: list[str]) -> Damaged | None:
    if not names:
        return None
    listed = ", ".join(name[:80] for name in names[:8])
    return Damaged(f"its pickle names {listed}, which is not on the list of harmless names; nothing of it was run")
