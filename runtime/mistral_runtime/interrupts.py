"""Signals, turned into either a polite request or an end.

Owns the handlers of SIGINT and SIGTERM while a command runs. During an answer the first signal only sets `cancel`,
so that what was generated is still delivered; at any other time, and the second time, it ends the program.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mistral_runtime.errors import Interrupted


class Interrupts:
    """What the signals have said so far. `cancel` is what the engine looks at."""

    def __init__(self) -> None:
        self.cancel = threading.Event()
        self.received: int | None = None
        self._answering = False

    @contextmanager
    def installed(self) -> Iterator[Interrupts]:
        """Handle SIGINT and SIGTERM inside the block. Outside the main thread, where that is impossible, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        # A shell starts background jobs with SIGINT ignored; what was to be ignored stays so.
        wanted = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
        previous = {number: signal.signal(number, self._handle) for number in wanted}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def answering(self) -> Iterator[threading.Event]:
        """Inside the block a first signal asks the answer to end instead of ending the program."""
        self.cancel.clear()
        self.received = None
        self._answering = True
        try:
            yield self.cancel
        finally:
            self._answering = False

    def raise_if_received(self) -> None:
        """Raise Interrupted if a signal came during the last answer."""
        if self.received is not None:
            raise Interrupted(self.received)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        if self._answering and not self.cancel.is_set():
            self.cancel.set()
            return
        raise Interrupted(number)
