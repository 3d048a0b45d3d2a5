"""What the swarm's settings do to real connections on loopback: nothing beside the proxy, no word unsaid."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from urllib.parse import urlsplit

import pytest

from mistral_fetch.bittorrent.bencode import decode, encode
from mistral_fetch.bittorrent.metainfo import parse_metainfo
from mistral_fetch.bittorrent.seed import Seeder
from mistral_fetch.bittorrent.settings import SwarmSettings
from mistral_fetch.errors import NoPeers
from mistral_fetch.events import BytesReceived, Notice
from mistral_fetch.simulators.mirror import MirrorSimulator
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.simulators.tracker import TrackerSimulator
from mistral_fetch.sources.base import StopSignal, Target
from mistral_fetch.sources.swarm import SwarmSource
from mistral_fetch.store.partials import Partial

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(60)]

MODEL = PublisherSimulator({"weights.bin": bytes(range(256)) * 2000, "config.json": b"{}"})
SETTINGS = SwarmSettings(
    listen_interfaces="127.0.0.1:0", use_trackers=False, no_peers_timeout_seconds=4, stall_timeout_seconds=8
)


class ProxySimulator:
    """A SOCKS5 and HTTP CONNECT proxy on loopback that remembers whom it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            is_socks = client.recv(1, socket.MSG_PEEK) == b"\x05"
            target, head = self._greet_socks(client) if is_socks else self._greet_http(client)
            if target:
                self.asked.append(target)
                with socket.create_connection(("127.0.0.1", int(target.rpartition(":")[2]))) as onward:
                    onward.sendall(head)
                    self._relay(client, onward)

    def _greet_socks(self, client: socket.socket) -> tuple[str, bytes]:
        client.recv(2 + client.recv(2, socket.MSG_PEEK)[1])
        client.sendall(b"\x05\x00")
        _, command, _, kind = client.recv(4)
        length = {1: 4, 4: 16}.get(kind) or client.recv(1)[0]
        raw = client.recv(length)
        host = socket.inet_ntoa(raw) if kind == 1 else raw.decode()
        port = int.from_bytes(client.recv(2), "big")
        client.sendall(b"\x05\x00\x00\x01" + bytes(6) if command == 1 else b"\x05\x07\x00\x01" + bytes(6))
        return (f"{host}:{port}" if command == 1 else ""), b""  # to relay UDP is a question to the proxy alone

    def _greet_http(self, client: socket.socket) -> tuple[str, bytes]:
        head = b""
        while b"\r\n\r\n" not in head:
            head += client.recv(1)
        method, target, _ = head.decode().split(" ", 2)
        if method != "CONNECT":
            return urlsplit(target).netloc, head
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        return target, b""

    @staticmethod
    def _relay(one: socket.socket, other: socket.socket) -> None:
        while True:
            for ready in select.select([one, other], [], [])[0]:
                data = ready.recv(65536)
                if not data:
                    return
                (other if ready is one else one).sendall(data)


@contextmanager
def _seed(tmp_path, torrent=None, **settings) -> Iterator[tuple[str, object]]:
    publication = MODEL.publish(tmp_path)
    metainfo = parse_metainfo(torrent(publication) if torrent else publication.plain_torrent_path.read_bytes())
    seeder = Seeder(metainfo, tmp_path / "model", replace(SETTINGS, uploads=True, **settings))
    with closing(seeder):
        seeder.wait_until_seeding(10)
        yield f"127.0.0.1:{seeder.port}", metainfo


def _fetch(tmp_path, metainfo, **settings) -> list[object]:
    """Fetch the model's weights; return what was reported."""
    events: list[object] = []
    entry = next(entry for entry in MODEL.manifest().files if entry.path == "weights.bin")
    partial = Partial(tmp_path / "partial", entry.size)
    source = SwarmSource(metainfo, replace(SETTINGS, **settings), tmp_path / "state")
    try:
        source.fetch([Target(entry, partial)], events.append, StopSignal())
        assert partial.data_path.read_bytes() == MODEL.files["weights.bin"]
    except NoPeers as error:
        events.append(error)
    return events


def _notices(events) -> list[str]:
    return [event.text for event in events if isinstance(event, Notice)]


@pytest.mark.parametrize("seeds, leeches, works", [("require", "require", True), ("require", "off", False)])
def test_encryption_that_both_ask_for_works_and_what_one_refuses_does_not(tmp_path, seeds, leeches, works):
    with _seed(tmp_path, encryption=seeds) as (peer, metainfo):
        events = _fetch(tmp_path, metainfo, peers=(peer,), encryption=leeches, no_peers_timeout_seconds=2)
    assert any(isinstance(event, BytesReceived) for event in events) is works


@pytest.mark.parametrize("scheme", ["socks5", "http"])
def test_peers_trackers_and_web_seeds_are_asked_through_the_proxy_alone(tmp_path, scheme):
    with (
        closing(ProxySimulator()) as proxy,
        TrackerSimulator() as tracker,
        _seed(tmp_path) as (peer, metainfo),
    ):
        tracker.add("127.0.0.1", int(peer.rpartition(":")[2]))
        metainfo = replace(metainfo, trackers=(tracker.url, "udp://tracker.invalid:1"))
        events = _fetch(tmp_path, metainfo, use_trackers=True, proxy=f"{scheme}://127.0.0.1:{proxy.port}", dht=True)
        assert tracker.announcements
    assert set(proxy.asked) == {peer, f"127.0.0.1:{tracker.port}"}
    said = " ".join(_notices(events))
    assert "udp trackers" in said
    assert "DHT" in said


def test_a_name_is_never_looked_up_around_the_proxy(tmp_path, monkeypatch):
    with closing(ProxySimulator()) as proxy, _seed(tmp_path) as (_, metainfo):
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_a, **_k: pytest.fail("looked up"))
        events = _fetch(tmp_path, metainfo, peers=("seed.example:6881",), proxy=f"socks5://127.0.0.1:{proxy.port}")
    assert isinstance(events[-1], NoPeers)
    assert any("seed.example:6881" in text for text in _notices(events))
    assert not proxy.asked


def test_a_dead_proxy_is_not_gone_around(tmp_path):
    with _seed(tmp_path) as (peer, metainfo):
        events = _fetch(tmp_path, metainfo, peers=(peer,), proxy="socks5://127.0.0.1:9", no_peers_timeout_seconds=2)
    assert isinstance(events[-1], NoPeers)


def test_a_busy_port_and_a_missing_interface_are_said_once_and_gone_on_without(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken, _seed(tmp_path) as (peer, metainfo):
        busy = f"127.0.0.1:{taken.getsockname()[1]}"
        events = _fetch(
            tmp_path, metainfo, peers=(peer,), incoming=True, listen_interfaces=f"{busy},gone7:0,127.0.0.1:0"
        )
    said = _notices(events)
    assert sum(busy in text and "in use" in text for text in said) == 1
    assert sum("gone7" in text for text in said) == 1


def test_a_dht_that_cannot_be_joined_is_said_and_the_named_peer_delivers(tmp_path):
    with _seed(tmp_path) as (peer, metainfo):
        _fetch(tmp_path, metainfo, peers=(peer,), dht=True, dht_nodes="127.0.0.1:9")


def test_a_dht_where_nobody_answers_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr("mistral_fetch.bittorrent.transfer.DHT_SECONDS", 0.5)
    monkeypatch.setattr("mistral_fetch.bittorrent.transfer.RECONNECT_SECONDS", 0.3)
    metainfo = parse_metainfo(MODEL.publish(tmp_path).plain_torrent_path.read_bytes())
    events = _fetch(tmp_path, metainfo, dht=True, dht_nodes="127.0.0.1:9", no_peers_timeout_seconds=3)
    assert isinstance(events[-1], NoPeers)
    assert sum("DHT" in text for text in _notices(events)) == 1


def _make_private(publication) -> bytes:
    torrent = decode(publication.plain_torrent_path.read_bytes())
    torrent[b"info"][b"private"] = 1
    return encode(torrent)


def test_a_private_torrent_is_fetched_from_named_peers_and_asks_no_dht(tmp_path):
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as node,
        _seed(tmp_path, _make_private) as (peer, metainfo),
    ):
        node.bind(("127.0.0.1", 0))
        node.settimeout(0.01)
        assert metainfo.is_private
        asked = f"127.0.0.1:{node.getsockname()[1]}"
        events = _fetch(tmp_path, metainfo, peers=(peer,), dht=True, lsd=True, pex=True, dht_nodes=asked)
        with pytest.raises(TimeoutError):
            node.recv(1000)
    assert any("private" in text for text in _notices(events))


def test_a_web_seed_is_asked_through_the_proxy(tmp_path):
    MODEL.publish(tmp_path)
    with closing(ProxySimulator()) as proxy, MirrorSimulator(tmp_path) as mirror:
        metainfo = parse_metainfo((tmp_path / "model.v1.torrent").read_bytes())
        seeded = replace(metainfo, web_seeds=(f"{mirror.base_url}/",))
        _fetch(tmp_path, seeded, proxy=f"socks5://127.0.0.1:{proxy.port}")
        assert proxy.asked
        assert all(asked == mirror.base_url.removeprefix("http://") for asked in proxy.asked)
