"""A pull killed at any moment: the next one ends exact and fetches nothing twice beyond one batch."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mistral_fetch.manifest import PieceHashes
from mistral_fetch.simulators.mirror import MirrorSimulator
from mistral_fetch.store.partials import Partial

ROOT = Path(__file__).parents[2]
PIECE = 64 * 1024
BATCH = 512 * 1024
SIZE = 12 * 1024 * 1024 + 321
KILLS = 10
# What may be between the mirror's counter and our buffer: one slice of the simulator and the kernel's buffers.
IN_FLIGHT = 512 * 1024

PULL = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from mistral_fetch.events import ignore_events
from mistral_fetch.manifest import FileEntry, MirrorUrl, PieceHashes
from mistral_fetch.sources.base import StopSignal, Target
from mistral_fetch.sources.http import HttpSource
from mistral_fetch.sources.http_client import HttpClient
from mistral_fetch.store import partials
partials.BATCH_BYTES = int(sys.argv[2])
job = json.loads(sys.stdin.read())
pieces = PieceHashes(job["piece"], tuple(job["hashes"]))
entry = FileEntry("model.bin", job["size"], (), pieces, (MirrorUrl(job["url"]),))
partial = partials.Partial(Path(job["directory"]), job["size"], pieces)
print("ready", flush=True)
with HttpClient() as client:
    HttpSource(client).fetch([Target(entry, partial)], ignore_events, StopSignal())
partial.close()
"""


@pytest.mark.slow
def test_killed_ten_times_at_random_it_ends_exact_and_fetches_little_twice(tmp_path: Path) -> None:
    seed = 20230927
    chance = random.Random(seed)
    data = chance.randbytes(SIZE)
    hashes = PieceHashes(
        PIECE, tuple(hashlib.sha256(data[at : at + PIECE]).hexdigest() for at in range(0, SIZE, PIECE))
    )
    # Paced, so that every kill falls into the transfer and little is in flight between the processes.
    files = {"model.bin": data}
    with MirrorSimulator(files, rate_bytes_per_second=8 * 1024 * 1024, send_buffer_bytes=64 * 1024) as mirror:
        job = json.dumps(
            {
                "url": mirror.url("model.bin"),
                "directory": str(tmp_path / "partial"),
                "size": SIZE,
                "piece": PIECE,
                "hashes": hashes.sha256,
            }
        )
        kills = 0
        while True:
            seen = len(mirror.served)
            process = start(job)
            if kills == KILLS:
                assert process.wait(timeout=60) == 0
                break
            wait_for_request(mirror, seen, process)
            time.sleep(chance.uniform(0, 0.12))
            process.send_signal(signal.SIGKILL)
            assert process.wait(timeout=60) == -signal.SIGKILL, "it was done before it could be killed"
            kills += 1
            assert_only_right_pieces(Partial(tmp_path / "partial", SIZE, hashes), data)
        assert (tmp_path / "partial" / "data").read_bytes() == data
        assert Partial(tmp_path / "partial", SIZE, hashes).missing_pieces() == []
        sent_twice = mirror.bytes_sent() - SIZE
    assert sent_twice <= KILLS * (BATCH + PIECE + IN_FLIGHT), f"seed {seed}: {sent_twice} bytes were sent twice"
    print(f"{kills} kills, {sent_twice} bytes sent twice")
    assert sent_twice > 0, "no kill hit the transfer: the test shows nothing"


def start(job: str) -> subprocess.Popen[bytes]:
    """Start a pull and return once it is about to ask."""
    command = [sys.executable, "-c", PULL, str(ROOT), str(BATCH)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(job.encode())
    process.stdin.close()
    assert process.stdout.readline() == b"ready\n"
    process.stdout.close()
    return process


def wait_for_request(mirror: MirrorSimulator, seen: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until the mirror has sent something of a new answer."""
    deadline = time.monotonic() + 30
    while len(mirror.served) <= seen and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def assert_only_right_pieces(partial: Partial, data: bytes) -> None:
    """Check that what the journal says is on disk."""
    for span in partial.present:
        with partial.data_path.open("rb") as file:
            file.seek(span.start)
            assert file.read(span.length) == data[span.start : span.end]
