"""What surrounds a conversion: whether there is something to convert, room, another process, leftovers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mistral_fetch.config import Settings
from mistral_fetch.errors import NotInCache, OutOfSpace, StoreLocked, UsageError
from mistral_fetch.events import Event, Notice, ignore_events
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.store.derived import Product, find_derived_drafts
from mistral_fetch.store.gc import execute_removal, plan_removal
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.lock import locked
from mistral_fetch.store.snapshots import find_refs, write_snapshot
from mistral_fetch.transfer import derive as derive_module
from mistral_fetch.transfer.convert import SAFETENSORS
from mistral_fetch.transfer.derive import Derivation, derive, find_right
from tests.store.conftest import add_blobs
from tests.store.derived_faults import DIGEST, FILES, make, set_up

Convert = Callable[..., Derivation]


@pytest.fixture
def layout(own_home: Path) -> Layout:
    return set_up(own_home)


@pytest.fixture
def made() -> list[Path]:
    """Where products were made, in order."""
    return []


@pytest.fixture
def run(layout: Layout, made: list[Path]) -> Convert:
    """Return a function that converts the model with settings of a test's own."""

    def run_it(digest: str = DIGEST, report: Callable[[Event], None] = lambda _event: None, **settings: Any) -> Any:
        def counted(snapshot: Path, draft: Path) -> Product:
            made.append(draft)
            return make(snapshot, draft)

        chosen = Settings(home=layout.home, **{"disk_reserve": 0, "lock_timeout": 0.0, **settings})
        return derive(SAFETENSORS, "tiny", digest, chosen, report, StopSignal(), counted)

    return run_it


def test_the_second_conversion_does_nothing(run: Convert, made: list[Path], layout: Layout) -> None:
    first, second = run(), run()
    assert (first.was_complete, second.was_complete) == (False, True)
    assert len(made) == 1
    assert first.directory == second.directory
    assert first.product == second.product
    found = find_right(layout, SAFETENSORS, DIGEST, ignore_events, lambda: None)
    assert found is not None
    assert found.directory == first.directory


def test_it_is_told_before_it_begins(run: Convert, layout: Layout) -> None:
    told: list[Event] = []
    run(report=told.append)
    assert told == [Notice("tiny: writing 7.0 kB of weights as safetensors")]


def keep(layout: Layout, files: dict[str, bytes]) -> str:
    manifest = PublisherSimulator(files).manifest()
    add_blobs(layout, files)
    write_snapshot(layout, manifest, {"files": []})
    return manifest.content_digest().value


@pytest.mark.parametrize(
    "files, found",
    [
        ({"model.safetensors": b"s", "config.json": b"{}"}, "model.safetensors"),
        ({"consolidated.00.pth": b"p", "consolidated.safetensors": b"s"}, "consolidated.safetensors"),
        ({"weights.bin": b"b"}, "no weights in that layout"),
        ({"sub/consolidated.00.pth": b"p"}, "no weights in that layout"),
    ],
)
def test_a_model_without_a_pickle_to_convert_is_refused(
    files: dict[str, bytes], found: str, run: Convert, layout: Layout, made: list[Path]
) -> None:
    digest = keep(layout, files)
    with pytest.raises(UsageError, match="no weights that need converting") as caught:
        run(digest)
    assert found in caught.value.detail
    assert made == []


def test_a_disk_without_room_for_a_second_copy_is_refused_first(
    run: Convert, made: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    size = len(FILES["consolidated.00.pth"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(size + 499))
    with pytest.raises(OutOfSpace, match="not enough space"):
        run(disk_reserve=500)
    assert made == []
    assert not run(disk_reserve=499).was_complete


def test_a_model_that_was_removed_meanwhile_is_told(run: Convert, layout: Layout) -> None:
    execute_removal(layout, plan_removal(layout, find_refs(layout, "tiny")))
    with pytest.raises(NotInCache):
        run()


def test_two_processes_do_not_convert_at_once(run: Convert, layout: Layout, made: list[Path]) -> None:
    with (
        locked(layout.derived_lock(DIGEST), "convert tiny", 0.0, lambda _owner: None, lambda: None),
        pytest.raises(StoreLocked, match="another process"),
    ):
        run()
    assert made == []


def test_who_waited_finds_what_the_other_one_made(
    run: Convert, layout: Layout, made: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([None])

    def not_yet(*arguments: Any) -> Derivation | None:
        return next(answers, find_right(*arguments))

    run()
    monkeypatch.setattr(derive_module, "find_right", not_yet)
    assert run().was_complete
    assert len(made) == 1


def test_what_a_killed_process_left_makes_room_first(run: Convert, layout: Layout, made: list[Path]) -> None:
    draft = layout.derived(SAFETENSORS.key, "x").with_name(f".{DIGEST[:16]}-0123456789ab.tmp")
    draft.mkdir(parents=True)
    (draft / "consolidated.safetensors").write_bytes(b"half")
    run()
    assert find_derived_drafts(layout, DIGEST) == []
