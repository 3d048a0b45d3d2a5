"""How the swarm is used: the choices a user has, and what they mean in libtorrent's settings. Values, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import libtorrent as lt

from mistral_fetch.bittorrent.listen import DEFAULT_LISTEN
from mistral_fetch.bittorrent.proxy import parse_proxy, proxy_settings
from mistral_fetch.units import KIB, MIB

_NEVER = 2**30
_ENCRYPTION: dict[str, dict[str, Any]] = {
    "allow": {"out_enc_policy": lt.enc_policy.pe_enabled, "allowed_enc_level": lt.enc_level.pe_both},
    "require": {"out_enc_policy": lt.enc_policy.pe_forced, "allowed_enc_level": lt.enc_level.pe_rc4},
    "off": {"out_enc_policy": lt.enc_policy.pe_disabled, "allowed_enc_level": lt.enc_level.pe_plaintext},
}


@dataclass(frozen=True)
class SwarmSettings:
    """What to ask of the swarm. The defaults talk to nobody who was not named by the user or the torrent.

    ``dht``, ``lsd`` (local discovery by multicast) and ``pex`` (peers that peers name) find peers that nobody named;
    :meth:`for_private` turns them off for a torrent that says so. ``encryption`` is ``allow``, ``require`` or ``off``
    and means message stream encryption, which hides the protocol from the wire, not the content from anybody who
    knows the torrent. With a ``proxy`` everything goes through it; see :mod:`mistral_fetch.bittorrent.proxy`.
    ``incoming`` is whether peers may connect to us; None means: only when peers are looked for beyond the named ones.
    ``peers`` are ``host:port``. ``uploads`` is whether to give anything back; a leech still connects, asks and
    says what it has, but never serves a block. The three timeouts count seconds of silence, not of transfer.
    """

    peers: tuple[str, ...] = ()
    use_trackers: bool = True
    use_web_seeds: bool = True
    dht: bool = False
    lsd: bool = False
    pex: bool = False
    encryption: str = "allow"
    proxy: str = ""
    dht_nodes: str = ""
    port_mapping: bool = False
    utp: bool = False
    incoming: bool | None = None
    listen_interfaces: str = DEFAULT_LISTEN
    download_limit_bytes_per_second: int | None = None
    upload_limit_bytes_per_second: int | None = None
    uploads: bool = False
    no_peers_timeout_seconds: float = 15.0
    stall_timeout_seconds: float = 60.0
    metadata_timeout_seconds: float = 60.0

    def for_private(self) -> SwarmSettings:
        """Return these settings for a torrent whose tracker alone may hand out peers (BEP 27)."""
        return replace(self, dht=False, lsd=False, pex=False)

    def usable_trackers(self, trackers: tuple[str, ...]) -> list[str]:
        """Return the trackers to announce to: none where they are off, no udp ones through a proxy."""
        if not self.use_trackers:
            return []
        return [url for url in trackers if not self.proxy or not url.lower().startswith("udp:")]

    def accepts_incoming(self, trackers: tuple[str, ...]) -> bool:
        """Return whether peers may connect to us.

        With named peers alone, who does so can only be one of them again, from a port we did not ban.
        """
        if self.proxy:
            return False
        return self.looks_around(trackers) if self.incoming is None else self.incoming

    def looks_around(self, trackers: tuple[str, ...]) -> bool:
        """Return whether peers are looked for beyond the named ones."""
        if self.proxy:
            return bool(self.usable_trackers(trackers))
        return bool(self.dht or self.lsd or self.usable_trackers(trackers))


def for_seeds(settings: SwarmSettings, listen_interfaces: str) -> SwarmSettings:
    """Return what the session of a node asks that meets whole seeds only: named peers, and whom those name.

    It gives nothing, and listens only so that seeds tell others of this node. Each session gets half of a limit.
    """
    limit = settings.download_limit_bytes_per_second
    return replace(
        settings,
        uploads=False,
        use_trackers=False,
        use_web_seeds=False,
        dht=False,
        lsd=False,
        pex=not settings.proxy,
        incoming=True,
        listen_interfaces=listen_interfaces,
        download_limit_bytes_per_second=limit // 2 if limit else None,
    )


def find_peers_hint(settings: SwarmSettings) -> str:
    """Return what to type when nobody was found."""
    look = "" if settings.dht else "look in the public DHT with --dht, "
    return f"{look}name a seed with --peer HOST:PORT, or fetch from mirrors with --via http"


def session_settings(settings: SwarmSettings, *, incoming: bool) -> dict[str, Any]:
    """Return libtorrent's settings for a session, each with its reason where it is not the obvious one.

    Raises:
        SwarmError: The proxy is of a kind that libtorrent cannot use.
    """
    through_proxy = proxy_settings(parse_proxy(settings.proxy)) if settings.proxy else {}
    dht_nodes = {"dht_bootstrap_nodes": settings.dht_nodes} if settings.dht_nodes else {}
    encryption = _ENCRYPTION[settings.encryption]
    return {
        "user_agent": "mistral-fetch",
        "peer_fingerprint": "-MF0100-",
        "listen_interfaces": settings.listen_interfaces,
        "max_retry_port_bind": 0,  # the ports were chosen already; a busy one is said, not walked away from
        "listen_system_port_fallback": False,
        **encryption,
        "in_enc_policy": encryption["out_enc_policy"],
        "prefer_rc4": settings.encryption == "require",
        **dht_nodes,
        "enable_dht": settings.dht,
        "enable_lsd": settings.lsd,
        "enable_upnp": settings.port_mapping,
        "enable_natpmp": settings.port_mapping,
        # uTP gives 5 MB/s where TCP gives 300 (loopback, measured), and libtorrent tries it first.
        "enable_incoming_utp": settings.utp and incoming,
        "enable_outgoing_utp": settings.utp,
        "enable_incoming_tcp": incoming,
        "allow_multiple_connections_per_ip": True,  # several seeds on one machine, as in a lab or a test
        # Nothing given back takes all three: no slots, no optimistic unchoking (one peer a turn, slots or not), and
        # every request refused that comes all the same. An upload rate limit would slow our own requests too.
        "unchoke_slots_limit": 8 if settings.uploads else 0,
        "optimistic_unchoke_interval": 30 if settings.uploads else _NEVER,
        "max_allowed_in_request_queue": 2000 if settings.uploads else -1,
        "allowed_fast_set_size": 5 if settings.uploads else 0,  # pieces that even a choked peer may ask for
        "connection_speed": 100,
        "torrent_connect_boost": 60,
        "peer_connect_timeout": 5,
        "handshake_timeout": 5,
        "min_reconnect_time": 1,
        "max_failcount": 20,  # a seed that restarts must be found again
        "request_timeout": 20,
        "piece_timeout": 10,
        "urlseed_timeout": 6,  # a silent web seed holds up the pieces it was asked for until then
        "max_out_request_queue": 1000,
        "max_queued_disk_bytes": 8 * MIB,  # the default of 100 MiB adds as much to the peak memory, and no speed
        "checking_mem_usage": 256,
        "aio_threads": 2,
        "hashing_threads": 2,
        "send_buffer_watermark": 2 * MIB,
        "send_buffer_low_watermark": 128 * KIB,
        "alert_queue_size": 50_000,
        "stop_tracker_timeout": 1,
        "ssrf_mitigation": True,
        "tick_interval": 100,
        **through_proxy,  # last: nothing may leak around it
    }
