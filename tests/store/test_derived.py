"""What was made of a snapshot: laid out like one, seen whole or not at all, and gone with it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from mistral_fetch.errors import StoreError, StoreLocked
from mistral_fetch.events import ignore_events
from mistral_fetch.store.derived import (
    Product,
    Recipe,
    describe_derived,
    discard_derived,
    find_derived,
    find_derived_drafts,
    list_derived,
    write_derived,
)
from mistral_fetch.store.gc import execute_removal, held_for_removal, plan_removal
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.lock import locked
from mistral_fetch.store.snapshots import RefRecord, find_refs, load_manifest, load_provenance, write_ref
from mistral_fetch.store.verify import verify_snapshot
from tests.store.derived_faults import DIGEST, EXPECTED, FILES, WEIGHTS, make, set_up

ROOT = Path(__file__).parents[2]
RECIPE = Recipe("recipe-1", "consolidated-safetensors", ["consolidated.00.pth"])


@pytest.fixture
def layout(own_home: Path) -> Layout:
    return set_up(own_home)


def write(layout: Layout, recipe: Recipe = RECIPE) -> Path:
    return write_derived(layout, recipe, DIGEST, lambda draft: make(layout.snapshot(DIGEST), draft))


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_product_stands_beside_everything_but_what_it_replaces(layout: Layout) -> None:
    directory = write(layout)
    assert directory == layout.home / "derived" / "recipe-1" / DIGEST == find_derived(layout, "recipe-1", DIGEST)
    found = files_of(directory)
    assert found.keys() - EXPECTED.keys() == {"LICENSE", "PROVENANCE.json", "manifest.meta4", ".complete"}
    assert {path: found[path] for path in EXPECTED} == EXPECTED
    assert found["LICENSE"] == (layout.snapshot(DIGEST) / "LICENSE").read_bytes()


def test_what_is_not_made_is_linked_and_what_is_made_is_read_only(layout: Layout) -> None:
    directory = write(layout)
    for path in ("params.json", "docs/notes.txt"):
        blob = layout.blob(hashlib.sha256(FILES[path]).hexdigest())
        assert (directory / path).resolve() == blob.resolve()
        assert not (directory / path).readlink().is_absolute()
    product = directory / "consolidated.safetensors"
    assert not product.is_symlink()
    assert product.stat().st_mode & 0o777 == 0o444


def test_the_papers_say_what_it_was_made_from(layout: Layout) -> None:
    directory = write(layout)
    papers = load_provenance(directory)
    source = FILES["consolidated.00.pth"]
    assert papers["derived_from"] == {
        "recipe": "recipe-1",
        "content_digest": f"sha256:{DIGEST}",
        "files": [
            {"path": "consolidated.00.pth", "size": len(source), "sha256": hashlib.sha256(source).hexdigest()},
        ],
    }
    assert papers["chat_template"] is None  # what the runtime relies on
    assert papers["weight_format"] == "consolidated-safetensors"
    made = papers["files"][0]
    assert (made["path"], made["size"], made["assurance"]) == ("consolidated.safetensors", len(WEIGHTS), "sha256")
    assert made["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert {file["path"] for file in papers["files"]} == EXPECTED.keys()
    manifest = load_manifest(directory)
    assert papers["content_digest"] == str(manifest.content_digest())
    assert manifest.info.licence == "Apache-2.0"


def test_it_is_verified_like_a_snapshot(layout: Layout) -> None:
    directory = write(layout)
    _, verdicts = verify_snapshot(directory, ignore_events, lambda: None)
    assert [verdict.path for verdict in verdicts] == sorted(EXPECTED)
    assert all(verdict.is_good for verdict in verdicts)
    product = directory / "consolidated.safetensors"
    product.chmod(0o644)
    product.write_bytes(WEIGHTS[:-1] + b"?")
    _, verdicts = verify_snapshot(directory, ignore_events, lambda: None)
    assert [verdict.path for verdict in verdicts if not verdict.is_good] == ["consolidated.safetensors"]


def test_a_product_that_is_not_what_was_said_is_refused(layout: Layout) -> None:
    def lie(draft: Path) -> Product:
        product = make(layout.snapshot(DIGEST), draft)
        return Product(product.path, product.size + 1, product.sha256)

    with pytest.raises(StoreError, match="did not leave what it said"):
        write_derived(layout, RECIPE, DIGEST, lie)
    assert list(layout.derivations.rglob("*")) == [layout.derivations / "recipe-1"]


def test_a_link_in_the_product_s_place_is_refused(layout: Layout) -> None:
    def link(draft: Path) -> Product:
        product = make(layout.snapshot(DIGEST), layout.home)
        (draft / product.path).symlink_to(layout.home / product.path)
        return product

    with pytest.raises(StoreError, match="did not leave what it said"):
        write_derived(layout, RECIPE, DIGEST, link)


def test_a_failed_recipe_leaves_nothing(layout: Layout) -> None:
    def fail(draft: Path) -> Product:
        (draft / "half").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_derived(layout, RECIPE, DIGEST, fail)
    assert find_derived(layout, "recipe-1", DIGEST) is None
    assert find_derived_drafts(layout, DIGEST) == []


def test_what_lost_a_file_is_not_found_and_made_again(layout: Layout) -> None:
    directory = write(layout)
    (directory / "consolidated.safetensors").unlink()
    assert find_derived(layout, "recipe-1", DIGEST) is None
    assert describe_derived(layout, DIGEST)[0]["state"] == "damaged"
    assert write(layout) == directory
    assert files_of(directory)["consolidated.safetensors"] == WEIGHTS


def test_who_comes_second_takes_what_the_first_one_made(layout: Layout) -> None:
    def race(draft: Path) -> Product:
        write(layout)
        return make(layout.snapshot(DIGEST), draft)

    directory = write_derived(layout, RECIPE, DIGEST, race)
    assert directory == find_derived(layout, "recipe-1", DIGEST)
    assert find_derived_drafts(layout, DIGEST) == []


def test_two_recipes_stand_side_by_side(layout: Layout) -> None:
    write(layout)
    second = write(layout, Recipe("a/b", "consolidated-safetensors", RECIPE.replaced))
    assert second.parent.name == "a%2Fb"
    assert [made["recipe"] for made in describe_derived(layout, DIGEST)] == ["a/b", "recipe-1"]


# --- removal ---------------------------------------------------------------------------------------------------------


def remove(layout: Layout, key: str = "tiny") -> int:
    with held_for_removal(layout, plan_removal(layout, find_refs(layout, key))):
        plan = plan_removal(layout, find_refs(layout, key))
        execute_removal(layout, plan)
    return plan.freed_bytes


def test_it_goes_with_its_snapshot_and_is_counted(layout: Layout) -> None:
    own = describe_derived(layout, DIGEST)
    without = plan_removal(layout, find_refs(layout, "tiny")).freed_bytes
    directory = write(layout)
    allocated = (directory / "consolidated.safetensors").stat().st_blocks * 512
    assert own == []
    freed = remove(layout)
    assert freed >= without + allocated
    # The links in it are no bytes of its own.
    assert freed < without + allocated + 64 * 1024
    assert list(layout.derivations.rglob(DIGEST)) == []
    assert list(layout.blobs.glob("*/*")) == []
    assert list((layout.home / "locks").iterdir()) == []


def test_it_stays_while_another_name_leads_to_its_snapshot(layout: Layout) -> None:
    directory = write(layout)
    write_ref(layout, RefRecord("other", "manifest", DIGEST, 1))
    remove(layout)
    assert find_derived(layout, "recipe-1", DIGEST) == directory
    assert files_of(directory).keys() >= EXPECTED.keys()
    remove(layout, "other")
    assert list_derived(layout, DIGEST) == []


def test_a_killed_conversion_s_draft_goes_with_the_snapshot(layout: Layout) -> None:
    draft = layout.derivations / "recipe-1" / f".{DIGEST[:16]}-0123456789ab.tmp"
    draft.mkdir(parents=True)
    (draft / "consolidated.safetensors").write_bytes(bytes(1 << 20))
    assert list_derived(layout, DIGEST) == []
    assert remove(layout) >= 1 << 20
    assert not draft.exists()


def test_a_model_that_is_being_converted_is_not_removed(layout: Layout) -> None:
    with locked(layout.derived_lock(DIGEST), "convert", 0.0, lambda _owner: None, lambda: None):
        with pytest.raises(StoreLocked):
            remove(layout)
        assert find_refs(layout, "tiny")
    remove(layout)
    assert find_refs(layout, "tiny") == []


def test_what_is_discarded_stops_being_complete_first(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write(layout)

    def refuse(*_: object) -> None:
        raise OSError(30, os.strerror(30))

    with monkeypatch.context() as broken:
        broken.setattr("mistral_fetch.store.derived.shutil.rmtree", refuse)
        with pytest.raises(StoreError):
            discard_derived(directory)
    assert find_derived(layout, "recipe-1", DIGEST) is None
    discard_derived(directory)
    assert not directory.exists()


# --- every change of the disk struck once ----------------------------------------------------------------------------


def strike(mode: str, folder: Path, *extra: str) -> list[dict[str, Any]]:
    argv = [sys.executable, str(Path(__file__).with_name("derived_faults.py")), mode, str(folder), *extra]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(argv, env=environment, check=True, stdout=subprocess.PIPE, timeout=170)
    return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.mark.parametrize("begins", ["nothing", "damaged"])
@pytest.mark.parametrize(
    "mode, ends",
    [
        ("kill", {"cut"}),
        ("power", {"cut"}),
        ("ENOSPC", {"out-of-space 9", "complete"}),
    ],
)
def test_a_conversion_struck_at_any_change_leaves_nothing_that_looks_complete(
    mode: str, ends: set[str], begins: str, tmp_path: Path
) -> None:
    shared = Path("/dev/shm")  # in memory where there is such a place: dozens of small caches
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else tmp_path) as folder:
        outcomes = strike(mode, Path(folder), begins)
    assert len(outcomes) > 20
    assert outcomes[-1]["first"] == "not reached"
    assert {outcome["first"] for outcome in outcomes[:-1]} <= ends
    assert [o for o in outcomes if o["wrong"] or o["wrong_later"] or o["second"] != "complete"] == []
    assert {path for outcome in outcomes for path in outcome["left"] if "VERSION" not in path} == set()
