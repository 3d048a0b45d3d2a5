"""How does pull over HTTP compare? One large file from nginx on loopback: ours, curl, aria2c, hf_transfer, the hub's.

    python benchmarks/download.py /big/work [--size 4GiB] [--rounds 3] [--scheme http] [--plot download.svg]

Each run is one process: wall time, processor time of the process and its children, peak memory, and what nginx used
meanwhile. All run in turn, in rounds whose order rotates, so that a busy moment does not hit the same one each time;
ratios are taken within a round. What a run left behind is deleted, and the disk synced, before the next. Only ours
syncs what it wrote; neither hf_transfer nor huggingface_hub nor the bare loop checks a digest. Ends with one line of
JSON. ``--peers`` names an interpreter with hf_transfer and huggingface_hub; by default one is made in WORK/peers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import (
    Nginx,
    Stage,
    Summary,
    make_certificate,
    measure,
    missing_programs,
    nginx,
    own_peak_bytes,
    publish,
    random_file,
)
from benchmarks.downloaders import (
    BARE,
    CURL,
    FILE,
    HF,
    OURS,
    OURS_WHOLE,
    Downloader,
    Served,
    downloaders,
    find_peers,
    hub_location,
)
from benchmarks.plot import Bar, Group, write_bar_chart
from mistral_fetch.units import GIB, format_rate, format_size, format_size_both, parse_size


@dataclass(frozen=True)
class Run:
    """One download by one program."""

    scheme: str
    name: str
    round: int
    seconds: float
    cpu_seconds: float
    nginx_cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Contender:
    """A program, and the server that it asks."""

    scheme: str
    program: Downloader
    server: Nginx
    size: int


def main() -> None:
    """Measure, print a table and one line of JSON."""
    given = _parse()
    if missing := missing_programs("nginx", "curl", "openssl", "aria2c"):
        sys.exit(f"not installed: {', '.join(missing)}")
    work = given.work.absolute()
    published, sha256 = prepare(work, given.size)
    peers = find_peers(given.peers, work)
    schemes = ["http", "https"] if given.scheme == "both" else [given.scheme]
    with contextlib.ExitStack() as stack:
        contenders = [
            contender
            for scheme in schemes
            for contender in stack.enter_context(serve(scheme, published, work, sha256, peers))
        ]
        runs = [run for number in range(given.rounds) for run in run_round(contenders, number, work / "scratch")]
    report(runs, given.size, given.rounds, given.plot)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("work", type=Path, help="a directory with room for the file twice")
    parser.add_argument("--size", type=parse_size, default=4 * GIB, help="of the file (default: 4GiB)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scheme", choices=["http", "https", "both"], default="both")
    parser.add_argument("--peers", default="auto", help="an interpreter with hf_transfer and huggingface_hub, or none")
    parser.add_argument("--plot", type=Path, help="write the medians as an SVG")
    return parser.parse_args()


def prepare(work: Path, size: int) -> tuple[Path, str]:
    """Write and publish the file, if that was not done before; return the published folder and the file's sha256."""
    published, file = work / "published", work / "published" / "model" / FILE
    manifest = published / "model.meta4"
    random_file(file, size)
    if not manifest.exists() or manifest.stat().st_mtime < file.stat().st_mtime:
        publish(published / "model", published)
    text = manifest.read_text()
    # Like Hugging Face's: a digest of the whole file, none of its pieces.
    (published / "whole.meta4").write_text(re.sub(r"\s*<pieces .*?</pieces>", "", text, flags=re.DOTALL))
    # aria2c would look for the torrents' peers first.
    (published / "http.meta4").write_text(re.sub(r"\s*<metaurl .*?</metaurl>", "", text, flags=re.DOTALL))
    subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)  # into the page cache
    return published, (published / "SHA256SUMS").read_text().split()[0]


@contextlib.contextmanager
def serve(scheme: str, published: Path, work: Path, sha256: str, peers: Path | None) -> Iterator[list[Contender]]:
    """Serve the folder; yield who is to fetch the file over this scheme."""
    file = published / "model" / FILE
    size = file.stat().st_size
    authority, certificate = make_certificate(work / "tls") if scheme == "https" else (None, None)
    location = hub_location(file, size, sha256)
    with nginx(published, work / scheme, certificate=certificate, locations=location) as server:
        served = Served(server.url, published, size, sha256, authority)
        yield [Contender(scheme, program, server, size) for program in downloaders(served, work / "scratch", peers)]


def run_round(contenders: list[Contender], number: int, scratch: Path) -> Iterator[Run]:
    """Let everybody run once, starting with another one in each round."""
    first = number * len(contenders) // 3 % len(contenders)
    for contender in [*contenders[first:], *contenders[:first]]:
        scratch.mkdir(parents=True)
        before = contender.server.cpu_seconds()
        program = contender.program
        stage = measure(f"{contender.scheme:5} {program.name}", program.argv, program.environment)
        used = round(contender.server.cpu_seconds() - before, 2)
        _check(contender, stage, scratch)
        shutil.rmtree(scratch)
        os.sync()
        yield Run(contender.scheme, program.name, number, stage.seconds, stage.cpu_seconds, used, stage.peak_bytes)


def _check(contender: Contender, stage: Stage, scratch: Path) -> None:
    program = contender.program
    sizes = {path.stat().st_size for path in scratch.rglob("*") if path.is_file()}
    if contender.size not in sizes or program.must_say not in stage.output:
        sys.exit(f"{program.name} did not deliver the file: {sorted(sizes)}\n{stage.output[-2000:]}")


def report(runs: list[Run], size: int, rounds: int, plot: Path | None) -> None:
    """Print the table, the ceilings and the ratios, then one line of JSON."""
    script = str(Path(__file__).with_name("ceiling.py"))
    hashing = json.loads(subprocess.check_output([sys.executable, script], text=True))
    names = list(dict.fromkeys((run.scheme, run.name) for run in runs))
    print(f"\n{format_size_both(size)}, {rounds} rounds; seconds: median (lowest to highest); others: median")
    print(f"{'':34} {'seconds':>24} {'CPU s':>7} {'nginx s':>8} {'peak':>9} {'rate':>11}")
    for scheme, name in names:
        print(_row(f"{scheme:5} {name}", [run for run in runs if (run.scheme, run.name) == (scheme, name)], size))
    print(f"peaks of {format_size(own_peak_bytes())} may be lower: that is this program's own size")
    rate = hashing["sha256_all_cores"]
    print(
        f"sha256: {format_rate(hashing['sha256_one_core'])} on one core, {format_rate(rate)} on {hashing['cores']}:"
        f" {size / rate:.1f} s for this file"
    )
    ratios = _ratios(runs)
    for name, ratio in ratios.items():
        print(f"{name}: {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})")
    if plot:
        _plot(plot, runs, names, size, rounds)
    result = {
        "size_bytes": size,
        "rounds": rounds,
        **hashing,
        "ratios": {name: asdict(ratio) for name, ratio in ratios.items()},
        "runs": [asdict(run) for run in runs],
    }
    print(json.dumps(result))


def _row(label: str, runs: list[Run], size: int) -> str:
    seconds = Summary.of([run.seconds for run in runs])
    spread = f"{seconds.median:.1f} ({seconds.low:.1f} to {seconds.high:.1f})"
    cpu, server, peak = (
        Summary.of([getattr(run, name) for run in runs]).median
        for name in ("cpu_seconds", "nginx_cpu_seconds", "peak_bytes")
    )
    rate = format_rate(size / seconds.median)
    return f"{label:34} {spread:>24} {cpu:7.1f} {server:8.1f} {format_size(int(peak)):>9} {rate:>11}"


def _ratios(runs: list[Run]) -> dict[str, Summary]:
    """Compare within each round, then take the median of the rounds."""
    seconds = {(run.scheme, run.name, run.round): run.seconds for run in runs}
    ratios = {}
    for scheme in dict.fromkeys(run.scheme for run in runs):
        for ours in (OURS, OURS_WHOLE):
            for other in (HF, CURL, BARE):
                pairs = [
                    seconds[scheme, ours, number] / seconds[scheme, other, number]
                    for number in dict.fromkeys(run.round for run in runs)
                    if (scheme, other, number) in seconds
                ]
                if pairs:
                    ratios[f"{scheme}: {ours} / {other}"] = Summary.of(pairs)
    return ratios


def _plot(path: Path, runs: list[Run], names: list[tuple[str, str]], size: int, rounds: int) -> None:
    groups = []
    for scheme in dict.fromkeys(scheme for scheme, _ in names):
        bars = []
        for name in (name for of, name in names if of == scheme):
            seconds = Summary.of([run.seconds for run in runs if (run.scheme, run.name) == (scheme, name)])
            bars.append(Bar(name, seconds.median, seconds.low, seconds.high, is_ours=name in {OURS, OURS_WHOLE}))
        groups.append(Group(scheme, bars))
    note = f"seconds, whole process, median of {rounds}; lines reach from the lowest to the highest; shorter is better"
    write_bar_chart(path, f"{format_size_both(size)} from nginx on loopback", note, groups)


if __name__ == "__main__":
    main()
