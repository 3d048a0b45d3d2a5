"""How long a start takes, part by part, counted from the beginning of the process itself.

Owns the clock and its words. Free of torch, since the import of torch is one of the parts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path


class StartClock:
    """Name what the time since the last mark went into. Marks add up: their sum is the time to the first token.

    Attributes:
        since: "process", or "call" where the process had begun for another purpose or its age cannot be told.
    """

    def __init__(self, *, age_seconds: float | None = None) -> None:
        self.since = "call" if age_seconds is None else "process"
        self._last = time.perf_counter() - (age_seconds or 0.0)
        self._seconds: dict[str, float] = {}
        self._is_over = False

    @classmethod
    def of_process(cls) -> StartClock:
        """Return a clock that began when this process did."""
        return cls(age_seconds=process_age())

    def mark(self, part: str) -> None:
        """Count the time since the last mark as `part`; after `finish`, do nothing."""
        if self._is_over:
            return
        now = time.perf_counter()
        self._seconds[part] = self._seconds.get(part, 0.0) + now - self._last
        self._last = now

    def leave_out(self) -> None:
        """Count the time since the last mark as nothing: it was spent waiting for a person."""
        self._last = time.perf_counter()

    def finish(self, part: str) -> None:
        """Mark the last part; the start is over. Only the first call counts."""
        self.mark(part)
        self._is_over = True

    def watch(self, tokens: Iterable[int]) -> Iterator[int]:
        """Pass tokens on; the first of them ends the start with the part `prefill`."""
        for token in tokens:
            self.finish("prefill")
            yield token

    @property
    def total(self) -> float:
        """Seconds so far, waiting left out."""
        return sum(self._seconds.values())

    def fields(self) -> dict[str, str | float | None]:
        """Return what `--json` shows as `timings`; `first_token` is the sum, or None where it never came."""
        parts = {part: round(seconds, 4) for part, seconds in self._seconds.items()}
        return {"since": self.since, **parts, "first_token": round(self.total, 4) if self._is_over else None}

    def line(self) -> str:
        """Return one line for people."""
        parts = " + ".join(f"{part.replace('_', ' ')} {seconds:.2f}" for part, seconds in self._seconds.items())
        end = "first token" if self._is_over else "end, without a token"
        return f"start: {parts} = {self.total:.2f} s from the {self.since}'s beginning to the {end}"


def process_age(stat: Path = Path("/proc/self/stat")) -> float | None:
    """Return for how many seconds this process has existed, or None where the system does not tell (only Linux does).

    Field 22 of proc_pid_stat(5) is the start in clock ticks since boot, on the clock that runs on during suspend. A
    tick is 10 ms, so the age is right to 10 ms.
    """
    try:
        # The second field is the program's name in parentheses and may hold anything, spaces and parentheses too.
        fields = stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    return age if age >= 0 else None
