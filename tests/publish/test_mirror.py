"""The mirror: exactly what publish lays out, with ranges and strong validators, and not a byte more."""

from __future__ import annotations

import gc
import http.client
import json
import socket
import sys
import time
import warnings

import pytest

from mistral_fetch.errors import ListenRefused, RuntimeMissing
from mistral_fetch.metalink import parse_metalink
from mistral_fetch.publish.build import plan_publication, publish
from mistral_fetch.publish.listen import parse_listen
from mistral_fetch.publish.metrics import Metrics
from mistral_fetch.publish.mirror import MirrorServer
from mistral_fetch.publish.readback import parse_checksums, read_back
from mistral_fetch.publish.site import ServedModel, build_site
from tests.publish.conftest import FILES, content, wait_until

WEIGHTS = content("weights.bin", FILES["weights.bin"])
SIZE = len(WEIGHTS)


def served_model(world, name="tiny"):
    out = world.directory.parent
    return ServedModel(name, out, read_back(out, "tiny"), plan_publication(world.directory), "tiny")


@pytest.fixture(autouse=True)
def collected():
    """Let go of what uvicorn cut off here, not in somebody else's test: it leaves that to the process's end."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def serve(world):
    """Start a mirror; yields its port."""
    servers = []

    def start(*names, has_index=False):
        site = build_site([served_model(world, name) for name in names or ("tiny",)], has_index=has_index)
        servers.append(MirrorServer(parse_listen("127.0.0.1:0"), site, Metrics("mirror")))
        wait_until(lambda: servers[-1].is_running)
        return servers[-1].port

    yield start
    for server in servers:
        server.close()


def ask(port, path, method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def test_the_layout_is_that_of_publish(world, serve):
    port = serve()
    for path in ("tiny.meta4", "tiny.torrent", "tiny.v1.torrent", "SHA256SUMS", "tiny/weights.bin", "tiny/params.json"):
        status, headers, body = ask(port, f"/{path}")
        assert (status, body) == (200, (world.directory.parent / path).read_bytes())
        assert int(headers["content-length"]) == len(body)
    assert ask(port, "/tiny.meta4")[1]["content-type"] == "application/metalink4+xml"


def test_the_signatures_of_a_publication_are_served_beside_it(world, serve):
    for ending in ("meta4.sig", "sig"):
        (world.directory.parent / f"tiny.{ending}").write_bytes(b"signed")
    try:
        port = serve()
    finally:
        for ending in ("meta4.sig", "sig"):
            (world.directory.parent / f"tiny.{ending}").unlink()
    assert [ask(port, f"/tiny.{ending}")[::2] for ending in ("meta4.sig", "sig")] == [(200, b"signed")] * 2
    assert ask(serve(), "/tiny.meta4.sig")[0] == 404


def test_the_validator_is_the_digest(world, serve):
    port = serve()
    sha256 = world.published.manifest.entry("weights.bin").sha256
    status, headers, body = ask(port, "/tiny/weights.bin", "HEAD")
    assert (status, body, headers["etag"]) == (200, b"", f'"{sha256}"')
    assert (headers["accept-ranges"], headers["content-length"]) == ("bytes", str(SIZE))
    assert ask(port, "/tiny/weights.bin", If_None_Match=f'"{sha256}"')[::2] == (304, b"")
    assert ask(port, "/tiny/weights.bin", If_None_Match='"other"')[0] == 200


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [("0-0", 0, 1), ("5-9", 5, 10), ("700000-", 700_000, SIZE), ("-7", SIZE - 7, SIZE), ("10-9999999999", 10, SIZE)],
)
def test_ranges(serve, asked, start, end):
    status, headers, body = ask(serve(), "/tiny/weights.bin", Range=f"bytes={asked}")
    assert (status, body) == (206, WEIGHTS[start:end])
    assert headers["content-range"] == f"bytes {start}-{end - 1}/{SIZE}"


def test_a_range_beyond_the_end_is_416(serve):
    status, headers, _ = ask(serve(), "/tiny/weights.bin", Range=f"bytes={SIZE}-")
    assert (status, headers["content-range"]) == (416, f"bytes */{SIZE}")


@pytest.mark.parametrize("asked", ["pieces=0-1", "bytes=a-b", "bytes", "bytes=-", "bytes=1-2;3"])
def test_what_is_no_range_of_bytes_is_ignored(serve, asked):
    status, _, body = ask(serve(), "/tiny/weights.bin", Range=asked)
    assert (status, body) in {(200, WEIGHTS), (400, body)}
    assert status == 200 or asked == "bytes=-"


def test_if_range_guards_against_another_version(world, serve):
    port, sha256 = serve(), world.published.manifest.entry("weights.bin").sha256
    assert ask(port, "/tiny/weights.bin", Range="bytes=0-9", If_Range=f'"{sha256}"')[0] == 206
    assert ask(port, "/tiny/weights.bin", Range="bytes=0-9", If_Range='"other"')[::2] == (200, WEIGHTS)
    assert ask(port, "/tiny/weights.bin", Range="bytes=0-9", If_Range=f'W/"{sha256}"')[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/tiny",
        "/tiny/",
        "/tiny/../../../../etc/passwd",
        "/..%2f..%2f..%2fetc/passwd",
        "//etc/passwd",
        "/tiny/%2e%2e/secret",
        "/secret",
        "/tiny/secret",
        "/tiny/weights.bin/",
        "/tiny//weights.bin",
        "/tiny/weights.bin%00",
        "/TINY/weights.bin",
    ],
)
def test_nothing_else_can_be_had(world, serve, path):
    (world.directory.parent / "secret").write_bytes(b"secret")
    port = serve()
    (world.directory / "secret").write_bytes(b"secret")  # after the manifest was made
    status, _, body = ask(port, path)
    assert (status, body) == (404, b"not found\n")


@pytest.mark.parametrize("method", ["PUT", "POST", "DELETE", "OPTIONS"])
def test_it_is_read_only(serve, method):
    status, headers, _ = ask(serve(), "/tiny/weights.bin", method)
    assert (status, headers["allow"]) == (405, "GET, HEAD")


def test_a_file_that_was_changed_is_not_served_under_its_old_validator(world, serve):
    port = serve()
    world.spoil()
    status, headers, body = ask(port, "/tiny/weights.bin")
    assert (status, body) == (503, b"this file was changed on the server\n")
    assert "etag" not in headers
    assert ask(port, "/tiny/params.json")[0] == 200


def test_an_index_of_several_models(world, serve):
    port = serve("tiny", "other", has_index=True)
    _, headers, body = ask(port, "/")
    assert headers["content-type"] == "application/json"
    listed = json.loads(body)["models"]
    assert [model["name"] for model in listed] == ["tiny", "other"]
    manifest = parse_metalink(ask(port, f"/{listed[1]['manifest']}")[2], f"http://127.0.0.1:{port}/other.meta4")
    assert manifest.entry("weights.bin").mirrors[0].url == f"http://127.0.0.1:{port}/other/weights.bin"
    torrents = {link.url.rpartition("/")[2] for link in manifest.entry("weights.bin").torrents}
    assert torrents == {"other.torrent", "other.v1.torrent"}
    assert ask(port, "/other/weights.bin")[2] == WEIGHTS
    sums = parse_checksums(ask(port, "/SHA256SUMS")[2].decode())
    assert set(sums) == {f"{name}/{path}" for name in ("tiny", "other") for path in FILES}


def test_what_was_sent_is_counted(world):
    metrics = Metrics("mirror")
    site = build_site([served_model(world)], has_index=False)
    with MirrorServer(parse_listen("127.0.0.1:0"), site, metrics) as server:
        wait_until(lambda: server.is_running)
        ask(server.port, "/tiny/weights.bin", Range="bytes=0-99")
        ask(server.port, "/nothing")
        wait_until(lambda: metrics.snapshot()["uploaded_bytes"].get("http") == 100 + len(b"not found\n"))
    assert metrics.snapshot()["http_answers"] == {"206": 1, "404": 1}


def test_a_download_under_way_does_not_hold_up_the_end(tmp_path, capfd):
    directory = tmp_path / "served" / "tiny"
    directory.mkdir(parents=True)
    with (directory / "big.bin").open("wb") as file:
        file.truncate(32_000_000)
    publish(directory, tmp_path / "served")
    model = ServedModel(
        "tiny", tmp_path / "served", read_back(tmp_path / "served", "tiny"), plan_publication(directory), "tiny"
    )
    server = MirrorServer(parse_listen("127.0.0.1:0"), build_site([model], has_index=False), Metrics("mirror"))
    wait_until(lambda: server.is_running)
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"GET /tiny/big.bin HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(15) == b"HTTP/1.1 200 OK"
        began = time.monotonic()
        server.close()
        assert time.monotonic() - began < 6
    assert not server.is_running
    assert capfd.readouterr().err == ""


def test_a_port_in_use_is_refused(world):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ListenRefused, match="cannot listen"):
        MirrorServer(parse_listen(f"127.0.0.1:{taken.getsockname()[1]}"), {}, Metrics("mirror"))


@pytest.mark.parametrize("library", ["uvicorn", "starlette.responses"])
def test_a_missing_library_says_what_to_install(world, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(RuntimeMissing) as caught:
        MirrorServer(parse_listen("127.0.0.1:0"), {}, Metrics("mirror"))
    assert caught.value.hint == "pip install 'mistral-fetch[serve]'"
