"""Does the main job hold at full size? Publish, pull by every channel, and run a synthetic Mistral 7B.

    python benchmarks/synthetic_mistral.py /big/synth [--only torrent]
    python benchmarks/full_size.py /big/synth /big/work

The channels are a torrent, mirrors, mirrors and swarm together, and a tar whose members the manifest names. Without the
hub layout (``--only torrent``) the run from hub shards is left out.

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
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Stage, measure, nginx
from mistral_fetch.manifest import MirrorUrl
from mistral_fetch.metalink import parse_metalink, serialise_metalink
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
        "same_tokens_from_all": True,
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

    with nginx(published, work / "nginx") as server:
        address = f"{server.url}/mistral-synthetic.meta4"
        home = {"MISTRAL_FETCH_HOME": str(work / "cache-mixed")}
        with seeder(torrent, synthetic / "torrent") as port:
            mixed = [*program, "pull", address, "--peer", f"127.0.0.1:{port}"]
            yield measure("pull by mirror and swarm", mixed, home)
        yield measure("run from the mixed pull", [*program, "run", address, PROMPT, *generate], home)
        shutil.rmtree(work / "cache-mixed")

        _write_tar(synthetic / "torrent", published / "model.tar")
        members = _name_members(published / "mistral-synthetic.meta4", f"{server.url}/model.tar")
        home = {"MISTRAL_FETCH_HOME": str(work / "cache-tar")}
        yield measure("pull members of a tar", [*program, "pull", str(members)], home)
        yield measure("run from the tar's members", [*program, "run", str(members), PROMPT, *generate], home)
        shutil.rmtree(work / "cache-tar")
        (published / "model.tar").unlink()

        home = {"MISTRAL_FETCH_HOME": str(work / "cache-http")}
        yield measure("pull by HTTP from nginx", [*program, "pull", address, "--via", "http"], home)
        yield measure("pull again (nothing to do)", [*program, "pull", address], home)
        yield measure("verify", [*program, "verify", address], home)
        yield measure("run from consolidated.00.pth", [*program, "run", address, PROMPT, *generate], home)
    shutil.rmtree(work / "cache-http")
    if (synthetic / "hub").is_dir():
        yield measure("run from hub shards", [*program, "run", str(synthetic / "hub"), PROMPT, *generate], home)


def _write_tar(directory: Path, tar: Path) -> None:
    names = sorted(path.name for path in directory.iterdir())
    subprocess.run(["tar", "-cf", str(tar), "-C", str(directory), *names], check=True)


def _name_members(manifest: Path, tar_url: str) -> Path:
    """Write a manifest whose only mirrors are members of a tar."""
    parsed = parse_metalink(manifest.read_bytes(), manifest.as_uri())
    entries = (
        replace(entry, mirrors=(MirrorUrl(tar_url, 1, member=entry.path),), torrents=()) for entry in parsed.files
    )
    path = manifest.with_name("members.meta4")
    path.write_bytes(serialise_metalink(parsed.with_files(entries)))
    return path


if __name__ == "__main__":
    main()
