"""How fast does a model cross the air gap, beside `cp`, `sync` and `sha256sum` of the same bytes?

    python benchmarks/bundle.py WORK [--size 1GiB] [--rounds 3]

A file of random bytes becomes a model of a cache and a bundle on the same disk. Each round is a pair, in turn the one
and the other first: the bundle copied to a new place, synced and hashed by sha256sum, and ``bundle import`` into an
empty cache, from a file and from a pipe; then ``bundle create`` and ``bundle verify`` beside sha256sum, with a copy
and without one. All sources are in the page cache; our times include the start of Python. Needs the disk for four
copies. Ends with one line of JSON; ``ratio`` is the peer's time over ours, and ``peak_bytes`` our largest memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Stage, Summary, measure
from mistral_fetch.units import MIB, format_rate, format_size, parse_size

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = [sys.executable, "-m", "mistral_fetch"]
ENVIRONMENT = {"PYTHONPATH": str(ROOT)}
PEER = {
    "import": "cp, sync, sha256sum",
    "pipe": "cp, sync, sha256sum",
    "create": "sha256sum, cp, sync",
    "verify": "sha256sum",
}
SHELL = {
    "cp, sync, sha256sum": 'cp "$1" "$2" && sync "$2" && sha256sum "$2"',
    "sha256sum, cp, sync": 'sha256sum "$1" && cp "$1" "$2" && sync "$2"',
    "sha256sum": 'sha256sum "$1"',
}


def ours(*arguments: str) -> list[str]:
    """Return the command line of our own program, quiet."""
    return [*PROGRAM, *arguments, "--quiet"]


def prepare(work: Path, size: int) -> Path:
    """Make a model of ``size`` bytes complete in a cache, and its bundle; return the bundle."""
    source = work / "model"
    source.mkdir(parents=True)
    chance = random.Random(1)
    with (source / "weights.bin").open("wb") as file:
        for start in range(0, size, 8 * MIB):
            file.write(chance.randbytes(min(8 * MIB, size - start)))
    measure("publish", ours("publish", str(source), "--out", str(work)), ENVIRONMENT)
    measure("pull", ours("pull", str(work / "model.meta4"), "--home", str(work / "cache")), ENVIRONMENT)
    shutil.rmtree(source)
    bundle = work / "model.tar"
    create(work, bundle)
    return bundle


def create(work: Path, bundle: Path) -> Stage:
    """Write the bundle."""
    home = str(work / "cache")
    return measure(
        "bundle create",
        ours("bundle", "create", str(work / "model.meta4"), "-o", str(bundle), "--home", home),
        ENVIRONMENT,
    )


def run_ours(name: str, work: Path, bundle: Path) -> Stage:
    """Do one of our four jobs from the same state of the disk."""
    scratch = fresh(work)
    if name == "create":
        return create(work, scratch / "out.tar")
    if name == "verify":
        return measure("bundle verify", ours("bundle", "verify", str(bundle)), ENVIRONMENT)
    take = ours("bundle", "import", "-" if name == "pipe" else str(bundle), "--home", str(scratch / "home"))
    if name == "import":
        return measure("bundle import", take, ENVIRONMENT)
    return measure("bundle import, piped", ["sh", "-c", 'cat "$0" | "$@"', str(bundle), *take], ENVIRONMENT)


def run_peer(name: str, work: Path, bundle: Path) -> Stage:
    """Do what people do without us."""
    peer = PEER[name]
    return measure(peer, ["sh", "-c", SHELL[peer], "sh", str(bundle), str(fresh(work) / "copy")])


def fresh(work: Path) -> Path:
    """Return an empty directory, with nothing left to write back."""
    scratch = work / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    os.sync()
    return scratch


def main() -> None:
    """Measure the pairs and print one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("work", type=Path, help="a directory on the disk to measure; it is made and removed")
    parser.add_argument("--size", type=parse_size, default=parse_size("1GiB"))
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    work = given.work.absolute()
    bundle = prepare(work, given.size)
    try:
        result = {name: compare(name, work, bundle, given.size, given.rounds) for name in PEER}
    finally:
        shutil.rmtree(work)
    print(json.dumps({"size": given.size, "rounds": given.rounds, **result}))


def compare(name: str, work: Path, bundle: Path, size: int, rounds: int) -> dict[str, object]:
    """Run both, the one and the other first in turn, and print the medians."""
    pairs = []
    for number in range(rounds):
        order = (run_ours, run_peer) if number % 2 == 0 else (run_peer, run_ours)
        found = {run: run(name, work, bundle) for run in order}
        pairs.append((found[run_ours], found[run_peer]))
    mine, theirs = (Summary.of([pair[side].seconds for pair in pairs]) for side in (0, 1))
    ratio = Summary.of([peer.seconds / own.seconds for own, peer in pairs])
    peak = max(own.peak_bytes for own, _ in pairs)
    print(
        f"{name:8} {mine.median:6.2f} s ({format_rate(size / mine.median)}) beside {PEER[name]} {theirs.median:6.2f} s:"
        f" ratio {ratio.median} ({ratio.low} to {ratio.high}), peak {format_size(peak)}"
    )
    return {"seconds": vars(mine), "peer_seconds": vars(theirs), "ratio": vars(ratio), "peak_bytes": peak}


if __name__ == "__main__":
    main()
