"""A conversion that is cut short at its n-th change of the disk, in a process of its own; run by test_derived.py.

``python tests/store/derived_faults.py MODE FOLDER [damaged]`` tries every change in turn and prints one JSON line for
each: how the cut conversion ended, what was wrong with the cache right after it, and what the next one made of it.
``damaged`` begins with a product in which a byte is wrong, so that it is made anew. Modes as in ``faults.py``.

The runtime is played by a function that writes the product as it does: hidden, synced, then named.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

from mistral_fetch.config import Settings
from mistral_fetch.errors import MistralFetchError
from mistral_fetch.events import ignore_events
from mistral_fetch.manifest import ModelInfo
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.store.derived import Product, find_derived
from mistral_fetch.store.durable import write_durably
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.snapshots import RefRecord, write_ref, write_snapshot
from mistral_fetch.transfer.convert import SAFETENSORS
from mistral_fetch.transfer.derive import derive, find_right
from tests.store.conftest import add_blobs
from tests.store.faults import CUT, Disk, in_child, leftovers

FILES = {"consolidated.00.pth": b"pickled" * 999, "params.json": b"{}", "docs/notes.txt": b"n"}
PRODUCT_NAME = SAFETENSORS.product
WEIGHTS = b"tensors" * 999
MANIFEST = PublisherSimulator(FILES, info=ModelInfo(name="tiny", licence="Apache-2.0")).manifest()
DIGEST = MANIFEST.content_digest().value
EXPECTED = {PRODUCT_NAME: WEIGHTS, "params.json": b"{}", "docs/notes.txt": b"n"}


def set_up(home: Path) -> Layout:
    """Put a model into a new cache."""
    layout = Layout(home)
    layout.prepare()
    add_blobs(layout, FILES)
    papers = [{"path": e.path, "size": e.size, "sha256": e.sha256, "assurance": "sha256"} for e in MANIFEST.files]
    write_snapshot(layout, MANIFEST, {"name": "tiny", "chat_template": None, "files": papers})
    write_ref(layout, RefRecord("tiny", "manifest", DIGEST, 1_700_000_000))
    return layout


def make(_snapshot: Path, draft: Path) -> Product:
    """Write the product as the runtime does."""
    write_durably(draft / PRODUCT_NAME, WEIGHTS)
    return Product(PRODUCT_NAME, len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())


def run(home: Path) -> None:
    derive(SAFETENSORS, "tiny", DIGEST, Settings(home=home, disk_reserve=0), ignore_events, StopSignal(), make)


def cut_short(home: Path, mode: str, step: int) -> str:
    """Convert with the n-th change struck; return how it ended. Runs in a child."""

    def strike(disk: Disk) -> None:
        if mode in {"kill", "power"}:
            if mode == "power":
                disk.strike_at = -1
                disk.lose_power()
            os._exit(CUT)
        raise OSError(getattr(errno, mode), os.strerror(getattr(errno, mode)))

    disk = Disk(home, step, strike)
    try:
        run(home)
    except MistralFetchError as error:
        return f"{error.kind} {int(error.exit_code)}"
    return "not reached" if disk.count < step else "complete"


def problems(home: Path) -> list[str]:
    """Return what breaks the one rule: what would be used is right."""
    found = find_right(Layout(home), SAFETENSORS, DIGEST, ignore_events, lambda: None)
    if found is None:
        return []
    wrong = [path for path, data in EXPECTED.items() if (found.directory / path).read_bytes() != data]
    return wrong + ([] if (found.directory / "LICENSE").is_file() else ["no licence"])


def try_again(home: Path) -> str:
    """Convert once more, as the next process does. Runs in a child."""
    run(home)
    return "complete" if find_derived(Layout(home), SAFETENSORS.key, DIGEST) else "not complete"


def damage(home: Path) -> None:
    """Convert, and let a byte of the product rot."""
    run(home)
    product = Layout(home).derived(SAFETENSORS.key, DIGEST) / PRODUCT_NAME
    product.chmod(0o644)
    product.write_bytes(b"?" + WEIGHTS[1:])


def main(mode: str, folder: Path, *, damaged: bool) -> None:
    for step in range(1, 200):
        home = folder / f"{mode}-{step}"
        set_up(home)
        if damaged:
            damage(home)
        first = in_child(lambda: cut_short(home, mode, step))  # noqa: B023 - called at once
        outcome = {"step": step, "first": first, "wrong": problems(home)}
        outcome |= {"second": in_child(lambda: try_again(home)), "wrong_later": problems(home)}  # noqa: B023
        print(json.dumps(outcome | {"left": leftovers(home)}), flush=True)
        shutil.rmtree(home)
        if first == "not reached":
            break


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), damaged="damaged" in sys.argv[3:])
