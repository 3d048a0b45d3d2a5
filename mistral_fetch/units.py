"""Bytes, rates, durations and moments, to and from text: the only place that knows 1024.

Sizes are printed in decimal units (GB) as disks and networks count; GiB is shown beside them where a
publisher's figure is binary.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

_DECIMAL = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3))
_FACTORS = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "kb": 10**3,
    "m": 10**6,
    "mb": 10**6,
    "g": 10**9,
    "gb": 10**9,
    "t": 10**12,
    "tb": 10**12,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1024 * GIB,
}
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_SIZE = re.compile(r"\s*(\d{1,18})(?:\.(\d{1,18}))?\s*([a-z]*?)(/s|ps)?\s*", re.IGNORECASE | re.ASCII)


def smoothed(known: float | None, measured: float, share: float) -> float:
    """Return a running average (exponential): ``share`` of the new measurement, the rest of what was known, if any."""
    return known + share * (measured - known) if known else measured


def format_size(size: int) -> str:
    """Return ``size`` bytes as text with a decimal unit, such as ``14.5 GB``."""
    for unit, factor in _DECIMAL:
        # From 0.99995 of a unit on, the next smaller one would round to 1000.0.
        if size >= factor - factor // 20_000:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def format_size_both(size: int) -> str:
    """Return ``size`` in GB and GiB, since publishers use both: ``14.48 GB (13.49 GiB)``."""
    if size < 10**8:
        return format_size(size)
    return f"{size / 10**9:.2f} GB ({size / GIB:.2f} GiB)"


def format_rate(bytes_per_second: float) -> str:
    """Return a transfer rate as text, such as ``112.0 MB/s``; ``unknown`` for an infinite one or none."""
    if not math.isfinite(bytes_per_second):
        return "unknown"
    return f"{format_size(int(bytes_per_second))}/s"


def format_duration(seconds: float) -> str:
    """Return a duration as ``45s``, ``3m20s`` or ``2h05m``; ``unknown`` for an infinite one or none."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def parse_duration(text: str) -> float:
    """Return the seconds in ``text`` (``90``, ``90s``, ``15m``, ``12h``, ``30d``, ``2w``).

    Raises:
        ValueError: The text is not a duration.
    """
    match = re.fullmatch(r"\s*(\d{1,9})(?:\.(\d{1,9}))?\s*([smhdw]?)\s*", text, re.IGNORECASE | re.ASCII)
    if match is None:
        raise ValueError(f"not a duration: {text[:40]!r}; write 30d, 12h, 15m or seconds")
    whole, fraction, unit = match.groups(default="")
    seconds = float(f"{whole}.{fraction or 0}") * _SECONDS[unit.lower()]
    if seconds > 10**10:
        raise ValueError(f"not a duration of less than 300 years: {text[:40]!r}")
    return seconds


def parse_size(text: str) -> int:
    """Return the number of bytes in ``text`` (``500``, ``1.5GB``, ``4MiB``, ``10MB/s``).

    Raises:
        ValueError: The text is not a size.
    """
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match.group(3).lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"not a size: {text!r}")
    whole, fraction, unit, rate = match.groups(default="")
    if rate.lower() == "ps" and unit.endswith("b"):
        raise ValueError(f"bits or bytes? {text!r} means bits to networks; write bytes as MB/s")
    scale: int = 10 ** len(fraction)
    return int(whole + fraction) * factor // scale  # exact, where a float is not


def parse_utc(text: str) -> datetime:
    """Return the moment written as ``2027-01-31T12:00:00Z`` (RFC 3339, UTC, whole seconds).

    Raises:
        ValueError: It is written otherwise, or there is no such day.
    """
    from datetime import datetime  # only what carries a date pays for it

    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z", text, re.ASCII):
        raise ValueError(f"expected a moment as 2027-01-31T12:00:00Z, got {text[:40]!r}")
    return datetime.fromisoformat(f"{text[:-1]}+00:00")
