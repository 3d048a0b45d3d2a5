"""A published model, and a leech that is libtorrent itself: what it gets was really sent and really right."""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass, field

import libtorrent as lt
import pytest

from mistral_fetch.bittorrent.metainfo import parse_metainfo
from mistral_fetch.events import Notice
from mistral_fetch.publish.build import publish
from mistral_fetch.publish.listen import parse_listen
from mistral_fetch.publish.metrics import Metrics
from mistral_fetch.publish.notify import Supervisor
from mistral_fetch.publish.seed import Seeding, SeedOptions

FILES = {"weights.bin": 1_300_000, "params.json": 600}
WAIT_SECONDS = 30


def content(path, size):
    return hashlib.shake_128(path.encode()).digest(size)


def wait_until(condition, seconds=WAIT_SECONDS):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@dataclass
class World:
    """The model's directory and its publication."""

    directory: object
    published: object

    @property
    def torrents(self):
        return [
            parse_metainfo(path.read_bytes())
            for path in (self.published.torrent_path, self.published.plain_torrent_path)
        ]

    @property
    def places(self):
        return {path: self.directory / path for path in FILES}

    def spoil(self, at=700_000):
        data = bytearray(content("weights.bin", FILES["weights.bin"]))
        data[at] ^= 1
        (self.directory / "weights.bin").write_bytes(data)

    def mend(self):
        (self.directory / "weights.bin").write_bytes(content("weights.bin", FILES["weights.bin"]))


@pytest.fixture
def world(tmp_path):
    directory = tmp_path / "served" / "tiny"
    directory.mkdir(parents=True)
    for path, size in FILES.items():
        (directory / path).write_bytes(content(path, size))
    return World(directory, publish(directory, tmp_path / "served"))


@dataclass
class Running:
    """A seeding that runs in a thread of its own until its test ends."""

    seeding: Seeding
    notices: list = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)
    is_ready: threading.Event = field(default_factory=threading.Event)
    ready: object = None
    ended: object = None
    error: BaseException | None = None

    def start(self):
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        return self

    def wait_ready(self):
        assert self.is_ready.wait(WAIT_SECONDS)
        return self.ready

    def join(self):
        self.thread.join(WAIT_SECONDS)
        assert not self.thread.is_alive()
        return self.ended

    def _run(self):
        try:
            self.ended = self.seeding.run(self._on_ready)
        except Exception as error:
            self.error = error

    def _on_ready(self, ready):
        self.ready = ready
        self.is_ready.set()


@pytest.fixture
def seed(world):
    """Start to seed the world; options are those of ``seed``."""
    running = []

    def start(**options):
        listen = parse_listen(options.pop("listen", "127.0.0.1:0"))
        supervisor = Supervisor(options.pop("environment", {}))
        one = Running(None)
        one.seeding = Seeding(
            "tiny",
            world.torrents,
            world.places,
            SeedOptions(listen, **options),
            Metrics("seed"),
            supervisor,
            lambda event: one.notices.append(event.text) if isinstance(event, Notice) else None,
            one.stopped.is_set,
        )
        running.append(one)
        return one.start()

    yield start
    for one in running:
        one.stopped.set()
        one.join()


class Leech:
    """Fetches a torrent from one peer with libtorrent's own defaults."""

    def __init__(self, torrent, directory, port):
        mask = lt.alert.category_t.status_notification | lt.alert.category_t.piece_progress_notification
        settings = {
            "listen_interfaces": "127.0.0.1:0",
            "enable_dht": False,
            "enable_lsd": False,
            "enable_upnp": False,
            "enable_natpmp": False,
            "enable_outgoing_utp": False,
            "alert_mask": mask,
        }
        self.session = lt.session(settings)
        parameters = lt.load_torrent_buffer(torrent.data)
        parameters.save_path = str(directory)
        parameters.trackers = []
        self.handle = self.session.add_torrent(parameters)
        self.port = port
        self.failed = []

    def pieces(self):
        """Return which pieces are there; ask for the peer again, since it may have been away."""
        if not self.handle.get_peer_info():
            self.handle.connect_peer(("127.0.0.1", self.port))
        self.failed += [alert for alert in self.session.pop_alerts() if isinstance(alert, lt.hash_failed_alert)]
        status = self.handle.status(lt.status_flags_t.query_pieces)
        return {index for index, has in enumerate(status.pieces) if has}


@pytest.fixture
def leech(tmp_path):
    made = []

    def start(torrent, port):
        directory = tmp_path / f"leech{len(made)}"
        directory.mkdir()
        made.append(Leech(torrent, directory, port))
        return made[-1]

    yield start
    for one in made:
        one.session.remove_torrent(one.handle)
