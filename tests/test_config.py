from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mistral_fetch.config import Settings, load_settings
from mistral_fetch.digest import Assurance
from mistral_fetch.errors import ConfigError


def written(tmp_path: Path, text: str) -> dict[str, str]:
    (tmp_path / "config.toml").write_text(text)
    return {"MISTRAL_FETCH_CONFIG": str(tmp_path / "config.toml")}


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    environment = written(tmp_path, 'via = "torrent"\nread_timeout = 7\npeer_timeout = 8\n')
    environment |= {"MISTRAL_FETCH_VIA": "http", "MISTRAL_FETCH_READ_TIMEOUT": "9"}
    loaded = load_settings({"via": "auto", "read_timeout": None}, environment)
    assert (loaded.values.via, loaded.origins["via"]) == ("auto", "flag")
    assert (loaded.values.read_timeout, loaded.origins["read_timeout"]) == (9.0, "environment")
    assert (loaded.values.peer_timeout, loaded.origins["peer_timeout"]) == (8.0, str(tmp_path / "config.toml"))
    assert (loaded.values.connect_timeout, loaded.origins["connect_timeout"]) == (7.0, "default")


def test_every_setting_has_a_parser_and_an_origin(tmp_path: Path) -> None:
    loaded = load_settings({}, {"HOME": str(tmp_path)})
    assert set(loaded.origins) == {field.name for field in dataclasses.fields(Settings)}
    for field in dataclasses.fields(Settings):
        value = getattr(loaded.values, field.name)
        given: Any = ",".join(value) or "h:1" if isinstance(value, tuple) else value
        given = "none" if field.name == "trust_keys" else given
        given = value.label if isinstance(value, Assurance) else given
        again = load_settings({}, {"HOME": str(tmp_path), f"MISTRAL_FETCH_{field.name.upper()}": str(given)})
        assert type(getattr(again.values, field.name)) is type(value)


def test_the_default_home_is_the_user_s_cache(tmp_path: Path) -> None:
    assert load_settings({}, {}).values.home.name == "mistral-fetch"


def test_an_empty_variable_is_not_a_value() -> None:
    assert load_settings({}, {"MISTRAL_FETCH_VIA": ""}).values.via == "auto"


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("offline", "1", True),
        ("offline", "False", False),
        ("offline", " YES ", True),
        ("dht", "off", False),
        ("min_assurance", "sha256", Assurance.SHA256),
        ("peers", "a:1, [::1]:2 b:65535", ("a:1", "[::1]:2", "b:65535")),
        ("listen", "127.0.0.1:6881-6889, [::]:0 eth0:1", ("127.0.0.1:6881-6889", "[::]:0", "eth0:1")),
        ("encryption", "require", "require"),
        ("disk_reserve", "1 GB", 10**9),
        ("disk_reserve", "0", 0),
        ("lock_timeout", "0", 0.0),
        ("read_timeout", "1e2", 100.0),
        ("home", "relative", Path.cwd() / "relative"),
    ],
)
def test_values_are_read(name: str, text: str, value: object) -> None:
    assert getattr(load_settings({}, {f"MISTRAL_FETCH_{name.upper()}": text}).values, name) == value


@pytest.mark.parametrize(
    "name, text",
    [
        ("offline", "maybe"),
        ("offline", "2"),
        ("via", "carrier pigeon"),
        ("min_assurance", "certain"),
        ("encryption", "rot13"),
        ("listen", "6881"),
        ("listen", "127.0.0.1:70000"),
        ("listen", "127.0.0.1:9-8"),
        ("listen", "h,k:1"),
        ("peers", "nohost"),
        ("peers", "host:"),
        ("peers", "host:0"),
        ("peers", "host:65536"),
        ("peers", "host:²"),
        ("peers", ":1"),
        ("lock_timeout", "-1"),
        ("lock_timeout", "nan"),
        ("lock_timeout", "inf"),
        ("lock_timeout", "1e8"),
        ("read_timeout", "soon"),
        ("disk_reserve", "-1"),
        ("disk_reserve", "lots"),
    ],
)
def test_a_value_that_cannot_be_used_is_exit_code_2_and_names_its_place(name: str, text: str) -> None:
    variable = f"MISTRAL_FETCH_{name.upper()}"
    with pytest.raises(ConfigError) as caught:
        load_settings({}, {variable: text})
    assert caught.value.exit_code == 2
    assert variable in caught.value.what
    assert all(caught.value.lines())


@pytest.mark.parametrize(
    "text",
    [
        "via = ",
        "no_such_setting = 1",
        "via = 3",
        "offline = 1.5",
        "offline = []",
        "peers = 5",
        'peers = [["a:1"]]',
        "read_timeout = true_",
        "read_timeout = [1]",
        "read_timeout = {a = 1}",
        "home = 7",
        "min_assurance = 7",
        "disk_reserve = []",
    ],
)
def test_a_file_that_cannot_be_used_is_exit_code_2_and_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings({}, written(tmp_path, text))
    assert caught.value.exit_code == 2
    assert "config.toml" in caught.value.what
    assert all(caught.value.lines())


def test_file_values_keep_their_types(tmp_path: Path) -> None:
    text = 'offline = true\npeers = ["a:1", "b:2"]\nread_timeout = 5\ndisk_reserve = 1000\nhome = "~/x"\n'
    values = load_settings({}, written(tmp_path, text)).values
    assert (values.offline, values.peers, values.read_timeout) == (True, ("a:1", "b:2"), 5.0)
    assert (values.disk_reserve, values.home) == (1000, Path("~/x").expanduser())


def test_a_file_that_is_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration file"):
        load_settings({}, {"MISTRAL_FETCH_CONFIG": str(tmp_path / "none.toml")})


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\x00"])
def test_bytes_that_are_no_text_are_explained(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.toml").write_bytes(content)
    with pytest.raises(ConfigError):
        load_settings({}, {"MISTRAL_FETCH_CONFIG": str(tmp_path / "config.toml")})


def test_a_directory_for_a_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load_settings({}, {"MISTRAL_FETCH_CONFIG": str(tmp_path)})


def test_an_oversized_file_is_not_read_whole(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load_settings({}, written(tmp_path, "#" * (1 << 20) + '\nvia = "http"\n'))
