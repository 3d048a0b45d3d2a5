"""What do twenty kills cost, and how much memory do sixteen connections take? One large file from nginx on loopback.

    python benchmarks/kills.py /big/work [--size 13.4GiB] [--kills 20] [--rate 30m]

nginx limits each connection to RATE, so that more of them bring more and the pull opens as many as it may. First an
undisturbed pull: wall time and peak memory. Then a pull that is killed (SIGKILL) at random moments and started again
each time: what nginx sent in all, against the size, and against the bound of 2 % and one batch (64 MiB) a kill. What
was sent into sockets that died is counted too. The result is verified. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Nginx, Stage, measure, missing_programs, nginx, publish, random_file
from mistral_fetch.store.partials import BATCH_BYTES
from mistral_fetch.units import format_size, format_size_both, parse_size

PROGRAM = [sys.executable, "-m", "mistral_fetch"]
SEED = 20230927


def main() -> None:
    """Measure both and print one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("work", type=Path, help="a directory on a disk with room for twice the size")
    parser.add_argument("--size", type=parse_size, default=parse_size("13.4GiB"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rate", default="30m", help="bytes per second of each connection, as nginx writes it")
    given = parser.parse_args()
    if missing := missing_programs("nginx"):
        sys.exit(f"not installed: {', '.join(missing)}")
    work = given.work.absolute()
    random_file(work / "model" / "model.bin", given.size)
    publish(work / "model", work)
    log = work / "sent.log"
    format_ = f"access_log {log} sent; limit_rate {given.rate};"
    with nginx(work, work / "nginx", locations=format_, http="log_format sent '$body_bytes_sent';") as server:
        undisturbed = _pull(server, work / "cache")
        shutil.rmtree(work / "cache")
        log.write_text("")
        killed, seconds = _pull_with_kills(server, work / "cache", given.kills, undisturbed.seconds)
        measure("verify", [*PROGRAM, "verify", "--quiet"], {"MISTRAL_FETCH_HOME": str(work / "cache")})
    shutil.rmtree(work / "cache")
    sent = sum(map(int, log.read_text().split()))
    allowed = int(1.02 * given.size) + killed * BATCH_BYTES
    print(f"\n{format_size_both(given.size)}; peak memory {format_size(undisturbed.peak_bytes)}")
    print(
        f"{killed} kills: {format_size(sent)} sent, {format_size(sent - given.size)} more than the size;"
        f" allowed are {format_size(allowed - given.size)}"
    )
    result = {
        "size_bytes": given.size,
        "peak_bytes": undisturbed.peak_bytes,
        "seconds": undisturbed.seconds,
        "kills": killed,
        "seconds_with_kills": round(seconds, 1),
        "sent_bytes": sent,
        "allowed_bytes": allowed,
        "is_within_bound": sent <= allowed,
    }
    print(json.dumps(result))


def _pull(server: Nginx, cache: Path) -> Stage:
    return measure("pull", _argv(server), {"MISTRAL_FETCH_HOME": str(cache)})


def _argv(server: Nginx) -> list[str]:
    return [*PROGRAM, "pull", f"{server.url}/model.meta4", "--via", "http", "--quiet", "--connections", "16"]


def _pull_with_kills(server: Nginx, cache: Path, kills: int, whole_seconds: float) -> tuple[int, float]:
    """Kill a pull again and again, at moments spread over what an undisturbed one takes, then let it finish."""
    chance, started, killed = random.Random(SEED), time.monotonic(), 0
    environment = {**os.environ, "MISTRAL_FETCH_HOME": str(cache)}
    while killed < kills:
        process = subprocess.Popen(_argv(server), stdout=subprocess.DEVNULL, env=environment)
        try:
            process.wait(chance.uniform(0.8, 2 * whole_seconds / kills))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
        else:
            break
    _pull(server, cache)
    return killed, time.monotonic() - started


if __name__ == "__main__":
    main()
