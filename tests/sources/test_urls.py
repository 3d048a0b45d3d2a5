from __future__ import annotations

import pytest

from mistral_fetch.errors import MirrorUnreachable
from mistral_fetch.sources.urls import host_of, is_relative, next_hop, origin_of, public_url, redact, without_userinfo


@pytest.mark.parametrize(
    "url, shown",
    [
        ("https://me:secret@host/a?X-Sig=secret&b=secret#secret", "https://host/a?X-Sig=…&b=…"),
        ("https://host/a", "https://host/a"),
        ("https://a@b:secret@host:1/", "https://host:1/"),
        ("http://[broken/secret", "(an unreadable address)"),
        ("https://host/\x1b[31mred", "https://host/?[31mred"),
    ],
)
def test_what_is_printed_of_an_address(url: str, shown: str) -> None:
    assert redact(url) == shown
    assert "secret" not in redact(url)


@pytest.mark.parametrize(
    "url, public",
    [
        ("https://me:secret@host:81/a/m.meta4?sig=secret#secret", "https://host:81/a/m.meta4"),
        ("https://host/a@b", "https://host/a@b"),
        ("file:///srv/m.meta4", "file:///srv/m.meta4"),
        ("http://[broken/secret", ""),
    ],
)
def test_what_is_stored_of_an_address(url: str, public: str) -> None:
    assert public_url(url) == public


def test_an_endless_address_is_cut() -> None:
    assert len(redact("https://host/" + "a" * 10_000)) <= 300


@pytest.mark.parametrize(
    "url, origin",
    [
        ("HTTPS://Host.Example/x", "https://host.example:443"),
        ("http://host.example.:80", "http://host.example:80"),
        ("http://user@[::1]:8080/x", "http://[::1]:8080"),
    ],
)
def test_one_spelling_of_an_origin(url: str, origin: str) -> None:
    assert origin_of(url) == origin


@pytest.mark.parametrize(
    "url",
    ["ftp://host/x", "file:///etc/passwd", "http://", "//host/x", "", "http://h:99999/", "http://h/a b", "http://h/\n"],
)
def test_other_addresses_are_refused_for_good(url: str) -> None:
    with pytest.raises(MirrorUnreachable) as caught:
        origin_of(url)
    assert caught.value.is_permanent


def test_host_shows_unusual_ports_only() -> None:
    assert [host_of(u) for u in ("https://h:443/", "https://h:80/", "http://h/")] == ["h", "h:80", "h"]


def test_userinfo_is_split_off() -> None:
    assert without_userinfo("https://me:p@h/x?q=1#f") == ("https://h/x?q=1", "Basic bWU6cA==")
    assert without_userinfo("https://h/x") == ("https://h/x", None)


@pytest.mark.parametrize(
    "url, location, target",
    [
        ("https://h/a/b", "c", "https://h/a/c"),
        ("https://h/a", "/b?x=1", "https://h/b?x=1"),
        ("https://h/a", "//other/b", "https://other/b"),
        ("http://h/a", "https://h/a", "https://h/a"),
        ("http://h/a", "http://u:p@o/a", "http://o/a"),
    ],
)
def test_where_redirects_lead(url: str, location: str, target: str) -> None:
    assert next_hop(url, location) == target


@pytest.mark.parametrize(
    "location", ["http://h/a", "http://other/", "file:///x", "ftp://h/", "javascript:x", "http://["]
)
def test_redirects_never_leave_https(location: str) -> None:
    with pytest.raises(MirrorUnreachable) as caught:
        next_hop("https://h/a", location)
    assert caught.value.is_permanent


def test_relative_locations() -> None:
    assert is_relative("/a/b")
    assert is_relative("b")
    assert not is_relative("//host/b")
    assert not is_relative("https://host/b")
    assert not is_relative("http://[")
