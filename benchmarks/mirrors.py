"""Do several shaped mirrors add up, and what do bad ones cost? Four links of 200 Mbit/s, in network namespaces.

    sudo .venv/bin/python benchmarks/mirrors.py /big/work [--size 2GiB] [--rounds 3] [--cases all,liar] [--plot out.svg]

Each mirror is nginx in a namespace of its own, its link to the client's namespace shaped with ``tc tbf``; nothing
else is reachable from there, and all of it is removed at the end. First curl measures one link. Then the program
pulls with the four mirrors in its manifest: all well; the first at 5 Mbit/s; killed when half is there; lying (a wrong
byte each 100 MB); and three of them bad, one in each way. ``silent`` (the first one's link goes dead half-way, without
a word) runs if it is named. A pull that takes more than four times the ideal and a minute is given up.

The ideal is what the honest links need for all bytes, at the rate curl got; the overhead is what the whole process
took beyond it, start and final hashing included. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Summary, case_names, missing_programs, publish, random_file
from benchmarks.namespaces import Network, payload_rate
from benchmarks.plot import Bar, Group, write_bar_chart
from benchmarks.shaped_pull import PORT, Case, Field, Links, Pull, measure_link
from mistral_fetch.units import GIB, format_rate, format_size, format_size_both, parse_size

MIRRORS = 4
CASES = {
    "all": Case("all four"),
    "slow": Case("one slow", slow=0),
    "killed": Case("one killed half-way", killed=0),
    "liar": Case("one lying", liar=0),
    "three": Case("slow, killed and lying", slow=0, killed=1, liar=2),
    "silent": Case("one silent half-way", silent=0),
}
DEFAULT_CASES = "all,slow,killed,liar,three"
_LIE_EVERY_BYTES = 100_000_000


def main() -> None:
    """Measure, print a table and one line of JSON."""
    given = _parse()
    if os.geteuid() != 0:
        sys.exit("needs root: it makes network namespaces")
    if missing := missing_programs("nginx", "curl", "ip", "tc"):
        sys.exit(f"not installed: {', '.join(missing)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    work = given.work.absolute()
    with Network(MIRRORS) as network:
        field = prepare(network, work, given.size, given.link, given.slow)
        pulls = []
        for number in range(given.rounds):
            cases = [CASES[name] for name in given.cases]
            first = number % len(cases)
            for case in [*cases[first:], *cases[:first]]:
                pulls.append(pull := field.pull(case))
                _show(pull)
    report(pulls, field, given)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("work", type=Path, help="a directory with room for the file three times")
    parser.add_argument("--size", type=parse_size, default=2 * GIB, help="of the file (default: 2GiB)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--link", type=float, default=200.0, metavar="MBIT", help="each link's rate (default: 200)")
    parser.add_argument("--slow", type=float, default=5.0, metavar="MBIT", help="the slow link's (default: 5)")
    parser.add_argument("--cases", type=case_names(CASES), default=DEFAULT_CASES, help=f"some of {','.join(CASES)}")
    parser.add_argument("--plot", type=Path, help="write the medians as an SVG")
    return parser.parse_args()


def prepare(network: Network, work: Path, size: int, link_mbit: float, slow_mbit: float) -> Field:
    """Write, corrupt and publish the file, and measure what one link carries."""
    honest, lying = work / "honest", work / "lying"
    random_file(honest / "model" / "model.bin", size)
    _corrupt(honest / "model" / "model.bin", lying / "model" / "model.bin")
    mirrors = [option for host in network.hosts for option in ("--mirror", f"http://{host.address}:{PORT}/model")]
    manifest = publish(honest / "model", work / "published", *mirrors)
    for host in network.hosts:
        network.shape(host, f"{link_mbit}mbit")
    measured = [measure_link(network, host, honest, work / "nginx-curl", link_mbit * 1e6) for host in network.hosts[:2]]
    rate = sum(measured) / len(measured)
    print(
        f"one link: {link_mbit:g} Mbit/s raw = {format_rate(link_mbit * 1e6 / 8)}, of which payload"
        f" {format_rate(payload_rate(link_mbit * 1e6))}; curl got {format_rate(rate)}",
        flush=True,
    )
    links = Links(f"{link_mbit}mbit", f"{slow_mbit}mbit", rate, payload_rate(slow_mbit * 1e6))
    return Field(network, links, honest, lying, manifest, size, work)


def _corrupt(honest: Path, lying: Path) -> None:
    """Copy a file and flip one byte in each 100 MB, at least one."""
    lying.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(honest, lying)
    size = lying.stat().st_size
    with lying.open("r+b") as file:
        for offset in range(min(_LIE_EVERY_BYTES, size) // 2, size, _LIE_EVERY_BYTES):
            file.seek(offset)
            wrong = bytes([file.read(1)[0] ^ 0xFF])
            file.seek(offset)
            file.write(wrong)


def _show(pull: Pull) -> None:
    how = "complete" if pull.is_complete else "NOT COMPLETE"
    shares = ", ".join(f"{source} {format_size(got)}" for source, got in sorted(pull.received_by_source.items()))
    print(f"{pull.case:24} {pull.seconds:7.1f} s  {how}; {shares or 'no source seen'}", flush=True)
    for problem in pull.problems[:4]:
        print(f"    {problem[:150]}", flush=True)


def report(pulls: list[Pull], field: Field, given: argparse.Namespace) -> None:
    """Print the table, then one line of JSON."""
    raw, ideal = given.link * 1e6 / 8, payload_rate(given.link * 1e6)
    print(
        f"\n{format_size_both(field.size)}, {given.rounds} rounds; seconds of the whole process: median (low to high)"
    )
    print(f"{'':24} {'seconds':>24} {'ideal':>7} {'overhead':>9} {'rate':>11} {'CPU s':>6} {'peak':>9}  liar named")
    summaries = {}
    for case in dict.fromkeys(pull.case for pull in pulls):
        of_case = [pull for pull in pulls if pull.case == case]
        summaries[case] = _summary(of_case)
        print(_row(case, of_case, field.size))
    print(
        f"four links: {format_rate(4 * raw)} raw, {format_rate(4 * ideal)} payload, {format_rate(4 * field.links.rate)}"
        " by curl"
    )
    if given.plot:
        _plot(given.plot, pulls, field.size, given)
    result = {
        "size_bytes": field.size,
        "rounds": given.rounds,
        "mirrors": MIRRORS,
        "link_raw_bytes_per_second": int(raw),
        "link_payload_bytes_per_second": int(ideal),
        "link_curl_bytes_per_second": int(field.links.rate),
        "cases": summaries,
        "pulls": [asdict(pull) for pull in pulls],
    }
    print(json.dumps(result))


def _summary(pulls: list[Pull]) -> dict[str, object]:
    named = [pull.liar_was_named for pull in pulls if pull.liar_was_named is not None]
    return {
        "seconds": asdict(Summary.of([pull.seconds for pull in pulls])),
        "ideal_seconds": Summary.of([pull.ideal_seconds for pull in pulls]).median,
        "overhead_percent": asdict(Summary.of([pull.overhead_percent for pull in pulls])),
        "complete": sum(pull.is_complete for pull in pulls),
        "liar_named": sum(named) if named else None,
    }


def _row(case: str, pulls: list[Pull], size: int) -> str:
    seconds = Summary.of([pull.seconds for pull in pulls])
    spread = f"{seconds.median:.1f} ({seconds.low:.1f} to {seconds.high:.1f})"
    ideal, overhead, cpu, peak = (
        Summary.of([getattr(pull, name) for pull in pulls]).median
        for name in ("ideal_seconds", "overhead_percent", "cpu_seconds", "peak_bytes")
    )
    complete = sum(pull.is_complete for pull in pulls)
    rate = format_rate(size / seconds.median) if complete == len(pulls) else f"{complete} of {len(pulls)} done"
    named = [pull.liar_was_named for pull in pulls if pull.liar_was_named is not None]
    told = f"{sum(named)} of {len(named)}" if named else "-"
    sizes = f"{cpu:6.1f} {format_size(int(peak)):>9}"
    return f"{case:24} {spread:>24} {ideal:7.1f} {overhead:+8.1f}% {rate:>11} {sizes}  {told}"


def _plot(path: Path, pulls: list[Pull], size: int, given: argparse.Namespace) -> None:
    bars = []
    for case in dict.fromkeys(pull.case for pull in pulls):
        seconds = Summary.of([pull.seconds for pull in pulls if pull.case == case])
        ideal = Summary.of([pull.ideal_seconds for pull in pulls if pull.case == case]).median
        bars.append(Bar(case, seconds.median, seconds.low, seconds.high, is_ours=True, mark=ideal))
    title = f"{format_size_both(size)} from four mirrors at {given.link:g} Mbit/s each"
    note = f"seconds, whole process, median of {given.rounds}; the upright line is what the good links need"
    write_bar_chart(path, title, note, [Group("", bars)])


if __name__ == "__main__":
    main()
