"""The `.pth` container, judged before anything unpickles it.

Owns the question whether this is the kind of zip archive that `torch.save` writes; its pickle goes to `pth_pickle`.
Knows nothing of the model.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from mistral_runtime.errors import MalformedCheckpoint
from mistral_runtime.pth_pickle import check_pickle

# Everything but the weights is small: the pickle of 7B's 291 tensors takes some 40 kB and 10,000 instructions.
MAX_RECORD_BYTES = 16 << 20
_HINT = "the weights are damaged, or were not written by torch.save; verify the snapshot or fetch it again"


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
