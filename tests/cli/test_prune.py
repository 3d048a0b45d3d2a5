"""``prune``, ``pin`` and the sizes of ``list``: what goes, why, and how it comes back."""

from __future__ import annotations

import os
import shutil
import time

import pytest

from mistral_fetch.cli.pin import Shell, assignment
from mistral_fetch.config import Settings
from mistral_fetch.errors import UsageError
from mistral_fetch.ref import parse_ref
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.lock import locked
from mistral_fetch.store.snapshots import list_refs
from mistral_fetch.store.use import in_use, note_use
from mistral_fetch.transfer.pull import pull
from tests.cli.test_lock_sync import publish

DAY = 86_400.0


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """Three models, published and pulled; ``one`` and ``two`` have a file in common."""
    directory = tmp_path_factory.mktemp("filled")
    publish(directory, "one", w=b"one" * 20_000, shared=b"shared" * 30_000)
    publish(directory, "two", w=b"two" * 20_000, shared=b"shared" * 30_000)
    publish(directory, "three", w=b"three" * 20_000)
    settings = Settings(home=directory / "home", disk_reserve=0, hf_cache=False)
    for name in ("one", "two", "three"):
        pull(parse_ref(str(directory / f"{name}.meta4")), settings, lambda _event: None, StopSignal())
    return directory


@pytest.fixture
def cache(program, tmp_path, filled):
    """A cache with those three, and their manifests and files in the current directory."""
    shutil.copytree(filled, tmp_path, symlinks=True, dirs_exist_ok=True)
    layout = Layout(program.home)
    for record in list_refs(layout):
        note_use(layout, layout.snapshot(record.content_digest))
    return layout


def disk_use(directory):
    """Return what ``du`` says: the blocks of every file and directory, hard links once."""
    paths = [directory, *directory.rglob("*")]
    return sum({(s.st_dev, s.st_ino): s.st_blocks * 512 for s in map(os.lstat, paths)}.values())


def age(cache, name, seconds):
    """Let a model have been pulled and used some time ago."""
    record = next(record for record in list_refs(cache) if record.key.startswith(name))
    path = cache.ref(record.key, record.channel)
    then = time.time() - seconds
    path.write_text(path.read_text().replace(str(record.pulled_at), str(int(then))))
    os.utime(cache.used(record.content_digest), (then, then))
    return record


def models(program):
    return {model["ref"].partition(".")[0] for model in program("list", "--json").json["models"]}


def names(shown):
    return [(item["kind"], item["name"].partition(".")[0]) for item in shown.json["items"]]


def test_the_sizes_of_list_add_up_to_what_the_disk_says(program, cache):
    before = disk_use(cache.home)
    shown = program("list", "--json").json
    disk = shown["disk_bytes"]
    parts = [value for name, value in disk.items() if name not in {"total", "quota"}]
    assert sum(parts) == disk["total"] == before
    assert disk["models"] == sum(model["exclusive_bytes"] for model in shown["models"])
    shared = {model["ref"].partition(".")[0]: model["shared_bytes"] for model in shown["models"]}
    assert shared["one"] == shared["two"] == disk["shared"] >= 180_000
    assert shared["three"] == 0


def test_a_model_by_two_names_is_counted_once(program, cache, tmp_path):
    (tmp_path / "again.meta4").write_bytes((tmp_path / "three.meta4").read_bytes() + b"\n")
    (tmp_path / "again").symlink_to("three")
    assert program("pull", "again.meta4", "--quiet").code == 0
    disk = program("list", "--json").json["disk_bytes"]
    assert disk["total"] == disk_use(cache.home)
    assert sum(value for name, value in disk.items() if name not in {"total", "quota"}) == disk["total"]


def test_a_plan_is_printed_and_nothing_is_done(program, cache):
    age(cache, "one", 40 * DAY)
    before = sorted(cache.home.rglob("*"))
    for flags in ([], ["--dry-run"]):
        shown = program("prune", "--older-than", "30d", *flags)
        assert (shown.code, shown.err) == (0, "")
        assert "not used for 960h00m" in shown.out
        assert "nothing was changed" in shown.out
    assert sorted(cache.home.rglob("*")) == before


def test_what_was_not_used_goes_and_comes_back_whole(program, cache):
    directory = program("path", "one.meta4").out.strip()
    age(cache, "one", 40 * DAY)
    shown = program("prune", "--older-than", "30d", "--yes", "--json")
    assert (shown.code, names(shown)) == (0, [("model", "one")])
    assert models(program) == {"two", "three"}
    assert program("list", "--json").json["disk_bytes"]["trash"] > 60_000
    assert program("verify", "--quiet").code == 0
    back = program("prune", "--undo")
    assert (back.code, back.out.rpartition(" ")[2].strip()) == (0, directory)
    assert models(program) == {"one", "two", "three"}
    assert program("verify", "--quiet").code == 0
    assert not list(cache.trash.iterdir())
    assert program("prune", "--undo").code == 3


def test_a_use_makes_a_model_young_again(program, cache):
    for use in (["path", "one.meta4"], ["pull", "one.meta4"], ["env", "one.meta4"]):
        record = age(cache, "one", 40 * DAY)
        assert program(*use).code == 0
        assert time.time() - cache.used(record.content_digest).stat().st_mtime < DAY
        assert program("prune", "--older-than", "30d", "--json").json["items"] == []


def test_the_trash_is_emptied_when_its_time_is_over(program, cache, environment):
    shared = cache.home.glob("blobs/*/*/*")
    count = len(list(shared))
    age(cache, "one", 40 * DAY)
    program("prune", "--older-than", "30d", "--yes")
    assert names(program("prune", "--json")) == []
    assert len(list(cache.home.glob("blobs/*/*/*"))) == count
    shown = program("prune", "--keep-trash", "0s", "--yes", "--json")
    assert [kind for kind, _ in names(shown)] == ["trash"]
    assert shown.json["freed_bytes"] >= 60_000
    assert len(list(cache.home.glob("blobs/*/*/*"))) == count - 1  # not what the others share with it
    assert program("prune", "--undo").code == 3
    assert program("verify", "--quiet").code == 0


def test_without_trash_it_goes_at_once(program, cache):
    age(cache, "three", 40 * DAY)
    before = disk_use(cache.home)
    shown = program("prune", "--older-than", "30d", "--no-trash", "--yes", "--json")
    assert before - disk_use(cache.home) == pytest.approx(shown.json["freed_bytes"], abs=16_384)
    assert program("prune", "--undo").code == 3


def test_a_clock_that_jumps_empties_no_trash_and_removes_nothing_from_the_future(program, cache, environment):
    age(cache, "one", 40 * DAY)
    program("prune", "--older-than", "30d", "--yes")
    age(cache, "two", -400 * DAY)  # pulled while the clock was ahead
    now = time.time()
    assert names(program("prune", "--older-than", "0s", "--json")) == [("model", "three")]
    environment.setattr(time, "time", lambda: now + 365 * DAY)
    assert "trash" not in [kind for kind, _ in names(program("prune", "--json"))]
    environment.setattr(time, "time", lambda: 1000.0)
    assert names(program("prune", "--older-than", "1d", "--json")) == []


def test_the_least_recently_used_go_until_the_low_mark(program, cache):
    for days, name in enumerate(("three", "one", "two"), start=1):
        age(cache, name, days * DAY)
    total = program("list", "--json").json["disk_bytes"]["total"]
    assert names(program("prune", "--high", str(total + 100_000), "--low", "0", "--json")) == []
    shown = program("prune", "--high", str(total - 1), "--low", str(total - 150_000), "--json")
    assert names(shown) == [("model", "two"), ("model", "one")]
    # What the two share is freed with the second of them.
    assert shown.json["items"][1]["bytes"] - shown.json["items"][0]["bytes"] >= 180_000
    assert names(program("prune", "--high", "0%", "--json")) == [("model", n) for n in ("two", "one", "three")]
    assert names(program("prune", "--high", "100%", "--json")) == []


def test_the_quota_is_the_mark_by_default(program, cache, environment):
    environment.setenv("MISTRAL_FETCH_CACHE_QUOTA", "1kB")
    assert len(program("prune", "--json").json["items"]) == 3
    assert "of a quota of 1.0 kB" in program("list").out


def test_pins_hold_against_everything(program, cache):
    assert program("pin", "one.meta4", "two.meta4").code == 0
    for name in ("one", "two", "three"):
        age(cache, name, 40 * DAY)
    assert names(program("prune", "--older-than", "1d", "--high", "0", "--json")) == [("model", "three")]
    shown = program("rm", "one.meta4")
    assert (shown.code, shown.err.splitlines()[0]) == (13, "error: one.meta4 is pinned")
    assert "complete, pinned" in program("list").out
    assert program("unpin", "one.meta4").code == 0
    assert program("unpin", "one.meta4").code == 3
    assert program("rm", "one.meta4").code == 0
    assert program("pin", "one.meta4").code == 3


def test_a_model_that_is_read_or_pulled_is_kept(program, cache):
    records = {name: age(cache, name, 40 * DAY) for name in ("one", "two", "three")}
    pulling = cache.lock(records["two"].key)
    with (
        in_use(cache, cache.snapshot(records["one"].content_digest), "run one"),
        in_use(cache, cache.snapshot(records["one"].content_digest), "run one again"),
        locked(pulling, "pull two", 0.0, lambda _owner: None, lambda: None),
    ):
        age(cache, "one", 40 * DAY)
        shown = program("prune", "--older-than", "30d", "--no-trash", "--yes", "--json")
        assert names(shown) == [("model", "three")]
        assert {item["name"].partition(".")[0] for item in shown.json["kept"]} == {"one", "two"}
        assert any("run one" in item["used_by"] for item in shown.json["kept"])
        assert program("rm", "one.meta4").code == 11
        assert models(program) == {"one", "two"}
        assert list(cache.partials.iterdir()) == []
    assert program("verify", "--quiet").code == 0


def test_two_prunes_at_once_are_one_after_the_other(program, cache):
    with locked(cache.lock("prune"), "prune", 0.0, lambda _owner: None, lambda: None):
        assert program("prune", "--yes").code == 11
        assert program("prune").code == 0  # a plan needs no lock


def test_what_nobody_names_is_garbage(program, cache, environment):
    record = age(cache, "three", 0)
    cache.ref(record.key, record.channel).unlink()
    stray = cache.blob("ab" * 32)
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"x" * 5000)
    assert names(program("prune", "--json")) == [("model", record.content_digest[:16])]  # the blob is too new
    environment.setattr("mistral_fetch.store.prune.BLOB_AGE_SECONDS", -1.0)
    shown = program("prune", "--no-trash", "--yes", "--json")
    assert [kind for kind, _ in names(shown)] == ["blobs", "model"]
    assert not stray.exists()
    assert program("verify", "--quiet").code == 0
    assert program("list", "--json").json["disk_bytes"]["unused"] == 0


def test_unfinished_files_go_by_age_unless_somebody_fills_them(program, cache):
    for name in ("old", "busy", "new"):
        directory = cache.partial(name)
        directory.mkdir(parents=True)
        (directory / "data").write_bytes(b"x" * 9000)
        if name != "new":
            for path in (directory / "data", directory):
                os.utime(path, (1.7e9, 1.7e9))
    with locked(cache.partial("busy") / "lock", "fetch", 0.0, lambda _owner: None, lambda: None):
        for path in (cache.partial("busy"), cache.partial("busy") / "lock"):
            os.utime(path, (1.7e9, 1.7e9))
        shown = program("prune", "--yes", "--json")
    assert names(shown) == [("partial", "old")]
    assert [item["name"] for item in shown.json["kept"]] == ["busy"]
    assert {path.name for path in cache.partials.iterdir()} == {"busy", "new"}


@pytest.mark.parametrize(
    "flags",
    [["--older-than", "soon"], ["--high", "much"], ["--high", "101%"], ["--low", "5GB"], ["--yes", "--dry-run"], ["x"]],
    ids=" ".join,
)
def test_marks_that_make_no_sense_are_refused(program, cache, flags):
    shown = program("prune", *flags)
    assert (shown.code, shown.out, len(shown.err.splitlines())) == (2, "", 3)
    assert models(program) == {"one", "two", "three"}


def test_a_cache_that_is_not_there_is_not_made(program):
    assert program("prune").out.startswith("nothing to remove")
    assert program("prune", "--yes").code == 0
    assert not program.home.exists()


def test_a_quota_smaller_than_the_model_is_refused_before_a_byte(program, tmp_path, environment):
    publish(tmp_path, "one", w=b"one" * 20_000)
    environment.setenv("MISTRAL_FETCH_CACHE_QUOTA", "50kB")
    for flags in ([], ["--dry-run"]):
        shown = program("pull", "one.meta4", "--quiet", *flags)
        assert shown.code == 9
        assert "quota" in shown.out + shown.err
    assert not list(program.home.glob("blobs/*/*/*"))


VALUES = ["/plain/path", "/with space/and'quote", 'a"b$c`d\\e', "–‘typographic’ quotes"]


@pytest.mark.parametrize("value", [*VALUES, "two\nlines"])
def test_a_line_for_a_shell_sets_exactly_the_value(value):
    import subprocess

    line = assignment(Shell.SH, "X", value)
    told = subprocess.run(["sh", "-c", f'{line}\nprintf %s "$X"'], capture_output=True, check=True)
    assert told.stdout.decode() == value


def test_every_shell_has_its_own_quotes():
    assert assignment(Shell.FISH, "X", "a'b\\c") == "set -gx X 'a\\'b\\\\c'"
    assert assignment(Shell.POWERSHELL, "X", "a'b’c$d") == "$env:X = 'a''b’’c$d'"
    assert assignment(Shell.DOTENV, "X", "a b$c") == "X='a b$c'"
    assert assignment(Shell.DOTENV, "X", "a'b$c\"") == 'X="a\'b\\$c\\""'
    with pytest.raises(UsageError):
        assignment(Shell.DOTENV, "X", "two\nlines")


def test_env_tells_where_the_model_is(program, cache):
    directory = program("path", "one.meta4").out.strip()
    shown = program("env", "one.meta4")
    assert shown.out.splitlines()[0] == f"export MISTRAL_FETCH_MODEL={directory}"
    assert program("env", "one.meta4", "--name", "M", "--json").json["M"] == directory
    assert program("env", "one.meta4", "--name", "M;rm -rf").code == 2
    assert program("env", "four.meta4").code == 3
