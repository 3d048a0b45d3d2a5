"""One pull through shaped links: what goes wrong meanwhile, how long it took, and how long it had to take."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import Nginx, nginx
from benchmarks.namespaces import Host, Network, inside, payload_rate

PORT = 8080
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Case:
    """What is wrong with which mirror, by its place in the manifest; None for none."""

    name: str
    slow: int | None = None
    killed: int | None = None
    silent: int | None = None
    liar: int | None = None


@dataclass(frozen=True)
class Links:
    """How fast they are."""

    tc_rate: str
    tc_slow_rate: str
    rate: float
    """Bytes a second of payload, as curl measured it."""
    slow_rate: float


@dataclass
class Pull:
    """How one pull went."""

    case: str
    seconds: float = 0.0
    ideal_seconds: float = 0.0
    is_complete: bool = False
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    broke_at_bytes: int | None = None
    """What had arrived when a mirror was killed or silenced."""
    liar_was_named: bool | None = None
    received_by_source: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def overhead_percent(self) -> float:
        """Return how much longer it took than it had to."""
        return 100 * (self.seconds / self.ideal_seconds - 1)


def ideal_seconds(case: Case, links: Links, mirrors: int, size: int, broke_at: int | None) -> float:
    """Return the time that the honest mirrors' links need for all bytes.

    Args:
        case: What is wrong.
        links: Their rates.
        mirrors: How many there are.
        size: Bytes to move.
        broke_at: How many had arrived when a mirror went away, if one did.
    """
    rates = {
        number: links.slow_rate if number == case.slow else links.rate
        for number in range(mirrors)
        if number != case.liar
    }
    remaining = sum(rate for number, rate in rates.items() if number not in {case.killed, case.silent})
    first = size if broke_at is None else broke_at
    return first / sum(rates.values()) + (size - first) / remaining


@dataclass(frozen=True)
class Field:
    """Where the pulls happen: hosts, what they serve, and what is pulled."""

    network: Network
    links: Links
    honest: Path
    lying: Path
    manifest: Path
    size: int
    work: Path

    def pull(self, case: Case) -> Pull:
        """Pull once, with this going wrong, into a cache that is deleted afterwards."""
        for number, host in enumerate(self.network.hosts):
            self.network.shape(host, self.links.tc_slow_rate if number == case.slow else self.links.tc_rate)
        pulled = Pull(case.name)
        home = self.work / "cache"
        try:
            with self._servers(case) as servers:
                self._run(case, servers, home, pulled)
        finally:
            shutil.rmtree(home, ignore_errors=True)
            if case.silent is not None:
                self.network.mend(self.network.hosts[case.silent])
        return pulled

    @contextlib.contextmanager
    def _servers(self, case: Case) -> Iterator[list[Nginx]]:
        with contextlib.ExitStack() as stack:
            yield [
                stack.enter_context(
                    serve_on(host, self.lying if number == case.liar else self.honest, self.work / f"nginx{number}")
                )
                for number, host in enumerate(self.network.hosts)
            ]

    def _run(self, case: Case, servers: list[Nginx], home: Path, pulled: Pull) -> None:
        argv = [sys.executable, "-m", "mistral_fetch", "pull", str(self.manifest), "--via", "http"]
        argv = [*inside(self.network.client), *argv, "--home", str(home), "--progress", "json"]
        started = time.monotonic()
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        patience = threading.Timer(self._patience(case), process.kill)
        patience.start()
        try:
            assert process.stderr is not None
            self._watch(process.stderr, pulled, lambda: self._break(case, servers))
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            patience.cancel()
            if process.returncode is None:
                process.kill()
                process.wait()
        pulled.seconds = round(time.monotonic() - started, 2)
        pulled.is_complete = process.returncode == 0
        pulled.cpu_seconds = round(usage.ru_utime + usage.ru_stime, 2)
        pulled.peak_bytes = usage.ru_maxrss * 1024
        self._conclude(case, pulled)

    def _patience(self, case: Case) -> float:
        mirrors = len(self.network.hosts)
        return _PATIENCE_SECONDS + 4 * ideal_seconds(case, self.links, mirrors, self.size, self.size // 2)

    def _watch(self, lines: Iterator[str], pulled: Pull, break_one: Callable[[], bool]) -> None:
        """Read the events to their end; break a mirror when half of the bytes are there."""
        for line in lines:
            event = _event(line)
            if not event:
                pulled.problems.append(line.strip())
            pulled.received_by_source = event.get("received_by_source", pulled.received_by_source)
            if event.get("event") in {"source-failed", "source-lied"}:
                pulled.problems.append(f"{event['event']}: {event['source']}: {event.get('reason', '')}".rstrip(": "))
            done = event.get("done_bytes", 0)
            if pulled.broke_at_bytes is None and done >= self.size // 2 and break_one():
                pulled.broke_at_bytes = done

    def _break(self, case: Case, servers: list[Nginx]) -> bool:
        if case.killed is not None:
            servers[case.killed].process.kill()
        if case.silent is not None:
            self.network.cut(self.network.hosts[case.silent])
        return case.killed is not None or case.silent is not None

    def _conclude(self, case: Case, pulled: Pull) -> None:
        mirrors, at = len(self.network.hosts), pulled.broke_at_bytes
        pulled.ideal_seconds = round(ideal_seconds(case, self.links, mirrors, self.size, at), 2)
        if case.liar is not None:
            address = self.network.hosts[case.liar].address
            pulled.liar_was_named = any(line.startswith(f"source-lied: {address}") for line in pulled.problems)


def _event(line: str) -> dict[str, Any]:
    """Return one line of ``--progress json``; empty for a line that is none."""
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


@contextlib.contextmanager
def serve_on(host: Host, root: Path, work: Path) -> Iterator[Nginx]:
    """Serve a directory on one host."""
    with nginx(root, work, address=host.address, port=PORT, prefix=host.prefix) as server:
        yield server


def measure_link(network: Network, host: Host, honest: Path, work: Path, raw_bits_per_second: float) -> float:
    """Return how many bytes a second curl gets over one link, from some seconds of it."""
    length = int(payload_rate(raw_bits_per_second) * 4)
    asked = ["curl", "-sS", "--fail", "-o", "/dev/null", "-r", f"0-{length - 1}", "-w", "%{speed_download}"]
    with serve_on(host, honest, work) as server:
        argv = [*inside(network.client), *asked, f"{server.url}/model/model.bin"]
        return float(subprocess.check_output(argv, text=True))
