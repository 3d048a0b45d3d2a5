from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mistral_fetch.simulators.mirror import Fault, MirrorSimulator

DATA = bytes(range(256)) * 1000
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["bytes", "directory"])
def mirror(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MirrorSimulator]:
    """A mirror of one file, from memory and from a directory: both behave alike."""
    (tmp_path / "sub dir").mkdir()
    (tmp_path / "sub dir" / "a.bin").write_bytes(DATA)
    with MirrorSimulator({"sub dir/a.bin": DATA} if request.param == "bytes" else tmp_path) as mirror:
        yield mirror


def ask(mirror: MirrorSimulator, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(*mirror.address, timeout=10)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, "/sub%20dir/a.bin", headers=named)
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    finally:
        connection.close()


def test_a_file_is_served_with_validators(mirror: MirrorSimulator) -> None:
    status, headers, body = ask(mirror)
    assert (status, body) == (200, DATA)
    assert headers["etag"].startswith('"')
    assert headers["last-modified"].endswith("GMT")
    assert headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize(
    "asked, start, end",
    [
        ("bytes=0-0", 0, 1),
        ("bytes=100-199", 100, 200),
        ("bytes=255000-", 255000, 256000),
        ("bytes=-7", 255993, 256000),
        ("bytes=255999-999999", 255999, 256000),
    ],
)
def test_ranges(mirror: MirrorSimulator, asked: str, start: int, end: int) -> None:
    status, headers, body = ask(mirror, Range=asked)
    assert (status, body) == (206, DATA[start:end])
    assert headers["content-range"] == f"bytes {start}-{end - 1}/256000"


def test_a_range_beyond_the_end_is_not_satisfiable(mirror: MirrorSimulator) -> None:
    status, headers, _ = ask(mirror, Range="bytes=256000-")
    assert (status, headers["content-range"]) == (416, "bytes */256000")


def test_if_range_gives_the_whole_file_when_the_version_differs(mirror: MirrorSimulator) -> None:
    etag = ask(mirror, "HEAD")[1]["etag"]
    assert ask(mirror, Range="bytes=5-9", If_Range=etag)[0] == 206
    assert ask(mirror, Range="bytes=5-9", If_Range='"other"')[::2] == (200, DATA)


def test_head_sends_no_body(mirror: MirrorSimulator) -> None:
    status, headers, body = ask(mirror, "HEAD")
    assert (status, headers["content-length"], body) == (200, "256000", b"")
    assert mirror.bytes_sent() == 0


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "public").mkdir()
    (tmp_path / "secret").write_text("secret")
    with MirrorSimulator(tmp_path / "public") as mirror:
        for path in ("none", "../secret", "..%2fsecret", "%2e%2e/secret", "", "."):
            connection = http.client.HTTPConnection(*mirror.address, timeout=10)
            connection.request("GET", f"/{path}")
            assert connection.getresponse().status == 404
            connection.close()


def test_requests_and_bytes_are_counted(mirror: MirrorSimulator) -> None:
    ask(mirror, Range="bytes=0-99")
    ask(mirror, X_Custom="1")
    assert [request.range for request in mirror.requests("sub dir/a.bin")] == ["bytes=0-99", ""]
    assert mirror.requests()[1].headers["x-custom"] == "1"
    assert mirror.bytes_sent("sub dir/a.bin") == 100 + len(DATA)
    assert mirror.bytes_sent("other") == 0


def test_scripts_run_in_order_then_the_rule_then_truth(mirror: MirrorSimulator) -> None:
    mirror.script("sub dir/a.bin", [Fault(status=503), None, Fault(status=404)])
    mirror.rule = lambda request: Fault(status=410) if request.headers.get("x-bad") else None
    assert [ask(mirror)[0] for _ in range(4)] == [503, 200, 404, 200]
    assert ask(mirror, X_Bad="1")[0] == 410


@pytest.mark.parametrize(
    "fault, status, body",
    [
        (Fault(wrong_bytes_at=(1,)), 200, DATA[:1] + b"\xfe" + DATA[2:]),
        (Fault(size=10), 200, DATA[:10]),
        (Fault(size=256003), 200, DATA + b"\0\0\0"),
        (Fault(body=b"<html>"), 200, b"<html>"),
        (Fault(no_length=True), 200, DATA),
        (Fault(no_length=True, end_at=5), 200, DATA[:5]),
        (Fault(status=429, headers={"Retry-After": "9"}), 429, b""),
        (Fault(redirect_to="/x"), 302, b""),
    ],
)
def test_faults_are_carried_out(mirror: MirrorSimulator, fault: Fault, status: int, body: bytes) -> None:
    mirror.always("sub dir/a.bin", fault)
    answer = ask(mirror)
    assert (answer[0], answer[2]) == (status, body)
    assert fault.headers.items() <= {k.title(): v for k, v in answer[1].items()}.items()


def test_a_reset_is_a_reset(mirror: MirrorSimulator) -> None:
    mirror.always("sub dir/a.bin", Fault(reset_at=0))
    with pytest.raises(ConnectionResetError):
        ask(mirror)


def test_an_early_end_is_an_early_end(mirror: MirrorSimulator) -> None:
    mirror.always("sub dir/a.bin", Fault(end_at=1000))
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(mirror)
    assert caught.value.partial == DATA[:1000]


def test_silence_is_silence(mirror: MirrorSimulator) -> None:
    mirror.always("sub dir/a.bin", Fault(hang_at=-1))
    connection = http.client.HTTPConnection(*mirror.address, timeout=0.3)
    connection.request("GET", "/sub%20dir/a.bin")
    with pytest.raises(TimeoutError):
        connection.getresponse()
    connection.close()


@pytest.mark.parametrize("by_fault", [True, False])
def test_a_rate_is_kept(mirror: MirrorSimulator, by_fault: bool) -> None:
    if by_fault:
        mirror.always("sub dir/a.bin", Fault(rate_bytes_per_second=1_000_000))
    else:
        mirror.rate_bytes_per_second = 1_000_000
    begun = time.monotonic()
    assert ask(mirror)[2] == DATA
    assert time.monotonic() - begun > 0.2


def test_the_end_of_the_simulator_is_the_end_of_its_connections() -> None:
    with MirrorSimulator({"a": b"x"}) as mirror:
        connection = socket.create_connection(mirror.address, timeout=5)
        connection.sendall(b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(1000)
    while received := connection.recv(1000):
        assert received in b"\r\nx"  # the rest of the answer, then the end
    connection.close()


def start_program(directory: Path) -> tuple[subprocess.Popen[bytes], str]:
    command = [sys.executable, "-m", "mistral_fetch.simulators.mirror", "--dir", str(directory)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())["url"]


@pytest.mark.parametrize("how", ["SIGTERM", "the parent goes away"])
def test_as_a_program_it_serves_a_directory_and_ends_when_told(how: str, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(DATA)
    process, url = start_program(tmp_path)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        host, _, port = url.removeprefix("http://").partition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        connection.request("GET", "/a.bin")
        assert connection.getresponse().read() == DATA
        connection.close()
        if how == "SIGTERM":
            process.send_signal(signal.SIGTERM)
        else:
            process.stdin.close()
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_as_a_program_it_refuses_what_is_no_directory(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mistral_fetch.simulators.mirror", "--dir", str(tmp_path / "none")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=30)
    assert ended.returncode == 2
    assert b"--dir" in ended.stderr
