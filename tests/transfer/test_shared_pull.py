"""Nodes that share while they pull: the origin sends little more than one copy, and may go once that is out."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from mistral_fetch.bittorrent import node as fleet_node
from mistral_fetch.bittorrent.metainfo import parse_metainfo
from mistral_fetch.bittorrent.seed import Seeder
from mistral_fetch.bittorrent.settings import SwarmSettings
from mistral_fetch.events import Notice, SourceLied
from mistral_fetch.publish.build import Publication
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.transfer.channels import PullResult
from tests.transfer.conftest import Puller

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(120)]

SIZE = 6_000_000
MODEL = PublisherSimulator({"weights.bin": random.Random(71).randbytes(SIZE), "config.json": b"{}"})
SEEDING = SwarmSettings(listen_interfaces="127.0.0.1:0", use_trackers=False, uploads=True)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Publication:
    return MODEL.publish(tmp_path_factory.mktemp("publisher"))


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_node, "GRACE_SECONDS", 0.5)


@contextmanager
def origin(published: Publication, rate: int | None = None) -> Iterator[Seeder]:
    metainfo = parse_metainfo(published.torrent_path.read_bytes())
    seeder = Seeder(metainfo, published.torrent_path.parent / "model", SEEDING, rate_bytes_per_second=rate)
    try:
        seeder.wait_until_seeding(30)
        yield seeder
    finally:
        with suppress(RuntimeError):  # the test closed it
            seeder.close()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


class Fleet:
    """Nodes in threads of this process, each with a cache and a port of its own, all named to each other."""

    def __init__(self, home: Path, published: Publication, seed_port: int, count: int) -> None:
        self.published = published
        self.ports = free_ports(count)
        self.peers = tuple(f"127.0.0.1:{port}" for port in (seed_port, *self.ports))
        self.nodes = [Puller(home / f"node{number}") for number in range(count)]
        self.results: dict[int, PullResult | BaseException] = {}
        self.threads: list[threading.Thread] = []

    def start(self, number: int) -> None:
        thread = threading.Thread(target=self._pull, args=(number,), daemon=True)
        self.threads.append(thread)
        thread.start()

    def _pull(self, number: int) -> None:
        listen = (f"127.0.0.1:{self.ports[number]}",)
        peers = tuple(peer for peer in self.peers if not peer.endswith(f":{self.ports[number]}"))
        try:
            self.results[number] = self.nodes[number](
                str(self.published.torrent_path),
                peers=peers,
                share=True,
                listen=listen,
                peer_timeout=20.0,
                stall_timeout=20.0,
            )
        except BaseException as error:
            self.results[number] = error

    def wait(self) -> None:
        for thread in self.threads:
            thread.join(100)
        for number, node in enumerate(self.nodes):
            result = self.results[number]
            assert isinstance(result, PullResult), result
            node.assert_exact(result, MODEL)
            assert not node.of_kind(SourceLied)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_origin_sends_little_more_than_one_copy(own_home: Path, published: Publication) -> None:
    with origin(published, rate=1_000_000) as seeder:
        fleet = Fleet(own_home, published, seeder.port, 3)
        for number in range(3):
            fleet.start(number)
        fleet.wait()
        assert seeder.uploaded_bytes < 2 * SIZE, "three would be sent to nodes that do not share"


def test_an_origin_that_dies_once_a_copy_is_out_is_not_missed(own_home: Path, published: Publication) -> None:
    with origin(published, rate=1_000_000) as seeder:
        fleet = Fleet(own_home, published, seeder.port, 2)
        fleet.start(0)
        wait_for(lambda: seeder.uploaded_bytes > SIZE // 2)
        fleet.start(1)
        # All pieces are out when one of the two is complete; it stays as long as the other one is not.
        wait_for(lambda: any("complete" in notice.text for node in fleet.nodes for notice in node.of_kind(Notice)))
        seeder.close()
        fleet.wait()


def test_a_late_node_gets_it_from_one_that_is_complete(own_home: Path, published: Publication) -> None:
    with origin(published) as seeder:
        fleet = Fleet(own_home, published, seeder.port, 2)
        fleet.start(0)
        wait_for(lambda: 0 in fleet.results)
        sent = seeder.uploaded_bytes
        fleet.start(1)
        fleet.wait()
        assert sent <= seeder.uploaded_bytes <= 2.5 * SIZE


def test_a_node_alone_needs_nobody_but_the_origin(puller: Puller, published: Publication) -> None:
    with origin(published) as seeder:
        began = time.monotonic()
        result = puller(str(published.torrent_path), peers=(f"127.0.0.1:{seeder.port}",), share=True, peer_timeout=20.0)
        puller.assert_exact(result, MODEL)
        assert time.monotonic() - began < 30, "nobody is waited for who does not want anything"


def test_an_interrupted_node_goes_on_where_it_was(own_home: Path, published: Publication) -> None:
    with origin(published, rate=1_500_000) as seeder:
        peers = (f"127.0.0.1:{seeder.port}",)
        first, again = Puller(own_home), Puller(own_home)
        stopper = threading.Thread(
            target=lambda: (wait_for(lambda: seeder.uploaded_bytes > SIZE // 2), first.stop.set())
        )
        stopper.start()
        with pytest.raises(Exception, match="stopped"):
            first(str(published.torrent_path), peers=peers, share=True, peer_timeout=20.0)
        stopper.join()
        result = again(str(published.torrent_path), peers=peers, share=True, peer_timeout=20.0)
        again.assert_exact(result, MODEL)
        assert seeder.uploaded_bytes < 1.5 * SIZE
