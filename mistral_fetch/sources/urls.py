"""Addresses as text: what may be printed of them, whom they belong to, where a redirect may lead. Pure.

A URL may carry a password, a token or a signature, so nothing here or above prints one whole.
"""

from __future__ import annotations

import base64
from urllib.parse import SplitResult, unquote, urljoin, urlsplit, urlunsplit

from mistral_fetch.errors import MirrorUnreachable

_DEFAULT_PORTS = {"http": 80, "https": 443}
_MAX_SHOWN = 300
HTTP_SCHEMES = frozenset(_DEFAULT_PORTS)


def redact(url: str) -> str:
    """Return ``url`` without userinfo, query values and fragment, fit for messages and logs."""
    try:
        parts = urlsplit(url)
        netloc = parts.netloc.rpartition("@")[2]
        keys = [pair.partition("=")[0] for pair in parts.query.split("&") if pair]
    except ValueError:
        return "(an unreadable address)"
    query = "&".join(f"{key}=…" for key in keys)
    shown = urlunsplit((parts.scheme, netloc, parts.path, query, ""))
    return "".join(character if character.isprintable() else "?" for character in shown)[:_MAX_SHOWN]


def public_url(url: str) -> str:
    """Return ``url`` without userinfo, query and fragment: what may be stored, and still leads there if public.

    An address that cannot be read becomes empty, for nobody can tell what of it is a secret.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def origin_of(url: str) -> str:
    """Return scheme, host and port of ``url`` in one spelling: what credentials and blame are bound to.

    Raises:
        MirrorUnreachable: It is not an http or https address.
    """
    parts = split_http_url(url)
    host = (parts.hostname or "").lower().rstrip(".")
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{shown}:{parts.port or _DEFAULT_PORTS[parts.scheme]}"


def host_of(url: str) -> str:
    """Return the host of ``url`` as people read it, the port only where it is unusual."""
    parts = split_http_url(url)
    host = parts.hostname or ""
    if parts.port in {None, _DEFAULT_PORTS[parts.scheme]}:
        return host
    return f"{host}:{parts.port}"


def split_http_url(url: str) -> SplitResult:
    """Return the parts of an http or https address.

    Raises:
        MirrorUnreachable: It is anything else; asking again cannot help.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in HTTP_SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or any(character <= " " or character == "\x7f" for character in url):
        error = MirrorUnreachable(
            f"{redact(url)} is not an address this program can ask",
            detail="expected http:// or https:// and a host",
            hint="correct the address",
        )
        error.is_permanent = True
        raise error
    return parts


def without_userinfo(url: str) -> tuple[str, str | None]:
    """Return ``url`` without ``user:password@``, and the Basic authorization made of them (RFC 7617)."""
    parts = split_http_url(url)
    userinfo, _, netloc = parts.netloc.rpartition("@")
    clean = urlunsplit(parts._replace(netloc=netloc, fragment=""))
    if not userinfo:
        return clean, None
    user, _, password = userinfo.partition(":")
    token = base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode("ascii")
    return clean, f"Basic {token}"


def is_relative(location: str) -> bool:
    """Return whether a ``Location`` stays on the server that sent it (RFC 9110, 10.2.2)."""
    try:
        parts = urlsplit(location)
    except ValueError:
        return False
    return not parts.scheme and not parts.netloc


def next_hop(url: str, location: str) -> str:
    """Return where a redirect from ``url`` leads; userinfo that a server put into it is dropped.

    Raises:
        MirrorUnreachable: It leads to another scheme, or from https down to http.
    """
    try:
        clean, _ = without_userinfo(urljoin(url, location))
    except (ValueError, MirrorUnreachable):
        raise _bad_redirect(url, location, "expected an http or https address, got something else") from None
    if urlsplit(url).scheme == "https" and urlsplit(clean).scheme != "https":
        raise _bad_redirect(url, location, "expected https all the way, got plain http, which anybody could read")
    return clean


def _bad_redirect(url: str, location: str, detail: str) -> MirrorUnreachable:
    error = MirrorUnreachable(
        f"{redact(url)} redirects to {redact(location)}", detail=detail, hint="use another mirror"
    )
    error.is_permanent = True
    return error
