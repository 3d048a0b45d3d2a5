"""The pickle of a `.pth` file, followed step by step on paper.

Owns the grammar of a plain table of tensors: which globals, which instructions, and which values each of them may
be given. Only names, numbers and placeholders are handled, so what a pickle would make is never made. It is stricter
than a list of names, since tuples that share their parts are exponentially long when hashed or written out.
"""

from __future__ import annotations

import pickletools
from enum import Enum
from pathlib import Path

from mistral_runtime.errors import MalformedCheckpoint, UnsafePickle

# 1,024 layers need about 400,000 instructions; one of them can make an object of hundreds of bytes.
MAX_INSTRUCTIONS = 1 << 19

_HINT = "the weights are damaged, or were not written by torch.save; verify the snapshot or fetch it again"
_UNSAFE_HINT = "do not load it with another tool; fetch the model again, or a safetensors version of it"
_NUMBERS = (
    "BFloat16", "Bool", "Byte", "Char", "ComplexDouble", "ComplexFloat", "Double", "Float", "Half", "Int", "Long",
    "Short",
)  # fmt: skip


class _Made(Enum):
    """What stands on the stack for an object."""

    DICT = "dict"
    STORAGE = "storage"
    TENSOR = "tensor"
    STORAGE_TYPE = "storage type"
    ORDERED_DICT = "OrderedDict"
    REBUILD_TENSOR = "_rebuild_tensor_v2"
    REBUILD_PARAMETER = "_rebuild_parameter"


# What a plain table of tensors names. torch's own list is far longer and has callables such as bytearray, which
# take memory by the number in the file.
_GLOBALS = {
    "collections.OrderedDict": _Made.ORDERED_DICT,
    "torch._utils._rebuild_tensor_v2": _Made.REBUILD_TENSOR,
    "torch._utils._rebuild_parameter": _Made.REBUILD_PARAMETER,
} | {f"torch.{number}Storage": _Made.STORAGE_TYPE for number in _NUMBERS}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_DICT": _Made.DICT, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def check_pickle(program: bytes, path: Path) -> None:
    """Raise unless the pickle describes a plain table of tensors. Nothing of it is run.

    Raises:
        MalformedCheckpoint: Far longer than any table of tensors, cut short, or without sense.
        UnsafePickle: It asks for a global or an instruction that no table of tensors needs.
    """
    machine = _Machine()
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(program)):
            if count >= MAX_INSTRUCTIONS:
                raise ValueError(f"more than {MAX_INSTRUCTIONS} instructions")
            machine.step(operation.name, argument)
    except _NotPlain as error:
        raise UnsafePickle(
            f"{path} is not only weights",
            detail=f"expected tensors, found a pickle that asks for {error}",
            hint=_UNSAFE_HINT,
        ) from error
    except (ValueError, LookupError, EOFError) as error:
        raise MalformedCheckpoint(
            f"{path} is not a readable .pth file",
            detail=f"expected a pickle of a table of tensors, found: {str(error)[:200] or type(error).__name__}",
            hint=_HINT,
        ) from error


class _NotPlain(Exception):
    """Carries what the pickle asks for."""


class _Machine:
    """The stack and the memo of the unpickler, with placeholders for objects."""

    def __init__(self) -> None:
        self._stack: list[object] = []
        self._below: list[list[object]] = []  # one stack for every open mark
        self._memo: dict[object, object] = {}

    def step(self, name: str, argument: object) -> None:
        """Follow one instruction."""
        if name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            self._stack.append(_plain_tuple(self._take(_TUPLES[name])))
        elif name in ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"):
            if isinstance(argument, int) and not -(1 << 63) <= argument < 1 << 63:
                raise _NotPlain("a number of more than 64 bits")
            self._stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[argument])
        elif name == "PROTO":
            if argument != 2:
                raise _NotPlain(f"pickle protocol {argument}")
        elif name != "STOP":
            self._compose(name, argument)

    def _compose(self, name: str, argument: object) -> None:
        if name == "GLOBAL":
            asked = str(argument).replace(" ", ".", 1)
            if asked not in _GLOBALS:
                raise _NotPlain(asked[:200])
            self._stack.append(_GLOBALS[asked])
        elif name == "MARK":
            self._below.append(self._stack)
            self._stack = []
        elif name == "TUPLE":
            made = _plain_tuple(self._since_mark())  # first: it changes which stack is the current one
            self._stack.append(made)
        elif name == "SETITEMS":
            self._set_items(self._since_mark())
        elif name == "SETITEM":
            self._set_items(self._take(2))
        elif name == "BINPERSID":
            _require_storage(self._take(1)[0])
            self._stack.append(_Made.STORAGE)
        elif name == "REDUCE":
            function, arguments = self._take(2)
            self._stack.append(_called(function, arguments))
        elif name == "BUILD":  # an OrderedDict's attributes: modules write `_metadata`
            if self._take(1) != [_Made.DICT] or self._stack[-1] is not _Made.DICT:
                raise ValueError("BUILD of something that is not a dict")
        else:
            raise _NotPlain(f"the instruction {name}")

    def _take(self, count: int) -> list[object]:
        if len(self._stack) < count:
            raise ValueError("an instruction without its values")
        taken = self._stack[-count:]
        del self._stack[-count:]
        return taken

    def _since_mark(self) -> list[object]:
        taken, self._stack = self._stack, self._below.pop()
        return taken

    def _set_items(self, items: list[object]) -> None:
        if self._stack[-1] is not _Made.DICT or len(items) % 2 or not all(isinstance(key, str) for key in items[::2]):
            raise ValueError("a table whose keys are not text")


def _plain_tuple(values: list[object]) -> tuple[object, ...]:
    """Return a tuple that holds no tuples but those of numbers: shapes and strides."""
    for value in values:
        if isinstance(value, tuple) and (len(value) > 16 or not all(isinstance(part, int) for part in value)):
            raise ValueError("tuples within tuples")
    return tuple(values)


def _require_storage(identity: object) -> None:
    match identity:
        case ("storage", _Made.STORAGE_TYPE, str(), str(), int(count)) if count >= 0:
            return
    raise ValueError("a storage without type, name, place and length")


def _called(function: object, arguments: object) -> _Made:
    match function, arguments:
        case _Made.ORDERED_DICT, ():
            return _Made.DICT
        case _Made.REBUILD_TENSOR, (_Made.STORAGE, int(), tuple(), tuple(), bool(), _Made.DICT):
            return _Made.TENSOR
        case _Made.REBUILD_PARAMETER, (_Made.TENSOR, bool(), _Made.DICT):
            return _Made.TENSOR
    raise ValueError("a call that makes no tensor")
