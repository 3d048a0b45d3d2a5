"""What ``doctor`` finds out about the way out: proxies and certificates without a socket, the rest only when asked."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

from mistral_fetch.cli.doctor_report import Finding, fail, good, warn
from mistral_fetch.config import Settings

_SCHEMES = {"http", "https", "socks5", "socks5h"}
_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
_DHT_SECONDS = 15.0
_SKEW_SECONDS = 300.0


def proxy(settings: Settings, environment: Mapping[str, str] | None = None) -> Finding:
    """Tell which proxy counts for what, by its kind alone: its name and password are nobody's business."""
    environment = os.environ if environment is None else environment
    if settings.proxy:
        found = {"the setting proxy": settings.proxy}
        counts = "for mirrors and peers, whatever the variables say"
    else:
        # As urllib and httpx read them: the small spelling wins over the large one.
        chosen = {name: environment.get(name.lower()) or environment.get(name, "") for name in _VARIABLES}
        found = {name: value for name, value in chosen.items() if value}
        counts = "for mirrors; peers are connected to directly"
    if not found:
        return good("none: everything is connected to directly")
    wrong = [f"{name} ({problem})" for name, value in found.items() if (problem := _proxy_problem(value))]
    if wrong:
        return fail(f"{', '.join(wrong)} is no proxy", "write it as http://HOST:PORT or socks5://HOST:PORT")
    told = f"{', '.join(f'{name} ({_kind(value)})' for name, value in found.items())} {counts}"
    if exceptions := environment.get("no_proxy") or environment.get("NO_PROXY", ""):
        told += f"; NO_PROXY excepts {len(exceptions.split(','))}"
    facts = {name: _kind(value) for name, value in found.items()}
    twice = [name for name in _VARIABLES if _differs(environment, name)]
    if twice and not settings.proxy:
        small = ", ".join(name.lower() for name in twice)
        return warn(f"{told}; {', '.join(twice)} says otherwise than {small}", f"only {small} counts", **facts)
    if any(value.startswith("socks5") for value in found.values()) and _lacks("socksio"):
        return fail(f"{told}; socksio is missing", "install it with: pip install 'httpx[socks]'", **facts)
    return good(told, **facts)


def _proxy_problem(value: str) -> str:
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        _ = parts.port
    except ValueError:
        return "not an address"
    if parts.scheme not in _SCHEMES:
        return f"unknown scheme {parts.scheme[:12]!r}"
    return "" if parts.hostname else "no host"


def _kind(value: str) -> str:
    parts = urlsplit(value if "://" in value else f"http://{value}")
    return parts.scheme + (", with credentials" if "@" in parts.netloc else "")


def _differs(environment: Mapping[str, str], name: str) -> bool:
    large, small = environment.get(name, ""), environment.get(name.lower(), "")
    return bool(large and small and large != small)


def _lacks(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is None


def certificates(settings: Settings, environment: Mapping[str, str] | None = None) -> Finding:
    """Load the certificate authorities that count; what cannot be loaded would fail every https mirror."""
    import ssl

    environment = os.environ if environment is None else environment
    file, folder = environment.get("SSL_CERT_FILE", ""), environment.get("SSL_CERT_DIR", "")
    where, path = (
        ("the setting ca_bundle", settings.ca_bundle)
        if settings.ca_bundle
        else ("SSL_CERT_FILE", file)
        if file
        else ("SSL_CERT_DIR", folder)
    )
    if not path:
        return good(f"httpx's own authorities ({ssl.OPENSSL_VERSION})", openssl=ssl.OPENSSL_VERSION)
    hint = "name a PEM file with certificate authorities, or unset it for the built-in ones"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if where == "SSL_CERT_DIR":
            known = sum(1 for _ in Path(path).iterdir())
        else:
            context.load_verify_locations(cafile=path)
            known = context.cert_store_stats()["x509_ca"]
    except (OSError, ValueError) as error:
        return fail(f"{where} cannot be used: {path}: {error}", hint)
    if not known:
        return fail(f"{where} holds no certificate authority: {path}", hint)
    return good(f"{known} authorities from {where}: {path}", count=known, openssl=ssl.OPENSSL_VERSION)


def hub(settings: Settings) -> Finding:
    """Ask the hub for one small page: name, route, proxy and TLS in one, and what time it is there."""
    from mistral_fetch.sources.http_client import HttpClient
    from mistral_fetch.sources.hub import hub_endpoint
    from mistral_fetch.sources.urls import host_of
    from mistral_fetch.transfer.network import http_settings

    endpoint = hub_endpoint()
    started = time.monotonic()
    with HttpClient(http_settings(settings)) as client, client.stream(f"{endpoint}/robots.txt") as answer:
        seconds = time.monotonic() - started
        date = answer.headers.get("date", "")
    facts = {"host": host_of(endpoint), "status": answer.status, "milliseconds": round(seconds * 1000)}
    told = f"{host_of(endpoint)} answers ({answer.status}, {seconds * 1000:.0f} ms)"
    skew = _skew(date)
    if skew is not None and abs(skew) > _SKEW_SECONDS:
        hint = "set the clock: certificates and signed catalogs are judged by it"
        return warn(f"{told}; this clock is {abs(skew):.0f} s {'behind' if skew > 0 else 'ahead'}", hint, **facts)
    return good(told, **facts)


def _skew(date: str) -> float | None:
    try:
        return parsedate_to_datetime(date).timestamp() - time.time()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def ports(settings: Settings) -> Finding:
    """Try to listen where peers would be listened for. Whether they can reach it, only they can tell."""
    from mistral_fetch.bittorrent.listen import is_free, parse_listen

    addresses = [parse_listen(text) for text in settings.listen or ("0.0.0.0:0",)]
    busy = [
        f"{address.host}:{address.first_port}"
        for address in addresses
        if not any(is_free(address.host, port) for port in range(address.first_port, address.last_port + 1))
    ]
    if busy:
        return fail(f"nobody can listen on {', '.join(busy)}", "another --listen HOST:PORT-PORT, or end what has it")
    return good(f"{', '.join(settings.listen) or 'any port'} can be listened on; a firewall may still be in the way")


def dht(settings: Settings, timeout_seconds: float = _DHT_SECONDS) -> Finding:
    """Join the DHT where it is on, and count who answers."""
    if not settings.dht:
        return good("off (the default); --dht tries it")
    if settings.proxy:
        return warn("on, but a proxy is set: the swarm does without it", "unset proxy, or name peers with --peer")
    from mistral_fetch.bittorrent.dht_probe import count_dht_nodes
    from mistral_fetch.bittorrent.listen import listen_interfaces
    from mistral_fetch.bittorrent.settings import SwarmSettings

    swarm = SwarmSettings(dht_nodes=",".join(settings.dht_nodes), listen_interfaces=listen_interfaces(settings.listen))
    nodes = count_dht_nodes(swarm, timeout_seconds)
    if not nodes:
        hint = "is UDP blocked? fetch with --via http, or name a peer with --peer HOST:PORT"
        return warn(f"nobody answered within {timeout_seconds:g} s", hint, nodes=0)
    return good("its nodes answer", nodes=nodes)
