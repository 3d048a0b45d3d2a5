"""Hosts on one machine: network namespaces with shaped links, removed again whatever happens. Needs root and ``ip``."""

from __future__ import annotations

import atexit
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

MTU = 1500
# Bytes of a full frame as tbf counts them (with Ethernet's 14), and what of it is payload: IP takes 20 bytes,
# TCP 20 and its timestamps 12.
_FRAME_BYTES, _PAYLOAD_BYTES = MTU + 14, MTU - 52


def payload_rate(raw_bits_per_second: float) -> float:
    """Return how many bytes a second of TCP payload fit through a link in full frames."""
    return raw_bits_per_second / 8 * _PAYLOAD_BYTES / _FRAME_BYTES


@dataclass(frozen=True)
class Host:
    """One namespace that the client reaches over a link of its own."""

    namespace: str
    address: str
    device: str

    @property
    def prefix(self) -> list[str]:
        """Return what runs a command there."""
        return inside(self.namespace)


def inside(namespace: str) -> list[str]:
    """Return what stands before a command to run it in a namespace."""
    return ["ip", "netns", "exec", namespace]


class Network:
    """A client and some hosts, each at the other end of one link. Nothing else is connected to them.

    Args:
        hosts: How many.
    """

    def __init__(self, hosts: int) -> None:
        self._made: list[str] = []
        self.client = f"mfb{os.getpid()}c"
        self.hosts: list[Host] = []
        atexit.register(self.close)
        try:
            self._add(self.client)
            for number in range(1, hosts + 1):
                self.hosts.append(self._connect(number))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove every namespace; their links go with them."""
        while self._made:
            subprocess.run(["ip", "netns", "delete", self._made.pop()], check=False)

    def shape(self, host: Host, rate: str, burst: str = "128kb", latency: str = "50ms") -> None:
        """Let at most ``rate`` (as ``tc`` writes it, such as ``200mbit``) go from a host to the client."""
        shaped = ["root", "tbf", "rate", rate, "burst", burst, "latency", latency]
        _run(["tc", "-n", host.namespace, "qdisc", "replace", "dev", host.device, *shaped])

    def cut(self, host: Host) -> None:
        """Let nothing through any more, without a word to anybody."""
        _run(["ip", "-n", host.namespace, "link", "set", host.device, "down"])

    def mend(self, host: Host) -> None:
        """Undo :meth:`cut`."""
        _run(["ip", "-n", host.namespace, "link", "set", host.device, "up"])

    def _add(self, namespace: str) -> None:
        _run(["ip", "netns", "add", namespace])
        self._made.append(namespace)
        _run(["ip", "-n", namespace, "link", "set", "lo", "up"])

    def _connect(self, number: int) -> Host:
        host = Host(f"mfb{os.getpid()}m{number}", f"10.83.{number}.2", "up0")
        self._add(host.namespace)
        near, far = f"to{number}", host.device
        pair = ["type", "veth", "peer", "name", far, "netns", host.namespace]
        _run(["ip", "-n", self.client, "link", "add", near, "mtu", str(MTU), *pair])
        for namespace, device, address in (
            (self.client, near, f"10.83.{number}.1/30"),
            (host.namespace, far, f"{host.address}/30"),
        ):
            _run(["ip", "-n", namespace, "address", "add", address, "dev", device])
            _run(["ip", "-n", namespace, "link", "set", device, "up"])
        return host


def _run(argv: Sequence[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)} failed: {done.stderr.strip()}")
