"""What the benchmarks compute, draw and copy; the measurements themselves are run by hand."""

from __future__ import annotations

import xml.dom.minidom
from pathlib import Path

import pytest

from benchmarks.ceiling import copy
from benchmarks.namespaces import payload_rate
from benchmarks.plot import Bar, Group, bar_chart
from benchmarks.shaped_pull import Case, Links, ideal_seconds
from mistral_fetch.simulators.mirror import MirrorSimulator

LINKS = Links("200mbit", "5mbit", rate=100.0, slow_rate=20.0)


@pytest.mark.parametrize(
    "case, broke_at, expected",
    [
        (Case("all"), None, 2400 / 400),
        (Case("slow", slow=0), None, 2400 / 320),
        (Case("lying", liar=0), None, 2400 / 300),
        (Case("killed", killed=0), 1200, 1200 / 400 + 1200 / 300),
        (Case("killed too late", killed=0), None, 2400 / 400),
        (Case("silent", silent=1), 600, 600 / 400 + 1800 / 300),
        (Case("three", slow=0, killed=1, liar=2), 1200, 1200 / 220 + 1200 / 120),
    ],
)
def test_the_ideal_is_what_the_honest_links_need(case: Case, broke_at: int | None, expected: float) -> None:
    assert ideal_seconds(case, LINKS, mirrors=4, size=2400, broke_at=broke_at) == pytest.approx(expected)


def test_payload_is_what_headers_leave() -> None:
    assert payload_rate(200e6) == pytest.approx(25e6 * 1448 / 1514)


def test_a_chart_is_well_formed_and_its_bars_are_to_scale() -> None:
    bars = [Bar('a <b> & "c"', 10.0, 8.0, 12.0, mark=9.0), Bar("half", 5.0, 5.0, 5.0, is_ours=True)]
    chart = xml.dom.minidom.parseString(bar_chart('"title" & more', "note", [Group("http", bars)], "s"))
    widths = [float(bar.getAttribute("width")) for bar in chart.getElementsByTagName("rect")]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.01)
    texts = [text.firstChild.data for text in chart.getElementsByTagName("text")]
    assert texts == ['"title" & more', "note", "http", 'a <b> & "c"', "10.0 s", "half", "5.0 s"]


@pytest.mark.parametrize("threads", [1, 4])
def test_the_bare_loop_copies_every_byte(threads: int, tmp_path: Path) -> None:
    data = bytes(range(256)) * 1001
    with MirrorSimulator({"a.bin": data}) as mirror:
        assert copy(mirror.url("a.bin"), tmp_path / "copy", threads) == len(data)
        assert mirror.most_requests_at_once <= threads
    assert (tmp_path / "copy").read_bytes() == data
