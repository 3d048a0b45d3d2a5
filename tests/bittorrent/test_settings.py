"""What the settings mean, without a packet."""

from __future__ import annotations

import pytest

from mistral_fetch.bittorrent.listen import DEFAULT_LISTEN
from mistral_fetch.bittorrent.settings import SwarmSettings, session_settings
from mistral_fetch.errors import SwarmError

OPEN = SwarmSettings(dht=True, lsd=True, pex=True, port_mapping=True, utp=True, incoming=True, uploads=True)
TRACKERS = ("udp://a.example:1", "http://b.example/announce", "UDP://c.example:1")


def test_the_defaults_ask_nobody_who_was_not_named():
    settings = SwarmSettings()
    pack = session_settings(settings, incoming=settings.accepts_incoming(()))
    assert not any(pack[f"enable_{name}"] for name in ("dht", "lsd", "upnp", "natpmp", "incoming_tcp", "outgoing_utp"))
    assert not settings.pex
    assert not settings.looks_around(())
    assert settings.listen_interfaces == DEFAULT_LISTEN
    assert settings.usable_trackers(TRACKERS) == list(TRACKERS)


def test_a_private_torrent_has_its_trackers_alone():
    private = OPEN.for_private()
    assert (private.dht, private.lsd, private.pex) == (False, False, False)
    assert private.looks_around(TRACKERS)
    assert not private.looks_around(())


@pytest.mark.parametrize("proxy", ["socks5://u:p%40@127.0.0.1:9", "socks5h://h", "http://h:3128"])
def test_behind_a_proxy_nothing_goes_around_it(proxy):
    settings = SwarmSettings(
        dht=True, lsd=True, pex=True, port_mapping=True, utp=True, incoming=True, proxy=proxy, uploads=True
    )
    pack = session_settings(settings, incoming=True)
    around = ("dht", "lsd", "upnp", "natpmp", "incoming_tcp", "incoming_utp", "outgoing_utp")
    assert not any(pack[f"enable_{name}"] for name in around)
    assert all(pack[f"proxy_{name}"] for name in ("hostnames", "peer_connections", "tracker_connections"))
    assert settings.usable_trackers(TRACKERS) == ["http://b.example/announce"]
    assert not settings.accepts_incoming(TRACKERS)
    assert not settings.looks_around(TRACKERS[:1])
    if "@" in proxy:
        assert (pack["proxy_username"], pack["proxy_password"], pack["proxy_port"]) == ("u", "p@", 9)


@pytest.mark.parametrize("proxy", ["https://h:1", "socks4://h:1", "h:1", "http://h:x", "http://"])
def test_a_proxy_of_another_kind_is_refused_rather_than_gone_around(proxy):
    with pytest.raises(SwarmError) as caught:
        session_settings(SwarmSettings(proxy=proxy), incoming=False)
    assert caught.value.exit_code == 6


def test_encryption_means_both_directions():
    packs = {name: session_settings(SwarmSettings(encryption=name), incoming=True) for name in ("require", "off")}
    for pack in packs.values():
        assert pack["in_enc_policy"] == pack["out_enc_policy"]
    assert packs["require"]["allowed_enc_level"] != packs["off"]["allowed_enc_level"]
