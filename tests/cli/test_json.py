"""``--json``: exactly one document on standard output, whatever happens."""

from __future__ import annotations

import json

import pytest

KEYS = {
    "list": {"models", "partials"},
    "list --catalog": {"models"},
    "path tiny.meta4": {"ref", "directory"},
    "pull tiny.meta4": {
        "ref",
        "directory",
        "content_digest",
        "channel",
        "assurance",
        "was_complete",
        "received_bytes",
    },
    "pull tiny.meta4 --dry-run": {"ref", "was_complete", "directory", "files", "total_bytes", "disk", "refused"},
    "repair tiny.meta4": {"ref", "directory", "dry_run", "repaired", "received_bytes", "discarded"},
    "verify": {"ok", "seconds", "bytes", "models"},
    "show tiny.meta4": {"cache"},
    "show mistral-7b": {"cache"},
    "rm tiny.meta4 --dry-run": {"freed_bytes", "deleted", "dry_run"},
    "publish tiny --out out": {"name", "content_digest", "manifest", "torrent", "plain_torrent", "checksums", "size"},
    "doctor": {"program", "cache", "disk", "packages", "runtime", "threads", "environment"},
}


@pytest.mark.parametrize("command", KEYS)
def test_results(program, pulled, command):
    shown = program(*command.split(), "--json")
    assert shown.code == 0, shown.err
    assert set(shown.json) >= KEYS[command]


def test_two_models_are_one_list(program, manifest):
    (manifest.parent / "second.meta4").write_bytes(manifest.read_bytes().replace(b'm:name="tiny"', b'm:name="two"'))
    shown = program("pull", "tiny.meta4", "second.meta4", "--json", "--quiet")
    assert [model["ref"].partition("#")[0] for model in shown.json] == ["tiny.meta4", "second.meta4"]


ERRORS = {
    "pull": (2, "usage-error"),
    "list --frobnicate": (2, "usage-error"),
    "pull mistral-7b --convert gguf": (2, "usage-error"),
    "pull tiny.meta4 --convert safetensors --dry-run": (2, "usage-error"),
    "quantize ./tiny --to int8": (2, "usage-error"),
    "quantize mistral-7b --to int3": (2, "usage-error"),
    "compare mistral-7b mistral-7b": (3, "not-in-cache"),
    "compare nowhere.meta4 ./tiny": (3, "not-found-error"),
    "pull one/two": (2, "ambiguous-ref"),
    "pull mistral-8b": (3, "unknown-model"),
    "path mistral-7b": (3, "not-in-cache"),
    "repair mistral-7b": (3, "not-in-cache"),
    "repair ./tiny": (2, "usage-error"),
    "show other.meta4": (3, "not-found-error"),
    "rm mistral-7b": (3, "not-in-cache"),
    "pull mistral-7b --offline": (6, "offline-refused"),
    "run mistral-7b hello --offline": (6, "offline-refused"),
    "chat mistral-7b": (2, "usage-error"),
    "publish nowhere --out out": (3, "unknown-model"),
    "publish empty --out out": (2, "publish-error"),
    "demo --offline": (2, "usage-error"),
    "pull bad.meta4": (20, "malformed-manifest"),
}


@pytest.mark.parametrize("command", ERRORS)
def test_errors(program, tmp_path, command):
    (tmp_path / "bad.meta4").write_text("<html>log in first</html>")
    (tmp_path / "empty").mkdir()
    shown = program(*command.split(), "--json")
    code, kind = ERRORS[command]
    error = shown.json["error"]
    assert (shown.code, error["exit_code"], error["kind"]) == (code, code, kind)
    assert all(error[line] and "\n" not in error[line] for line in ("what", "detail", "hint"))
    assert "error:" not in shown.err


def test_the_same_error_is_three_lines_for_people(program):
    error = program("path", "mistral-7b", "--json").json["error"]
    shown = program("path", "mistral-7b")
    assert shown.out == ""
    assert shown.err == f"error: {error['what']}\n  {error['detail']}\n  {error['hint']}\n"


def test_a_bug_is_a_document_too_and_keeps_its_traceback(program, environment):
    environment.setattr("mistral_fetch.store.inventory.take_inventory", lambda _layout: 1 / 0)
    shown = program("list", "--json")
    assert (shown.code, shown.json["error"]["kind"]) == (1, "bug")
    assert shown.json["error"]["detail"] == "ZeroDivisionError: division by zero"
    assert "Traceback" in shown.err


def test_progress_json_is_one_document_a_line_on_standard_error(program, manifest):
    shown = program("pull", "tiny.meta4", "--json", "--progress", "json")
    *events, note = shown.err.splitlines()
    names = [json.loads(line)["event"] for line in events]
    assert names[0] == "transfer-planned"
    assert names[-1] == "snapshot-ready"
    assert {"bytes-received", "progress", "file-verified"} <= set(names)  # nobody waits for hashes of files so small
    assert json.loads(note)["event"] == "notice"
    assert json.loads(note)["text"].endswith("received")
    assert shown.json["was_complete"] is False
