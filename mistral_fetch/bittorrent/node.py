"""A node of a fleet: it takes what it lacks from the others, gives what it has, and asks whole seeds for the rest.

Two sessions, because libtorrent cannot be told which peer to ask for which piece. This one meets only nodes that are
not complete; in the other one :mod:`.seed_feed` chooses what is asked of whole seeds, and every named peer is met there
first, to learn which of the two it is. Nodes that nobody named are found through the seeds (BEP 11), if all listen on
the same port.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mistral_fetch.bittorrent.alerts import Alert
from mistral_fetch.bittorrent.client import ConnectedPeer, DownloadStatus
from mistral_fetch.bittorrent.conduct import Clocks
from mistral_fetch.bittorrent.hand_over import HandOver
from mistral_fetch.bittorrent.peers import Endpoint, format_peer, resolve_peers
from mistral_fetch.bittorrent.seed_feed import SeedFeed
from mistral_fetch.bittorrent.shared import SharedDownload
from mistral_fetch.bittorrent.transfer import Transfer
from mistral_fetch.events import Notice

MEET_SECONDS = 0.5
# After so long without a byte seeds are asked anew for all that is missing: a piece of theirs may have been lost on its
# way from one session to the other.
STUCK_SECONDS = 6.0
# A name may stand for more nodes from time to time.
LOOKUP_SECONDS = 10.0
# What must have passed without an incomplete peer before sharing ends: one may be reconnecting.
GRACE_SECONDS = 3.0
_LINGER_POLL_SECONDS = 0.2


@dataclass
class NodeTransfer(Transfer):
    """One run of one node; see :class:`~.transfer.Transfer`.

    ``feed`` chooses what whole seeds are asked for, and ``open_seeds`` returns the run of the session that asks them.
    """

    download: SharedDownload
    feed: SeedFeed = field(kw_only=True)
    open_seeds: Callable[[], HandOver] = field(kw_only=True)
    nodes: dict[Endpoint, None] = field(default_factory=dict)
    """Peers to exchange pieces with: they were not complete when they were met."""
    seeds: HandOver | None = None
    asking: threading.Thread | None = None
    failure: BaseException | None = None
    downloaded_bytes: int = 0
    last_meeting: float = 0.0
    last_anew: float = 0.0
    last_lookup: float = 0.0

    def linger(self, paths: Mapping[int, Path], most_seconds: float, is_stopped: Callable[[], bool]) -> None:
        """Go on giving for as long as somebody who is connected is not complete, within limits.

        Args:
            paths: Where the finished files lie now, by index.
            most_seconds: The longest time.
            is_stopped: Asked often; ends it.
        """
        self.download.give_from(paths)
        self.download.connect(self._welcome_endpoints())
        self.report(Notice("complete; giving to peers that are not, as long as there are any"))
        began = wanted = time.monotonic()
        while not is_stopped() and (now := time.monotonic()) - began < most_seconds:
            self.download.poll(_LINGER_POLL_SECONDS)
            if any(not peer.has_all for peer in self.download.connected()):
                wanted = now
            if now - wanted > GRACE_SECONDS:
                break
        self._tell_uploads()

    def _first_peers(self) -> list[Endpoint]:
        return []  # which of the named ones are nodes is found out first

    def _wait_until_finished(self) -> None:
        self._begin_asking()
        try:
            super()._wait_until_finished()
        finally:
            self._end_asking()

    def _begin_asking(self) -> None:
        self.feed.begin()
        self.seeds = self.open_seeds()
        self.asking = threading.Thread(target=self._ask_seeds, args=(self.seeds,), name="seeds", daemon=True)
        self.asking.start()

    def _end_asking(self) -> None:
        self.feed.is_over = True
        if self.asking is not None and self.seeds is not None:
            self.asking.join()
            self.seeds.download.close()
        self.seeds = None

    def _ask_seeds(self, seeds: HandOver) -> None:
        try:
            seeds.run()
        except BaseException as error:  # noqa: BLE001 - raised by the thread that waits
            self.failure = error

    def _look_for_peers(self, status: DownloadStatus, clocks: Clocks, now: float) -> None:
        super()._look_for_peers(status, clocks, now)
        if now - max(clocks.last_byte, self.last_anew) > STUCK_SECONDS:
            self.last_anew = now
            self._end_asking()
            self._begin_asking()

    def _handle(self, alerts: list[Alert]) -> None:
        super()._handle(alerts)
        if self.failure is not None:
            raise self.failure
        now = time.monotonic()
        if self.seeds is not None and self.seeds.download.is_open and now - self.last_meeting >= MEET_SECONDS:
            self.last_meeting = now
            self._look_up(self.seeds, now)
            self._meet(self.seeds)

    def _look_up(self, seeds: HandOver, now: float) -> None:
        if now - self.last_lookup >= LOOKUP_SECONDS and not self.settings.proxy:
            self.last_lookup = now
            self.endpoints = seeds.endpoints = resolve_peers(self.settings.peers)

    def _meet(self, seeds: HandOver) -> None:
        """Sort the peers: nodes are met here, whole seeds in their own session."""
        here, there = self.download.connected(), seeds.download.connected()
        for peer in there:
            if peer.endpoint not in self.endpoints:  # told by a seed, with a port of its other session
                self.nodes[peer.endpoint[0], self.download.port] = None
            elif not peer.has_all:
                self.nodes[peer.endpoint] = None
                if self._is_alone_on_its_host(peer, there):
                    seeds.download.block(peer.endpoint[0])  # it has slots for so many, and meets us already
        for peer in here:
            if not peer.has_all and peer.is_known_address:
                self.nodes[peer.endpoint] = None
            elif peer.is_known_address and peer.endpoint not in self.nodes and self._is_alone_on_its_host(peer, here):
                self.download.block(peer.endpoint[0])
                seeds.download.connect([peer.endpoint])
        self.download.connect(set(self._welcome_endpoints()) - {peer.endpoint for peer in here})
        unmet = set(self.endpoints) - self.nodes.keys() - {peer.endpoint for peer in there}
        seeds.download.connect(unmet)

    def _is_alone_on_its_host(self, peer: ConnectedPeer, others: list[ConnectedPeer]) -> bool:
        """Return whether to block a host is to block this peer and no other: several may share one, as in a lab."""
        host = peer.endpoint[0]
        addresses = {*self.endpoints, *self.nodes, *(other.endpoint for other in others if other.is_known_address)}
        is_shared = any(address[0] == host and address != peer.endpoint for address in addresses)
        return not is_shared and not ipaddress.ip_address(host).is_loopback

    def _to_meet(self) -> Iterable[Endpoint]:
        return self.nodes

    def _tell_progress(self, status: DownloadStatus) -> bool:
        if status.downloaded_bytes > self.downloaded_bytes:
            self.downloaded_bytes = status.downloaded_bytes
            self.feed.nodes_delivered()
        return super()._tell_progress(status)

    def _give_up_in_time(self, status: DownloadStatus, clocks: Clocks, now: float) -> None:
        seeds = self.seeds.download.connected() if self.seeds is not None and self.seeds.download.is_open else []
        if seeds:
            clocks.last_peer = now
        peers = (*status.peers, *(format_peer(seed.endpoint) for seed in seeds))
        super()._give_up_in_time(replace(status, peers=peers), clocks, now)

    def _settle(self) -> None:
        self.download.settle()
