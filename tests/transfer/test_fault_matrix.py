"""Every fault of a mirror, alone and beside an honest one, with piece hashes and without, from the start and resumed.

588 cases. After each one, whatever it was, the same is asked: what is published is right, byte by byte; a
failure has the right exit code, names the mirror and publishes nothing; nothing verified is fetched again beyond what
the fault costs; and what is left over is used up by the next run.
"""

from __future__ import annotations

import gzip
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from mistral_fetch.errors import MistralFetchError
from mistral_fetch.events import BytesReceived, SourceFailed, SourceLied
from mistral_fetch.manifest import MirrorUrl, PieceHashes
from mistral_fetch.metalink import serialise_metalink
from mistral_fetch.simulators.mirror import Fault, MirrorSimulator, SeenRequest
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.sources import schedule
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.partials import Partial
from tests.transfer.conftest import Puller
from tests.transfer.engine import CONNECTIONS, LONGEST_RUN, PIECE, RATE, SEND_BUFFER, shrink, write_one_certificate

CASE_COUNT = 588

pytestmark = pytest.mark.slow

NAME = "weights.bin"
WEIGHTS = random.Random(61).randbytes(32 * PIECE + 4321)
SIZE = len(WEIGHTS)
STALE = random.Random(62).randbytes(SIZE)
PUBLISHER = PublisherSimulator({NAME: WEIGHTS, "config.json": b"{}"})
TRUTH = PUBLISHER.manifest()
# What an earlier run brought, with gaps of several kinds between.
RECORDED = (0, 1, 2, 9, 16, 17, 18, 19, 31)
# What else may lie in a partial: nothing of one process alone.
KEPT = ("data", "journal-", "about.json", "lock", "validator", "committed.json")
HTML = b"<html><body>Please log in</body></html>"


@dataclass(frozen=True)
class Asked:
    """A request that is about to meet a fault: the bytes it wants, how many came before it, and another host."""

    start: int
    end: int
    number: int
    elsewhere: Callable[[str], str]


@dataclass(frozen=True)
class Kind:
    """A fault, and the exit code that it ends in where there is no other mirror."""

    fault: Callable[[Asked], Fault | None]
    always: int = 0
    once: int = 0
    once_without_pieces: int | None = None
    """Where that is another one: who lied about a whole file is asked a second time, as it may have been the disk."""
    lies: bool = False
    """It sends wrong bytes: without piece hashes all of the file is fetched again, from one mirror after the other."""
    sends_all: bool = False
    """It sends the file from its beginning, also what is here already."""
    skip: frozenset[str] = field(default_factory=frozenset)
    """Settings in which the fault makes no sense, or takes for ever by design."""


def plain(fault: Fault) -> Callable[[Asked], Fault]:
    return lambda _asked: fault


KINDS = {
    "wrong byte": Kind(lambda a: Fault(wrong_bytes_at=(a.start + PIECE - 1,)), 32, 32, 0, lies=True),
    "stale version": Kind(plain(Fault(body=STALE, etag='"stale"')), 32, 32, 0, lies=True),
    "body ends early": Kind(plain(Fault(end_at=1000)), 6, 0),
    "body ends within a later piece": Kind(plain(Fault(end_at=PIECE + 99)), 0, 0),
    "range shorter than claimed": Kind(plain(Fault(short_by=100)), 6, 6),
    "part of the range, and said so": Kind(plain(Fault(max_range_bytes=PIECE + 5)), 0, 0),
    "whole file for a range": Kind(plain(Fault(ignores_range=True)), 0, 0, sends_all=True),
    "untrue Content-Range": Kind(plain(Fault(content_range=f"bytes 0-99/{SIZE}")), 6, 6),
    "Content-Range of another file": Kind(
        lambda a: Fault(content_range=f"bytes {a.start}-{a.end - 1}/{SIZE + 5}"), 32, 32
    ),
    "another range": Kind(plain(Fault(shift_range=100)), 6, 6),
    "416": Kind(plain(Fault(status=416, headers={"Content-Range": f"bytes */{SIZE}"})), 6, 6),
    "429": Kind(plain(Fault(status=429)), 6, 0),
    "429 with Retry-After": Kind(plain(Fault(status=429, headers={"Retry-After": "0"})), 6, 0),
    "429, come back tomorrow": Kind(
        plain(Fault(status=429, headers={"Retry-After": "86400"})), 6, skip=frozenset({"once"})
    ),
    "503": Kind(plain(Fault(status=503)), 6, 0),
    "500": Kind(plain(Fault(status=500)), 6, 0),
    "reset at once": Kind(plain(Fault(reset_at=0)), 6, 0),
    "reset within a later piece": Kind(plain(Fault(reset_at=PIECE + 99)), 0, 0),
    "slow": Kind(plain(Fault(rate_bytes_per_second=2_000_000)), 0, 0),
    "trickle": Kind(plain(Fault(rate_bytes_per_second=1000)), skip=frozenset({"always alone"})),
    "ETag flips": Kind(lambda a: Fault(etag='"other"') if a.number % 2 == 0 else None, 0, 0),
    "no validator": Kind(plain(Fault(etag="")), 0, 0),
    "redirect loop": Kind(plain(Fault(redirect_to=f"/{NAME}")), 6, 0),
    "redirect to another host": Kind(lambda a: Fault(redirect_to=a.elsewhere(NAME)), 0, 0),
    "redirect to a refusal": Kind(lambda a: Fault(redirect_to=a.elsewhere("refused")), 6, 0),
    "redirect to a lie": Kind(lambda a: Fault(redirect_to=a.elsewhere("stale")), 32, 32, 0, lies=True),
    "redirect to a file": Kind(plain(Fault(redirect_to="file:///etc/passwd")), 6, 6),
    "gzip": Kind(
        plain(Fault(body=gzip.compress(WEIGHTS, 1), ignores_range=True, headers={"Content-Encoding": "gzip"})), 6, 6
    ),
    "never answers": Kind(plain(Fault(hang_at=-1)), 5, 0),
    "falls silent at once": Kind(plain(Fault(hang_at=0)), 5, 0),
    "falls silent within a later piece": Kind(plain(Fault(hang_at=PIECE + 99)), skip=frozenset({"always alone"})),
    "401": Kind(plain(Fault(status=401)), 4, 4),
    "403": Kind(plain(Fault(status=403)), 4, 4),
    "404": Kind(plain(Fault(status=404)), 6, 6),
    "204": Kind(plain(Fault(status=204)), 6, 6),
    "web page": Kind(plain(Fault(body=HTML, ignores_range=True, headers={"Content-Type": "text/html"})), 6, 6),
    "longer file": Kind(plain(Fault(size=SIZE + 1)), 32, 32),
    "shorter file": Kind(plain(Fault(size=SIZE - 1)), 32, 32),
    "longer file, length untold": Kind(
        plain(Fault(size=SIZE + PIECE, no_length=True, ignores_range=True)), 32, 0, sends_all=True
    ),
    "short Content-Length": Kind(plain(Fault(headers={"Content-Length": "1000"})), 6, 6),
    "no Content-Length": Kind(plain(Fault(no_length=True)), 0, 0),
    "no Content-Range": Kind(plain(Fault(content_range="")), 0, 0),
    "no length of any kind": Kind(plain(Fault(content_range="", no_length=True)), 6, 6),
}


@dataclass(frozen=True)
class Case:
    """A fault in a setting."""

    name: str
    times: str  # always or once
    beside: str  # alone, or beside an honest mirror
    pins: str  # pieces or sha256
    start: str  # fresh or resumed

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @property
    def makes_sense(self) -> bool:
        if (self.times, self.beside, self.start) == ("once", "beside", "resumed"):
            return False  # the honest mirror hides the fault, and what was recorded is met alone already
        return not self.kind.skip & {self.times, f"{self.times} {self.beside}"}

    @property
    def exit_code(self) -> int:
        """Return what the pull must end in."""
        if self.beside == "beside":
            return 0
        if self.times == "always":
            return self.kind.always
        other = self.kind.once_without_pieces
        return self.kind.once if self.pins == "pieces" or other is None else other

    @property
    def wasted_bytes(self) -> int:
        """Return how many received bytes the fault may make useless."""
        if self.kind.lies and self.pins == "sha256":
            return 2 * SIZE  # the mixture, then each of the two mirrors alone
        # A piece begun by each connection, which another mirror must bring from its first byte.
        begun = 2 * CONNECTIONS * PIECE
        return begun + (SIZE if self.kind.sends_all else 0)

    def __str__(self) -> str:
        return "-".join((self.name, self.times, self.beside, self.pins, self.start))


CASES = [
    case
    for name in KINDS
    for times in ("always", "once")
    for beside in ("alone", "beside")
    for pins in ("pieces", "sha256")
    for start in ("fresh", "resumed")
    if (case := Case(name, times, beside, pins, start)).makes_sense
]


@dataclass
class Stage:
    """The mirrors of one case, the faulty one first, and how often that was asked for the file while it was faulty."""

    mirrors: list[MirrorSimulator]
    elsewhere: Callable[[str], str]
    """From a file's name to its address on a host that the manifest does not name."""
    manifest: str
    hits: int = 0

    @property
    def faulty(self) -> MirrorSimulator:
        return self.mirrors[0]

    def host(self) -> str:
        """Return how the faulty mirror is called in messages."""
        return self.faulty.base_url.removeprefix("http://")

    def misbehave(self, case: Case) -> None:
        """Let the faulty mirror do as the case says from now on."""

        lock = threading.Lock()

        def rule(request: SeenRequest) -> Fault | None:
            start, end = request.wanted(SIZE) or (0, SIZE)
            with lock:  # requests come from many connections
                if request.path != NAME or (case.times == "once" and self.hits):
                    return None
                self.hits += 1
                return case.kind.fault(Asked(start, end, self.hits - 1, self.elsewhere))

        self.faulty.rule = rule


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "one.pem"
    write_one_certificate(path)
    return path


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, certificate: Path) -> None:
    shrink(monkeypatch.setattr)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))


@pytest.fixture
def own_home(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a cache in memory, where there is such a place: hundreds of pulls wait for a disk most of the time."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield own_home
        return
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory) / "cache"


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Callable[[str, str], Stage]]:
    """Return a function that sets the mirrors up, for the pins and the number of mirrors that a case has."""
    with ExitStack() as stack:
        mirrors: list[MirrorSimulator] = []

        def start(files: dict[str, bytes]) -> MirrorSimulator:
            options = {"rate_bytes_per_second": RATE, "send_buffer_bytes": SEND_BUFFER}
            mirrors.append(stack.enter_context(MirrorSimulator(files, **options)))  # type: ignore[arg-type]
            return mirrors[-1]

        def elsewhere(name: str) -> str:
            if not any("stale" in mirror.files for mirror in mirrors):  # type: ignore[operator]
                start({NAME: WEIGHTS, "stale": STALE}).always("refused", Fault(status=403))
            return mirrors[-1].url(name)

        def build(pins: str, beside: str) -> Stage:
            # Credentials for the first mirror; they are nobody else's business.
            bases = [start(PUBLISHER.files).base_url.replace("http://", "http://user:pa55word@")]
            bases += [start(PUBLISHER.files).base_url] if beside == "beside" else []
            entries = []
            for entry in TRUTH.files:
                urls = tuple(MirrorUrl(f"{base}/{entry.path}", number) for number, base in enumerate(bases, 1))
                entries.append(replace(entry, mirrors=urls, pieces=entry.pieces if pins == "pieces" else None))
            (tmp_path / "model.meta4").write_bytes(serialise_metalink(TRUTH.with_files(entries)))
            return Stage(mirrors, elsewhere, str(tmp_path / "model.meta4"))

        yield build


def open_partial(home: Path, pins: str) -> Partial:
    entry = TRUTH.entry(NAME)
    pieces: PieceHashes | None = entry.pieces if pins == "pieces" else None
    return Partial(Layout(home).partial(f"sha256-{entry.sha256}"), SIZE, pieces)


def record_an_earlier_run(home: Path, pins: str) -> int:
    """Put right pieces on disk, as an earlier run did; return how many bytes."""
    partial = open_partial(home, pins)
    for index in RECORDED:
        span = partial.grid.span(index)
        partial.put(index, WEIGHTS[span.start : span.end], "an earlier run")
    partial.close()
    return partial.present_bytes


def received(puller: Puller) -> int:
    return sum(event.length for event in puller.of_kind(BytesReceived) if event.path == NAME)


def assert_only_what_the_next_run_uses_is_left(home: Path) -> None:
    keys = {f"sha256-{entry.sha256}" for entry in TRUTH.files}
    assert {path.name for path in home.glob("partial/*")} <= keys
    for path in home.glob("partial/*/*"):
        assert path.name.startswith(KEPT), path
        assert not path.name.startswith("data-"), path
    assert list(home.rglob("*.tmp")) == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_fault_costs_what_it_must_and_never_a_wrong_byte(
    case: Case, puller: Puller, stage: Callable[[str, str], Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    if case.exit_code or case.kind.lies:  # no connection takes the faulty one's work from it before its answer is seen
        monkeypatch.setattr(schedule, "SETTLE_SECONDS", 30.0)
    scene = stage(case.pins, case.beside)
    recorded = record_an_earlier_run(puller.home, case.pins) if case.start == "resumed" else 0
    scene.misbehave(case)
    patience = {"read_timeout": 0.2} if "answers" in case.name or "silent" in case.name else {}
    error, began = None, time.monotonic()
    try:
        result = puller(scene.manifest, **patience)
    except MistralFetchError as caught:
        error = caught
    code = int(error.exit_code) if error else 0
    assert code == case.exit_code
    assert time.monotonic() - began < 20
    if error:
        assert all(error.lines())
        assert scene.host() in error.what
        assert "pa55word" not in " ".join(error.lines())
    assert scene.hits, "the fault was never met: the case shows nothing"

    # Rule 5: whoever is complained about is the one that did it.
    complaints = {event.source for event in (*puller.of_kind(SourceFailed), *puller.of_kind(SourceLied))}
    assert complaints <= {scene.host(), "http"}
    if case.kind.lies and case.start == "fresh":
        assert {event.source for event in puller.of_kind(SourceLied)} == {scene.host()}
    # Nobody else sees the first mirror's credentials, wherever it redirects to.
    assert all("authorization" in request.headers for request in scene.faulty.requests(NAME))
    assert not any("authorization" in r.headers for other in scene.mirrors[1:] for r in other.requests())
    # Rule 4: nothing verified is fetched again, but for what the fault makes useless.
    needed = SIZE - recorded
    assert received(puller) <= needed + case.wasted_bytes
    # What was on its way when a connection broke was sent and never came: a run at most, for each of them.
    sent = sum(mirror.bytes_sent(NAME) for mirror in scene.mirrors)
    broken = scene.hits + 2 * CONNECTIONS
    assert sent <= needed + case.wasted_bytes + broken * (SIZE if case.kind.sends_all else LONGEST_RUN)

    if code == 0:
        puller.assert_exact(result, PUBLISHER)
        return
    puller.assert_nothing_published()
    assert_only_what_the_next_run_uses_is_left(puller.home)
    kept = open_partial(puller.home, case.pins).present_bytes
    assert kept >= recorded or (case.kind.lies and case.pins == "sha256")
    scene.faulty.rule = None
    puller.events.clear()
    puller.assert_exact(puller(scene.manifest), PUBLISHER)
    assert received(puller) == SIZE - kept


@pytest.mark.parametrize("pins", ["pieces", "sha256"])
@pytest.mark.parametrize("beside", ["alone", "beside"])
def test_without_a_fault_several_connections_share_the_work_and_no_byte_comes_twice(
    pins: str, beside: str, puller: Puller, stage: Callable[[str, str], Stage]
) -> None:
    scene = stage(pins, beside)
    puller.assert_exact(puller(scene.manifest), PUBLISHER)
    for mirror in scene.mirrors:
        assert mirror.most_requests_at_once > 1
        assert len(mirror.requests(NAME)) >= CONNECTIONS
    assert received(puller) == SIZE
    assert sum(mirror.bytes_sent(NAME) for mirror in scene.mirrors) == SIZE
    assert not puller.of_kind(SourceFailed)


def test_the_matrix_has_as_many_cases_as_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(CASES) == CASE_COUNT
    assert f"\n{CASE_COUNT} cases." in (__doc__ or "")
    assert len(set(map(str, CASES))) == CASE_COUNT
    with capsys.disabled():
        print(f"\nfault matrix: {len(CASES)} cases of {len(KINDS)} faults")
