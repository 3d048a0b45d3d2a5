"""What was typed, kept for the arrow keys of later sessions: a private file of bounded size, a line an entry."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

MAX_ENTRIES = 1000
MAX_BYTES = 256 << 10
MAX_ENTRY_BYTES = 4 << 10  # what is longer was pasted, and is not what an arrow key is for


def history_path(environment: Mapping[str, str]) -> Path:
    """Return the file's place. Source: XDG Base Directory Specification, which ignores relative paths."""
    state = environment.get("XDG_STATE_HOME", "")
    base = Path(state) if state.startswith("/") else Path(environment.get("HOME") or "~").expanduser() / ".local/state"
    return base / "mistral-fetch" / "chat-history"


class HistoryFile:
    """The file. That it cannot be read or written is no reason to fail: a chat goes without."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[str]:
        """Return the newest entries, oldest first; cut the file where it has grown too large."""
        try:
            with self._path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(max(0, size - MAX_BYTES))
                data = file.read(MAX_BYTES)
        except OSError:
            return []
        lines = data.decode("utf-8", "replace").splitlines()[size > MAX_BYTES :][-MAX_ENTRIES:]
        if size > MAX_BYTES:
            self._write("".join(f"{line}\n" for line in lines[-MAX_ENTRIES // 2 :]), os.O_TRUNC)
        return lines

    def add(self, line: str) -> str | None:
        """Append an entry, and return why that failed if it did.

        Several chats may do so at once: each entry is one write to the file's end.
        """
        line = " ".join(line.splitlines())
        is_short = len(line.encode("utf-8", "replace")) <= MAX_ENTRY_BYTES
        return self._write(f"{line}\n", os.O_APPEND) if is_short else None

    def _write(self, text: str, flag: int) -> str | None:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | flag, 0o600)
            try:
                os.fchmod(descriptor, 0o600)
                os.write(descriptor, text.encode("utf-8", "replace"))
            finally:
                os.close(descriptor)
        except OSError as error:
            return str(error)
        return None
