"""The options that ``lock``, ``sync`` and ``pull`` share; light, because every command loads it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mistral_fetch.cli.options import FrontEnd

# What --wait means: as long as it takes, but not for ever.
LONGEST_WAIT_SECONDS = 86_400.0

FileOption = Annotated[
    Path,
    typer.Option("--file", metavar="FILE", help="What the machine is to have; its lock file lies beside it."),
]
DEFAULT_FILE = Path("mistral-fetch.toml")
WaitOption = Annotated[
    bool, typer.Option("--wait", help="Wait a day for another process rather than 600 s (see --lock-timeout).")
]


def with_wait(front: FrontEnd, wait: bool) -> FrontEnd:
    """Return the front end with the patience that ``--wait`` asks for."""
    if not wait or front.origins["lock_timeout"] == "flag":
        return front
    return replace(front, settings=replace(front.settings, lock_timeout=LONGEST_WAIT_SECONDS))
