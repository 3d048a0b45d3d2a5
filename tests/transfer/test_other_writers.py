"""Bytes that no piece hash vouches for, while another process may be writing them: never named without being read."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.store.journal import journal_paths
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.partials import Partial
from tests.transfer.conftest import Puller
from tests.transfer.engine import PIECE, shrink

WEIGHTS = random.Random(73).randbytes(9 * PIECE + 5)
PUBLISHER = PublisherSimulator({"weights.bin": WEIGHTS})


def of_a_living_process(journal: Path) -> None:
    journal.rename(journal.with_name(f"journal-{os.getppid()}-0123abcd.log"))


def of_another_boot(journal: Path) -> None:
    # A host that went down a moment ago, or another one that shares the file system.
    lines = journal.read_text().splitlines(keepends=True)
    head = lines[0].rpartition("boot=")[0] + "boot=another\n"
    journal.with_name("journal-4194304-0123abcd.log").write_text(head + "".join(lines[1:]))
    journal.unlink()


@pytest.mark.parametrize("missing", [(), (4,), tuple(range(9))], ids=["complete", "all but one", "one piece"])
@pytest.mark.parametrize("whose", [of_a_living_process, of_another_boot])
def test_what_another_process_recorded_and_may_still_write_becomes_no_blob(
    puller: Puller, monkeypatch: pytest.MonkeyPatch, whose: Callable[[Path], None], missing: tuple[int, ...]
) -> None:
    shrink(monkeypatch.setattr)
    manifest = PUBLISHER.manifest(piece_length=None)
    partial = Partial(Layout(puller.home).partial(f"sha256-{manifest.files[0].sha256}"), len(WEIGHTS))
    for index in set(range(partial.grid.count)) - set(missing):
        span = partial.grid.span(index)
        partial.put(index, WEIGHTS[span.start : span.end], "another process")
    partial.close()
    whose(*journal_paths(partial.directory))
    with PUBLISHER.serve(manifest) as mirror:
        result = puller(mirror.url("model.meta4"))
    puller.assert_exact(result, PUBLISHER)
