"""How fast could a download be at all? Bare sockets to a file without any check, and sha256 on every core.

    python benchmarks/ceiling.py --url http://127.0.0.1:8080/model.bin --out copy.bin [--threads 4]
    python benchmarks/ceiling.py

With an address: each thread asks for its share of the file and moves it with ``recv_into`` and ``pwrite``, nothing is
hashed. Without: bytes a second of sha256 on one core, and on all of them at once. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from mistral_fetch.units import MIB

_TRIAL_SECONDS, _TRIALS = 0.4, 3


def copy(url: str, out: Path, threads: int) -> int:
    """Copy ``url`` (plain http) to ``out`` over ``threads`` connections; return the number of bytes."""
    address = urlsplit(url)
    size = _size_of(address)
    bounds = [size * number // threads for number in range(threads + 1)]
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.truncate(descriptor, size)
        with ThreadPoolExecutor(threads) as pool:
            moved = [pool.submit(_move, address, descriptor, *span) for span in pairwise(bounds)]
            return sum(part.result() for part in moved)
    finally:
        os.close(descriptor)


def _ask(connection: socket.socket, address: SplitResult, method: str, extra: str = "") -> tuple[bytes, bytes]:
    """Send a request; return its head, and what came of its body with it."""
    line = f"{method} {address.path} HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n{extra}\r\n"
    connection.sendall(line.encode())
    received = b""
    while b"\r\n\r\n" not in received:
        received += (data := connection.recv(4096))
        if not data:
            raise ConnectionError(f"no answer from {address.netloc}")
    head, _, rest = received.partition(b"\r\n\r\n")
    return head.lower(), rest


def _connect(address: SplitResult) -> socket.socket:
    return socket.create_connection((address.hostname or "", address.port or 80))


def _size_of(address: SplitResult) -> int:
    with _connect(address) as connection:
        head, _ = _ask(connection, address, "HEAD")
    return int(head.partition(b"content-length:")[2].split(b"\r\n")[0])


def _move(address: SplitResult, descriptor: int, start: int, end: int) -> int:
    buffer = memoryview(bytearray(MIB))
    with _connect(address) as connection:
        head, rest = _ask(connection, address, "GET", f"Range: bytes={start}-{end - 1}\r\n")
        if not head.startswith(b"http/1.1 206"):
            raise ConnectionError(f"expected a range, got {head[:40]!r}")
        os.pwrite(descriptor, rest, start)
        position = start + len(rest)
        while received := connection.recv_into(buffer):
            os.pwrite(descriptor, buffer[:received], position)
            position += received
    return position - start


def hash_rate(threads: int) -> float:
    """Return how many bytes a second ``threads`` threads hash together: the best of some trials, as it is a ceiling."""
    data = bytes(8 * MIB)
    with ThreadPoolExecutor(threads) as pool:
        return max(_hash_trial(pool, threads, data) for _ in range(_TRIALS))


def _hash_trial(pool: ThreadPoolExecutor, threads: int, data: bytes) -> float:
    begun, started = threading.Barrier(threads), time.monotonic()

    def work() -> int:
        begun.wait()
        return _count_until(started + _TRIAL_SECONDS, lambda: hashlib.sha256(data).digest())

    rounds = sum(part.result() for part in [pool.submit(work) for _ in range(threads)])
    return rounds * len(data) / (time.monotonic() - started)


def _count_until(ended: float, work: Callable[[], object]) -> int:
    count = 0
    while time.monotonic() < ended:
        work()
        count += 1
    return count


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--url", help="a file on a server that knows ranges, plain http")
    parser.add_argument("--out", type=Path, help="where to write it")
    parser.add_argument("--threads", type=int, default=4)
    given = parser.parse_args()
    if given.url:
        if given.out is None:
            parser.error("--url needs --out")
        print(json.dumps({"bytes": copy(given.url, given.out, given.threads)}))
        return
    cores = len(os.sched_getaffinity(0))
    print(json.dumps({"sha256_one_core": int(hash_rate(1)), "sha256_all_cores": int(hash_rate(cores)), "cores": cores}))


if __name__ == "__main__":
    main()
