from __future__ import annotations

import inspect
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from mistral_fetch.errors import (
    ConfigError,
    Interrupted,
    MirrorError,
    MirrorStatus,
    MirrorTimeout,
    MirrorUnreachable,
    NotAModelFile,
    OfflineRefused,
)
from mistral_fetch.simulators.mirror import Fault, MirrorSimulator
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.sources.http_client import MAX_REDIRECTS, HttpClient, HttpSettings, map_httpx_error
from mistral_fetch.sources.retry import RetryPolicy
from mistral_fetch.sources.urls import origin_of

URL = "https://mirror.example/file?token=secret"
QUICK = RetryPolicy(attempts=2, first_delay_seconds=0.01)


@pytest.fixture
def server() -> Iterator[MirrorSimulator]:
    with MirrorSimulator({"small.json": b'{"ok": true}', "big.bin": bytes(500_000)}) as server:
        yield server


def exception_classes() -> list[type[Exception]]:
    public = [getattr(httpx, name) for name in httpx.__all__]
    return [kind for kind in public if inspect.isclass(kind) and issubclass(kind, Exception)]


@pytest.mark.parametrize("kind", exception_classes(), ids=lambda kind: kind.__name__)
def test_every_exception_of_httpx_becomes_ours(kind: type[Exception]) -> None:
    mapped = map_httpx_error(kind.__new__(kind), URL)
    assert isinstance(mapped, MirrorError)
    assert all(mapped.lines())
    assert "secret" not in " ".join(mapped.lines())


def test_there_are_exceptions_to_map() -> None:
    assert len(exception_classes()) > 20


def test_an_exception_that_is_none_of_httpx_is_not_swallowed() -> None:
    with pytest.raises(TypeError):
        map_httpx_error(ValueError("a bug of ours"), URL)


@pytest.mark.parametrize(
    "error, expected, is_permanent",
    [
        (httpx.ReadTimeout("slow"), MirrorTimeout, False),
        (httpx.ConnectTimeout("slow"), MirrorUnreachable, False),
        (httpx.ConnectError("refused"), MirrorUnreachable, False),
        (httpx.ReadError("reset"), MirrorUnreachable, False),
        (httpx.UnsupportedProtocol("ftp"), MirrorUnreachable, True),
        (httpx.DecodingError("broken"), NotAModelFile, True),
    ],
)
def test_the_most_specific_meaning_wins(error: Exception, expected: type[MirrorError], is_permanent: bool) -> None:
    mapped = map_httpx_error(error, URL)
    assert type(mapped) is expected
    assert mapped.is_permanent is is_permanent


def test_an_untrusted_certificate_is_permanent_and_says_what_to_set() -> None:
    error = httpx.ConnectError("certificate verify failed")
    error.__cause__ = ssl.SSLCertVerificationError("self-signed")
    mapped = map_httpx_error(error, URL)
    assert mapped.is_permanent
    assert "SSL_CERT_FILE" in mapped.hint


def test_small_bodies_are_read(server: MirrorSimulator, client: HttpClient) -> None:
    assert client.get_bytes(server.url("small.json"), 100) == b'{"ok": true}'
    (request,) = server.requests()
    assert request.headers["accept-encoding"] == "identity"
    assert request.headers["user-agent"].startswith("mistral-fetch/")
    assert {"referer", "cookie", "authorization"}.isdisjoint(request.headers)


@pytest.mark.parametrize("fault", [Fault(), Fault(no_length=True)])
def test_reading_stops_when_more_than_the_limit_arrived(
    fault: Fault, server: MirrorSimulator, client: HttpClient
) -> None:
    server.always("big.bin", fault)
    with pytest.raises(NotAModelFile, match="too large"):
        client.get_bytes(server.url("big.bin"), 1000)


def test_a_body_of_exactly_the_limit_is_fine(server: MirrorSimulator, client: HttpClient) -> None:
    assert len(client.get_bytes(server.url("small.json"), 12)) == 12


def test_a_byte_now_and_then_does_not_hold_a_metadata_read_for_ever(server: MirrorSimulator) -> None:
    server.always("big.bin", Fault(rate_bytes_per_second=1000))
    settings = HttpSettings(read_timeout_seconds=5, metadata_timeout_seconds=0.2, retry=RetryPolicy(attempts=1))
    with HttpClient(settings) as client, pytest.raises(MirrorTimeout):
        client.get_bytes(server.url("big.bin"), 1_000_000)


@contextmanager
def serving(answer: bytes, every_seconds: float = 0.05) -> Iterator[str]:
    """Serve connections that get ``answer`` again and again and nothing else; yield the address."""
    is_over = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.recv(65536)
            while not is_over.wait(every_seconds):
                connection.sendall(answer)

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threads.append(threading.Thread(target=serve, args=(connection,)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads = [threading.Thread(target=accept)]
        threads[0].start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/x"
        finally:
            is_over.set()
            listener.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()


ASKS = [
    pytest.param(lambda client, url, stop: client.get_bytes(url, 1000, stop=stop), id="get_bytes"),
    pytest.param(lambda client, url, stop: client.head(url, stop=stop), id="head"),
]
Ask = Callable[[HttpClient, str, StopSignal], object]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("ask", ASKS)
def test_interim_answers_do_not_hold_a_metadata_read_for_ever(ask: Ask) -> None:
    settings = HttpSettings(read_timeout_seconds=5, metadata_timeout_seconds=0.3, retry=RetryPolicy(attempts=3))
    interim = b"HTTP/1.1 103 Early Hints\r\nx: y\r\n\r\n"
    with serving(interim) as url, HttpClient(settings) as client:
        began = time.monotonic()
        with pytest.raises(MirrorTimeout, match="too slowly"):
            ask(client, url, StopSignal())
        assert time.monotonic() - began < 5


@pytest.mark.timeout(20)
@pytest.mark.parametrize("ask", ASKS)
def test_a_stop_ends_the_wait_for_a_silent_server(ask: Ask) -> None:
    stop = StopSignal()
    timer = threading.Timer(0.3, stop.set)
    timer.start()
    with serving(b"") as url, HttpClient(HttpSettings(read_timeout_seconds=15)) as client:
        began = time.monotonic()
        with pytest.raises(Interrupted):
            ask(client, url, stop)
        assert time.monotonic() - began < 5
    timer.join()


@pytest.mark.timeout(20)
def test_a_body_cut_by_a_stop_is_not_taken_for_a_whole_one() -> None:
    stop = StopSignal()
    timer = threading.Timer(0.5, stop.set)
    timer.start()
    # Without a length, the end of the connection is the end of the body.
    with serving(b"HTTP/1.1 200 OK\r\n\r\n", 0.1) as url, HttpClient() as client, pytest.raises(Interrupted):
        client.get_bytes(url, 10_000, stop=stop)
    timer.join()


def test_metadata_reads_try_again(server: MirrorSimulator, client: HttpClient) -> None:
    server.script("small.json", [Fault(status=503), Fault(reset_at=2)])
    assert client.get_bytes(server.url("small.json"), 100) == b'{"ok": true}'


def test_metadata_reads_give_up(server: MirrorSimulator, client: HttpClient) -> None:
    server.always("small.json", Fault(status=503))
    with pytest.raises(MirrorStatus, match="503"):
        client.get_bytes(server.url("small.json"), 100)
    assert len(server.requests()) == client.settings.retry.attempts


def test_offline_refuses_before_anything_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: pytest.fail("a name was looked up"))
    with HttpClient(HttpSettings(is_offline=True)) as client:
        for ask in (lambda: client.get_bytes(URL, 1), lambda: client.head(URL), lambda: client.stream(URL).__enter__()):
            with pytest.raises(OfflineRefused) as caught:
                ask()
            assert "secret" not in " ".join(caught.value.lines())
        assert client._client is None


@pytest.mark.parametrize("count, works", [(MAX_REDIRECTS, True), (MAX_REDIRECTS + 1, False)])
def test_redirects_are_followed_ten_times(count: int, works: bool, server: MirrorSimulator, client: HttpClient) -> None:
    for hop in range(count):
        target = f"/{hop + 1}" if hop + 1 < count else "/small.json"
        server.always(str(hop), Fault(redirect_to=target))
    if works:
        assert client.get_bytes(server.url("0"), 100) == b'{"ok": true}'
    else:
        with pytest.raises(MirrorUnreachable, match="circles"):
            client.get_bytes(server.url("0"), 100)


def test_credentials_stay_with_their_origin(server: MirrorSimulator) -> None:
    with MirrorSimulator({"small.json": b"elsewhere"}) as other:
        server.always("away", Fault(redirect_to=other.url("small.json")))
        server.always("here", Fault(redirect_to="/small.json"))
        settings = HttpSettings(authorizations={origin_of(server.base_url): "Bearer secret"})
        with HttpClient(settings) as client:
            client.get_bytes(server.url("away"), 100)
            client.get_bytes(server.url("here"), 100)
        assert [request.headers.get("authorization") for request in server.requests()] == ["Bearer secret"] * 3
        assert "authorization" not in other.requests()[0].headers
    assert "secret" not in repr(settings)


def test_userinfo_becomes_basic_authorization_for_its_origin_only(server: MirrorSimulator, client: HttpClient) -> None:
    with MirrorSimulator({"small.json": b"elsewhere"}) as other:
        server.always("away", Fault(redirect_to=other.url("small.json").replace("http://", "http://evil:x@")))
        url = server.url("away").replace("http://", "http://me:p%40ss@")
        assert client.get_bytes(url, 100) == b"elsewhere"
        assert server.requests()[0].headers["authorization"] == "Basic bWU6cEBzcw=="
        assert "authorization" not in other.requests()[0].headers


def test_cookies_are_neither_kept_nor_sent(server: MirrorSimulator, client: HttpClient) -> None:
    server.always("small.json", Fault(headers={"Set-Cookie": "id=1; Path=/"}))
    client.get_bytes(server.url("small.json"), 100)
    client.get_bytes(server.url("small.json"), 100)
    assert all("cookie" not in request.headers for request in server.requests())


def test_head_can_stay_with_the_server(server: MirrorSimulator, client: HttpClient) -> None:
    assert client.head(server.url("big.bin")).content_length == 500_000
    assert client.head(server.url("missing")).status == 404


def test_connections_are_kept_alive(server: MirrorSimulator, client: HttpClient) -> None:
    for _ in range(3):
        client.get_bytes(server.url("small.json"), 100)
    assert len(server.connections_made) == 1


def test_a_proxy_from_the_environment_is_used_but_not_for_loopback(
    server: MirrorSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MirrorSimulator({}) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.base_url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        with HttpClient(HttpSettings(retry=QUICK)) as client:
            assert client.get_bytes(server.url("small.json"), 100) == b'{"ok": true}'
            assert proxy.served == []
            with pytest.raises(MirrorStatus):
                client.get_bytes("http://mirror.example/x", 100)
        assert proxy.requests()[0].headers["host"] == "mirror.example"


def test_a_ca_bundle_that_is_missing_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    with HttpClient() as client, pytest.raises(ConfigError, match="settings") as caught:
        client.get_bytes(URL, 1)
    assert "SSL_CERT_FILE" in caught.value.hint


def test_importing_the_client_does_not_import_httpx() -> None:
    import subprocess
    import sys

    code = "import sys, mistral_fetch.sources.http, mistral_fetch.sources.hub; sys.exit('httpx' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False, timeout=60).returncode == 0
