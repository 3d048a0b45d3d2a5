"""What a service tells its supervisor: systemd's notification protocol (``sd_notify(3)``), written by hand.

A few datagrams to the socket that ``NOTIFY_SOCKET`` names; without one, nothing at all.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

_EXTEND_SECONDS = 120
_START_SECONDS = 1.0


class Supervisor:
    """Whoever started this process and wants to hear of it.

    Args:
        environment: Where to look for ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID``; this process's own
            by default.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        self._address = _socket_address(environment.get("NOTIFY_SOCKET", ""))
        self._interval = _watchdog_seconds(environment)
        self._last_sign = 0.0
        self._last_start: float | None = None

    def ready(self, status: str) -> None:
        """Tell that the service can be used."""
        self._send(f"READY=1\nSTATUS={_one_line(status)}")

    def status(self, status: str) -> None:
        """Tell people what is being done."""
        self._send(f"STATUS={_one_line(status)}")

    def starting(self, status: str) -> None:
        """Tell what the start waits for, and that it may take longer: hashing a model outlasts usual time limits.

        Sent once a second at most; call it often.
        """
        now = time.monotonic()
        if self._last_start is not None and now - self._last_start < _START_SECONDS:
            return
        self._last_start = now
        self._send(f"EXTEND_TIMEOUT_USEC={_EXTEND_SECONDS * 1_000_000}\nSTATUS={_one_line(status)}")

    def stopping(self) -> None:
        """Tell that the service ends."""
        self._send("STOPPING=1")

    def sign_of_life(self) -> None:
        """Answer the watchdog, at most twice in its interval; call it often."""
        now = time.monotonic()
        if self._interval and now - self._last_sign >= self._interval / 2:
            self._last_sign = now
            self._send("WATCHDOG=1")

    def _send(self, text: str) -> None:
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
                channel.sendto(text.encode(), self._address)
        except OSError:
            self._address = None  # a supervisor that has gone is no reason to stop serving


def _socket_address(text: str) -> str | bytes | None:
    """Return the socket's address: a path, or ``@name`` for one in Linux's abstract namespace (unix(7))."""
    if text.startswith("@"):
        return b"\0" + os.fsencode(text[1:])
    return text if text.startswith("/") else None


def _watchdog_seconds(environment: Mapping[str, str]) -> float:
    text, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not text.isdigit() or (pid and pid != str(os.getpid())):
        return 0.0
    return int(text) / 1_000_000


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]
