"""How long does a fleet take to get a model from one origin, and what does the origin send? Nine hosts on one switch.

    sudo .venv/bin/python benchmarks/fleet.py /big/work [--size 256MiB] [--nodes 8] [--rate 100] [--rounds 1]
        [--cases one,fleet,named,node,origin,http] [--plot out.svg]

Every host is a network namespace; its link to the switch lets through ``--rate`` Mbit/s each way (``tc tbf``), the
origin's like the others'. The origin runs ``seed`` (or nginx, for ``http``), each node one ``pull --share``, which is
told of the origin alone (``named``: of all nodes). Times are those of whole processes, from the start of all to the
moment the last model is complete and published. ``one`` is a single node, the time of one copy. ``node``: one node is
killed with SIGKILL when it has a third and started again two seconds later. ``origin``: the last node starts when the
first one has half, and the origin is killed as soon as any node is complete, so that one copy is out. What the origin
sent is counted on its link, less what headers take.

Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Summary, case_names, missing_programs, nginx, publish, random_file
from benchmarks.namespaces import MTU, Switch, payload_rate
from benchmarks.plot import Bar, Group, write_bar_chart
from mistral_fetch.units import MIB, format_size_both, parse_size

PORT, WEB_PORT = 6881, 8080
PROGRAM = [sys.executable, "-m", "mistral_fetch"]
CASES = {
    "one": "one node, the time of one copy",
    "fleet": "the fleet, told of the origin",
    "named": "the fleet, all named to each",
    "node": "one node killed and restarted",
    "origin": "one joins late, origin killed",
    "http": "the fleet by HTTP alone",
}
KILLED_AT, AWAY_SECONDS, LATE_AT = 1 / 3, 2.0, 1 / 2
FRAMES = (MTU + 14) / (MTU - 52)  # what a link carries for each byte of payload, see namespaces.py
GIVEN_UP = 12.0  # copies' times


@dataclass(frozen=True)
class Run:
    """One case, once."""

    case: str
    seconds: float
    first_seconds: float
    origin_copies: float
    complete: int


class Field:
    """The hosts, the published model and where nodes keep their caches."""

    def __init__(self, switch: Switch, work: Path, size: int, rate_mbit: float) -> None:
        self.switch, self.work, self.size = switch, work, size
        self.origin, *self.nodes = switch.hosts
        self.ideal_seconds = size / payload_rate(rate_mbit * 1e6)
        random_file(work / "out" / "model" / "model.bin", size)
        publish(work / "out" / "model", work / "out")

    def run(self, case: str) -> Run:
        """Run one case from empty caches."""
        for cache in self.work.glob("cache*"):
            shutil.rmtree(cache)
        serves = self._web if case == "http" else self._seed
        nodes = self.nodes[:1] if case == "one" else self.nodes
        with serves() as origin:
            before, began = self.switch.sent_bytes(self.origin), time.monotonic()
            late = len(nodes) - 1 if case == "origin" else None
            pulls = {number: self._pull(number, case) for number in range(len(nodes)) if number != late}
            try:
                ended = self._watch(case, pulls, origin, began)
            finally:
                for pull in pulls.values():
                    pull.kill()
                    pull.wait()
            sent = self.switch.sent_bytes(self.origin) - before
        last, first = max(ended.values(), default=0.0), min(ended.values(), default=0.0)
        return Run(case, round(last, 2), round(first, 2), round(sent / FRAMES / self.size, 2), len(ended))

    def _watch(
        self,
        case: str,
        pulls: dict[int, subprocess.Popen[bytes]],
        origin: subprocess.Popen[bytes],
        began: float,
    ) -> dict[int, float]:
        """Wait for all nodes, and do to them what the case says; return when each was complete."""
        ended: dict[int, float] = {}
        killed_at = 0.0
        late = case == "origin"
        while (late or len(ended) < len(pulls)) and time.monotonic() - began < GIVEN_UP * self.ideal_seconds:
            time.sleep(0.05)
            for number in pulls.keys() - ended.keys():
                if (self.work / f"cache{number}" / "snapshots").is_dir() and self._is_complete(number):
                    ended[number] = time.monotonic() - began
            if case == "node" and not killed_at and self._share(1) >= KILLED_AT:
                pulls[1].kill()
                killed_at = time.monotonic()
            if killed_at and pulls[1].poll() == -signal.SIGKILL and time.monotonic() - killed_at >= AWAY_SECONDS:
                pulls[1] = self._pull(1, case)
            if late and self._share(0) >= LATE_AT:
                pulls[len(pulls)], late = self._pull(len(pulls), case), False
            if case == "origin" and ended and not late:
                origin.kill()
        return ended

    def _is_complete(self, number: int) -> bool:
        return any((self.work / f"cache{number}" / "snapshots").glob("*/.complete"))

    def _share(self, number: int) -> float:
        data = next((self.work / f"cache{number}" / "partial").glob("*/data"), None)
        return data.stat().st_blocks * 512 / self.size if data else 0.0

    def _pull(self, number: int, case: str) -> subprocess.Popen[bytes]:
        node = self.nodes[number]
        web = f"http://{self.origin.address}:{WEB_PORT}/model.meta4"
        torrent = str(self.work / "out" / "model.torrent")
        named = self.switch.hosts if case == "named" else [self.origin]
        by_swarm = [torrent, "--share", "--listen", f"0.0.0.0:{PORT}"]
        by_swarm += [word for host in named for word in ("--peer", f"{host.address}:{PORT}")]
        words = [web, "--via", "http"] if case == "http" else by_swarm
        home = self.work / f"cache{number}"
        argv = [*node.prefix, *PROGRAM, "pull", *words, "--home", str(home), "--quiet"]
        with (self.work / f"node{number}.log").open("wb") as log:
            return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=log, env=_environment())

    @contextmanager
    def _seed(self) -> Iterator[subprocess.Popen[bytes]]:
        out = self.work / "out"
        argv = [*self.origin.prefix, *PROGRAM, "seed", str(out / "model"), "--torrent", str(out / "model.torrent")]
        argv += ["--listen", f"0.0.0.0:{PORT}", "--home", str(self.work / "origin")]
        with (self.work / "origin.log").open("wb") as log:
            process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, env=_environment())
        try:
            assert process.stdout is not None
            if not process.stdout.readline().startswith(b"ready"):
                sys.exit(f"the origin did not start; see {self.work / 'origin.log'}")
            yield process
        finally:
            process.kill()
            process.communicate()

    @contextmanager
    def _web(self) -> Iterator[subprocess.Popen[bytes]]:
        prefix, address = self.origin.prefix, self.origin.address
        served = nginx(self.work / "out", self.work / "nginx", address=address, port=WEB_PORT, prefix=prefix)
        with served as server:
            yield server.process


def main() -> None:
    """Measure, print a table and one line of JSON."""
    given = _parse()
    if os.geteuid() != 0:
        sys.exit("needs root: it makes network namespaces")
    if missing := missing_programs("nginx", "ip", "tc"):
        sys.exit(f"not installed: {', '.join(missing)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    runs = []
    with Switch(given.nodes + 1, f"{given.rate:g}mbit") as switch:
        field = Field(switch, given.work.absolute(), given.size, given.rate)
        for _ in range(given.rounds):
            for case in given.cases:
                runs.append(run := field.run(case))
                told = f"{run.complete} complete, origin sent {run.origin_copies:.2f} copies"
                print(f"{CASES[case]:34} {run.seconds:7.1f} s   {told}", flush=True)
    report(runs, field, given)


def report(runs: list[Run], field: Field, given: argparse.Namespace) -> None:
    """Print the medians beside one copy's time, then one line of JSON."""
    median = _medians(runs, lambda run: run.seconds)
    copies = _medians(runs, lambda run: run.origin_copies)
    one = median.get("one", field.ideal_seconds)
    print(f"\n{format_size_both(field.size)} at {given.rate:g} Mbit/s, {given.nodes} nodes, {given.rounds} rounds")
    print(f"{'':34} {'seconds':>8} {'copies of time':>15} {'origin sent':>12}")
    for case, seconds in median.items():
        print(f"{CASES[case]:34} {seconds:8.1f} {seconds / one:14.2f}x {copies[case]:11.2f}x")
    print(f"{'one link, full of payload':34} {field.ideal_seconds:8.1f}")
    if given.plot:
        _plot(given.plot, runs, one, given)
    result = {
        "size_bytes": field.size,
        "nodes": given.nodes,
        "link_mbit": given.rate,
        "ideal_seconds": round(field.ideal_seconds, 2),
        "seconds": median,
        "ratio_to_one": {case: round(seconds / one, 2) for case, seconds in median.items()},
        "origin_copies": copies,
        "runs": [asdict(run) for run in runs],
    }
    print(json.dumps(result))


def _medians(runs: list[Run], value: Callable[[Run], float]) -> dict[str, float]:
    cases = dict.fromkeys(run.case for run in runs)
    return {case: Summary.of([value(run) for run in runs if run.case == case]).median for case in cases}


def _plot(path: Path, runs: list[Run], one: float, given: argparse.Namespace) -> None:
    bars = []
    for case in dict.fromkeys(run.case for run in runs):
        seconds = Summary.of([run.seconds for run in runs if run.case == case])
        bars.append(Bar(CASES[case], seconds.median, seconds.low, seconds.high, is_ours=case != "http", mark=one))
    title = f"{format_size_both(given.size)} from one origin to {given.nodes} nodes, every link {given.rate:g} Mbit/s"
    note = "seconds until the last node has it, verified and published; the upright line is the time of one copy"
    write_bar_chart(path, title, note, [Group("", bars)])


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("MISTRAL_FETCH_")}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("work", type=Path, help="a directory with room for the model ten times")
    parser.add_argument("--size", type=parse_size, default=256 * MIB, help="of the model (default: 256MiB)")
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--rate", type=float, default=100.0, metavar="MBIT", help="of each link (default: 100)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cases", type=case_names(CASES), default=list(CASES), help=f"some of {','.join(CASES)}")
    parser.add_argument("--plot", type=Path, help="write the medians as an SVG")
    return parser.parse_args()


if __name__ == "__main__":
    main()
