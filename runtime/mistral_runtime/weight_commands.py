"""The commands `convert`, `quantize` and `digest`: call one function, print its result, or its error."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mistral_runtime.convert import convert
from mistral_runtime.digest import SnapshotDigest, digest_snapshot
from mistral_runtime.json_result import tell
from mistral_runtime.machine import peak_resident_bytes
from mistral_runtime.quantize import quantize_snapshot, show_progress
from mistral_runtime.recipe import Recipe


def run_convert(snapshot: Path, out: Path, *, reserve_bytes: int, as_json: bool) -> int:
    """Convert and tell what was written; return the exit code."""

    def work() -> tuple[dict[str, Any], str]:
        done = convert(snapshot, out, reserve_bytes=reserve_bytes)
        text = f"{done.path}: {done.tensors} tensors, {done.size} bytes, sha256:{done.sha256}"
        return done.fields(), text

    return tell(work, as_json=as_json)


def run_quantize(
    snapshot: Path, out: Path, kind: str, group: int | None, *, reserve_bytes: int, as_json: bool, quiet: bool
) -> int:
    """Quantise and tell what was written; return the exit code."""

    def work() -> tuple[dict[str, Any], str]:
        recipe = Recipe.of(kind, group)
        progress = ignore_progress if quiet else show_progress(f"quantising to {kind}")
        done = quantize_snapshot(snapshot, out, recipe, reserve_bytes=reserve_bytes, progress=progress)
        text = (
            f"{done.path}: {done.tensors} matrices as {recipe.name}, {done.size} bytes, "
            f"relative error {done.relative_error:.4f}, sha256:{done.sha256}"
        )
        return done.fields(), text

    return tell(work, as_json=as_json)


def ignore_progress(_done: int, _total: int) -> None:
    """Show nothing of how far the work is."""


def run_digest(directories: Sequence[Path], *, as_json: bool) -> int:
    """Print the digests of every tensor of each directory; return the exit code."""

    def work() -> tuple[dict[str, Any], str]:
        started = time.perf_counter()
        found = [digest_snapshot(directory) for directory in directories]
        fields = {
            "snapshots": [snapshot.fields() for snapshot in found],
            "seconds": round(time.perf_counter() - started, 6),
            "peak_rss_bytes": peak_resident_bytes(),
        }
        return fields, "\n".join(map(_digest_text, found))

    return tell(work, as_json=as_json)


def _digest_text(snapshot: SnapshotDigest) -> str:
    lines = [f"{t.sha256}  {t.dtype} {list(t.shape)}  {name!r}" for name, t in snapshot.tensors.items()]
    return "\n".join([*lines, f"{snapshot.sha256}  all {len(lines)} tensors of {snapshot.directory}"])
