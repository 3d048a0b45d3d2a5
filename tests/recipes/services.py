"""Running a recipe's service: started as its unit or pod would, asked as a probe would, stopped as they would."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from tests.recipes.sandbox import Sandbox

PATIENCE_SECONDS = 90


@contextmanager
def running(sandbox: Sandbox, command: list[str], **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Start a command in the sandbox; at the end it is told to stop, and has to do so in order."""
    environment = {**sandbox.environment, **{name: sandbox.translate(value) for name, value in variables.items()}}
    with subprocess.Popen(
        [sandbox.translate(word) for word in command],
        cwd=sandbox.root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            yield process
            process.send_signal(signal.SIGTERM)
            _, told = process.communicate(timeout=PATIENCE_SECONDS)
            assert process.returncode == 0, told
        finally:
            process.kill()


@contextmanager
def supervisor(name: str) -> Iterator[socket.socket]:
    """Give the socket that a service manager would listen at, of this abstract name."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0{name}")
        listening.settimeout(PATIENCE_SECONDS)
        yield listening


def wait_for_ready(listening: socket.socket) -> None:
    """Wait until the service says READY."""
    while b"READY=1" not in listening.recv(4096):
        pass


def ask(url: str, body: object = None, key: str = "") -> tuple[int, str]:
    """Return the status and text that a service answers with; 0 while nobody listens."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read().decode()
    except OSError:
        return 0, ""


def wait_for_probe(url: str) -> None:
    """Ask as Kubernetes' probe does, until it is content."""
    end = time.monotonic() + PATIENCE_SECONDS
    while ask(url)[0] != 200:
        assert time.monotonic() < end, f"{url} never became ready"
        time.sleep(0.2)


def free_port() -> int:
    """Return a port that nobody has."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
