"""What the generators of pages share: writing the page, or only looking whether it is right."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def write_or_check(target: Path, page: str, arguments: Sequence[str]) -> int:
    """Write the page, or with ``--check`` only look whether it is right; return the exit code."""
    if "--check" not in arguments:
        target.write_text(page, encoding="utf-8")
        return 0
    if target.is_file() and target.read_text(encoding="utf-8") == page:
        return 0
    print(f"{target} is stale; type: make docs", file=sys.stderr)
    return 1
