"""Finding an interpreter: the configured one or our own, or three lines on what to install."""

from __future__ import annotations

import sys

import pytest

from mistral_fetch.errors import ExitCode, RuntimeMissing
from mistral_fetch.launch import locate
from mistral_fetch.launch.locate import find_interpreter, runtime_package


def write_program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_our_own_interpreter_is_taken_when_it_has_everything(monkeypatch):
    monkeypatch.setattr(locate, "REQUIRED_MODULES", {"json": "json"})
    found = find_interpreter("")
    assert (found.executable, found.runtime_package) == (sys.executable, runtime_package())
    assert (found.runtime_package / "__main__.py").is_file()


@pytest.mark.parametrize("configured", ["", sys.executable], ids=["our own", "configured"])
def test_missing_packages_are_named_as_they_are_installed(monkeypatch, configured):
    monkeypatch.setattr(locate, "REQUIRED_MODULES", {"json": "json", "no_such_module": "no-such-package"})
    with pytest.raises(RuntimeMissing) as caught:
        find_interpreter(configured)
    assert caught.value.exit_code is ExitCode.RUNTIME
    assert "missing: no-such-package" in caught.value.detail
    assert "mistral-fetch[runtime]" in caught.value.hint


def test_a_torch_in_the_current_directory_is_not_pytorch(monkeypatch, tmp_path):
    (tmp_path / "torch_of_a_stranger.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(locate, "REQUIRED_MODULES", {"torch_of_a_stranger": "torch"})
    with pytest.raises(RuntimeMissing, match="cannot run a model"):
        find_interpreter(sys.executable)


@pytest.mark.parametrize(
    "text", ["exit 3", "sleep 30", "true", "echo torch"], ids=["fails", "hangs", "is silent", "says else"]
)
def test_an_interpreter_that_does_not_answer_is_named(monkeypatch, tmp_path, text):
    monkeypatch.setattr(locate, "PROBE_TIMEOUT_SECONDS", 0.5)
    configured = write_program(tmp_path / "python", "exec " + text if text != "exit 3" else text)
    with pytest.raises(RuntimeMissing, match="does not answer") as caught:
        find_interpreter(configured)
    assert configured in caught.value.what


def test_what_a_site_prints_before_the_answer_is_no_answer(monkeypatch, tmp_path):
    monkeypatch.setattr(locate, "REQUIRED_MODULES", {"json": "json"})
    configured = write_program(tmp_path / "python", f'echo welcome; exec "{sys.executable}" "$@"')
    assert find_interpreter(configured).executable == configured


def test_an_interpreter_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(RuntimeMissing, match="no-such-python does not answer"):
        find_interpreter(str(tmp_path / "no-such-python"))


def test_an_incomplete_installation_is_explained(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(RuntimeMissing, match="the bundled runtime is not installed"):
        runtime_package()
