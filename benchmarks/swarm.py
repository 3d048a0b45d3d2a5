"""How fast is a torrent, one seed to one leech? Ours beside aria2 and Transmission, on the same plain v1 torrent.

    python benchmarks/swarm.py WORK [--size 4GiB] [--rounds 3] [--skip transmission]

Seconds are whole processes; ours verifies every piece, proves it on the disk, hashes the file and publishes it.
Leeches are compared at one seed (ours), seeds at one leech (ours), and both programs that can fetch from a web seed
alone (nginx). The order of the programs rotates from round to round, and ratios are taken within a round. The last
row is what a pull does with a manifest that names a mirror and a torrent, with ``--via auto``. Beside them stand the
ceilings: curl of the same file from nginx, and hashing it once. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import (
    Stage,
    Summary,
    free_port,
    measure,
    missing_programs,
    nginx,
    publish,
    random_file,
)
from benchmarks.torrent_programs import LEECHES, OURS, SEEDS, Leech, seed_that_comes
from mistral_fetch.simulators.tracker import TrackerSimulator
from mistral_fetch.units import GIB, format_rate, format_size, parse_size

FILE = "weights.bin"
CURL = "curl from nginx"


@dataclass(frozen=True)
class Run:
    """One process."""

    name: str
    round: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class World:
    """What is shared by all runs: the files, the torrents of them, the tracker and the web server's address."""

    work: Path
    model: Path
    torrent: Path
    web_torrent: Path
    manifest: Path
    tracker: TrackerSimulator
    url: str

    @property
    def size(self) -> int:
        """Return the file's bytes."""
        return (self.model / FILE).stat().st_size


def main() -> None:
    """Measure, print a table and one line of JSON."""
    given = _parse()
    wanted = {"aria2c": "aria2c", "transmission": "transmission-cli"}
    programs = [program for name, program in wanted.items() if name not in given.skip]
    if missing := missing_programs("nginx", "curl", *programs):
        sys.exit(f"not installed: {', '.join(missing)}")
    with TrackerSimulator() as tracker, prepare(given.work.absolute(), given.size, tracker) as world:
        contests = [contest for contest in make_contests(world, given.skip) if given.only in contest[0]]
        runs = [run for number in range(given.rounds) for run in run_round(world, contests, number)]
    report(runs, world.size, given.rounds)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("work", type=Path, help="a directory with room for the file twice")
    parser.add_argument("--size", type=parse_size, default=4 * GIB, help="of the file (default: 4GiB)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip", action="append", default=[], choices=["aria2c", "transmission"])
    parser.add_argument("--only", default="", help="only rows whose name has this in it")
    return parser.parse_args()


@contextlib.contextmanager
def prepare(work: Path, size: int, tracker: TrackerSimulator) -> Iterator[World]:
    """Write and publish the file: once for a swarm with a tracker, once with a web seed."""
    model = work / "served" / "model"
    random_file(model / FILE, size)
    port = free_port()
    url = f"http://127.0.0.1:{port}/model"
    publish(model, work / "swarm", "--tracker", tracker.url)
    manifest = publish(model, work / "web", "--mirror", url)
    subprocess.run(["cat", str(model / FILE)], stdout=subprocess.DEVNULL, check=True)  # into the page cache
    for torrent in work.glob("web/*.torrent"):  # beside the model, where the manifest looks for them
        shutil.copyfile(torrent, work / "served" / torrent.name)
    shutil.copyfile(manifest, work / "served" / manifest.name)
    with nginx(work / "served", work / "nginx", port=port):
        yield World(
            work,
            model,
            work / "swarm" / "model.v1.torrent",
            work / "web" / "model.v1.torrent",
            work / "served" / manifest.name,
            tracker,
            url,
        )


Contest = tuple[str, Callable[[Path], Stage]]


def make_contests(world: World, skip: Sequence[str]) -> list[Contest]:
    """Return everything to measure: its name and, given a scratch folder, how."""
    leeches = [leech for leech in LEECHES if leech.name not in skip]
    contests = [leech_contest(world, leech, "ours") for leech in leeches]
    contests += [leech_contest(world, OURS, seed) for seed in SEEDS if seed not in {"ours", *skip}]
    contests += [web_contest(world, leech) for leech in leeches if leech.name != "transmission"]
    return [*contests, auto_contest(world), curl_contest(world)]


def leech_contest(world: World, leech: Leech, seed: str) -> Contest:
    """One seed to one leech."""
    name = f"{leech.name} from the seed {seed}"

    def run(place: Path) -> Stage:
        environment = leech.environment(place)
        if leech.seed_comes_to_it:
            with seed_that_comes(world.torrent, world.model, world.tracker):
                return measure(name, leech.command(world.torrent, 0, place), environment)
        with SEEDS[seed](world.torrent, world.model, world.tracker, world.work) as port:
            world.tracker.forget_all()
            world.tracker.add("127.0.0.1", port)
            return measure(name, leech.command(world.torrent, port, place), environment)

    return name, run


def web_contest(world: World, leech: Leech) -> Contest:
    """A web seed alone."""
    name = f"{leech.name} from a web seed"
    return name, lambda place: measure(name, leech.command(world.web_torrent, 0, place), leech.environment(place))


def auto_contest(world: World) -> Contest:
    """Whatever ``--via auto`` makes of a mirror and a seed of the manifest's own (hybrid) torrent."""
    name = "ours, mirror and seed, --via auto"

    def run(place: Path) -> Stage:
        torrent = world.work / "web" / "model.torrent"
        with SEEDS["ours"](torrent, world.model, world.tracker, world.work) as port:
            return measure(name, OURS.command(world.manifest, port, place), OURS.environment(place))

    return name, run


def curl_contest(world: World) -> Contest:
    """The ceiling: the bytes over loopback and to the disk, unverified."""
    return CURL, lambda place: measure(CURL, ["curl", "-s", "-o", str(place / FILE), f"{world.url}/{FILE}"])


def run_round(world: World, contests: list[Contest], number: int) -> Iterator[Run]:
    """Let everybody run once, starting with another one in each round."""
    first = number * len(contests) // 3 % len(contests)
    for name, run in [*contests[first:], *contests[:first]]:
        scratch = world.work / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        stage = run(scratch)
        sizes = [path.stat().st_size for path in scratch.rglob("*") if path.is_file()]
        if world.size not in sizes:
            sys.exit(f"{name} did not deliver the file: {sorted(sizes)}\n{stage.output[-2000:]}")
        shutil.rmtree(scratch)
        os.sync()
        yield Run(name, number, stage.seconds, stage.cpu_seconds, stage.peak_bytes)


def report(runs: list[Run], size: int, rounds: int) -> None:
    """Print the table, the ceilings and the ratios, then one line of JSON."""
    script = str(Path(__file__).with_name("ceiling.py"))
    hashing = json.loads(subprocess.check_output([sys.executable, script], text=True))
    print(f"\n{format_size(size)}, {rounds} rounds; seconds: median (lowest to highest); others: median")
    for name in dict.fromkeys(run.name for run in runs):
        print(_row(name, [run for run in runs if run.name == name], size))
    ratios = _ratios(runs)
    for name, ratio in ratios.items():
        print(f"{name}: {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})")
    result = {
        "size_bytes": size,
        "rounds": rounds,
        **hashing,
        "ratios": {name: asdict(ratio) for name, ratio in ratios.items()},
        "runs": [asdict(run) for run in runs],
    }
    print(json.dumps(result))


def _row(name: str, runs: list[Run], size: int) -> str:
    seconds = Summary.of([run.seconds for run in runs])
    spread = f"{seconds.median:.1f} ({seconds.low:.1f} to {seconds.high:.1f})"
    cpu = Summary.of([run.cpu_seconds for run in runs]).median
    peak = max(run.peak_bytes for run in runs)
    return f"{name:36} {spread:>24} {cpu:7.1f} {format_size(peak):>9} {format_rate(size / seconds.median):>11}"


def _ratios(runs: list[Run]) -> dict[str, Summary]:
    """Compare the seconds of two programs within each round."""
    seconds = {(run.name, run.round): run.seconds for run in runs}
    ours = f"{OURS.name} from the seed ours"
    pairs = [(ours, name) for name in dict.fromkeys(run.name for run in runs) if name != ours]
    pairs.append(("ours from a web seed", "aria2c from a web seed"))
    ratios = {}
    for one, other in pairs:
        values = [
            seconds[one, number] / seconds[other, number]
            for number in dict.fromkeys(run.round for run in runs)
            if (one, number) in seconds and (other, number) in seconds
        ]
        if values:
            ratios[f"{one} / {other}"] = Summary.of(values)
    return ratios


if __name__ == "__main__":
    main()
