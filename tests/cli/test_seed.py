"""``seed`` as a service: a line when it is ready, a real leech, an orderly end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
import urllib.request
from pathlib import Path

import pytest

from tests.cli.conftest import FILES, SIZE

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(90)]
ANY_PORT = ["--listen", "127.0.0.1:0"]
MAGNET = re.compile(r"magnet:\S+")


def exact(directory):
    return all((Path(directory) / path).read_bytes() == data for path, data in FILES.items())


@pytest.mark.parametrize("named", ["tiny.meta4", "tiny"], ids=["REF", "DIR"])
def test_a_seeded_model_is_pulled_by_its_magnet_link(program, service, pulled, tmp_path, named):
    running = service("seed", named, *ANY_PORT)
    match = re.fullmatch(r"ready: seeding \S+ \(281\.6 kB\) on (127\.0\.0\.1:\d+), (magnet:\S+)\n", running.ready)
    assert match, running.ready + running.process.stderr.read()
    magnet = match[2].partition("&x.pe=")[0]  # as it is passed on by people; the peer is named beside it
    done = program("pull", magnet, "--peer", match[1], "--home", tmp_path / "leech", "--quiet")
    assert done.code == 0, done.err
    assert exact(done.out.strip())
    code, out, err = running.stop()
    assert (code, out) == (0, "")
    assert re.search(r"  hybrid: v1 [0-9a-f]{40}, v2 [0-9a-f]{64}\n  v1: v1 [0-9a-f]{40}\n", err)
    assert re.search(r"stopped: \d+\.\d kB uploaded in \d+ s\n$", err)


def test_json_at_readiness_and_at_the_end(program, service, pulled, tmp_path):
    running = service("seed", "tiny.meta4", *ANY_PORT, "--json", "--quiet", "--status-listen", "127.0.0.1:0")
    ready = json.loads(running.ready)
    assert (ready["event"], ready["address"]) == ("ready", "127.0.0.1")
    assert (ready["size"], ready["offered_bytes"]) == (SIZE, SIZE)
    assert [torrent["kind"] for torrent in ready["torrents"]] == ["hybrid", "v1"]
    assert len(ready["info_hashes"]) == 3
    kept = {path.name for path in Path(ready["kept_in"]).iterdir()}
    assert kept == {"tiny-1.meta4", "tiny-1.torrent", "tiny-1.v1.torrent", "tiny-1.magnet", "SHA256SUMS"}
    peer = f"127.0.0.1:{ready['port']}"
    torrent = Path(ready["kept_in"]) / "tiny-1.v1.torrent"
    done = program("pull", torrent, "--peer", peer, "--home", tmp_path / "leech", "--quiet", "--via", "torrent")
    assert done.code == 0, done.err
    uploaded, deadline = 0.0, time.monotonic() + 30  # the seed looks at what it sent from time to time
    while uploaded < SIZE and time.monotonic() < deadline:
        with urllib.request.urlopen(f"{ready['status_url']}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        uploaded = float(re.search(r'uploaded_bytes_total\{via="torrent"\} (\S+)', text)[1])
    assert uploaded >= SIZE
    assert "mistral_fetch_ready 1.0" in text
    code, out, err = running.stop(signal.SIGINT)
    assert (code, err) == (0, "")
    ended = json.loads(out)
    assert (ended["event"], ended["reason"], ended["uploaded_bytes"] >= SIZE) == ("end", "stopped", True)


def test_a_second_start_hashes_nothing_twice(program, service, pulled):
    first = service("seed", "tiny.meta4", *ANY_PORT)
    code, _, told = first.stop()
    assert (code, "verifying weights.bin" in told) == (0, True)
    second = service("seed", "tiny.meta4", *ANY_PORT)
    code, _, told = second.stop()
    assert (code, "verifying" in told) == (0, False)
    assert MAGNET.search(second.ready)[0].partition("&x.pe")[0] == MAGNET.search(first.ready)[0].partition("&x.pe")[0]


def test_torrents_are_written_where_they_are_wanted_with_their_trackers(service, pulled):
    running = service("seed", "tiny.meta4", *ANY_PORT, "--out", "o", "--tracker", "http://127.0.0.1:1/announce")
    assert "&tr=http%3A%2F%2F127.0.0.1%3A1%2Fannounce" in running.ready
    assert running.stop()[0] == 0
    assert b"http://127.0.0.1:1/announce" in Path("o/tiny-1.torrent").read_bytes()
    assert Path("o/tiny-1.magnet").read_text().count("magnet:") == 2


@pytest.mark.parametrize("named", ["./tiny", "tiny.meta4"], ids=["DIR", "REF"])
def test_a_published_torrent_and_its_twin_are_used(program, service, pulled, named):
    assert program("publish", "./tiny", "--out", "out", "--quiet").code == 0
    running = service("seed", named, *ANY_PORT, "--torrent", "out/tiny.torrent", "--json")
    assert [torrent["kind"] for torrent in json.loads(running.ready)["torrents"]] == ["hybrid", "v1"]
    assert json.loads(running.ready)["kept_in"] is None
    assert running.stop()[0] == 0


def spoil(directory):
    data = bytearray(FILES["weights.bin"])
    data[100_000] ^= 1
    (Path(directory) / "weights.bin").write_bytes(data)


def test_a_model_that_was_changed(program, service, manifest):
    assert program("publish", "./tiny", "--out", "out", "--quiet").code == 0
    spoil("tiny")
    shown = program("seed", "./tiny", "--torrent", "out/tiny.torrent", *ANY_PORT, "--strict", "--quiet")
    assert (shown.code, shown.out) == (32, "")
    assert "weights.bin is wrong at bytes [98304, 131072)" in shown.err
    running = service("seed", "./tiny", "--torrent", "out/tiny.torrent", *ANY_PORT, "--json")
    assert json.loads(running.ready)["offered_bytes"] == SIZE - 32768
    code, _, told = running.stop()
    assert code == 0
    assert "weights.bin is wrong at bytes [98304, 131072); those pieces are not offered" in told


def test_a_port_in_use(program, service, pulled):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        shown = program("seed", "tiny.meta4", "--listen", f"127.0.0.1:{port}")
        assert (shown.code, shown.out) == (11, "")
        assert shown.err.startswith(f"error: cannot listen on 127.0.0.1:{port}\n")
        running = service("seed", "tiny.meta4", "--listen", f"127.0.0.1:{port}-{port + 9}")
        assert f"127.0.0.1:{port}," not in running.ready
        code, _, told = running.stop()
    assert (code, told.count(f"port {port} is in use")) == (0, 1)


def test_systemd_is_told(environment, service, pulled, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(f"\0mistral-fetch-seed-{os.getpid()}")
        supervisor.settimeout(20)
        environment.setenv("NOTIFY_SOCKET", f"@mistral-fetch-seed-{os.getpid()}")
        running = service("seed", "tiny.meta4", *ANY_PORT)
        assert running.stop()[0] == 0
        heard = [supervisor.recv(4096).decode()]
        while heard[-1] != "STOPPING=1":
            heard.append(supervisor.recv(4096).decode())
    assert heard[0].startswith("EXTEND_TIMEOUT_USEC=")
    assert any(text.startswith("READY=1\nSTATUS=seeding tiny") for text in heard)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nowhere"], 3),
        (["./nowhere"], 3),
        (["mistral-7b"], 3),
        (["tiny", "--listen", "nonsense"], 2),
        (["tiny", "--limit", "fast"], 2),
        (["tiny", "--tracker", "ftp://x"], 2),
        (["tiny", "--offline"], 6),
        (["tiny", "--torrent", "none.torrent"], 3),
        ([], 2),
    ],
)
def test_what_cannot_be_seeded(program, manifest, arguments, code):
    shown = program("seed", *arguments)
    assert (shown.code, shown.out) == (code, "")
    assert len(shown.err.splitlines()) == 3
