"""What earlier transfers learnt about mirrors: how fast they are, how often they failed, whether they lied. Values.

Mirrors are known by origin, so nothing of an address that may be a secret is in it. The file it is kept in is
``transfer``'s business.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from mistral_fetch.units import smoothed

MAX_MIRRORS = 256
# A mirror that lied is asked only when no other is left, for this long.
DISTRUST_SECONDS = 7 * 24 * 3600
_SMOOTHING = 0.5


@dataclass(frozen=True)
class MirrorScore:
    """One mirror: bytes per second that one connection reached, and when (seconds since 1970) it was seen and lied."""

    rate_bytes_per_second: float = 0.0
    failures: int = 0
    lies: int = 0
    seen_at: int = 0
    lied_at: int = 0


class ScoreBook:
    """The scores by origin; from any thread.

    Args:
        scores: What is known already.
        now: Seconds since 1970; tests pass their own.
    """

    def __init__(self, scores: dict[str, MirrorScore] | None = None, now: Callable[[], float] = time.time) -> None:
        self._scores = dict(scores or {})
        self._now = now
        self._lock = threading.Lock()
        self.has_changed = False

    def score(self, origin: str) -> MirrorScore:
        """Return what is known of a mirror, which may be nothing."""
        return self._scores.get(origin, MirrorScore())

    def rate(self, origin: str) -> float | None:
        """Return the rate that one connection reached before, or None."""
        return self.score(origin).rate_bytes_per_second or None

    def is_distrusted(self, origin: str) -> bool:
        """Return whether the mirror lied not long ago."""
        score = self.score(origin)
        return score.lies > 0 and 0 <= self._now() - score.lied_at < DISTRUST_SECONDS

    def learn(self, origin: str, rate: float | None, failures: int, *, lied: bool) -> None:
        """Take in what a transfer saw of a mirror. A failure-free transfer halves the failures of the past."""
        with self._lock:
            before, now = self.score(origin), int(self._now())
            known = before.rate_bytes_per_second
            if rate is not None:
                rate = smoothed(known, rate, _SMOOTHING)
            self._scores[origin] = replace(
                before,
                rate_bytes_per_second=round(rate or known, 1),
                failures=before.failures + failures if failures else before.failures // 2,
                lies=before.lies + lied,
                seen_at=now,
                lied_at=now if lied else before.lied_at,
            )
            self.has_changed = True

    def to_json(self) -> bytes:
        """Return the mirrors seen last, as a JSON object by origin."""
        with self._lock:
            latest = sorted(self._scores.items(), key=lambda item: -item[1].seen_at)[:MAX_MIRRORS]
        return json.dumps({origin: asdict(score) for origin, score in latest}, indent=1).encode()

    @staticmethod
    def from_json(data: bytes) -> ScoreBook:
        """Return the book that was kept; what is torn or foreign in it is left out, for nothing depends on it."""
        try:
            fields = json.loads(data)
            items = list(fields.items())[:MAX_MIRRORS]
        except (ValueError, AttributeError, RecursionError):
            return ScoreBook()
        return ScoreBook({str(origin): score for origin, value in items if (score := _parse(value)) is not None})


def _parse(value: object) -> MirrorScore | None:
    try:
        score = MirrorScore(**value)  # type: ignore[arg-type]
        numbers = list(asdict(score).values())
    except TypeError:
        return None
    is_sane = all(type(number) in {int, float} and math.isfinite(number) and number >= 0 for number in numbers)
    return score if is_sane else None
