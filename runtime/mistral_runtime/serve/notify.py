"""Telling systemd how the service is (sd_notify(3)): a datagram to the socket that NOTIFY_SOCKET names, or nothing."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress


def notify(text: str, environment: Mapping[str, str] | None = None) -> None:
    """Send lines such as `READY=1`. A supervisor that has gone is no reason to stop serving."""
    place = (os.environ if environment is None else environment).get("NOTIFY_SOCKET", "")
    if not place.startswith(("/", "@")):
        return
    address = b"\0" + os.fsencode(place[1:]) if place.startswith("@") else os.fsencode(place)
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.sendto(text.encode(), address)
