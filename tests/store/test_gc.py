from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from mistral_fetch.errors import StoreNotWritable
from mistral_fetch.store import gc
from mistral_fetch.store.gc import RemovalPlan, allocated_bytes, execute_removal, list_partials, plan_removal
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.partials import Partial
from mistral_fetch.store.snapshots import RefRecord, find_refs, find_snapshot, list_refs, write_ref
from tests.store.conftest import Keep, manifest_of

ONE = {"w.bin": b"one" * 100, "tokenizer.model": b"shared" * 50}
TWO = {"w.bin": b"two" * 100, "tokenizer.model": b"shared" * 50}


def remove(layout: Layout, ref: str) -> RemovalPlan:
    plan = plan_removal(layout, find_refs(layout, ref))
    execute_removal(layout, plan)
    return plan


def blobs(layout: Layout) -> set[bytes]:
    return {path.read_bytes() for path in layout.blobs.glob("*/*")}


def test_a_plan_touches_nothing(keep: Keep, layout: Layout) -> None:
    directory = keep(ONE)
    plan = plan_removal(layout, find_refs(layout, "model"))
    assert plan.snapshots == (directory,)
    assert plan.freed_bytes == 600
    assert find_snapshot(layout, directory.name) == directory


def test_a_model_goes_with_its_blobs(keep: Keep, layout: Layout) -> None:
    keep(ONE)
    assert remove(layout, "model").freed_bytes == 600
    assert list_refs(layout) == []
    assert blobs(layout) == set()
    assert list(layout.snapshots.iterdir()) == []
    assert list(layout.refs.iterdir()) == []


def test_a_blob_another_model_uses_is_kept(keep: Keep, layout: Layout) -> None:
    keep(ONE, "one")
    two = keep(TWO, "two")
    assert remove(layout, "one").freed_bytes == 300
    assert blobs(layout) == set(TWO.values())
    assert find_snapshot(layout, two.name) == two


def test_a_snapshot_with_another_name_is_kept(keep: Keep, layout: Layout) -> None:
    directory = keep(ONE, "one")
    keep(ONE, "the same by another name")
    assert remove(layout, "one").freed_bytes == 0
    assert find_snapshot(layout, directory.name) == directory
    assert [record.key for record in list_refs(layout)] == ["the same by another name"]


def test_a_damaged_snapshot_still_holds_on_to_its_blobs(keep: Keep, layout: Layout) -> None:
    keep(ONE, "one")
    (keep(TWO, "two") / "manifest.meta4").unlink()
    remove(layout, "one")
    assert blobs(layout) == set(TWO.values())


def test_a_dead_process_s_draft_does_not_keep_the_blobs(keep: Keep, layout: Layout) -> None:
    directory = keep(ONE)
    shutil.copytree(directory, layout.snapshots / f".{directory.name[:16]}-0123456789ab.tmp", symlinks=True)
    assert remove(layout, "model").freed_bytes == 600
    assert blobs(layout) == set()
    assert list(layout.snapshots.iterdir()) == []


def test_another_model_s_draft_keeps_its_blobs(keep: Keep, layout: Layout) -> None:
    two = keep(TWO, "two")
    two.rename(layout.snapshots / f".{two.name[:16]}-0123456789ab.tmp")
    keep(ONE, "one")
    remove(layout, "one")
    assert blobs(layout) == set(TWO.values())


def test_refs_go_first_so_that_no_name_is_left_without_its_bytes(
    keep: Keep, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = keep(ONE)
    steps: list[str] = []
    unlink, rmtree = Path.unlink, shutil.rmtree

    def watch_unlink(path: Path, missing_ok: bool = False) -> None:
        steps.append(path.relative_to(layout.home).parts[0] if path.name != ".complete" else ".complete")
        unlink(path, missing_ok=missing_ok)

    def watch_rmtree(path: Path) -> None:
        steps.append("snapshot")
        rmtree(path)

    monkeypatch.setattr(Path, "unlink", watch_unlink)
    monkeypatch.setattr(gc.shutil, "rmtree", watch_rmtree)
    remove(layout, "model")
    assert steps == ["refs", ".complete", "snapshot", "blobs", "blobs", "used"]
    assert not directory.exists()


def test_a_removal_cut_short_can_be_run_again(keep: Keep, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = keep(ONE)
    plan = plan_removal(layout, find_refs(layout, "model"))

    def refuse(*_: object) -> None:
        raise OSError(30, os.strerror(30))

    with monkeypatch.context() as broken:
        broken.setattr(gc.shutil, "rmtree", refuse)
        with pytest.raises(StoreNotWritable):
            execute_removal(layout, plan)
    assert find_snapshot(layout, directory.name) is None
    execute_removal(layout, plan)
    assert blobs(layout) == set()


def test_a_ref_whose_snapshot_is_gone_can_be_removed(layout: Layout) -> None:
    write_ref(layout, RefRecord("m", "hub", "0" * 64, 1))
    assert remove(layout, "m").freed_bytes == 0
    assert list_refs(layout) == []


def test_partials_are_counted_by_what_they_hold_not_by_their_holes(layout: Layout) -> None:
    partial = Partial(layout.partial("k"), 1 << 30)
    partial.prepare()
    partial.close()
    assert list_partials(layout) == [layout.partial("k")]
    assert allocated_bytes(layout.partial("k")) < 1 << 20
    execute_removal(layout, plan_removal(layout, [], list_partials(layout)))
    assert list_partials(layout) == []


def test_an_empty_cache_has_nothing_to_remove(own_home: Path) -> None:
    plan = plan_removal(Layout(own_home), [])
    assert plan == RemovalPlan((), (), (), (), 0)
    assert list_partials(Layout(own_home)) == []
    assert not own_home.exists()


def test_the_same_manifest_by_two_channels_is_one_snapshot(keep: Keep, layout: Layout) -> None:
    directory = keep(ONE)
    write_ref(layout, RefRecord("model", "torrent", manifest_of(ONE).content_digest().value, 1))
    plan = plan_removal(layout, find_refs(layout, "model"))
    assert len(plan.refs) == 2
    assert plan.snapshots == (directory,)
