"""Addresses to listen on, as people write them."""

from __future__ import annotations

import socket

import pytest

from mistral_fetch.bittorrent.listen import (
    DEFAULT_LISTEN,
    ListenAddress,
    listen_interfaces,
    missing_interfaces,
    parse_listen,
)
from mistral_fetch.errors import ConfigError


@pytest.mark.parametrize(
    "text, address",
    [
        ("127.0.0.1:6881", ListenAddress("127.0.0.1", 6881, 6881)),
        ("0.0.0.0:6881-6889", ListenAddress("0.0.0.0", 6881, 6889)),
        ("[::1]:0", ListenAddress("::1", 0, 0)),
        ("eth0:6881", ListenAddress("eth0", 6881, 6881)),
    ],
)
def test_addresses_are_read(text, address):
    assert parse_listen(text) == address


@pytest.mark.parametrize("text", ["", "6881", ":6881", "h:", "h:70000", "h:9-8", "h:0-9", "::1:5", "[x]:5", "a,b:1"])
def test_nonsense_is_refused(text):
    with pytest.raises(ConfigError):
        parse_listen(text)


def test_the_first_free_port_of_a_range_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (chosen,) = [int(part.rpartition(":")[2]) for part in [listen_interfaces([f"127.0.0.1:{port}-{port + 20}"])]]
        assert port < chosen <= port + 20
        # With nothing else to try, libtorrent is to say what is wrong.
        assert listen_interfaces([f"127.0.0.1:{port}"]) == f"127.0.0.1:{port}"


def test_several_addresses_and_none():
    assert listen_interfaces(["127.0.0.1:0", "[::1]:0"]) == "127.0.0.1:0,[::1]:0"
    assert listen_interfaces([]) == DEFAULT_LISTEN


def test_interfaces_that_are_not_there_are_found():
    present = socket.if_nameindex()[0][1]
    assert missing_interfaces(f"127.0.0.1:0,[::]:0,{present}:0,gone7:0") == ["gone7"]
