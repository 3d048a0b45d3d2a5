"""Notice that files which are being served were changed, from what the file system says of them. Nothing is read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

Stamp = tuple[int, int, int, int]


def stamp_of(path: Path) -> Stamp | None:
    """Return what changes with a file: device, inode, size and modification time; None where there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass
class FileWatch:
    """Looks at files now and then.

    Args:
        places: Where each file lies, by its name in the model.
        interval_seconds: How often to look.
    """

    places: Mapping[str, Path]
    interval_seconds: float = 2.0
    _stamps: dict[str, Stamp | None] = field(init=False)
    _last: float = field(init=False)

    def __post_init__(self) -> None:
        self._stamps = {path: stamp_of(place) for path, place in self.places.items()}
        self._last = time.monotonic()

    def changed(self) -> list[str]:
        """Return the files that differ from the last look; nothing when that was a moment ago."""
        if time.monotonic() - self._last < self.interval_seconds:
            return []
        self._last = time.monotonic()
        now = {path: stamp_of(place) for path, place in self.places.items()}
        differing = [path for path, stamp in now.items() if stamp != self._stamps[path]]
        self._stamps = now
        return differing
