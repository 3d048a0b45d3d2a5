"""Addresses to listen on, as people type them."""

from __future__ import annotations

import socket

import pytest

from mistral_fetch.errors import ConfigError, ExitCode, ListenRefused
from mistral_fetch.publish.listen import ListenAddress, open_listener, parse_listen, reachable_host


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6881", ListenAddress("", 6881, 6881)),
        (":8080", ListenAddress("", 8080, 8080)),
        ("127.0.0.1:0", ListenAddress("127.0.0.1", 0, 0)),
        ("192.0.2.7:6881-6889", ListenAddress("192.0.2.7", 6881, 6889)),
        ("[::1]:80", ListenAddress("::1", 80, 80)),
        ("localhost:80", ListenAddress("localhost", 80, 80)),
    ],
)
def test_addresses_are_read(text, expected):
    assert parse_listen(text) == expected


@pytest.mark.parametrize("text", ["", "host", "1:2:3", "::1:80", "80-79", "0-5", "65536", "1-5000", "a b:1", "-1"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ConfigError) as caught:
        parse_listen(text)
    assert caught.value.exit_code == ExitCode.USAGE


def test_after_a_range_any_free_port_is_taken():
    assert ListenAddress("", 6881, 6882).ports == (6881, 6882, 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenRefused):
            open_listener(ListenAddress("127.0.0.1", port, port))
        with open_listener(ListenAddress("127.0.0.1", max(port - 1, 1), port)) as other:
            assert other.getsockname()[1] != port


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", "x" * 300])
def test_an_address_that_is_not_ours_is_refused(host):
    with pytest.raises(ListenRefused):
        open_listener(ListenAddress(host, 0, 0))


def test_everywhere_is_reached_by_loopback():
    assert [reachable_host(host) for host in ("", "0.0.0.0", "::", "192.0.2.1", "host")] == [
        *["127.0.0.1"] * 3,
        "192.0.2.1",
        "host",
    ]
