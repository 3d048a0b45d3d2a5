"""The command line of `serve`: what is refused before anything is loaded, and a server from its start to its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import urllib.request

import pytest

from mistral_runtime.arguments import build_parser
from mistral_runtime.errors import BadRequest, MissingFile
from mistral_runtime.serve.command import ServeOptions, run_serve
from mistral_runtime.serve.engine_port import EngineFailed
from mistral_runtime.serve.listening import is_loopback, listen_tcp, listen_unix
from mistral_runtime.serve.notify import notify
from tests.runtime.serve.web.scripted_engine import ScriptedEngine


def options(*argv):
    return ServeOptions.of(build_parser().parse_args(["serve", *map(str, argv)]))


@pytest.fixture
def snapshot(tmp_path, write_snapshot):
    write_snapshot(tmp_path / "a model", "consolidated")
    (tmp_path / "a model" / "PROVENANCE.json").write_text('{"licence": "Apache-2.0", "chat_template": null}')
    return tmp_path / "a model"


def test_defaults(snapshot):
    given = options(snapshot)
    assert (given.host, given.port, given.model_names) == ("127.0.0.1", 8000, ("a-model",))


@pytest.mark.parametrize(
    "flags",
    [
        ["--port", "70000"],
        ["--model-name", "a b"],
        ["--max-body", "1"],
        ["--drain-timeout", "-1"],
        ["--drain-timeout", "nan"],
    ],
)
def test_flags_out_of_range_are_refused(snapshot, flags):
    with pytest.raises(BadRequest, match=flags[0]):
        options(snapshot, *flags)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_network_is_not_served_without_a_key(snapshot, host):
    with pytest.raises(BadRequest, match="expected --api-key-file"):
        run_serve(options(snapshot, "--host", host, "--port", 0), pytest.fail)


def test_bad_addresses_are_told(snapshot):
    with pytest.raises(BadRequest, match="no address of this machine"):
        run_serve(options(snapshot, "--host", "no such host"), pytest.fail)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(BadRequest, match="cannot listen"):
        run_serve(options(snapshot, "--port", taken.getsockname()[1]), pytest.fail)


def test_no_token_waits_for_the_clients_acknowledgement():
    with (
        listen_tcp(socket.AF_INET, ("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_directory_without_a_model_is_told(tmp_path):
    with pytest.raises(MissingFile):
        run_serve(options(tmp_path), pytest.fail)


@pytest.mark.parametrize(
    "address, expected", [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("10.0.0.1", False)]
)
def test_loopback_addresses_are_known(address, expected):
    assert is_loopback(address) == expected


def test_a_server_from_start_to_end(snapshot, capfd):
    engine = ScriptedEngine(lambda _request: [])
    told = {}

    def make():
        told["line"] = threading.Thread(target=ask)
        told["line"].start()
        return engine

    def ask():
        text = ""
        while "listening" not in text:
            text += capfd.readouterr().out
        address = text.split()[2]
        with urllib.request.urlopen(f"{address}/models", timeout=30) as answer:
            told["models"] = json.load(answer)
        told["text"] = text
        os.kill(os.getpid(), signal.SIGTERM)

    assert run_serve(options(snapshot, "--port", 0, "--model-name", "a", "--model-name", "b/c", "--quiet"), make) == 0
    told["line"].join()
    assert told["text"].startswith("listening on http://127.0.0.1:")
    assert told["text"].endswith("/v1 model a, b/c\n")
    assert [(model["id"], model["license"]) for model in told["models"]["data"]] == [
        ("a", "Apache-2.0"),
        ("b/c", "Apache-2.0"),
    ]
    assert engine.calls == ["start", "drain 30", "close"]


def test_an_engine_that_fails_gives_its_code_and_words(snapshot, capfd):
    engine = ScriptedEngine(lambda _request: [])

    async def load():
        raise EngineFailed(40, "error: the weights are damaged")

    engine.load = load
    assert run_serve(options(snapshot, "--port", 0), lambda: engine) == 40
    assert "the weights are damaged" in capfd.readouterr().err


def test_a_unix_socket_is_this_users_alone_and_replaces_a_stale_one(tmp_path):
    path = tmp_path / "socket"
    listen_unix(path).close()
    with listen_unix(path):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
        with pytest.raises(BadRequest, match="cannot listen"):
            listen_unix(path)
    path.unlink()
    path.write_text("not a socket")
    with pytest.raises(BadRequest):
        listen_unix(path)
    assert path.read_text() == "not a socket"


def test_a_server_at_a_unix_socket(snapshot, tmp_path):
    path = tmp_path / "socket"
    answers = []

    class Asked(ScriptedEngine):
        async def wait_ready(self):
            self.asking = asyncio.ensure_future(self.ask())

        async def ask(self):
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            answers.append(await reader.read())
            writer.close()
            os.kill(os.getpid(), signal.SIGTERM)

    assert run_serve(options(snapshot, "--uds", path, "--quiet"), lambda: Asked(lambda _request: [])) == 0
    assert b" 200 OK" in answers[0]
    assert not path.exists()


def test_systemd_is_told(tmp_path):
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(address)
        notify("READY=1", {"NOTIFY_SOCKET": address})
        assert supervisor.recv(100) == b"READY=1"
    notify("READY=1", {"NOTIFY_SOCKET": address})  # nobody there any more
    notify("READY=1", {})


def test_the_process_that_speaks_http_has_no_torch():
    program = "import mistral_runtime.serve.command, sys; print(*sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_help_needs_none_of_the_servers_libraries():
    program = (
        "import sys\nfrom mistral_runtime.arguments import build_parser\nbuild_parser()\n"
        "print(*sorted({'starlette', 'uvicorn', 'mistral_common', 'asyncio'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
