"""The `.pth` container, judged before anything unpickles it.

Owns two questions: is this the kind of zip archive that `torch.save` writes, and does its pickle do no more than
describe a table of tensors? The pickle is read as a list of instructions and never run. Knows nothing of the model.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path

from mistral_runtime.errors import MalformedCheckpoint, UnsafePickle

# Everything but the weights is small: the pickle of 7B's 291 tensors takes some 40 kB and 10,000 instructions.
MAX_RECORD_BYTES = 16 << 20
# One byte of pickle can make an object of hundreds; 1,024 layers need about 400,000 instructions.
MAX_INSTRUCTIONS = 1 << 19

_HINT = "the weights are damaged, or were not written by torch.save; verify the snapshot or fetch it again"
_UNSAFE_HINT = "do not load it with another tool; fetch the model again, or a safetensors version of it"
_NUMBERS = (
    "BFloat16", "Bool", "Byte", "Char", "ComplexDouble", "ComplexFloat", "Double", "Float", "Half", "Int", "Long",
    "Short",
)  # fmt: skip
# What a plain table of tensors names. torch's own list is far longer and has callables such as bytearray, which
# take memory by the number in the file.
_GLOBALS = {
    "collections.OrderedDict",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
    *(f"torch.{number}Storage" for number in _NUMBERS),
}
_INSTRUCTIONS = {
    "PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "NONE", "NEWTRUE", "NEWFALSE",
    "BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
    "EMPTY_DICT", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "SETITEM", "SETITEMS",
}  # fmt: skip


class _BoundedReads(io.FileIO):
    """A file that gives out no more at once than a small record holds: lengths come from the file itself."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_RECORD_BYTES:
            raise zipfile.BadZipFile(f"a directory or record of {size} bytes")
        return super().read(MAX_RECORD_BYTES if size is None or size < 0 else size) or b""


def check_archive(path: Path) -> list[zipfile.ZipInfo]:
    """Return the records that hold weights, once container and pickle are found plain.

    Raises:
        MalformedCheckpoint: Not an archive as `torch.save` writes it.
        UnsafePickle: The pickle asks for more than tensors.
        zipfile.BadZipFile: Not a zip archive at all; so may be OSError and the other ways to stumble over one.
    """
    with _BoundedReads(path) as file, zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        _require_plain_members(members, path)
        pickles = [info for info in members if info.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _malformed(path, "one record data.pkl", f"{len(pickles)} of them")
        check_pickle(archive.read(pickles[0]), path)
    return [info for info in members if "/data/" in info.filename]


def check_pickle(program: bytes, path: Path) -> None:
    """Raise unless every instruction is one that a plain table of tensors needs. Nothing is run.

    Raises:
        MalformedCheckpoint: Far longer than any table of tensors, or cut short.
        UnsafePickle: A global or an instruction outside the list.
    """
    unsafe: set[str] = set()
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(program)):
            if count >= MAX_INSTRUCTIONS:
                raise _malformed(path, f"a pickle of at most {MAX_INSTRUCTIONS} instructions", "more")
            if operation.name == "GLOBAL":
                asked = str(argument).replace(" ", ".", 1)
                if asked not in _GLOBALS:
                    unsafe.add(asked[:200])
            elif operation.name not in _INSTRUCTIONS:
                unsafe.add(f"the instruction {operation.name}")
            elif isinstance(argument, int) and not -(1 << 63) <= argument < 1 << 63:
                unsafe.add("a number of more than 64 bits")
            elif operation.name == "PROTO" and argument != 2:
                unsafe.add(f"pickle protocol {argument}")
    except (ValueError, LookupError, EOFError) as error:
        if not unsafe:
            raise _malformed(path, "a whole pickle", str(error)[:200]) from error
    if unsafe:
        raise UnsafePickle(
            f"{path} is not only weights",
            detail=f"expected tensors, found a pickle that asks for {', '.join(sorted(unsafe)[:5])}",
            hint=_UNSAFE_HINT,
        )


def _require_plain_members(members: list[zipfile.ZipInfo], path: Path) -> None:
    folders = {info.filename.partition("/")[0] for info in members}
    if len(folders) > 1:
        raise _malformed(path, "all records in one folder", f"{len(folders)} folders")
    # torch's reader looks names up without regard to case: two that differ in it would be one to it.
    if len({info.filename.lower() for info in members}) != len(members):
        raise _malformed(path, "every record once", "a name that is repeated")
    for info in members:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise _malformed(path, "uncompressed records", f"{info.filename[:80]!r}, compressed")
        if "/data/" not in info.filename and info.file_size > MAX_RECORD_BYTES:
            raise _malformed(
                path,
                f"at most {MAX_RECORD_BYTES} bytes beside the weights",
                f"{info.file_size} in {info.filename[:80]!r}",
            )


def _malformed(path: Path, expected: str, found: str) -> MalformedCheckpoint:
    return MalformedCheckpoint(
        f"{path} is not a readable .pth file", detail=f"expected {expected}, found {found}", hint=_HINT
    )
