"""``mirror`` as a service: another machine pulls from it, and it ends in good order."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from mistral_fetch.simulators.publisher import PublisherSimulator
from tests.cli.conftest import FILES, SIZE
from tests.cli.services import ROOT
from tests.keys import make_keys

pytestmark = pytest.mark.timeout(90)
ANY_PORT = ["--listen", "127.0.0.1:0"]


def fetch(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read()


@pytest.mark.parametrize("named", ["tiny.meta4", "./tiny"], ids=["REF", "DIR"])
def test_a_mirrored_model_is_pulled_from_another_machine(program, service, pulled, tmp_path, named):
    running = service("mirror", named, *ANY_PORT)
    match = re.fullmatch(r"ready: serving \S+ \(281\.6 kB\) at (http://127\.0\.0\.1:\d+/\S+\.meta4)\n", running.ready)
    assert match, running.ready + running.process.stderr.read()
    done = program("pull", match[1], "--home", tmp_path / "other", "--via", "http", "--json", "--quiet")
    assert done.code == 0, done.err
    assert done.json["assurance"] == "sha256"
    assert all((Path(done.json["directory"]) / path).read_bytes() == data for path, data in FILES.items())
    assert program("mirror", "check", match[1], "--quiet").code == 0
    code, out, err = running.stop()
    assert (code, out) == (0, "")
    assert re.search(r"stopped: \d+\.\d kB sent in \d+ s\n$", err)
    assert "GET" not in err


def test_a_signed_publication_is_served_as_it_was_signed(program, service, manifest, tmp_path):
    keys, out = make_keys(tmp_path, "publisher"), tmp_path / "site"
    # With another licence than a mirror would know of: made anew, it would not be what was signed.
    options = ["--out", out, "--sign", keys.private, "--licence", "MIT"]
    assert program("publish", "./tiny", *options).code == 0
    signed = (out / "tiny.meta4").read_bytes()
    running = service("mirror", "./tiny", "--out", out, *ANY_PORT)
    url = re.search(r"http://\S+", running.ready)[0]
    done = program("pull", url, "--trust-key", keys.public, "--via", "http", "--json", "--quiet")
    assert (done.code, done.json["assurance"]) == (0, "signed"), done.err
    running.stop()
    assert (out / "tiny.meta4").read_bytes() == signed
    Path("tiny/params.json").write_bytes(b"{ }")
    refused = program("mirror", "./tiny", "--out", out, *ANY_PORT)
    assert (refused.code, "is not this model" in refused.err) == (2, True)
    assert (out / "tiny.meta4").read_bytes() == signed


def test_every_complete_model_with_an_index(program, service, pulled, tmp_path):
    shutil.copy("tiny.meta4", "copy.meta4")  # the same content under another name is served once
    assert program("pull", "copy.meta4", "--quiet").code == 0
    running = service("mirror", *ANY_PORT, "--json", "--quiet", "--status-listen", "127.0.0.1:0")
    ready = json.loads(running.ready)
    assert (ready["event"], ready["size"], ready["index"]) == ("ready", SIZE, ready["url"] + "/")
    assert [model["name"] for model in ready["models"]] == ["tiny-1"]
    assert [model["name"] for model in json.loads(fetch(ready["index"]))["models"]] == ["tiny-1"]
    assert fetch(f"{ready['url']}/tiny-1/params.json") == FILES["params.json"]
    text = fetch(f"{ready['status_url']}/metrics").decode()
    assert "mistral_fetch_ready 1.0" in text
    assert 'mistral_fetch_http_answers_total{status="200"} 2.0' in text
    code, out, err = running.stop(signal.SIGINT)
    assert (code, err) == (0, "")
    assert json.loads(out)["uploaded_bytes"] > len(FILES["params.json"])


def test_an_access_log_where_it_is_wanted(service, pulled):
    running = service("mirror", "tiny.meta4", *ANY_PORT, "--access-log", "--json")
    fetch(json.loads(running.ready)["models"][0]["manifest"])
    code, out, err = running.stop()
    assert (code, "GET /tiny-1.meta4" in err, json.loads(out)["event"]) == (0, True, "end")


def test_the_duration_ends_it(service, pulled):
    running = service("mirror", "tiny.meta4", *ANY_PORT, "--duration", "0.5", "--json")
    code, out, _ = running.end()
    assert (code, json.loads(out)["reason"]) == (0, "duration")


def test_a_port_in_use(program, pulled):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        shown = program("mirror", "tiny.meta4", "--listen", f"127.0.0.1:{port}")
    assert (shown.code, shown.out) == (11, "")
    assert shown.err.startswith(f"error: cannot listen on 127.0.0.1:{port}\n")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [([], 3), (["nowhere"], 3), (["tiny", "--listen", "x"], 2), (["tiny", "--offline"], 6), (["tiny", "--port"], 2)],
)
def test_what_cannot_be_served(program, manifest, arguments, code):
    shown = program("mirror", *arguments)
    assert (shown.code, shown.out) == (code, "")
    assert len(shown.err.splitlines()) == 3


def test_a_pull_serves_its_numbers(environment, tmp_path):
    """Held up by a mirror that sends slowly, so that there is time to look."""
    environment.setenv("PYTHONPATH", str(ROOT))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with PublisherSimulator({"weights.bin": bytes(400_000)}, name="m").serve(rate_bytes_per_second=200_000) as slow:
        pull = ["pull", slow.url("m.meta4"), "--home", str(tmp_path / "h"), "--quiet"]
        argv = [sys.executable, "-m", "mistral_fetch", *pull, "--status-listen", f"127.0.0.1:{port}"]
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
        seen = {}
        while process.poll() is None and not seen.get("received_bytes"):
            try:
                seen = json.loads(fetch(f"http://127.0.0.1:{port}/status.json"))
            except OSError:
                time.sleep(0.02)
        assert process.wait(30) == 0
    assert (seen["doing"], seen["total_bytes"], seen["ready"]) == ("pull", 400_000, False)
    assert seen["received_bytes"]["http"] > 0
