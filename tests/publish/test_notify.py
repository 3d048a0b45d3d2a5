"""systemd's notification protocol: what is sent, where to, and that nobody listening is no failure."""

from __future__ import annotations

import os
import socket

import pytest

from mistral_fetch.publish.notify import Supervisor


@pytest.fixture(params=["path", "abstract"])
def channel(request, tmp_path, monkeypatch):
    """A socket as systemd gives one; yields it and its address as a variable says it."""
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        if request.param == "path":
            address = str(tmp_path / "s")[-100:] if len(str(tmp_path)) > 90 else str(tmp_path / "s")
            supervisor.bind(address)
        else:
            address = f"@mistral-fetch-{os.getpid()}"
            supervisor.bind("\0" + address[1:])
        supervisor.settimeout(5)
        yield supervisor, address


def test_what_is_told(channel):
    receiver, address = channel
    supervisor = Supervisor({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())})
    supervisor.starting("hashing\ntiny")
    supervisor.ready("seeding")
    supervisor.sign_of_life()
    supervisor.sign_of_life()  # too soon: not sent
    supervisor.status("again")
    supervisor.stopping()
    heard = [receiver.recv(4096).decode() for _ in range(5)]
    assert heard == [
        "EXTEND_TIMEOUT_USEC=120000000\nSTATUS=hashing tiny",
        "READY=1\nSTATUS=seeding",
        "WATCHDOG=1",
        "STATUS=again",
        "STOPPING=1",
    ]


def test_another_process_is_watched(channel):
    receiver, address = channel
    supervisor = Supervisor({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"})
    supervisor.sign_of_life()
    supervisor.stopping()
    assert receiver.recv(4096) == b"STOPPING=1"


@pytest.mark.parametrize("address", ["", "/nowhere/at/all", "@nobody-listens-here", "relative"])
def test_nobody_to_tell_is_no_failure(address):
    supervisor = Supervisor({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1"})
    supervisor.ready("x")
    supervisor.sign_of_life()
    supervisor.stopping()
