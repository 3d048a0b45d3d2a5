"""How the swarm is used: the choices a user has, and what they mean in libtorrent's settings. Values, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mistral_fetch.units import KIB, MIB

_NEVER = 2**30


@dataclass(frozen=True)
class SwarmSettings:
    """What to ask of the swarm. The defaults talk to nobody who was not named by the user or the torrent.

    ``incoming`` is whether peers may connect to us; None means: only when peers are looked for beyond the named ones.
    ``peers`` are ``host:port``. ``uploads`` is whether to give anything back; a leech still connects, asks and
    says what it has, but never serves a block. The three timeouts count seconds of silence, not of transfer.
    """

    peers: tuple[str, ...] = ()
    use_trackers: bool = True
    use_web_seeds: bool = True
    dht: bool = False
    lsd: bool = False
    port_mapping: bool = False
    utp: bool = False
    incoming: bool | None = None
    listen_interfaces: str = "0.0.0.0:0,[::]:0"
    download_limit_bytes_per_second: int | None = None
    uploads: bool = False
    no_peers_timeout_seconds: float = 15.0
    stall_timeout_seconds: float = 60.0
    metadata_timeout_seconds: float = 60.0


def find_peers_hint(settings: SwarmSettings) -> str:
    """Return what to type when nobody was found."""
    look = "" if settings.dht else "look in the public DHT with --dht, "
    return f"{look}name a seed with --peer HOST:PORT, or fetch from mirrors with --via http"


def session_settings(settings: SwarmSettings, *, incoming: bool) -> dict[str, Any]:
    """Return libtorrent's settings for a session, each with its reason where it is not the obvious one."""
    return {
        "user_agent": "mistral-fetch",
        "peer_fingerprint": "-MF0100-",
        "listen_interfaces": settings.listen_interfaces,
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
    }
