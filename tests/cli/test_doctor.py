"""``doctor``: a report fit to be pasted anywhere, and each failure told apart, with what to do about it."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from mistral_fetch.bittorrent.bencode import decode, encode
from mistral_fetch.cli import doctor_disk, doctor_machine, doctor_network
from mistral_fetch.cli.doctor_report import FAIL, OK, WARN, Redactor, examine
from mistral_fetch.config import Settings
from mistral_fetch.errors import RuntimeFailed
from mistral_fetch.launch.locate import Interpreter
from mistral_fetch.launch.probe import RuntimeMachine, ask_machine
from mistral_fetch.simulators.hub import HubRepository, HubSimulator
from tests.cli.conftest import SIZE

GB = 10**9
CHECKS = [
    "program",
    "cache",
    "disk",
    "writes",
    "links",
    "locks",
    "names",
    "clock",
    "packages",
    "runtime",
    "memory",
    "threads",
    "proxy",
    "certificates",
    "environment",
]
MACHINE = RuntimeMachine("2.13.0", (), (), 64 * GB, 2, 2)


@pytest.fixture
def machine(environment):
    """The runtime's answer without waiting for PyTorch; ``set`` gives another one."""
    told = SimpleNamespace(machine=MACHINE)
    environment.setattr("mistral_fetch.launch.probe.ask_machine", lambda _interpreter: told.machine)
    environment.setattr("mistral_fetch.cli.doctor_disk._MODEL_BYTES", 0)
    return told


def test_it_is_calm_on_a_good_machine_and_leaves_nothing_behind(program, machine, tmp_path):
    before = sorted(tmp_path.iterdir())
    shown = program("doctor")
    assert (shown.code, shown.err) == (0, "")
    lines = [line for line in shown.out.splitlines() if not line.lstrip().startswith("->")]
    assert [line.split()[1] for line in lines] == CHECKS
    assert not any(line.startswith(FAIL) for line in lines)
    assert not program.home.exists()
    assert sorted(tmp_path.iterdir()) == before


def test_json_holds_the_same_facts(program, machine):
    report = program("doctor", "--json").json
    assert list(report) == CHECKS
    text = program("doctor").out
    for name, found in report.items():
        if name not in {"disk", "writes", "clock"}:  # which moved on meanwhile
            assert found["detail"] in text
        assert found["state"] in {"ok", "warn"}
    assert report["locks"]["facts"] == {"exclusive": True}
    assert report["names"]["facts"]["max_name_bytes"] >= 255


def test_no_socket_is_opened_unless_asked(program, machine, environment):
    environment.setattr("socket.socket", lambda *_, **__: pytest.fail("a socket"))
    assert program("doctor", "mistral-7b").code == 0


SECRETS = {
    "HF_TOKEN": "hf_secret",
    "HTTPS_PROXY": "http://someone:geheim@proxy.example:3128",
    "https_proxy": "http://someone:geheim@proxy.example:3128",
    "HF_ENDPOINT": "https://someone:geheim@hub.example",
    "MISTRAL_FETCH_CATALOG": "https://someone:geheim@catalog.example/c.json?sig=geheim",
    "AWS_SECRET_ACCESS_KEY": "abcdefghijk",
}


@pytest.mark.parametrize("extra", [[], ["--json"]], ids=["text", "json"])
def test_no_secret_is_printed(program, machine, environment, extra):
    for name, value in SECRETS.items():
        environment.setenv(name, value)
    shown = program("doctor", *extra)
    assert shown.code == 0
    assert "HF_TOKEN" in shown.out
    assert "with credentials" in shown.out
    for secret in ("hf_secret", "geheim", "someone", "proxy.example", "abcdefghijk"):
        assert secret not in shown.out + shown.err


def test_a_report_names_nobody(monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "jdoe")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/jdoe"))
    redact = Redactor({"HOME": "/home/jdoe", "API_KEY": "123456secret"})
    assert redact("/home/jdoe/.cache and /home/jdoe2/x") == "~/.cache and /home/***/x"
    assert redact("/srv/jdoe/models on C:\\Users\\Jane\\x") == "/srv/***/models on C:\\Users\\***\\x"
    assert (
        redact("http://a:b@h/x https://h/y?token=1 hf_abcdef 123456secret") == "http://***@h/x https://h/y?*** *** ***"
    )
    assert redact.all({"a": ["jdoe", 1, None, {"b": "/home/jdoe"}]}) == {"a": ["***", 1, None, {"b": "~"}]}


def test_the_secrets_of_an_error_are_taken_out_too(program, machine, environment):
    folder = program.home.parent / "hf_tokenlike"
    environment.setenv("MISTRAL_FETCH_PYTHON", str(folder / "python"))
    shown = program("doctor")
    assert shown.code == 1
    assert "does not answer" in shown.out
    assert "hf_tokenlike" not in shown.out


def test_what_is_missing_fails_and_the_rest_is_told_all_the_same(program, machine, environment, tmp_path):
    environment.setenv("MISTRAL_FETCH_PYTHON", str(tmp_path / "no-such-python"))
    program.home.mkdir()
    (program.home / "VERSION").write_text("99\n")
    shown = program("doctor", "--json")
    assert shown.code == 1
    assert [name for name, found in shown.json.items() if not found["ok"]] == ["cache", "runtime"]
    assert "expected layout version 1, got '99'" in shown.json["cache"]["detail"]
    assert "no-such-python" in shown.json["runtime"]["detail"]
    assert all(shown.json[name]["hint"] for name in ("cache", "runtime"))
    lines = program("doctor").out.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith("FAIL runtime")]
    assert lines[at + 1].lstrip().startswith("-> install it with: pip install")


# The disk


def test_a_cache_that_is_a_file(tmp_path):
    (tmp_path / "home").write_bytes(b"")
    assert doctor_disk.cache(tmp_path / "home").state == FAIL


@pytest.mark.parametrize(
    "free, state, told", [(100, FAIL, "free some space"), (10 * GB, WARN, "a 7B takes 14.5 GB"), (40 * GB, OK, "")]
)
def test_room(monkeypatch, tmp_path, free, state, told):
    monkeypatch.setattr(doctor_disk.shutil, "disk_usage", lambda _path: SimpleNamespace(free=free))
    found = doctor_disk.disk(tmp_path, 1000)
    assert found.state == state
    assert told in f"{found.detail} {found.hint}"
    assert found.facts == {"free_bytes": free, "reserve_bytes": 1000}


def test_a_cache_that_may_not_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert doctor_disk.disk(tmp_path, 0).state == FAIL


def test_a_disk_that_fails_to_sync(monkeypatch, tmp_path):
    def refuse(_descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    found = examine(lambda: doctor_disk.writes(tmp_path))
    assert (found.state, found.detail) == (FAIL, "Input/output error")
    assert found.hint
    assert list(tmp_path.iterdir()) == []


def test_permissions_that_do_not_hold(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "chmod", lambda *_: None)
    assert doctor_disk.writes(tmp_path).state == WARN


def test_links_as_far_as_they_work(monkeypatch, tmp_path):
    def refuse(*_arguments):
        raise OSError(errno.EPERM, "Operation not permitted")

    assert doctor_disk.links(tmp_path).facts["symbolic_links"]
    monkeypatch.setattr(Path, "symlink_to", refuse)
    found = doctor_disk.links(tmp_path)
    assert (found.state, found.facts["symbolic_links"], found.facts["hard_links"]) == (OK, False, True)
    monkeypatch.setattr(Path, "hardlink_to", refuse)
    found = doctor_disk.links(tmp_path)
    assert found.state == WARN
    assert "snapshots hold copies" in found.detail


@pytest.mark.parametrize("answer", ["answer True\n", "answer None\n"])
def test_a_lock_that_does_not_exclude(monkeypatch, tmp_path, answer):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=answer))
    found = doctor_disk.locks(tmp_path)
    assert (found.state, found.facts) == (WARN, {"exclusive": False})


def test_another_process_that_does_not_answer(monkeypatch, tmp_path):
    def wait(*_arguments, **_options):
        raise subprocess.TimeoutExpired("python", 30)

    monkeypatch.setattr(subprocess, "run", wait)
    found = doctor_disk.locks(tmp_path)
    assert (found.state, found.detail) == (WARN, "another process could not be asked")


def test_a_disk_without_locks(monkeypatch, tmp_path):
    monkeypatch.setattr("mistral_fetch.system.try_lock", lambda _descriptor: None)
    assert doctor_disk.locks(tmp_path).state == WARN


def test_names_that_are_folded_or_too_short(monkeypatch, tmp_path):
    exists, write = Path.exists, Path.write_bytes
    monkeypatch.setattr(Path, "exists", lambda path: exists(path.with_name(path.name.replace("case", "Case"))))
    assert doctor_disk.names(tmp_path).facts["case_sensitive"] is False

    def short(path, data):
        if len(path.name) > 143:
            raise OSError(errno.ENAMETOOLONG, "File name too long")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", short)
    found = doctor_disk.names(tmp_path)
    assert (found.state, "File name too long" in found.detail) == (FAIL, True)


@pytest.mark.parametrize(
    "year, skew, state", [(1970, 0, FAIL), (2100, 0, WARN), (0, 4000, WARN), (0, -4000, WARN), (0, 0, OK)]
)
def test_clocks(monkeypatch, tmp_path, year, skew, state):
    now = time.time() if not year else (year - 1970) * 365.25 * 86400 + 86400
    assert doctor_disk.clock(tmp_path, now + skew).state == state


def test_a_program_from_the_future(monkeypatch, tmp_path):
    future = tmp_path / "installed.py"
    future.touch()
    os.utime(future, (time.time() + 10**6,) * 2)
    monkeypatch.setattr(doctor_disk, "__file__", str(future))
    found = doctor_disk.clock(tmp_path)
    assert found.state == WARN
    assert "before this program was installed" in found.detail


# The machine


@pytest.mark.parametrize(
    "memory, devices, state, told",
    [
        (64 * GB, (), OK, "16 bits fits"),
        (9 * GB, (), OK, "--quantize int8"),
        (5 * GB, (), OK, "--quantize int4"),
        (2 * GB, (), WARN, "a smaller model"),
        (2 * GB, (80 * GB,), OK, "16 bits fits"),
        (None, (), OK, "not known"),
    ],
)
def test_which_widths_of_a_7b_fit(memory, devices, state, told):
    found = doctor_machine.memory(replace(MACHINE, memory=memory, device_memory=devices))
    assert found.state == state
    assert told in f"{found.detail} {found.hint}"


def test_more_threads_than_cores(monkeypatch):
    monkeypatch.setattr("mistral_fetch.launch.cpu.usable_threads", lambda: 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr("mistral_fetch.system.usable_cores", lambda: 8)
    found = doctor_machine.threads()
    assert (found.state, found.facts) == (OK, {"usable": 2, "affinity": 8, "cores": 64})
    assert "8 by affinity, 2 by the control group's quota" in found.detail
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    assert doctor_machine.threads().state == WARN


def test_a_base_package_that_is_missing(monkeypatch):
    import importlib.metadata

    real = importlib.metadata.version

    def version(name):
        if name == "httpx":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = doctor_machine.packages()
    assert (found.state, found.facts["httpx"]) == (FAIL, "missing")


def fake_python(tmp_path: Path, script: str) -> Interpreter:
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return Interpreter(str(path), tmp_path)


TOLD = {"torch": "2", "devices": ["H"], "device_memory": [5], "memory": None, "cores": 1, "threads": 1}


def test_the_runtime_is_asked_in_its_own_interpreter(tmp_path):
    answers = fake_python(tmp_path, f"echo noise; echo 'mistral-fetch-probe: {json.dumps(TOLD)}'")
    assert ask_machine(answers) == RuntimeMachine("2", ("H",), (5,), None, 1, 1)


@pytest.mark.parametrize(
    "script, told",
    [
        ("exec sleep 30", "no answer within"),
        ("echo 'ImportError: libcudart.so' >&2; exit 1", "libcudart.so"),
        ("echo 'mistral-fetch-probe: []'", "nothing"),
        ("exit 0", "nothing"),
    ],
    ids=["silent", "broken", "odd", "mute"],
)
def test_a_pytorch_that_does_not_work(tmp_path, script, told):
    with pytest.raises(RuntimeFailed) as caught:
        ask_machine(fake_python(tmp_path, script), timeout_seconds=0.5 if "sleep" in script else 20)
    assert told in caught.value.detail


# The network


@pytest.mark.parametrize(
    "variables, setting, state, told",
    [
        ({}, "", OK, "none"),
        ({"HTTPS_PROXY": "http://p:1"}, "", OK, "HTTPS_PROXY (http) for mirrors"),
        ({"https_proxy": "p:3128"}, "", OK, "HTTPS_PROXY (http)"),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "a,b"}, "", OK, "NO_PROXY excepts 2"),
        ({"HTTPS_PROXY": "http://p:1", "https_proxy": "http://q:1"}, "", WARN, "only https_proxy counts"),
        ({"HTTPS_PROXY": "http://p:1"}, "http://q:1", OK, "the setting proxy (http) for mirrors and peers"),
        ({"ALL_PROXY": "gopher://p:1"}, "", FAIL, "unknown scheme 'gopher'"),
        ({"ALL_PROXY": "http://p:port"}, "", FAIL, "not an address"),
        ({"ALL_PROXY": "http://"}, "", FAIL, "no host"),
    ],
)
def test_proxies(tmp_path, variables, setting, state, told):
    found = doctor_network.proxy(Settings(home=tmp_path, proxy=setting), variables)
    assert found.state == state
    assert told in f"{found.detail} {found.hint}"


def test_a_socks_proxy_needs_a_package(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor_network, "_lacks", lambda module: module == "socksio")
    found = doctor_network.proxy(Settings(home=tmp_path), {"ALL_PROXY": "socks5://p:1"})
    assert (found.state, found.hint) == (FAIL, "install it with: pip install 'httpx[socks]'")


@pytest.mark.parametrize("content, state", [(b"no certificate", FAIL), (b"", FAIL), (None, FAIL)])
def test_certificates_that_cannot_be_used(tmp_path, content, state):
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    for settings, variables in (
        (Settings(home=tmp_path, ca_bundle=str(path)), {}),
        (Settings(home=tmp_path), {"SSL_CERT_FILE": str(path)}),
    ):
        found = doctor_network.certificates(settings, variables)
        assert found.state == state
        assert str(path) in found.detail


def test_certificates_that_can(tmp_path):
    assert doctor_network.certificates(Settings(home=tmp_path), {}).state == OK
    import certifi

    found = doctor_network.certificates(Settings(home=tmp_path, ca_bundle=certifi.where()), {})
    assert found.state == OK
    assert found.facts["count"] > 20


@contextmanager
def a_hub():
    with HubSimulator({"org/model": HubRepository({"consolidated.safetensors": bytes(100_000)})}) as hub:
        yield hub


def test_the_network_is_asked_when_that_is_asked_for(program, machine, environment):
    with a_hub() as hub:
        environment.setenv("HF_ENDPOINT", hub.base_url)
        shown = program("doctor", "hf:org/model", "--network", "--json", "--listen", "127.0.0.1:0")
        assert shown.code == 0, shown.out
        report = shown.json
        assert list(report) == [*CHECKS, "hub", "ports", "dht", "hf:org/model"]
        assert report["hub"]["facts"]["status"] in {200, 404}
        assert "off (the default)" in report["dht"]["detail"]
        planned = report["hf:org/model"]["facts"]
        assert (planned["to_fetch_bytes"], planned["channel"]) == (100_000, "hub")
        assert hub.bytes_sent() < 100_000  # descriptions alone
        assert not program.home.exists()


def test_a_hub_that_is_not_there(program, machine, environment):
    environment.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    shown = program("doctor", "--network", "--json")
    assert shown.code == 1
    assert shown.json["hub"]["state"] == "fail"


def test_a_clock_that_is_not_the_hub_s(monkeypatch, tmp_path):
    assert doctor_network._skew("Thu, 01 Jan 1970 00:00:00 GMT") < -(10**9)
    assert doctor_network._skew("yesterday") is None
    with a_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.base_url)
        monkeypatch.setattr(doctor_network, "_skew", lambda _date: 4000.0)
        found = doctor_network.hub(Settings(home=tmp_path))
    assert (found.state, "behind" in found.detail) == (WARN, True)


def test_a_port_that_is_taken(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        found = doctor_network.ports(Settings(home=tmp_path, listen=(f"127.0.0.1:{port}",)))
    assert (found.state, str(port) in found.detail) == (FAIL, True)


def test_a_dht_where_nobody_answers(tmp_path):
    settings = Settings(home=tmp_path, dht=True, dht_nodes=("127.0.0.1:9",), listen=("127.0.0.1:0",))
    found = doctor_network.dht(settings, timeout_seconds=0.5)
    assert (found.state, found.facts) == (WARN, {"nodes": 0})
    assert doctor_network.dht(replace(settings, proxy="socks5://p:1")).state == WARN


class DhtNode:
    """A node of a DHT on loopback: answers every query with the nodes that it knows (BEP 5)."""

    def __init__(self, host, identity, nodes=b""):
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((host, 0))
        self.host, self.port = self.socket.getsockname()
        self.compact = identity + socket.inet_aton(host) + self.port.to_bytes(2, "big")
        self._reply = {b"id": identity, b"nodes": nodes}
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        while True:
            query, asker = self.socket.recvfrom(2048)
            if not query:
                return
            answer = {b"t": decode(query)[b"t"], b"y": b"r", b"r": self._reply}
            self.socket.sendto(encode(answer), asker)

    def close(self):
        """Stop answering."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", (self.host, self.port))
        self._thread.join()
        self.socket.close()


def test_a_dht_that_answers(tmp_path):
    second = DhtNode("127.0.0.2", b"z" * 20)
    first = DhtNode("127.0.0.1", b"a" * 20, second.compact)
    try:
        nodes, listen = (f"127.0.0.1:{first.port}",), ("127.0.0.1:0",)
        settings = Settings(home=tmp_path, dht=True, dht_nodes=nodes, listen=listen)
        found = doctor_network.dht(settings, timeout_seconds=20)
        assert (found.state, found.facts) == (OK, {"nodes": 1})
    finally:
        first.close()
        second.close()


# A model


def test_a_model_that_is_here(program, machine, pulled):
    found = program("doctor", "tiny.meta4", "--json").json["tiny.meta4"]
    assert (found["state"], found["facts"]["directory"]) == ("ok", str(pulled))


def test_who_would_be_asked(program, machine, manifest):
    report = program("doctor", "tiny.meta4", "mistral-7b", "hf:org/x", "https://h/x.meta4", "--json").json
    assert "the folder beside the manifest" in report["tiny.meta4"]["detail"]
    assert f"{SIZE / 1000:.1f} kB" in report["tiny.meta4"]["detail"]
    ways = report["mistral-7b"]["facts"]["ways"]
    assert "the hub at huggingface.co (sha256" in ways[0]
    assert "the official torrent" in ways[1]
    assert "the hub at" in report["hf:org/x"]["detail"]
    assert "what https://h/x.meta4 names" in report["https://h/x.meta4"]["detail"]


def test_settings_that_leave_nobody_to_ask(program, machine):
    found = program("doctor", "mistral-7b", "--via", "torrent", "--min-assurance", "sha256", "--json").json
    assert "nobody: no channel reaches sha256" in found["mistral-7b"]["detail"]
    shown = program("doctor", "mistral-7b", "--offline", "--json")
    assert (shown.code, shown.json["mistral-7b"]["state"]) == (1, "fail")


def test_an_unknown_model_fails_alone(program, machine):
    shown = program("doctor", "mistral-8b", "--json")
    assert shown.code == 1
    assert [name for name, found in shown.json.items() if not found["ok"]] == ["mistral-8b"]
