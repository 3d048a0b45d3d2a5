"""How fast, and in how much memory, does a .pth become safetensors, beside `cp` of the same file?

    python benchmarks/convert.py WORK [--model DIR] [--layers 32] [--rounds 3] [--warm]

The model is one of Mistral 7B's shapes with random weights (``synthetic_mistral.py``), made in ``WORK/model`` unless
``--model`` names a directory in the torrent's layout on the same disk. Each round is a pair, in turn the one and the
other first: ``cp`` with a ``sync`` of the copy, and ``mistral_runtime convert``, which syncs too and hashes what it
writes; its wall time includes starting Python and PyTorch. Before each, the source is dropped from the page cache (not
with ``--warm``) and what the last one wrote is deleted. Needs the disk for the model and one copy, 29 GB at full size.
Last, the tensors of both files are compared. Ends with one line of JSON; ``ratio`` is ``cp``'s time over ours (the aim
is 0.6), ``inner_seconds`` is the conversion without the start.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Stage, Summary, measure, own_peak_bytes
from mistral_fetch.units import format_rate, format_size

ROOT = Path(__file__).resolve().parents[1]
RUNTIME = [sys.executable, "-m", "mistral_runtime"]
ENVIRONMENT = {"PYTHONPATH": str(ROOT / "runtime")}


def make_model(work: Path, layers: int) -> Path:
    """Write the synthetic model, unless it is there; return its directory."""
    directory = work / "model" / "torrent"
    if not directory.exists():
        script = str(ROOT / "benchmarks" / "synthetic_mistral.py")
        argv = [sys.executable, script, str(work / "model"), "--layers", str(layers), "--only=torrent"]
        measure("write the model", argv)
    return directory


def run_round(number: int, model: Path, work: Path, *, is_warm: bool) -> dict[str, Stage]:
    """Copy and convert, each from the same state of the machine, and return how both went."""
    found = {}
    for name in ("cp", "convert") if number % 2 == 0 else ("convert", "cp"):
        out = work / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        os.sync()
        source = model / "consolidated.00.pth"
        if not is_warm:
            drop_from_cache(source)
        found[name] = copy(source, out) if name == "cp" else convert(model, out)
    return found


def copy(source: Path, out: Path) -> Stage:
    """Copy a file and make the copy durable."""
    return measure("cp and sync", ["sh", "-c", 'cp "$1" "$2" && sync "$2"', "sh", str(source), str(out / "copy")])


def convert(model: Path, out: Path) -> Stage:
    """Convert; the runtime syncs by itself."""
    return measure("convert", [*RUNTIME, "convert", str(model), str(out), "--json"], ENVIRONMENT)


def drop_from_cache(path: Path) -> None:
    """Make the next reader of a file read it from the disk."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def same_tensors(model: Path, out: Path) -> bool:
    """Return whether the converted file has the source's tensors; also says how fast they are hashed."""
    stage = measure("digest of both", [*RUNTIME, "digest", str(model), str(out), "--json"], ENVIRONMENT)
    source, result = json.loads(stage.output)["snapshots"]
    return bool(source["tensors"] == result["tensors"])


def main() -> None:
    """Measure the pairs and print one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("work", type=Path, help="a directory on the disk to measure")
    parser.add_argument("--model", type=Path, help="a model in the torrent's layout on that disk")
    parser.add_argument("--layers", type=int, default=32, help="of the synthetic model; fewer for a trial")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="leave the source in the page cache")
    given = parser.parse_args()
    work = given.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    model = given.model.absolute() if given.model else make_model(work, given.layers)
    size = (model / "consolidated.00.pth").stat().st_size
    # Counted down: in the last one we come second, so that what is compared is there.
    rounds = [run_round(number, model, work, is_warm=given.warm) for number in reversed(range(given.rounds))]
    is_same = same_tensors(model, work / "out")
    shutil.rmtree(work / "out")
    report(size, rounds, is_same=is_same, is_warm=given.warm)


def report(size: int, rounds: list[dict[str, Stage]], *, is_same: bool, is_warm: bool) -> None:
    """Print the medians for people, then all of it as JSON."""
    seconds = {name: Summary.of([stages[name].seconds for stages in rounds]) for name in ("cp", "convert")}
    ratio = Summary.of([stages["cp"].seconds / stages["convert"].seconds for stages in rounds])
    peak = max(stages["convert"].peak_bytes for stages in rounds)
    for name, summary in seconds.items():
        print(f"{name:34} {summary.median:8.1f} s   {format_rate(size / summary.median)}")
    print(f"ratio {ratio.median} ({ratio.low} to {ratio.high}), peak {format_size(peak)}, same tensors: {is_same}")
    result = {
        "size": size,
        "warm": is_warm,
        "rounds": len(rounds),
        "cp_seconds": vars(seconds["cp"]),
        "convert_seconds": vars(seconds["convert"]),
        "convert_cpu_seconds": max(stages["convert"].cpu_seconds for stages in rounds),
        "inner_seconds": Summary.of([json.loads(s["convert"].output)["seconds"] for s in rounds]).median,
        "ratio": vars(ratio),
        "peak_bytes": peak,
        "least_peak_told_bytes": own_peak_bytes(),
        "same_tensors": is_same,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
