"""Reading bodies past httpx: that it happens where it may, gives exactly the bytes, and ends when it should."""

from __future__ import annotations

import hashlib
import random
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from mistral_fetch.errors import MirrorTimeout, MirrorUnreachable
from mistral_fetch.simulators.mirror import Fault, MirrorSimulator
from mistral_fetch.sources.http_body import DIRECT_BYTES, Body
from mistral_fetch.sources.http_client import Answer, HttpClient, HttpSettings
from mistral_fetch.sources.retry import RetryPolicy
from mistral_fetch.units import KIB

NAME = "f.bin"
ONCE = RetryPolicy(attempts=1)
HTTPX_CHUNK = 64 * KIB
LARGE = random.Random(41).randbytes(DIRECT_BYTES + 3 * HTTPX_CHUNK + 77)
OPENSSL = shutil.which("openssl")


@pytest.fixture(params=["http", "https"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def client(scheme: str, request: pytest.FixtureRequest) -> Iterator[HttpClient]:
    bundle = str(request.getfixturevalue("certificate")) if scheme == "https" else ""
    with HttpClient(HttpSettings(retry=ONCE, read_timeout_seconds=0.4, ca_bundle=bundle)) as client:
        yield client


@contextmanager
def mirror_of(data: bytes, scheme: str, request: pytest.FixtureRequest) -> Iterator[MirrorSimulator]:
    context = None
    if scheme == "https":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(request.getfixturevalue("certificate"))
    with MirrorSimulator({NAME: data}, tls=context) as mirror:
        yield mirror


@pytest.fixture
def mirror(scheme: str, request: pytest.FixtureRequest) -> Iterator[MirrorSimulator]:
    with mirror_of(LARGE, scheme, request) as mirror:
        yield mirror


def read_all(answer: Answer, room: int = 1 << 20) -> bytes:
    buffer, data = memoryview(bytearray(room)), bytearray()
    while length := answer.read_into(buffer):
        data += buffer[:length]
    return bytes(data)


def is_direct(answer: Answer) -> bool:
    return answer.body._socket is not None


def test_a_large_body_is_read_from_the_socket(client: HttpClient, mirror: MirrorSimulator) -> None:
    with client.stream(mirror.url(NAME)) as answer:
        first = bytearray(len(LARGE))
        length = answer.read_into(memoryview(first))
        assert is_direct(answer), "httpx hands out what came with the headers, and no more"
        assert bytes(first[:length]) + read_all(answer) == LARGE


@pytest.mark.parametrize("surplus", [-1, 0, 1])
@pytest.mark.parametrize("chunks", [0, 1, 8, 9])
def test_bodies_of_every_length_around_the_borders_come_exactly(
    scheme: str, client: HttpClient, request: pytest.FixtureRequest, chunks: int, surplus: int
) -> None:
    sizes = [chunks * HTTPX_CHUNK + surplus, DIRECT_BYTES + chunks * HTTPX_CHUNK + surplus]
    for size in sizes:
        data = LARGE[: max(size, 0)]
        with mirror_of(data, scheme, request) as mirror, client.stream(mirror.url(NAME)) as answer:
            assert read_all(answer) == data


@pytest.mark.parametrize("room", [1, 4095, 65_536, 10_000_019])
def test_the_room_of_the_reader_does_not_matter(client: HttpClient, mirror: MirrorSimulator, room: int) -> None:
    data = LARGE if room > 1 else b""
    with client.stream(mirror.url(NAME)) as answer:
        if room == 1:
            byte = memoryview(bytearray(1))
            data = b"".join(bytes(byte[: answer.read_into(byte)]) for _ in range(2000))
            assert data == LARGE[:2000]
        else:
            assert read_all(answer, room) == data


def test_nothing_beyond_the_body_is_read(client: HttpClient, mirror: MirrorSimulator) -> None:
    with client.stream(mirror.url(NAME), {"Range": f"bytes=100-{DIRECT_BYTES + HTTPX_CHUNK * 2}"}) as answer:
        assert read_all(answer) == LARGE[100 : DIRECT_BYTES + HTTPX_CHUNK * 2 + 1]
        assert answer.read_into(memoryview(bytearray(10))) == 0


def test_short_bodies_share_a_connection(scheme: str, client: HttpClient, request: pytest.FixtureRequest) -> None:
    with mirror_of(LARGE[: DIRECT_BYTES - 1], scheme, request) as mirror:
        for _ in range(5):
            with client.stream(mirror.url(NAME)) as answer:
                data, end = memoryview(bytearray(DIRECT_BYTES)), 0
                while end < DIRECT_BYTES - 1:  # and not once more, to find out that there is nothing more
                    end += answer.read_into(data[end:])
                assert data[:end] == LARGE[: DIRECT_BYTES - 1]
                assert not is_direct(answer)
        assert len(mirror.connections_made) == 1


def test_after_a_large_body_the_next_request_has_a_new_connection(client: HttpClient, mirror: MirrorSimulator) -> None:
    for _ in range(3):
        with client.stream(mirror.url(NAME)) as answer:
            assert read_all(answer) == LARGE
    assert len(mirror.connections_made) == 3


def test_a_body_of_unknown_length_stays_with_httpx(client: HttpClient, mirror: MirrorSimulator) -> None:
    mirror.always(NAME, Fault(no_length=True))
    with client.stream(mirror.url(NAME)) as answer:
        assert read_all(answer) == LARGE
        assert not is_direct(answer)


def test_a_connection_that_ends_in_the_middle_brings_what_came(client: HttpClient, mirror: MirrorSimulator) -> None:
    cut = len(LARGE) - 1000
    mirror.always(NAME, Fault(end_at=cut))
    with client.stream(mirror.url(NAME)) as answer:
        assert read_all(answer) == LARGE[:cut], "that it ended early is for whoever knows the length"


def test_a_connection_that_is_reset_in_the_middle_is_an_error(
    scheme: str, client: HttpClient, mirror: MirrorSimulator
) -> None:
    cut = len(LARGE) - 1000
    mirror.always(NAME, Fault(reset_at=cut))
    with client.stream(mirror.url(NAME)) as answer:
        try:
            assert len(read_all(answer)) <= cut
            assert scheme == "https", "TLS may have ended in good order before"
        except MirrorUnreachable:
            pass


@pytest.mark.parametrize("hang_at", [1000, len(LARGE) - 1000], ids=["with httpx", "directly"])
def test_silence_is_a_timeout(client: HttpClient, mirror: MirrorSimulator, hang_at: int) -> None:
    mirror.always(NAME, Fault(hang_at=hang_at))
    began = time.monotonic()
    with client.stream(mirror.url(NAME)) as answer, pytest.raises(MirrorTimeout):
        read_all(answer)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("hang_at", [1000, len(LARGE) - 1000], ids=["with httpx", "directly"])
def test_a_read_that_waits_is_ended_by_another_thread(
    scheme: str, request: pytest.FixtureRequest, mirror: MirrorSimulator, hang_at: int
) -> None:
    bundle = str(request.getfixturevalue("certificate")) if scheme == "https" else ""
    mirror.always(NAME, Fault(hang_at=hang_at))
    with HttpClient(HttpSettings(retry=ONCE, read_timeout_seconds=20, ca_bundle=bundle)) as patient:
        with patient.stream(mirror.url(NAME)) as answer, ThreadPoolExecutor(1) as pool:
            reading = pool.submit(read_all, answer)
            time.sleep(0.3)
            began = time.monotonic()
            answer.body.abort()
            try:
                got = reading.result(5)
            except MirrorUnreachable:
                got = b""
        assert time.monotonic() - began < 1
        assert len(got) < len(LARGE)


def test_an_abort_after_the_end_is_harmless(client: HttpClient, mirror: MirrorSimulator) -> None:
    with client.stream(mirror.url(NAME)) as answer:
        read_all(answer)
    answer.body.abort()


# Answers that no mirror of ours gives.


@contextmanager
def raw_server(answer: bytes) -> Iterator[int]:
    """Say one thing to who asks first."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            connection.recv(65_536)
            connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        listener.close()
        thread.join(5)


@pytest.mark.parametrize("names_length", [True, False])
def test_chunked_framing_is_never_taken_for_bytes_of_the_body(names_length: bool) -> None:
    chunks = [LARGE[at : at + 100_000] for at in range(0, len(LARGE), 100_000)]
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    length = b"Content-Length: %d\r\n" % len(LARGE) if names_length else b""
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n" + length + b"\r\n" + body
    with (
        raw_server(answer) as port,
        HttpClient(HttpSettings(retry=ONCE)) as client,
        client.stream(f"http://127.0.0.1:{port}/x") as got,
    ):
        assert hashlib.sha256(read_all(got)).digest() == hashlib.sha256(LARGE).digest()
        assert not is_direct(got)


class Stream:
    """What httpx says of a connection."""

    def __init__(self, connection: socket.socket, encryption: object) -> None:
        self._facts = {"socket": connection, "ssl_object": encryption}

    def get_extra_info(self, name: str) -> object:
        return self._facts[name]


class Response:
    """As much of an answer as a body needs."""

    def __init__(self, stream: Stream) -> None:
        self.extensions = {"network_stream": stream}

    def iter_raw(self) -> Iterator[bytes]:
        yield b"x"


def test_tls_within_tls_is_not_read_from_the_outer_layer() -> None:
    # Through a proxy that is asked over https, httpx's socket is the proxy's: its bytes are still encrypted.
    context = ssl.create_default_context()
    ours, theirs = socket.socketpair()
    with theirs, context.wrap_socket(ours, server_hostname="proxy", do_handshake_on_connect=False) as outer:
        inner = context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="mirror")
        cases = {"within": (inner, False), "plain TLS": (outer._sslobj or object(), True), "none": (None, False)}  # type: ignore[attr-defined]
        for name, (encryption, is_read) in cases.items():
            body = Body(Response(Stream(outer, encryption)), 10 * DIRECT_BYTES, 1.0)  # type: ignore[arg-type]
            assert body.read_into(memoryview(bytearray(10))) == 1
            assert (body._socket is not None) is is_read, name
