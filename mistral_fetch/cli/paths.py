"""Directories that a person named: found, or explained in three lines. Nothing is opened."""

from __future__ import annotations

import stat
from pathlib import Path

from mistral_fetch.errors import NotFoundError


def local_directory(text: str) -> Path:
    """Return the directory that ``text`` names, ``~`` included.

    Raises:
        NotFoundError: There is none, or there cannot be one (an unknown user, a name that is too long).
    """
    try:
        directory = Path(text).expanduser()
        if stat.S_ISDIR(directory.stat().st_mode):
            return directory
        reason = "something else"
    except FileNotFoundError:
        reason = "none"
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    raise NotFoundError(
        f"there is no directory {text}",
        detail=f"expected a directory with a model, got: {reason}",
        hint="check the path, or name a model: mistral-fetch list --catalog",
    )
