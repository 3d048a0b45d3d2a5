"""Does the main job hold at full size? Publish, pull by HTTP and by torrent, and run a synthetic Mistral 7B.

    python benchmarks/synthetic_mistral.py /big/synth
    python benchmarks/full_size.py /big/synth /big/work

Each stage is one process; seconds are wall time, memory is the process's own peak (``ru_maxrss``, which for the
runtime counts mapped weights too). HTTP is served by nginx on loopback, the torrent by our loopback seeder. Caches are
deleted as soon as they are measured; at most one cache (14.5 GB) stands beside the weights. The ceiling beside a pull
is ``sha256sum`` of the same file, which reads and hashes it once. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Stage, measure, nginx
from mistral_fetch.units import GIB

PROMPT = "Open weights matter because"


@contextmanager
def seeder(torrent: Path, directory: Path) -> Iterator[int]:
    """Seed a torrent on loopback; yield the port."""
    argv = [sys.executable, "-m", "mistral_fetch.simulators.seeder", "--torrent", str(torrent), "--dir", str(directory)]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(json.loads(process.stdout.readline())["port"])
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Measure every stage and print one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("synthetic", type=Path, help="what synthetic_mistral.py wrote")
    parser.add_argument("work", type=Path, help="an empty directory on the same disk")
    parser.add_argument("--tokens", type=int, default=16)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    stages = list(run_stages(given.synthetic.absolute(), given.work.absolute(), given.tokens))
    texts = {stage.name: json.loads(stage.output)["text"] for stage in stages if stage.name.startswith("run")}
    assert len(set(texts.values())) == 1, f"the layouts disagree: {texts}"
    weights = (given.synthetic / "torrent" / "consolidated.00.pth").stat().st_size
    result = {
        "weights_gib": round(weights / GIB, 2),
        "stages": [{key: value for key, value in asdict(stage).items() if key != "output"} for stage in stages],
        "same_tokens_from_both_layouts": True,
        "text": next(iter(texts.values())),
    }
    print(json.dumps(result, ensure_ascii=False))


def run_stages(synthetic: Path, work: Path, tokens: int) -> Iterator[Stage]:
    """Publish, fetch both ways, verify, and run both layouts."""
    program = [sys.executable, "-m", "mistral_fetch"]
    yield measure("sha256sum (the ceiling)", ["sha256sum", str(synthetic / "torrent" / "consolidated.00.pth")])
    published = work / "published"
    publish = [*program, "publish", str(synthetic / "torrent"), "--out", str(published), "--name", "mistral-synthetic"]
    yield measure("publish", publish)
    link = published / "mistral-synthetic"
    if not link.exists():
        link.symlink_to(synthetic / "torrent")
    generate = ["--max-tokens", str(tokens), "--temperature", "0", "--json", "--context", "512"]

    home = {"MISTRAL_FETCH_HOME": str(work / "cache-torrent")}
    torrent = published / "mistral-synthetic.torrent"
    with seeder(torrent, synthetic / "torrent") as port:
        yield measure("pull by torrent", [*program, "pull", str(torrent), "--peer", f"127.0.0.1:{port}"], home)
    shutil.rmtree(work / "cache-torrent")

    home = {"MISTRAL_FETCH_HOME": str(work / "cache-http")}
    with nginx(published, work / "nginx") as server:
        address = f"{server.url}/mistral-synthetic.meta4"
        yield measure("pull by HTTP from nginx", [*program, "pull", address], home)
        yield measure("pull again (nothing to do)", [*program, "pull", address], home)
        yield measure("verify", [*program, "verify", address], home)
        yield measure("run from consolidated.00.pth", [*program, "run", address, PROMPT, *generate], home)
    shutil.rmtree(work / "cache-http")
    yield measure("run from hub shards", [*program, "run", str(synthetic / "hub"), PROMPT, *generate], home)


if __name__ == "__main__":
    main()
