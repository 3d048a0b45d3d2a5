"""How many requests a simulated mirror answers at once: counted, and limited if it is told to."""

from __future__ import annotations

import threading


class Visit:
    """One request's stay; ``leave`` may be called more than once."""

    def __init__(self, gate: Gate, is_admitted: bool) -> None:
        self.is_admitted = is_admitted
        self._gate: Gate | None = gate

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Make room for the next one."""
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.count_out()


class Gate:
    """Counts the requests that are being answered.

    Args:
        limit: How many are admitted at once; None for all.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.most_at_once = 0
        self._inside = 0
        self._lock = threading.Lock()

    def enter(self) -> Visit:
        """Count a request in. Whoever is not admitted is counted too until it was told so."""
        with self._lock:
            self._inside += 1
            self.most_at_once = max(self.most_at_once, self._inside)
            return Visit(self, self.limit is None or self._inside <= self.limit)

    def count_out(self) -> None:
        """Count a request out; :class:`Visit` does it once."""
        with self._lock:
            self._inside -= 1
