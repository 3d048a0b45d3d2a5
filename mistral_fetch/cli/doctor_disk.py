"""What ``doctor`` finds out about the cache's disk, by trying each thing in a folder beside the cache's files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from mistral_fetch.cli.doctor_report import Finding, fail, good, warn
from mistral_fetch.units import format_size

# A 7B at 16 bits, as published.
_MODEL_BYTES = 14_500_000_000
# The longest names we give: a quoted reference and what is written beside it for a moment.
_NAME_BYTES = 220
_SKEW_SECONDS = 120.0
_LOCK_SECONDS = 30.0
_FIRST_YEAR = 2025
_DAY_SECONDS = 86400.0

# Another process, for flock(2) does not exclude where a network file system only pretends.
_TRIES_LOCK = """
import sys
from pathlib import Path
from mistral_fetch.system import try_lock
with open(sys.argv[1], "r+b") as file:
    print("answer", try_lock(file.fileno()))
"""


def cache(home: Path) -> Finding:
    """Look at the cache itself: its layout, and how much is in it."""
    from mistral_fetch.cli.render import count
    from mistral_fetch.store.gc import list_partials
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.snapshots import list_refs

    layout = Layout(home)
    layout.check_version()
    if home.exists() and not home.is_dir():
        return fail(f"{home} is not a directory", "choose another cache with --home DIR")
    if not home.is_dir():
        return good(f"{home}, not made yet", models=0, unfinished=0)
    models, unfinished = len(list_refs(layout)), len(list_partials(layout))
    began = f", {count(unfinished, 'unfinished file')}" if unfinished else ""
    return good(f"{home}, {count(models, 'model')}{began}", models=models, unfinished=unfinished)


def disk(home: Path, reserve_bytes: int) -> Finding:
    """Compare what is free with the reserve, and with what a 7B takes."""
    directory = existing(home)
    if not os.access(directory, os.W_OK):
        return fail(f"{directory} is not writable", "choose another cache with --home DIR")
    free = shutil.disk_usage(directory).free
    facts = {"free_bytes": free, "reserve_bytes": reserve_bytes}
    told = f"{format_size(free)} free, {format_size(reserve_bytes)} of them kept in reserve"
    if free < reserve_bytes:
        return fail(told, "free some space: mistral-fetch list shows what is kept; or --home DIR elsewhere", **facts)
    if free < reserve_bytes + _MODEL_BYTES:
        room = format_size(_MODEL_BYTES)
        return warn(f"{told}; a 7B takes {room}", "free some space, or --home DIR on a larger disk", **facts)
    return good(told, **facts)


def writes(home: Path) -> Finding:
    """Write, sync, rename over, sync the directory, and read back: what every step of the store rests on."""
    from mistral_fetch.store.durable import write_durably

    with _folder(home) as folder:
        started = time.perf_counter()
        for content in (b"old", b"new" * 1000):
            write_durably(folder / "file", content)
        seconds = time.perf_counter() - started
        if (folder / "file").read_bytes() != b"new" * 1000:
            return fail("a file does not hold what was written to it", "check the disk, or choose another --home DIR")
        if os.name != "nt" and _is_writable_after(folder / "file"):
            return warn("permissions do not hold here", "verified files cannot be protected from being written to")
    told = f"write, sync and rename work ({seconds * 500:.0f} ms a file)"
    return good(told, milliseconds=round(seconds * 500, 1))


def _is_writable_after(path: Path) -> bool:
    path.chmod(0o444)
    return bool(path.stat().st_mode & 0o222)


def links(home: Path) -> Finding:
    """Try what snapshots are made of (symbolic links, else hard links, else copies) and what adopting uses."""
    with _folder(home) as folder:
        kinds = {
            "symbolic links": _can(folder / "symbolic", lambda link: link.symlink_to("target"), folder),
            "hard links": _can(folder / "hard", lambda link: link.hardlink_to(folder / "target"), folder),
            "reflinks": _can_clone(folder),
        }
    able = [kind for kind, works in kinds.items() if works]
    facts = {kind.replace(" ", "_"): works for kind, works in kinds.items()}
    if not facts["symbolic_links"] and not facts["hard_links"]:
        return warn(
            "neither symbolic nor hard links: snapshots hold copies", "put the cache on another file system", **facts
        )
    return good(", ".join(able), **facts)


def _can(link: Path, make: object, folder: Path) -> bool:
    (folder / "target").write_bytes(b"x")
    try:
        make(link)  # type: ignore[operator]
        return link.read_bytes() == b"x"
    except (OSError, NotImplementedError):
        return False


def _can_clone(folder: Path) -> bool:
    from mistral_fetch.store.adopt import clone_file

    with (folder / "target").open("rb") as file:
        return clone_file(file.fileno(), folder / "clone")


def locks(home: Path) -> Finding:
    """Hold a lock and let another process try it."""
    from mistral_fetch.system import try_lock

    with _folder(home) as folder:
        path = folder / "lock"
        path.touch()
        with path.open("r+b") as file:
            if try_lock(file.fileno()) is None:
                return warn("there are no locks here", _WITHOUT_LOCKS, exclusive=False)
            answer = _ask_another_process(path)
    if not answer:
        return warn("another process could not be asked", "run doctor again when the machine is less busy")
    if "answer False" in answer:
        return good("flock excludes another process", exclusive=True)
    return warn("flock does not exclude another process (a network file system?)", _WITHOUT_LOCKS, exclusive=False)


def _ask_another_process(path: Path) -> str:
    import mistral_fetch

    package = Path(str(mistral_fetch.__file__)).parents[1]
    try:
        return subprocess.run(
            [sys.executable, "-c", _TRIES_LOCK, str(path)],
            env={**os.environ, "PYTHONPATH": str(package)},
            capture_output=True,
            text=True,
            timeout=_LOCK_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        ).stdout
    except subprocess.TimeoutExpired:
        return ""


_WITHOUT_LOCKS = "pulls stay correct; do not run rm or two pulls of one model at a time, or use a cache on a local disk"


def names(home: Path) -> Finding:
    """Find out how long a name may be, and whether case tells names apart."""
    with _folder(home) as folder:
        (folder / "Case").write_bytes(b"x")
        is_sensitive = not (folder / "case").exists()
        longest = os.pathconf(folder, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
        facts = {"case_sensitive": is_sensitive, "max_name_bytes": longest}
        try:
            (folder / ("n" * _NAME_BYTES)).write_bytes(b"x")
        except OSError as error:
            told = f"a name of {_NAME_BYTES} bytes is refused: {error.strerror}"
            return fail(told, "choose a cache on another file system with --home DIR", **facts)
    case = "case tells names apart" if is_sensitive else "case does not tell names apart (harmless here)"
    return good(f"{case}, names up to {longest} bytes", **facts)


def clock(home: Path, now: float | None = None) -> Finding:
    """Compare the clock with this version's year, our own files' time, and the time that the disk gives a new file."""
    now = time.time() if now is None else now
    with _folder(home) as folder:
        (folder / "file").write_bytes(b"x")
        skew = (folder / "file").stat().st_mtime - now
    today = datetime.fromtimestamp(now, timezone.utc)
    facts = {"utc": today.strftime("%Y-%m-%dT%H:%M:%SZ"), "disk_skew_seconds": round(skew, 1)}
    if today.year < _FIRST_YEAR:
        hint = "set the clock: certificates and signed catalogs would be refused"
        return fail(f"the clock says {today.year}, before this version was made", hint, **facts)
    if Path(__file__).stat().st_mtime - now > _DAY_SECONDS:
        hint = "set the clock; or the machine that installed it had a wrong one"
        return warn(f"the clock says {today:%Y-%m-%d}, before this program was installed", hint, **facts)
    if abs(skew) > _SKEW_SECONDS:
        hint = "set this machine's clock or the file server's: ages of locks and unfinished files would be wrong"
        return warn(f"the disk's clock is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}", hint, **facts)
    return good(f"{today:%Y-%m-%d %H:%M} UTC, and the disk agrees", **facts)


def existing(home: Path) -> Path:
    """Return the nearest directory that is there: a cache that is yet to be made will lie on its disk."""
    return next((path for path in (home, *home.parents) if path.is_dir()), Path("/"))


@contextmanager
def _folder(home: Path) -> Iterator[Path]:
    """Give a folder on the cache's disk that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(dir=existing(home), prefix=".mistral-fetch-doctor-"))
    try:
        yield folder
    finally:
        with suppress(OSError):
            shutil.rmtree(folder)
