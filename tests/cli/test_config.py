"""``config``: what is in force and why, and a file that is changed without losing what its owner wrote."""

from __future__ import annotations

import stat
from dataclasses import fields

import pytest

from mistral_fetch.config import Settings, load_settings
from mistral_fetch.settings_file import first_sentence, meanings

OWN = """\
# Ours, since 2026.
home = "/srv/models"   # the big disk
peers = [
  "10.0.0.2:6881",  # rack 1
  "10.0.0.3:6881",
]
via = 'http'
"""


@pytest.fixture
def file(environment, tmp_path):
    path = tmp_path / "config" / "mistral-fetch" / "config.toml"
    path.parent.mkdir(parents=True)
    environment.delenv("MISTRAL_FETCH_HOME")
    return path


def test_each_setting_is_shown_with_its_value_and_its_origin(program, file, environment):
    file.write_text('via = "http"\nlsd = true\n')
    environment.setenv("MISTRAL_FETCH_LSD", "0")
    shown = program("config", "--home", "/srv/x", "--json").json
    told = {name: (one["value"], one["origin"]) for name, one in shown["settings"].items()}
    assert set(told) == {field.name for field in fields(Settings)}
    assert told["home"] == ("/srv/x", "flag")
    assert told["lsd"] == (False, "environment")
    assert told["via"] == ("http", str(file))
    assert told["min_assurance"] == ("btv1", "default")
    lines = program("config").out.splitlines()
    (via,) = [line for line in lines if line.startswith("via ")]
    assert via.split()[1:3] == ["http", "file"]
    (lsd,) = [line for line in lines if line.startswith("lsd ")]
    assert lsd.split()[1:3] == ["false", "MISTRAL_FETCH_LSD"]
    assert lines[-1] == f"file: {file}"


def test_every_setting_has_a_meaning_of_one_line():
    for field in fields(Settings):
        assert len(meanings()[field.name]) > 10, field.name
        assert 5 < len(first_sentence(field.name)) < 100, field.name


def test_no_password_is_shown_unless_it_is_asked_for_by_name(program, environment):
    address = "http://someone:geheim@proxy.example:3128"
    environment.setenv("MISTRAL_FETCH_PROXY", address)
    for command in (["config"], ["config", "--json"], ["config", "explain", "proxy"]):
        shown = program(*command)
        assert "***@proxy.example:3128" in shown.out
        assert "geheim" not in shown.out
    assert program("config", "get", "proxy").out == f"{address}\n"


def test_path_get_and_explain(program, file):
    assert program("config", "path").out == f"{file}\n"
    assert program("config", "path", "--json").json == {"file": str(file), "exists": False}
    assert program("config", "get", "min-assurance").out == "btv1\n"
    assert program("config", "get", "lock_timeout").out == "600\n"
    shown = program("config", "explain", "lock_timeout").out
    assert shown.startswith("lock_timeout: Seconds to wait for another process")
    for part in ("600 (from default)", "MISTRAL_FETCH_LOCK_TIMEOUT", "--lock-timeout", str(file)):
        assert part in shown
    assert "flag" not in program("config", "explain", "pex").out


def test_set_writes_what_the_next_command_reads(program, file):
    for name, value, means in (
        ("offline", "yes", True),
        ("peers", "a:1, b:2", ("a:1", "b:2")),
        ("limit", "10MB/s", 10_000_000),
        ("read_timeout", "9.5", 9.5),
        ("connections", "8", 8),
        ("min-assurance", "sha256", None),
        ("peers", "", ()),
    ):
        assert program("config", "set", name, value).code == 0
        if means is not None:
            assert getattr(load_settings({}).values, name) == means
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text() == (
        'offline = true\npeers = []\nlimit = "10MB/s"\nread_timeout = 9.5\nconnections = 8\nmin_assurance = "sha256"\n'
    )


def test_set_keeps_every_other_line_and_the_comments(program, file):
    file.write_text(OWN)
    file.chmod(0o640)
    assert program("config", "set", "peers", "10.0.0.9:1").code == 0
    assert program("config", "set", "home", "/srv/other").code == 0
    assert program("config", "set", "offline", "true").code == 0
    assert file.read_text() == (
        "# Ours, since 2026.\n"
        'home = "/srv/other"   # the big disk\n'
        'peers = ["10.0.0.9:1"]\n'
        "via = 'http'\n"
        "offline = true\n"
    )
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_unset_takes_one_setting_out(program, file):
    file.write_text(OWN)
    assert program("config", "unset", "peers").code == 0
    assert file.read_text() == "# Ours, since 2026.\nhome = \"/srv/models\"   # the big disk\nvia = 'http'\n"
    assert program("config", "unset", "lsd").code == 0
    file.unlink()
    assert program("config", "unset", "via").code == 0
    assert not file.exists()


def test_a_path_means_the_same_from_everywhere(program, file, tmp_path):
    program("config", "set", "home", "models")
    assert program("config", "get", "home").out == f"{tmp_path / 'models'}\n"
    program("config", "set", "home", "~/models")
    assert 'home = "~/models"' in file.read_text()


def test_a_link_to_the_file_stays_a_link(program, file, tmp_path):
    kept = tmp_path / "dotfiles.toml"
    kept.write_text("lsd = true\n")
    file.symlink_to(kept)
    assert program("config", "set", "lsd", "false").code == 0
    assert file.is_symlink()
    assert kept.read_text() == "lsd = false\n"


def test_the_environment_that_wins_is_named(program, file, environment):
    environment.setenv("MISTRAL_FETCH_LSD", "1")
    shown = program("config", "set", "lsd", "false")
    assert (shown.code, shown.out) == (0, f"{file}\n")
    assert shown.err == "MISTRAL_FETCH_LSD says otherwise, and wins over the file\n"


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["set", "via", "pigeon"], "expected one of auto, http, torrent"),
        (["set", "lock_timeout", "-- -1"], "expected 0 to 10,000,000 seconds"),
        (["set", "hom", "/srv"], "did you mean home"),
        (["get", "lokc_timeout"], "did you mean lock_timeout"),
        (["explain", "colour"], "mistral-fetch config lists them"),
        (["set", "ca_bundle", "nowhere.pem"], "expected a PEM file"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_what_makes_no_sense_is_refused_and_nothing_is_written(program, file, arguments, told):
    shown = program("config", *[word for argument in arguments for word in argument.split()])
    assert (shown.code, shown.out) == (2, "")
    assert told in shown.err
    assert len(shown.err.splitlines()) == 3
    assert not file.exists()


def test_an_unknown_key_in_the_file_names_the_nearest(program, file):
    file.write_text("lock_timout = 3\n")
    shown = program("list")
    assert (shown.code, shown.out) == (2, "")
    assert "'lock_timout'" in shown.err
    assert "did you mean lock_timeout" in shown.err.splitlines()[2]


def test_a_file_that_only_a_person_can_change_is_left_alone(program, file, environment):
    text = 'lsd = true\npeers = ["""\na:1""", "b:2"]\n"v\\u0069a" = "http"\n'
    file.write_text(text)
    shown = program("config", "set", "via", "torrent")
    assert (shown.code, shown.out) == (2, "")
    assert "edit the file by hand" in shown.err
    assert file.read_text() == text


def test_a_directory_that_may_not_be_written_is_the_disk_s_error(program, file, monkeypatch):
    def refuse(*_arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mistral_fetch.store.durable.write_durably", refuse)
    shown = program("config", "set", "lsd", "true")
    assert (shown.code, shown.out) == (9, "")
    assert "not allowed to write while changing the settings" in shown.err
