"""The page of a transfer's status, in a real browser, fed by the events of a pull."""

from __future__ import annotations

import pytest

from mistral_fetch.events import (
    BytesReceived,
    FilesOpened,
    PieceView,
    Progress,
    SnapshotReady,
    SourceFailed,
    TransferPlanned,
)
from mistral_fetch.publish.listen import parse_listen
from mistral_fetch.publish.metrics import Metrics
from mistral_fetch.publish.status import StatusServer

pytestmark = pytest.mark.browser

HOSTILE = '<img src=x onerror="window.wasRun=1">'


@pytest.fixture
def senders():
    return {0: "http://a.example/w", 1: "torrent abcdef12…"}


@pytest.fixture
def metrics(senders):
    made = Metrics("pull")
    for event in (
        TransferPlanned("tiny", 1_000_000, 0, 1),
        FilesOpened((PieceView("w", 4, lambda: dict(senders)),)),
        BytesReceived("a.example", "w", 300_000),
        BytesReceived("torrent abcdef12…", "w", 200_000),
        SourceFailed("b.example", HOSTILE, will_retry=False),
        Progress("w", 500_000),
    ):
        made(event)
    return made


@pytest.fixture
def server(metrics):
    with StatusServer(parse_listen("127.0.0.1:0"), metrics) as running:
        yield running


@pytest.fixture
def page(browser, server):
    opened = browser.open(f"{server.url}/status")
    opened.wait_for("document.querySelectorAll('#sources tr').length === 3")
    return opened


def pixel(page, cell):
    """Return the colour in the middle of a cell of the map, as red, green and blue."""
    return page.evaluate(
        f"""(() => {{ const c = document.getElementById('pieces'), pen = c.getContext('2d');
        const side = cellSize(state.now.map.senders.length, c.clientWidth, c.clientHeight);
        const columns = Math.floor(c.clientWidth / side), step = c.clientWidth / columns;
        const x = ({cell} % columns + .5) * step * devicePixelRatio;
        return [...pen.getImageData(x, 8, 1, 1).data].slice(0, 3) }})()"""
    )


def test_the_picture_of_a_pull(page):
    assert (page.text("#model"), page.text("#state"), page.text("#share")) == ("tiny", "downloading", "50")
    assert page.text("#amount") == "500\u00a0kB of 1.00\u00a0MB"
    colours = [tuple(pixel(page, cell)) for cell in range(4)]
    assert len(set(colours)) == 3
    assert colours[2] == colours[3]
    assert page.text("#legend").splitlines() == ["a.example", "torrent abcdef12…", "missing"]
    assert page.complaints() == []


def test_it_changes_while_it_is_looked_at_and_says_when_it_has_ended(page, server, metrics, senders):
    senders |= {2: "http://a.example/w", 3: "http://a.example/w"}
    metrics(SnapshotReady("/x", "abc"))
    page.wait_for("document.getElementById('state').textContent === 'complete'")
    assert (page.text("#share"), page.evaluate("state.now.map.senders")) == ("100", "abaa")
    server.close()
    page.wait_for("document.getElementById('state').textContent === 'ended'")


def test_a_source_can_neither_draw_nor_run(page, server):
    assert HOSTILE in page.text("#sources")
    assert page.evaluate("document.images.length === 0 && window.wasRun === undefined")
    assert all(url.startswith((server.url, "data:")) for url in page.requested_urls())


@pytest.mark.parametrize("width", [320, 1000])
def test_nothing_is_wider_than_the_window(page, width):
    page.resize(width, 700)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_dark_follows_the_system(browser, server):
    dark = browser.open(f"{server.url}/", is_dark=True)
    assert dark.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 21, 19)"


def test_a_seed_shows_what_it_gives(browser):
    metrics = Metrics("seed")
    metrics.offer("tiny", 1000, 1000)
    metrics.set_swarm(2_500_000, 3)
    metrics.set_ready(True)
    with StatusServer(parse_listen("127.0.0.1:0"), metrics) as server:
        page = browser.open(f"{server.url}/status")
        page.wait_for("document.getElementById('state').textContent === 'seeding'")
        assert "Given away\n2.50\u00a0MB" in page.text("#sums")
        assert "Peers\n3" in page.text("#sums")
