"""Pins: refs that nothing but their owner removes."""

from __future__ import annotations

import json
import time

from mistral_fetch.store.durable import disk_errors, fsync_directory, write_durably
from mistral_fetch.store.layout import Layout


def write_pin(layout: Layout, key: str) -> bool:
    """Pin a ref, durably, and return whether it was not pinned before.

    Raises:
        StoreError: The disk refused.
    """
    if is_pinned(layout, key):
        return False
    with disk_errors("pinning a model", layout.pin(key)):
        write_durably(layout.pin(key), json.dumps({"ref": key, "pinned_at": int(time.time())}).encode())
    return True


def remove_pin(layout: Layout, key: str) -> bool:
    """Take a pin away, durably, and return whether there was one.

    Raises:
        StoreError: The disk refused.
    """
    path = layout.pin(key)
    with disk_errors("unpinning a model", path):
        if not path.exists():
            return False
        path.unlink(missing_ok=True)
        fsync_directory(path.parent)
    return True


def is_pinned(layout: Layout, key: str) -> bool:
    """Return whether a ref is pinned. The file's name says it all: one whose content is damaged still pins."""
    return layout.pin(key).exists()
