"""``lock`` and ``sync``: from a list of models to a machine that has them, the same bytes each time."""

from __future__ import annotations

import json
import time

import pytest

from mistral_fetch.metalink import serialise_metalink
from mistral_fetch.simulators.hub import HubRepository, HubSimulator
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.lock import locked


def publish(directory, name, **files):
    """Write a model with its manifest, which needs no network."""
    publisher = PublisherSimulator({f"{path}.bin": data for path, data in files.items()}, name=name)
    for path, data in publisher.files.items():
        (directory / name).mkdir(exist_ok=True)
        (directory / name / path).write_bytes(data)
    (directory / f"{name}.meta4").write_bytes(serialise_metalink(publisher.manifest()))


@pytest.fixture
def wishes(program, tmp_path):
    """Two models, and a file that asks for both."""
    publish(tmp_path, "one", w=b"one" * 5000, shared=b"shared" * 2000)
    publish(tmp_path, "two", w=b"two" * 5000, shared=b"shared" * 2000)
    path = tmp_path / "mistral-fetch.toml"
    path.write_text('[[model]]\nref = "two.meta4"\n\n[[model]]\nref = "./one.meta4"\n')
    return path


def lock_of(wishes):
    return wishes.with_suffix(".lock")


def states(shown):
    return [model["state"] for model in shown.json["models"]]


def test_the_lock_has_every_file_and_is_the_same_each_time(program, wishes):
    shown = program("lock", "--quiet")
    assert (shown.code, shown.err) == (0, "")
    first = lock_of(wishes).read_bytes()
    assert first.count(b"[[model.file]]") == 4
    assert first.index(b"./one.meta4") < first.index(b'"two.meta4"')
    assert program("lock", "--json").json["changed"] is False
    lock_of(wishes).unlink()
    assert program("lock", "--quiet").code == 0
    assert lock_of(wishes).read_bytes() == first
    assert not (program.home / "blobs").exists()


def test_check_tells_whether_the_lock_matches(program, wishes):
    assert program("lock", "--check").code == 3
    program("lock", "--quiet")
    assert program("lock", "--check").code == 0
    wishes.write_text(wishes.read_text() + '\n[[model]]\nref = "hf:org/third"\n')
    shown = program("lock", "--check")
    assert shown.code == 13
    assert "hf:org/third is not locked" in shown.err
    wishes.write_text('[[model]]\nref = "two.meta4"\n')
    assert "./one.meta4 is not asked for" in program("lock", "--check").err


def test_a_sync_brings_everything_once(program, wishes):
    program("lock", "--quiet")
    first = program("sync", "--frozen", "--json", "--quiet")
    assert (first.code, states(first), first.json["changed"]) == (0, ["changed", "changed"], True)
    again = program("sync", "--frozen", "--json", "--quiet")
    assert (again.code, states(again), again.json["changed"]) == (0, ["ok", "ok"], False)
    assert again.json["totals"] == {
        "ok": 2, "changed": 0, "planned": 0, "failed": 0, "removed": 0, "received_bytes": 0,
    }  # fmt: skip
    assert program("path", "one.meta4").out.strip() == again.json["models"][1]["directory"]


def test_a_complete_sync_works_offline_and_whatever_the_clock_says(program, wishes, environment):
    program("lock", "--quiet")
    assert program("sync", "--quiet").code == 0
    environment.setattr(time, "time", lambda: 3600.0)  # 1970
    shown = program("sync", "--frozen", "--offline", "--json")
    assert (shown.code, states(shown)) == (0, ["ok", "ok"])


def test_a_sync_writes_the_lock_unless_it_is_frozen(program, wishes):
    assert program("sync", "--frozen").code == 3
    shown = program("sync", "--json", "--quiet")
    assert (shown.code, shown.json["lock_changed"]) == (0, True)
    assert program("lock", "--check").code == 0


def test_a_source_that_has_other_files_by_now_is_an_integrity_error(program, wishes, tmp_path):
    program("lock", "--quiet")
    locked = lock_of(wishes).read_bytes()
    publish(tmp_path, "one", w=b"ONE" * 5000, shared=b"shared" * 2000)
    shown = program("sync", "--frozen", "--json", "--quiet")
    assert (shown.code, states(shown)) == (32, ["changed", "failed"])
    error = shown.json["models"][1]["error"]
    assert error["kind"] == "digest-mismatch"
    assert "w.bin" in error["what"]
    assert lock_of(wishes).read_bytes() == locked
    assert program("lock", "--update", "./one.meta4", "--quiet").code == 0
    assert program("sync", "--frozen", "--json", "--quiet").code == 0


@pytest.mark.parametrize("change", ["more", "fewer", "longer"])
def test_no_file_more_or_less_or_longer_is_accepted(program, wishes, tmp_path, change):
    program("lock", "--quiet")
    files = {"w": b"one" * 5000, "shared": b"shared" * 2000}
    files |= {"more": {"extra": b"x"}, "fewer": {}, "longer": {"w": b"one" * 5001}}[change]
    if change == "fewer":
        del files["shared"]
    publish(tmp_path, "one", **files)
    shown = program("sync", "--frozen", "--json", "--quiet")
    assert shown.code == 32
    assert shown.json["models"][1]["error"]["exit_code"] == 32


def test_wrong_bytes_are_an_integrity_error_and_keep_no_other_model_back(program, wishes, tmp_path):
    program("lock", "--quiet")
    (tmp_path / "two" / "w.bin").write_bytes(b"TWO" * 5000)
    shown = program("sync", "--frozen", "--json", "--quiet")
    assert (shown.code, states(shown)) == (32, ["failed", "changed"])
    assert shown.json["totals"]["failed"] == 1
    assert program("path", "one.meta4").code == 0
    assert program("path", "two.meta4").code == 3


def test_a_plan_changes_nothing(program, wishes):
    program("lock", "--quiet")
    shown = program("sync", "--frozen", "--dry-run", "--json")
    assert (shown.code, states(shown)) == (0, ["planned", "planned"])
    assert shown.json["models"][0]["missing_bytes"] == 27_000
    assert not (program.home / "snapshots").exists()


def test_unlisted_models_are_pruned_but_pinned_ones_are_not(program, wishes, tmp_path):
    publish(tmp_path, "three", w=b"three" * 100)
    publish(tmp_path, "four", w=b"four" * 100)
    for name in ("three", "four"):
        assert program("pull", f"{name}.meta4", "--quiet").code == 0
    program("pin", "four.meta4")
    assert program("sync", "--json", "--quiet").json["removed"] == []
    planned = program("sync", "--prune", "--dry-run", "--json")
    assert [item["name"].partition("#")[0] for item in planned.json["removed"]] == ["three.meta4"]
    assert program("path", "three.meta4").code == 0
    pruned = program("sync", "--prune", "--json", "--quiet")
    assert pruned.json["totals"]["removed"] == 1
    assert [program("path", f"{n}.meta4").code for n in ("one", "two", "three", "four")] == [0, 0, 3, 0]
    assert program("prune", "--undo").code == 0
    assert program("path", "three.meta4").code == 0


def test_nothing_is_pruned_while_a_model_is_missing(program, wishes, tmp_path):
    publish(tmp_path, "three", w=b"three" * 100)
    program("pull", "three.meta4", "--quiet")
    (tmp_path / "one" / "w.bin").unlink()
    shown = program("sync", "--prune", "--json")
    assert (shown.code != 0, shown.json["removed"]) == (True, [])
    assert "nothing is pruned" in shown.err
    assert program("path", "three.meta4").code == 0


def test_policy_and_model_raise_the_floor(program, wishes):
    wishes.write_text('[policy]\nmin-assurance = "signed"\n[[model]]\nref = "one.meta4"\n')
    shown = program("lock", "--json")
    assert (shown.code, shown.json["failed"][0]["error"]["kind"]) == (33, "assurance-too-low")
    assert not lock_of(wishes).exists()
    wishes.write_text('[[model]]\nref = "one.meta4"\n')
    program("lock", "--quiet")
    wishes.write_text('[[model]]\nref = "one.meta4"\nmin-assurance = "signed"\n')
    assert program("lock", "--check").code == 13  # it was locked under a weaker rule


def test_a_pinned_key_has_to_be_there(program, wishes):
    wishes.write_text('[policy]\ntrust-keys = ["gone.pem"]\n[[model]]\nref = "one.meta4"\n')
    shown = program("sync", "--json")
    assert (shown.code, shown.json["models"][0]["error"]["kind"]) == (2, "config-error")


def test_files_are_adopted_from_the_policys_directories(program, wishes, tmp_path):
    program("lock", "--quiet")
    (tmp_path / "one").rename(tmp_path / "usb")
    wishes.write_text('[policy]\nfrom = ["usb"]\n[[model]]\nref = "./one.meta4"\n')
    program("lock", "--quiet")
    shown = program("sync", "--frozen", "--offline", "--json")
    assert (shown.code, states(shown)) == (0, ["changed"])


def test_the_same_files_under_another_name_are_named_not_fetched(program, wishes, tmp_path):
    assert program("pull", "one.meta4", "--quiet").code == 0
    program("lock", "--quiet")
    text = lock_of(wishes).read_text().replace('revision = "', 'revision = "0000', 1)
    start = text.index('revision = "0000')
    lock_of(wishes).write_text(text[: start + 28] + text[start + 32 :])
    (tmp_path / "one" / "w.bin").unlink()
    shown = program("sync", "--frozen", "--json", "--quiet")
    assert (shown.code, states(shown)[1]) == (0, "ok")


def test_another_process_s_lock_is_exit_code_11_or_waited_for(program, wishes):
    program("lock", "--quiet")
    key = program("lock", "--json").json["models"][0]["key"]
    layout = Layout(program.home)
    layout.prepare()
    with locked(layout.lock(key), "a long pull", 0.0, lambda _owner: None, lambda: None):
        shown = program("sync", "--frozen", "--json", "--lock-timeout", "0")
    assert (shown.code, sorted(states(shown))) == (11, ["changed", "failed"])


def test_a_lock_file_for_another_name_lies_beside_it(program, wishes, tmp_path):
    wishes.rename(tmp_path / "node.toml")
    assert program("lock", "--file", "node.toml", "--quiet").code == 0
    assert (tmp_path / "node.lock").is_file()


def test_a_branch_that_moved_changes_nothing_while_frozen(program, environment, tmp_path):
    files = {"config.json": b"{}", "model.safetensors": b"weights" * 4000}
    repository = HubRepository(files)
    with HubSimulator({"org/model": repository}) as hub:
        environment.setenv("HF_ENDPOINT", hub.base_url)
        (tmp_path / "mistral-fetch.toml").write_text('[[model]]\nref = "hf:org/model"\n')
        shown = program("lock", "--json", "--quiet")
        assert (shown.code, shown.json["models"][0]["key"]) == (0, "hf:org/model@main")
        asked = len(hub.requests())
        shown = program("sync", "--frozen", "--json", "--quiet")
        assert (shown.code, states(shown)) == (0, ["changed"])
        assert any("/main" in str(request) for request in hub.requests()[:asked])
        assert [request for request in hub.requests()[asked:] if "/main" in str(request)] == []
        asked = len(hub.requests())
        assert states(program("sync", "--frozen", "--json")) == ["ok"]  # small files are known by their git ids
        assert len(hub.requests()) == asked


def test_a_toml_that_cannot_be_used_is_exit_code_2_and_a_lock_20(program, wishes):
    program("lock", "--quiet")
    lock_of(wishes).write_text(lock_of(wishes).read_text().replace("size = ", "size = 1", 1))
    shown = program("sync", "--frozen")
    assert shown.code == 20
    assert "line 10, model[0].manifest" in shown.err
    assert program("lock", "--update", "--quiet").code == 0
    wishes.write_text("[[model]]\n")
    assert program("sync").code == 2
    wishes.unlink()
    assert program("sync").code == 3


def test_json_has_no_second_document_when_models_fail(program, wishes, tmp_path):
    (tmp_path / "one.meta4").unlink()
    shown = program("sync", "--json")
    assert shown.code == 3
    assert json.loads(shown.out)["totals"]["failed"] == 1
    shown = program("sync")
    assert shown.err.count("error: ") == 1


def test_one_model_by_two_references_is_refused(program, wishes, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "one.meta4").write_bytes((tmp_path / "one.meta4").read_bytes())
    wishes.write_text('[[model]]\nref = "one.meta4"\n[[model]]\nref = "folder/one.meta4"\n')
    shown = program("lock")
    assert (shown.code, lock_of(wishes).exists()) == (2, False)
    assert "two references" in shown.err


def test_two_syncs_at_once_end_well(program, wishes, service):
    program("lock", "--quiet")
    racing = [service("sync", "--frozen", "--quiet", "--wait") for _ in range(2)]
    for one in racing:
        code, _, err = one.end()
        assert code == 0, err
    assert states(program("sync", "--frozen", "--offline", "--json")) == ["ok", "ok"]
    assert program("verify", "--quiet").code == 0
    assert list((program.home / "partial").iterdir()) == []
