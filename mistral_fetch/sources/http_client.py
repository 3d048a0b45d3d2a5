"""The one door to the web: requests, redirects, credentials and timeouts. The only user of httpx.

Owns every policy of a single request. Knows nothing of files, pieces or retries, and never sees ``file:``
addresses. Rules kept here: nothing is asked when offline; at most ten redirects, never from https to http;
credentials are bound to one origin and never follow a redirect elsewhere; no cookies; no Referer (a known
mirror answers an error page to foreign ones); bodies arrive as sent, never decoded.
"""

from __future__ import annotations

import math
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mistral_fetch.errors import AccessError, ConfigError, MirrorError, MirrorStatus, NotAModelFile, OfflineRefused
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.sources.http_body import Body
from mistral_fetch.sources.mirror_errors import (
    OTHER_WAYS,
    broken,
    circling,
    compressed,
    permanent,
    silent,
    too_large,
    too_slow,
    unreachable,
    untrusted,
)
from mistral_fetch.sources.retry import RetryPolicy, retrying
from mistral_fetch.sources.status import PassingStatus, explain_status
from mistral_fetch.sources.urls import is_relative, next_hop, origin_of, redact, without_userinfo
from mistral_fetch.version import __version__

if TYPE_CHECKING:
    # Imported when the first request is made: a pull that finds everything present must start fast.
    import httpx

MAX_REDIRECTS = 10
_STOP_CHECK_SECONDS = 0.2
_REDIRECTS = {301, 302, 303, 307, 308}
_LOOPBACK = ("all://127.0.0.1", "all://localhost", "all://[::1]")


@dataclass(frozen=True)
class HttpSettings:
    """How requests are made."""

    connect_timeout_seconds: float = 15.0
    read_timeout_seconds: float = 30.0
    """Seconds without a byte after which a mirror counts as stalled."""
    metadata_timeout_seconds: float = 300.0
    """Seconds a whole metadata read may take, so that a byte now and then cannot hold it up for ever."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    """How patient metadata reads are."""
    is_offline: bool = False
    proxy: str = field(default="", repr=False)
    """The proxy to use for everything but loopback; empty for what the environment says. May hold a password."""
    ca_bundle: str = ""
    """A PEM file of the authorities to trust; empty for httpx's own choice."""
    user_agent: str = f"mistral-fetch/{__version__}"
    authorizations: Mapping[str, str] = field(default_factory=dict, repr=False)
    """The ``Authorization`` value by origin, as :func:`~mistral_fetch.sources.urls.origin_of` spells it."""


@dataclass(frozen=True)
class Answer:
    """A response whose body was not read yet. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    asked_url: str
    url: str
    """The address that answered, after redirects; may hold a signature, so never printed whole."""
    has_credentials: bool
    _response: httpx.Response = field(repr=False)
    body: Body = field(repr=False)

    def read_into(self, target: memoryview) -> int:
        """Fill the beginning of ``target`` with what comes next of the body; return how many bytes, 0 at its end.

        Raises:
            MirrorTimeout: No byte came for the read timeout.
            MirrorUnreachable: The connection broke.
        """
        with _mapped_errors(self.asked_url):
            return self.body.read_into(target)

    def chunks(self) -> Iterator[bytes]:
        """Yield the body as it arrives, undecoded.

        Raises:
            MirrorTimeout: No byte came for the read timeout.
            MirrorUnreachable: The connection broke, or the body ended before its announced length.
        """
        with _mapped_errors(self.asked_url):
            yield from self._response.iter_raw()

    @property
    def content_length(self) -> int | None:
        """Return the announced length of the body, or None if it is unknown or no number."""
        return _announced_length(self.headers)


def _announced_length(headers: Mapping[str, str]) -> int | None:
    value = headers.get("content-length", "")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 20 else None


def _framed_length(headers: Mapping[str, str]) -> int | None:
    """Return where the body ends on the wire, or None where only its framing tells (RFC 9112, 6.3)."""
    return None if "transfer-encoding" in headers else _announced_length(headers)


class HttpClient:
    """Makes requests; shared by all sources of a process, from any thread."""

    def __init__(self, settings: HttpSettings | None = None) -> None:
        self.settings = settings or HttpSettings()
        self._client: httpx.Client | None = None
        self._lock = threading.Lock()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def __enter__(self) -> HttpClient:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    def break_connections(self) -> None:
        """Shut every open connection, from any thread, so that whoever waits for a byte stops waiting at once."""
        for connection in list(self._sockets):
            with suppress(OSError):  # closed already
                # Not the TLS socket's own shutdown: that one swaps its state under the reading thread.
                socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def get_bytes(
        self,
        url: str,
        limit_bytes: int,
        headers: Mapping[str, str] | None = None,
        stop: StopSignal | None = None,
    ) -> bytes:
        """Return a small body such as a manifest; stop as soon as more than ``limit_bytes`` arrived.

        What may pass is tried again, as the settings' retry policy says.

        Raises:
            NotAModelFile: It is larger than the limit.
            AccessError, MirrorError, OfflineRefused: It cannot be had.
            Interrupted: ``stop`` was set.
        """
        stop = stop or StopSignal()
        self._refuse_offline(url)

        def ask() -> bytes:
            with self._in_time(url, stop):
                return self._get_bytes(url, limit_bytes, headers)

        return retrying(ask, self.settings.retry, stop, self.settings.read_timeout_seconds)

    def _get_bytes(self, url: str, limit_bytes: int, headers: Mapping[str, str] | None) -> bytes:
        body = bytearray()
        with self.stream(url, headers) as answer:
            if answer.status != 200:
                raise status_error(answer)
            if (answer.content_length or 0) > limit_bytes:
                raise too_large(url, limit_bytes)
            for chunk in answer.chunks():
                body += chunk
                if len(body) > limit_bytes:
                    raise too_large(url, limit_bytes)
        return bytes(body)

    @contextmanager
    def _in_time(self, url: str, stop: StopSignal) -> Iterator[None]:
        """Bound one metadata read as a whole, the wait for its headers included."""
        seconds = self.settings.metadata_timeout_seconds
        deadline = time.monotonic() + seconds
        with breaking_off(self, stop, deadline):
            try:
                yield
            except MirrorError as error:
                stop.check()
                if time.monotonic() >= deadline:
                    raise too_slow(url, seconds) from error
                raise
        # A body that ends with its connection looks complete when the connection was broken off.
        stop.check()
        if time.monotonic() >= deadline:
            raise too_slow(url, seconds)

    def head(
        self,
        url: str,
        headers: Mapping[str, str] | None = None,
        *,
        only_relative: bool = False,
        stop: StopSignal | None = None,
    ) -> Answer:
        """Return status and headers.

        Args:
            url: The address.
            headers: Further request headers.
            only_relative: Return a redirect to another server as the answer instead of following it.
            stop: Ends the wait at once when it is set.

        Raises:
            AccessError, MirrorError, OfflineRefused: The server cannot be asked.
            Interrupted: ``stop`` was set.
        """
        stop = stop or StopSignal()
        self._refuse_offline(url)

        def ask() -> Answer:
            request = self._request("HEAD", url, headers, only_relative=only_relative)
            with self._in_time(url, stop), request as answer:
                if isinstance(error := status_error(answer), PassingStatus):
                    raise error
                return answer

        return retrying(ask, self.settings.retry, stop, self.settings.read_timeout_seconds)

    @contextmanager
    def stream(self, url: str, headers: Mapping[str, str] | None = None) -> Iterator[Answer]:
        """Open ``url`` and hand over the answer, whatever its status; the body is read from it.

        Raises:
            NotAModelFile: The body is compressed although identity was asked for.
            MirrorError, OfflineRefused: No answer can be had.
        """
        with self._request("GET", url, headers, only_relative=False) as answer:
            encoding = answer.headers.get("content-encoding", "identity").strip().lower()
            if answer.status < 400 and encoding not in {"", "identity"}:
                raise compressed(redact(url), encoding)
            yield answer

    @contextmanager
    def _request(
        self, method: str, url: str, headers: Mapping[str, str] | None, *, only_relative: bool
    ) -> Iterator[Answer]:
        self._refuse_offline(url)
        hop, userinfo = without_userinfo(url)
        first_origin = origin_of(hop)
        for _ in range(MAX_REDIRECTS + 1):
            authorization = self.settings.authorizations.get(origin_of(hop))
            if userinfo and origin_of(hop) == first_origin:
                authorization = userinfo
            response = self._send(method, hop, headers, authorization)
            try:
                location = response.headers.get("location", "")
                leads_on = response.status_code in _REDIRECTS and location != ""
                if not leads_on or (only_relative and not is_relative(location)):
                    lowered = {name.lower(): value for name, value in response.headers.items()}
                    body = Body(response, _framed_length(lowered), self.settings.read_timeout_seconds)
                    yield Answer(response.status_code, lowered, url, hop, authorization is not None, response, body)
                    return
                hop = next_hop(hop, location)
            finally:
                response.close()
        raise circling(redact(url), MAX_REDIRECTS)

    def _send(
        self, method: str, url: str, headers: Mapping[str, str] | None, authorization: str | None
    ) -> httpx.Response:
        client = self._open()
        sent = dict(headers or {})
        if authorization is not None:
            sent["Authorization"] = authorization
        with _mapped_errors(url):
            request = client.build_request(method, url, headers=sent, extensions={"trace": self._watch})
            return client.send(request, stream=True, auth=None)

    def _watch(self, event: str, info: Mapping[str, Any]) -> None:
        """Note the sockets that httpx opens (its ``trace`` extension)."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            connection = info["return_value"].get_extra_info("socket")
            if isinstance(connection, socket.socket):
                self._sockets.add(connection)

    def _refuse_offline(self, url: str) -> None:
        if self.settings.is_offline:
            raise OfflineRefused(
                f"{redact(url)} was not asked",
                detail="expected a network, but --offline forbids it",
                hint="run it again without --offline (or without MISTRAL_FETCH_OFFLINE)",
            )

    def _open(self) -> httpx.Client:
        with self._lock:
            if self._client is None:
                self._client = _new_client(self.settings)
            return self._client


def status_error(answer: Answer) -> AccessError | MirrorStatus:
    """Return the error that an unwanted status stands for."""
    return explain_status(
        answer.status,
        answer.headers,
        answer.asked_url,
        answer.url,
        has_credentials=answer.has_credentials,
    )


def _new_client(settings: HttpSettings) -> httpx.Client:
    from http.cookiejar import CookieJar, DefaultCookiePolicy

    import httpx

    timeout = httpx.Timeout(settings.read_timeout_seconds, connect=settings.connect_timeout_seconds, pool=None)
    try:
        return httpx.Client(
            headers={"User-Agent": settings.user_agent, "Accept": "*/*", "Accept-Encoding": "identity"},
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            timeout=timeout,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=16, keepalive_expiry=15.0),
            follow_redirects=False,
            http2=False,
            trust_env=True,  # proxies, SSL_CERT_FILE and SSL_CERT_DIR mean what users expect
            proxy=settings.proxy or None,
            verify=ssl.create_default_context(cafile=settings.ca_bundle) if settings.ca_bundle else True,
            # A proxy cannot reach this machine's own loopback, so it is never asked to.
            mounts=dict.fromkeys(_LOOPBACK),
        )
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            "the web cannot be reached with these settings",
            detail=f"expected usable proxy and certificate settings, got: {error}",
            hint="check --proxy, --ca-bundle, HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and SSL_CERT_DIR",
        ) from error


@contextmanager
def breaking_off(client: HttpClient, stop: StopSignal, deadline: float = math.inf) -> Iterator[None]:
    """Break the client's connections when a stop is asked for: a silent mirror must not hold up Ctrl-C.

    The same happens from ``deadline`` (monotonic seconds) on: a mirror that goes on sending interim answers
    is never silent, and the read timeout never passes.
    """
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(_STOP_CHECK_SECONDS):
            if stop.is_set() or time.monotonic() >= deadline:
                client.break_connections()

    watcher = threading.Thread(target=watch, name="stop-watcher", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


@contextmanager
def _mapped_errors(url: str) -> Iterator[None]:
    """Turn every exception of httpx into ours."""
    import httpx

    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL, httpx.CookieConflict, httpx.StreamError, OSError) as error:
        raise map_httpx_error(error, url) from error


def map_httpx_error(error: Exception, url: str) -> MirrorError:
    """Return what an exception of httpx, or of a socket it opened, means to us, most specific first.

    Raises:
        TypeError: The exception is none of httpx's, or one this program does not know.
    """
    import httpx

    shown = redact(url)
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    cases: tuple[tuple[Any, Any], ...] = (
        (httpx.ConnectTimeout, lambda: unreachable(shown, "no connection in time")),
        ((httpx.TimeoutException, TimeoutError), lambda: silent(shown)),
        ((httpx.UnsupportedProtocol, httpx.InvalidURL), lambda: permanent(unreachable(shown, reason))),
        (
            (httpx.ConnectError, ssl.SSLError),
            lambda: untrusted(shown, reason) if _is_untrusted(error) else unreachable(shown, reason),
        ),
        (httpx.ProxyError, lambda: unreachable(shown, f"the proxy failed: {reason}")),
        ((httpx.NetworkError, httpx.RemoteProtocolError), lambda: broken(shown, reason)),
        (httpx.TooManyRedirects, lambda: permanent(unreachable(shown, reason))),
        (httpx.DecodingError, lambda: NotAModelFile(f"{shown} sends a broken body", detail=reason, hint=OTHER_WAYS)),
        ((httpx.HTTPError, httpx.CookieConflict, httpx.StreamError, OSError), lambda: broken(shown, reason)),
    )
    for kinds, build in cases:
        if isinstance(error, kinds):
            mapped: MirrorError = build()
            return mapped
    raise TypeError(f"not an exception of httpx: {error!r}")


def _is_untrusted(error: BaseException) -> bool:
    """Return whether a certificate that could not be verified is among the causes."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
