"""Hosts on one machine: network namespaces with shaped links, removed again whatever happens. Needs root and ``ip``."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

MTU = 1500
Made = TypeVar("Made", bound="Namespaces")
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


class Namespaces:
    """Network namespaces that are removed again whatever happens; a context manager."""

    def __init__(self) -> None:
        self.hosts: list[Host] = []
        self._made: list[str] = []
        atexit.register(self.close)
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def __enter__(self: Made) -> Made:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove every namespace; their links go with them."""
        while self._made:
            subprocess.run(["ip", "netns", "delete", self._made.pop()], check=False)

    def _build(self) -> None:
        raise NotImplementedError

    def _add(self, namespace: str) -> None:
        _run(["ip", "netns", "add", namespace])
        self._made.append(namespace)
        _run(["ip", "-n", namespace, "link", "set", "lo", "up"])


class Network(Namespaces):
    """A client and some hosts, each at the other end of one link. Nothing else is connected to them.

    Args:
        hosts: How many.
    """

    def __init__(self, hosts: int) -> None:
        self.client = f"mfb{os.getpid()}c"
        self._count = hosts
        super().__init__()

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

    def _build(self) -> None:
        self._add(self.client)
        for number in range(1, self._count + 1):
            self.hosts.append(self._connect(number))

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


class Switch(Namespaces):
    """Hosts on one switch, each with a link of its own that is shaped alike in both directions.

    Args:
        hosts: How many.
        rate: What goes through each link, each way, as ``tc`` writes it.
        latency: How long a full queue before a link may hold a frame.
    """

    def __init__(self, hosts: int, rate: str, burst: str = "32kb", latency: str = "50ms") -> None:
        self._switch = f"mfb{os.getpid()}s"
        self._shape = ["root", "tbf", "rate", rate, "burst", burst, "latency", latency]
        self._count = hosts
        super().__init__()

    def sent_bytes(self, host: Host) -> int:
        """Return how many bytes went from a host to the switch, headers included."""
        text = _run(["ip", "-n", host.namespace, "-s", "-j", "link", "show", "dev", host.device])
        return int(json.loads(text)[0]["stats64"]["tx"]["bytes"])

    def _build(self) -> None:
        self._add(self._switch)
        _run(["ip", "-n", self._switch, "link", "add", "switch", "type", "bridge"])
        _run(["ip", "-n", self._switch, "link", "set", "switch", "up"])
        for number in range(1, self._count + 1):
            self.hosts.append(self._plug_in(number))

    def _plug_in(self, number: int) -> Host:
        host = Host(f"mfb{os.getpid()}h{number}", f"10.84.0.{number}", "up0")
        self._add(host.namespace)
        port = f"port{number}"
        pair = ["type", "veth", "peer", "name", host.device, "netns", host.namespace]
        _run(["ip", "-n", self._switch, "link", "add", port, "mtu", str(MTU), *pair])
        _run(["ip", "-n", self._switch, "link", "set", port, "master", "switch", "up"])
        _run(["ip", "-n", host.namespace, "address", "add", f"{host.address}/24", "dev", host.device])
        _run(["ip", "-n", host.namespace, "link", "set", host.device, "up"])
        for namespace, device in ((self._switch, port), (host.namespace, host.device)):
            # Frames one by one, as a wire carries them, or a token bucket would see giants and drop them.
            _run([*inside(namespace), "ethtool", "-K", device, "tso", "off", "gso", "off", "gro", "off"], may_fail=True)
            _run(["tc", "-n", namespace, "qdisc", "replace", "dev", device, *self._shape])
        return host


def _run(argv: Sequence[str], *, may_fail: bool = False) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        if may_fail:
            return ""
        raise SystemExit(f"not installed: {error.filename}") from error
    if done.returncode and not may_fail:
        raise SystemExit(f"{' '.join(argv)} failed: {done.stderr.strip()}")
    return done.stdout
