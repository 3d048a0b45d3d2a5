"""Which request meets which fault: by the bytes it asks for, in order of arrival, or each one."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from mistral_fetch.simulators.faults import Fault

_TRUTH = Fault()


@dataclass
class _RangeScript:
    start: int
    end: int
    faults: tuple[Fault, ...]
    times: int
    used: int = 0

    def is_met_by(self, start: int, end: int) -> bool:
        is_over = 0 <= self.times * len(self.faults) <= self.used
        return not is_over and start < self.end and self.start < end

    def take(self) -> Fault:
        fault = self.faults[self.used % len(self.faults)]
        self.used += 1
        return fault


class FaultScripts:
    """The scripts of one mirror; safe to ask from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_range: dict[str, list[_RangeScript]] = {}
        self._in_order: dict[str, list[Fault | None]] = {}
        self._always: dict[str, Fault] = {}

    def set_order(self, path: str, faults: Iterable[Fault | None]) -> None:
        """Replace the script by order of arrival."""
        with self._lock:
            self._in_order[path] = list(faults)

    def set_always(self, path: str, fault: Fault) -> None:
        """Replace what happens when no script is left."""
        with self._lock:
            self._always[path] = fault

    def add_range(self, path: str, start: int, end: int, faults: Iterable[Fault | None], times: int) -> None:
        """Add a script for requests that cover any byte of ``[start, end)``.

        Raises:
            ValueError: There is no fault, or no byte.
        """
        script = _RangeScript(start, end, tuple(fault or _TRUTH for fault in faults), times)
        if not script.faults or not 0 <= start < end:
            raise ValueError(f"expected faults for a range of bytes, got {len(script.faults)} for [{start}, {end})")
        with self._lock:
            self._by_range.setdefault(path, []).append(script)

    def knows_ranges(self, path: str) -> bool:
        """Return whether it matters which bytes of ``path`` are asked for."""
        with self._lock:
            return path in self._by_range

    def take(self, path: str, start: int, end: int) -> Fault | None:
        """Return the next fault for a request for the bytes ``[start, end)``; None if nothing was scripted."""
        with self._lock:
            for script in self._by_range.get(path, ()):
                if script.is_met_by(start, end):
                    return script.take()
            if order := self._in_order.get(path):
                return order.pop(0) or _TRUTH
            return self._always.get(path)
