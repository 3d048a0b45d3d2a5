"""Each fault that the documentation names can be written down as it is written there, and does what it says."""

from __future__ import annotations

import gzip
import http.client
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mistral_fetch.simulators.mirror import Fault, MirrorSimulator

DATA = bytes(range(256)) * 1000
OLD = bytes(reversed(DATA))
PAGE = Path(__file__).parents[2] / "docs" / "simulators.md"
WRONG = DATA[:70_000] + bytes([DATA[70_000] ^ 0xFF]) + DATA[70_001:]

Answer = tuple[int, dict[str, str], bytes]


@pytest.fixture
def mirror():
    with MirrorSimulator({"model.bin": DATA}) as mirror:
        yield mirror


def ask(mirror: MirrorSimulator, start: int | None = None, end: int = 0, timeout: float = 10) -> Answer:
    connection = http.client.HTTPConnection(*mirror.address, timeout=timeout)
    try:
        connection.request("GET", "/model.bin", headers={} if start is None else {"Range": f"bytes={start}-{end - 1}"})
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return response.status, headers, response.read()
    finally:
        connection.close()


def fails_with(error: type[Exception], start: int | None = None, end: int = 0) -> Callable[[MirrorSimulator], None]:
    def check(mirror: MirrorSimulator) -> None:
        with pytest.raises(error):
            ask(mirror, start, end, timeout=0.3)

    return check


def answers(status: int, body: bytes | None, **headers: str) -> Callable[[MirrorSimulator], None]:
    """Expect this of a request for bytes 60,000 to 80,000; '' stands for a header that is not sent."""

    def check(mirror: MirrorSimulator) -> None:
        got_status, got_headers, got_body = ask(mirror, 60_000, 80_000)
        assert got_status == status
        assert body is None or got_body == body
        for name, value in headers.items():
            assert got_headers.get(name.replace("_", "-"), "") == value

    return check


def breaks_off_after(length: int) -> Callable[[MirrorSimulator], None]:
    def check(mirror: MirrorSimulator) -> None:
        with pytest.raises(http.client.IncompleteRead) as caught:
            ask(mirror, 60_000, 80_000)
        assert caught.value.partial == DATA[60_000 : 60_000 + length]

    return check


def trickles(mirror: MirrorSimulator) -> None:
    begun = time.monotonic()
    assert ask(mirror, 0, 300)[2] == DATA[:300]
    assert time.monotonic() - begun > 0.2


def is_gzip(mirror: MirrorSimulator) -> None:
    status, headers, body = ask(mirror, 60_000, 80_000)
    assert (status, headers["content-encoding"], gzip.decompress(body)) == (200, "gzip", DATA)


def falls_silent_after(sent: int) -> Callable[[MirrorSimulator], None]:
    """Expect some bytes of a request for bytes 60,000 to 80,000, then nothing."""

    def check(mirror: MirrorSimulator) -> None:
        connection = http.client.HTTPConnection(*mirror.address, timeout=0.5)
        connection.request("GET", "/model.bin", headers={"Range": "bytes=60000-79999"})
        response = connection.getresponse()
        assert response.read(sent) == DATA[60_000 : 60_000 + sent]
        with pytest.raises(TimeoutError):
            response.read(1)
        connection.close()

    return check


EXPECTED = {
    "wrong bytes": answers(206, WRONG[60_000:80_000], content_length="20000"),
    "body shorter than announced": breaks_off_after(1000),
    "shorter range than claimed": answers(
        206, DATA[60_000:79_900], content_length="19900", content_range="bytes 60000-79999/256000"
    ),
    "part of the range, and said so": answers(206, DATA[60_000:61_000], content_range="bytes 60000-60999/256000"),
    "whole file for a range": answers(200, DATA, content_range=""),
    "untrue Content-Range": answers(206, DATA[60_000:80_000], content_range="bytes 0-99/256000"),
    "another range": answers(206, DATA[60_100:80_100], content_range="bytes 60100-80099/256000"),
    "416": answers(416, b"", content_range="bytes */256000"),
    "429": answers(429, b"", retry_after=""),
    "429 with Retry-After": answers(429, b"", retry_after="3"),
    "503": answers(503, b""),
    "reset at a byte of the body": fails_with(ConnectionResetError, 60_000, 80_000),
    "reset at a byte of the file": fails_with(ConnectionResetError, 60_000, 80_000),
    "trickle": trickles,
    "another ETag": answers(206, DATA[60_000:80_000], etag='"other"'),
    "stale version": answers(206, OLD[60_000:80_000], etag='"old"', content_range="bytes 60000-79999/256000"),
    "redirect loop": answers(302, b"", location="/model.bin"),
    "redirect to another host": answers(302, b"", location="http://other.example/model.bin"),
    "gzip": is_gzip,
    "never answers": fails_with(TimeoutError),
    "falls silent": falls_silent_after(1000),
    "falls silent at a byte": falls_silent_after(10_000),
}


class OtherMirror:
    def url(self, path: str) -> str:
        return f"http://other.example/{path}"


def documented() -> dict[str, Fault]:
    lines = re.findall(r"^        (\S.*?) {2,}(Fault\(.*\))$", Fault.__doc__ or "", re.MULTILINE)
    names = {"Fault": Fault, "OLD": OLD, "other": OtherMirror()}
    return {name: eval(text, names) for name, text in lines}


@pytest.mark.parametrize("name", documented())
def test_a_documented_fault_does_what_it_says(name: str, mirror: MirrorSimulator) -> None:
    mirror.always("model.bin", documented()[name])
    EXPECTED[name](mirror)


def test_the_faults_here_in_the_docstring_and_on_the_page_are_the_same() -> None:
    rows = re.findall(r"^\| ([^|]+) \| `(Fault\(.*\))` \|", PAGE.read_text(), re.MULTILINE)
    told = dict(re.findall(r"^        (\S.*?) {2,}(Fault\(.*\))$", Fault.__doc__ or "", re.MULTILINE))
    assert dict(rows) == told
    assert set(told) == set(EXPECTED)


@pytest.mark.parametrize("start, end", [(None, 0), (70_000, 70_001), (65_536, 131_072), (0, 256_000)])
@pytest.mark.parametrize("is_file", [True, False])
def test_a_wrong_byte_is_the_same_one_whichever_range_is_asked(
    start: int | None, end: int, is_file: bool, tmp_path: Path
) -> None:
    (tmp_path / "model.bin").write_bytes(DATA)
    with MirrorSimulator(tmp_path if is_file else {"model.bin": DATA}) as mirror:
        mirror.always("model.bin", Fault(wrong_bytes_at=(70_000,)))
        assert ask(mirror, start, end)[2] == (WRONG if start is None else WRONG[start:end])
        assert ask(mirror, 0, 70_000)[2] == DATA[:70_000]
        assert ask(mirror, 70_001, 256_000)[2] == DATA[70_001:]


@pytest.mark.parametrize("start, end, arrive", [(60_000, 80_000, 10_000), (70_000, 70_001, 0), (0, 70_001, 70_000)])
def test_an_offset_in_the_file_is_the_first_byte_not_to_arrive(
    start: int, end: int, arrive: int, mirror: MirrorSimulator
) -> None:
    mirror.always("model.bin", Fault(end_at=70_000, offsets_in_file=True))
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(mirror, start, end)
    assert caught.value.partial == DATA[start : start + arrive]
    assert ask(mirror, 70_001, 80_000)[2] == DATA[70_001:80_000]
    assert ask(mirror, 60_000, 70_000)[2] == DATA[60_000:70_000]


@pytest.mark.parametrize(
    "start, end, is_hit",
    [(0, 1000, False), (0, 1001, True), (1999, 2000, True), (2000, 3000, False), (None, 0, True)],
)
def test_a_range_script_meets_whoever_asks_for_one_of_its_bytes(
    start: int | None, end: int, is_hit: bool, mirror: MirrorSimulator
) -> None:
    mirror.script_range("model.bin", 1000, 2000, [Fault(status=503)], times=-1)
    assert ask(mirror, start, end)[0] == (503 if is_hit else 200 if start is None else 206)


def test_a_range_to_the_end_and_one_from_the_end_meet_a_script_there(mirror: MirrorSimulator) -> None:
    mirror.script_range("model.bin", 255_999, 256_000, [Fault(status=503)], times=-1)
    for asked in ("bytes=5-", "bytes=-1"):
        connection = http.client.HTTPConnection(*mirror.address, timeout=10)
        connection.request("GET", "/model.bin", headers={"Range": asked})
        assert connection.getresponse().status == 503
        connection.close()


@pytest.mark.parametrize("times, expected", [(1, 1), (3, 3), (-1, 6), (0, 0)])
def test_a_range_script_is_over_after_so_many_times(times: int, expected: int, mirror: MirrorSimulator) -> None:
    mirror.script_range("model.bin", 0, 10, [Fault(status=503)], times=times)
    assert [ask(mirror, 0, 10)[0] for _ in range(6)] == [503] * expected + [206] * (6 - expected)


def test_a_range_script_leaves_the_order_of_others_alone(mirror: MirrorSimulator) -> None:
    mirror.script("model.bin", [Fault(status=404), None])
    mirror.always("model.bin", Fault(status=410))
    mirror.script_range("model.bin", 0, 10, [Fault(status=503), None, Fault(status=500)])
    mirror.script_range("model.bin", 5, 20, [Fault(status=501)])
    asked = [(5, 6), (50, 60), (0, 10), (9, 10), (8, 9), (50, 60), (0, 10)]
    assert [ask(mirror, *span)[0] for span in asked] == [503, 404, 206, 500, 501, 206, 410]


def test_an_etag_can_change_with_each_request(mirror: MirrorSimulator) -> None:
    mirror.script_range("model.bin", 0, 256_000, [None, Fault(etag='"other"')], times=-1)
    assert [ask(mirror, at, at + 1)[1]["etag"] == '"other"' for at in range(4)] == [False, True, False, True]


@pytest.mark.parametrize("start, end, faults", [(5, 5, [Fault()]), (-1, 5, [Fault()]), (0, 5, [])])
def test_a_range_script_that_could_never_be_met_is_refused(
    start: int, end: int, faults: list[Fault], mirror: MirrorSimulator
) -> None:
    with pytest.raises(ValueError, match="expected faults for a range"):
        mirror.script_range("model.bin", start, end, faults)


def test_a_stale_version_keeps_its_own_validator(mirror: MirrorSimulator) -> None:
    mirror.always("model.bin", Fault(body=OLD, etag='"old"'))
    connection = http.client.HTTPConnection(*mirror.address, timeout=10)
    for validator, expected in (('"old"', (206, OLD[:5])), ('"new"', (200, OLD))):
        connection.request("GET", "/model.bin", headers={"Range": "bytes=0-4", "If-Range": validator})
        response = connection.getresponse()
        assert (response.status, response.read()) == expected
    connection.close()


def ask_at_once(mirror: MirrorSimulator, number: int) -> list[Answer]:
    found: list[Answer] = []
    threads = [
        threading.Thread(target=lambda at=at: found.append(ask(mirror, at * 1000, at * 1000 + 1000)))
        for at in range(number)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_the_highest_number_of_requests_at_once_is_recorded(mirror: MirrorSimulator) -> None:
    mirror.rate_bytes_per_second = 2000
    assert {status for status, _, _ in ask_at_once(mirror, 5)} == {206}
    assert mirror.most_requests_at_once == 5


def test_requests_one_after_the_other_are_never_two_at_once(mirror: MirrorSimulator) -> None:
    for at in range(100):
        ask(mirror, at, at + 1)
    assert mirror.most_requests_at_once == 1


def test_whoever_asks_too_much_at_once_is_told_to_come_back() -> None:
    with MirrorSimulator({"model.bin": DATA}, max_connections=2, retry_after_seconds=7) as mirror:
        mirror.rate_bytes_per_second = 2000
        found = ask_at_once(mirror, 5)
        assert sorted(status for status, _, _ in found) == [206, 206, 429, 429, 429]
        assert {headers.get("retry-after") for status, headers, _ in found if status == 429} == {"7"}
        assert ask(mirror, 0, 1)[0] == 206  # there is room again


def test_a_refused_request_uses_up_no_script() -> None:
    with MirrorSimulator({"model.bin": DATA}, max_connections=0) as mirror:
        mirror.script_range("model.bin", 0, 10, [Fault(status=503)])
        assert ask(mirror, 0, 10)[0] == 429
        mirror.gate.limit = None
        assert ask(mirror, 0, 10)[0] == 503


@pytest.mark.parametrize("fault", [Fault(hang_at=-1), Fault(hang_at=5)])
def test_who_hangs_up_on_a_silent_mirror_makes_room(fault: Fault) -> None:
    with MirrorSimulator({"model.bin": DATA}, max_connections=1) as mirror:
        mirror.script("model.bin", [fault])
        connection = socket.create_connection(mirror.address, timeout=5)
        connection.sendall(b"GET /model.bin HTTP/1.1\r\nHost: x\r\n\r\n")
        while not mirror.requests():
            time.sleep(0.01)
        assert ask(mirror)[0] == 429
        connection.close()
        deadline = time.monotonic() + 5
        while (status := ask(mirror)[0]) == 429 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert status == 200
