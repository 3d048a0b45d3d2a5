"""Where a setting comes from: the flag, then the environment, then ``config.toml``, then the default."""

from __future__ import annotations

import pytest


@pytest.fixture
def config(tmp_path):
    """``config.toml`` where the program looks for it."""
    path = tmp_path / "config" / "mistral-fetch" / "config.toml"
    path.parent.mkdir(parents=True)
    return path


def cache_in_use(program, *flags):
    """Return which cache the program looks into, as it tells itself."""
    return program("path", "mistral-7b", *flags).err.splitlines()[0].rpartition(" at ")[2]


def test_the_file_beats_the_default(program, config, environment, tmp_path):
    environment.delenv("MISTRAL_FETCH_HOME")
    environment.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_in_use(program) == str(tmp_path / "xdg" / "mistral-fetch")
    config.write_text('home = "/srv/from-file"\n')
    assert cache_in_use(program) == "/srv/from-file"


def test_the_environment_beats_the_file(program, config, tmp_path):
    config.write_text('home = "/srv/from-file"\n')
    assert cache_in_use(program) == str(tmp_path / "home")


def test_the_flag_beats_the_environment(program, config):
    config.write_text('home = "/srv/from-file"\n')
    assert cache_in_use(program, "--home", "/srv/from-flag") == "/srv/from-flag"


def test_an_empty_variable_counts_as_unset(program, config, environment):
    config.write_text('home = "/srv/from-file"\n')
    environment.setenv("MISTRAL_FETCH_HOME", "")
    assert cache_in_use(program) == "/srv/from-file"


@pytest.mark.parametrize("home", ["~nosuchuser/x", "/tmp/" + "x" * 300], ids=["an unknown user", "a long name"])
def test_a_home_that_cannot_be_is_refused(program, home):
    for command in (["list"], ["verify"], ["pull", "mistral-7b"]):
        shown = program(*command, "--home", home)
        assert (shown.code, shown.out) == (2, "")
        assert shown.err.startswith("error: the setting --home cannot be used\n  expected a directory, got: ")
        assert len(shown.err.splitlines()) == 3


def test_a_home_with_a_nul_in_the_file_is_refused(program, config, environment):
    environment.delenv("MISTRAL_FETCH_HOME")
    config.write_text('home = "a\\u0000b"\n')
    shown = program("list")
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.startswith("error: the setting home in ")
    assert len(shown.err.splitlines()) == 3


def test_a_configuration_file_of_an_unknown_user_does_not_exist(program, environment):
    environment.setenv("MISTRAL_FETCH_CONFIG", "~nosuchuser/config.toml")
    shown = program("list")
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.startswith("error: no configuration file at ~nosuchuser/config.toml\n")


def test_offline_from_each_place(program, config, environment):
    assert program("pull", "mistral-7b", "--offline").code == 6
    environment.setenv("MISTRAL_FETCH_OFFLINE", "1")
    shown = program("pull", "mistral-7b")
    assert (shown.code, shown.out) == (6, "")
    assert "the network is off limits" in shown.err
    environment.delenv("MISTRAL_FETCH_OFFLINE")
    config.write_text("offline = true\n")
    assert program("pull", "mistral-7b").code == 6


def test_a_file_named_by_the_environment_must_exist(program, environment, tmp_path):
    environment.setenv("MISTRAL_FETCH_CONFIG", str(tmp_path / "none.toml"))
    shown = program("list")
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.splitlines()[0] == f"error: no configuration file at {tmp_path}/none.toml"


BAD = {
    "not toml": "home = ",
    "an unknown key": 'hom = "/srv"',
    "a value of another kind": 'offline = "perhaps"',
    "an unknown choice": 'via = "pigeon"',
    "not text": b"\xff\xfe",
}


@pytest.mark.parametrize("reason", BAD)
def test_a_file_that_cannot_be_used_is_named(program, config, reason):
    text = BAD[reason]
    config.write_bytes(text if isinstance(text, bytes) else text.encode())
    shown = program("list")
    assert (shown.code, shown.out) == (2, "")
    assert str(config) in shown.err
    assert len(shown.err.splitlines()) == 3
    assert program("list", "--json").json["error"]["kind"] == "config-error"


@pytest.mark.parametrize(
    "name, value", [("OFFLINE", "perhaps"), ("VIA", "pigeon"), ("PEERS", "nowhere"), ("LOCK_TIMEOUT", "soon")]
)
def test_a_variable_that_cannot_be_used_is_named(program, environment, name, value):
    environment.setenv(f"MISTRAL_FETCH_{name}", value)
    shown = program("list")
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.startswith(f"error: the setting MISTRAL_FETCH_{name} cannot be used\n")


def test_another_catalog(program, environment, tmp_path):
    environment.setenv("MISTRAL_FETCH_CATALOG", str(tmp_path / "none.json"))
    shown = program("list", "--catalog")
    assert (shown.code, shown.out) == (2, "")
    assert "none.json cannot be read" in shown.err
    (tmp_path / "none.json").write_text("{}")
    assert program("list", "--catalog").code == 20


@pytest.mark.parametrize("name", ["NO_COLOR", None])
def test_no_command_colours_its_results(program, environment, name):
    if name:
        environment.setenv(name, "1")
    environment.setenv("FORCE_COLOR", "1")
    environment.setenv("TERM", "xterm-256color")
    for command in (["list", "--catalog"], ["show", "mistral-7b"], ["doctor"], ["--help"]):
        shown = program(*command)
        assert "\x1b" not in shown.out + shown.err
