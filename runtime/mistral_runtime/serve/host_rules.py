"""Which names this server answers to, and which pages may talk to it.

A page from elsewhere can make a browser send requests here, even under a name of its own that it points at this
machine (DNS rebinding). The first is told by Origin, the second by Host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mistral_runtime.serve.api_error import ApiError

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True)
class HostRules:
    """Names and origins beyond the usual.

    Attributes:
        allowed_hosts: Names beside the loopback ones and the address that a connection came in at; `*` is any.
        allowed_origins: Such as `https://chat.example`, for pages that are served elsewhere; `*` is any.
    """

    allowed_hosts: frozenset[str] = frozenset()
    allowed_origins: frozenset[str] = frozenset()

    def require_host(self, hosts: Sequence[str], server: Any) -> None:
        """Refuse a request under a name that is not this server's.

        Raises:
            ApiError: 403, or 400 where there is not exactly one Host.
        """
        if len(hosts) != 1:
            raise ApiError(400, f"expected one Host header, found {len(hosts)}", code="bad_host")
        name = host_name(hosts[0])
        own = {server[0]} if server else set()
        if "*" in self.allowed_hosts or name in LOOPBACK_NAMES | own | self.allowed_hosts:
            return
        message = f"the host {name[:120]!r} is not allowed; name it with --allowed-host when the server is started"
        raise ApiError(403, message, code="host_not_allowed")

    def require_origin(self, origin: str | None, host: str | None, scheme: str) -> None:
        """Refuse what a page from elsewhere makes a browser send. Programs send no Origin.

        Raises:
            ApiError: 403.
        """
        if origin is None or self._is_listed(origin) or origin == f"{scheme}://{host}":
            return
        message = f"pages of {origin[:120]!r} may not use this server; allow it with --allow-origin at its start"
        raise ApiError(403, message, code="origin_not_allowed")

    def cross_origin_headers(self, origin: str | None) -> dict[str, str]:
        """Return the headers that let a listed page read an answer: none for all others."""
        if not self.allowed_origins:
            return {}
        allowed = {"access-control-allow-origin": origin} if origin is not None and self._is_listed(origin) else {}
        return {**allowed, "vary": "origin"}

    def _is_listed(self, origin: str) -> bool:
        return "*" in self.allowed_origins or origin in self.allowed_origins


def host_name(host: str) -> str:
    """Return the name in a Host header, without its port and an IPv6 address's brackets, in lower case."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].rstrip(".").lower()
