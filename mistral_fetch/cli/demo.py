"""``demo``: the whole product on loopback in a minute, with a model small enough to ship in the package.

A mirror and a seeder run as processes of their own, the same ``pull`` as always fetches from each, and the
same runtime answers. Everything lies in one temporary directory, and nothing is left running.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mistral_fetch.cli.options import FrontEnd, command, write_out
from mistral_fetch.errors import IntegrityError, LaunchError, UsageError
from mistral_fetch.units import format_duration, format_size

if TYPE_CHECKING:
    from mistral_fetch.publish.build import Publication

NAME = "demo-mistral"
QUESTIONS = (
    "What licence is Mistral 7B under?",
    "How large is Mistral 7B?",
    "What does mistral-fetch verify?",
)
START_TIMEOUT_SECONDS = 30.0


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    command(app, "demo", epilog="Exit codes: 0 ok, 32 integrity, 40 the runtime is missing or failed.")(demo)


def demo(front: FrontEnd) -> int:
    """Publish, fetch by HTTP and by torrent, verify and run a tiny bundled model, all on this machine."""
    from mistral_fetch.launch.locate import find_interpreter

    if front.settings.offline:
        raise UsageError(
            "the demo is a network of its own",
            detail="expected leave to open loopback sockets, got --offline",
            hint="run it without --offline; it never leaves this machine",
        )
    interpreter = find_interpreter(front.settings.python)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mistral-fetch-demo-") as folder:
        results = _fetch_both_ways(front, Path(folder))
        fetched = time.monotonic()
        answers = _ask(front, interpreter, Path(results["http"]["directory"]))
    fields = {
        **results,
        "answers": answers,
        "fetch_seconds": round(fetched - started, 2),
        "total_seconds": round(time.monotonic() - started, 2),
    }
    front.result(fields, _summary(results, fetched - started))
    return 0


def _fetch_both_ways(front: FrontEnd, folder: Path) -> dict[str, Any]:
    published = folder / "published"
    front.note(f"Publishing the bundled model as {NAME}: manifest, torrents, checksums.")
    made = _publish(published)
    with _running("mirror", "--dir", str(published)) as mirror, _running(*_seeder_arguments(made, published)) as seeder:
        front.note(f"A mirror at {mirror['url']} and a seeder on port {seeder['port']}, both on loopback.")
        address = f"{mirror['url'].rstrip('/')}/{made.manifest_path.name}"
        peers = (f"127.0.0.1:{seeder['port']}",)
        by_http = _pull(front, folder / "cache-http", address, via="http", peers=())
        by_torrent = _pull(front, folder / "cache-torrent", str(made.torrent_path), via="torrent", peers=peers)
    if by_http["content_digest"] != by_torrent["content_digest"]:
        raise IntegrityError(
            "the two channels brought different files",
            detail=f"expected {by_http['content_digest']}, got {by_torrent['content_digest']}",
            hint="this is a bug: please report it",
        )
    return {"http": by_http, "torrent": by_torrent, "size": made.size}


def _publish(published: Path) -> Publication:
    from importlib import resources

    from mistral_fetch.manifest import ModelInfo
    from mistral_fetch.publish.build import publish

    with resources.as_file(resources.files("mistral_fetch") / "demo_model") as bundled:
        shutil.copytree(bundled, published / NAME)
    info = ModelInfo(
        name=NAME,
        version="1",
        licence="Apache-2.0",
        credit="The demo model of mistral-fetch, Apache-2.0",
        weight_format="consolidated-pth",
        chat_template="demo",
    )
    return publish(published / NAME, published, name=NAME, info=info)


def _seeder_arguments(made: Publication, published: Path) -> Sequence[str]:
    return ("seeder", "--torrent", str(made.torrent_path), "--dir", str(published / NAME))


@contextmanager
def _running(simulator: str, *arguments: str) -> Iterator[dict[str, Any]]:
    """Run one of our simulators as a process; yield what it says when ready; make sure that it ends."""
    argv = [sys.executable, "-m", f"mistral_fetch.simulators.{simulator}", *arguments]
    # It ends when its standard input closes, so it cannot outlive us, however we die.
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise LaunchError(
                f"the demo's {simulator} did not start",
                detail=f"expected a line that says it is ready, got exit code {process.wait(START_TIMEOUT_SECONDS)}",
                hint="mistral-fetch doctor explains this machine",
            )
        yield json.loads(line)
    finally:
        process.terminate()
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _pull(front: FrontEnd, home: Path, ref: str, *, via: str, peers: tuple[str, ...]) -> dict[str, Any]:
    from mistral_fetch.cli.fetch import fetch

    front.note(f"Fetching it by {via}:")
    settings = replace(front.settings, home=home, via=via, peers=peers, dht=False, disk_reserve=0)
    result = fetch(replace(front, settings=settings), ref)
    return {
        "directory": str(result.directory),
        "content_digest": result.content_digest,
        "assurance": result.assurance,
        "received_bytes": result.received_bytes,
    }


def _ask(front: FrontEnd, interpreter: Any, directory: Path) -> list[dict[str, str]]:
    """Let the runtime answer; in JSON mode its answers are collected, otherwise they are the output."""
    from mistral_fetch.launch.process import capture_runtime, explained_failure, run_runtime

    front.note("Starting the bundled runtime on what was verified:")
    answers = []
    for question in QUESTIONS:
        options = ["--temperature=0", "--max-tokens=160", "--quiet", f"--prompt={question}"]
        if front.is_json:
            code, output = capture_runtime(interpreter, "generate", [*options, "--json"], [str(directory)])
            if code:
                raise explained_failure(code)
            answers.append({"question": question, "answer": str(json.loads(output)["text"]).strip()})
            continue
        write_out(f"\n> {question}")
        code = run_runtime(interpreter, "generate", options, [str(directory)])
        if code:
            raise explained_failure(code)
    return answers


def _summary(results: dict[str, Any], seconds: float) -> str:
    size, content = format_size(results["size"]), results["http"]["content_digest"][:16]
    return "\n".join(
        [
            "",
            f"1. A model of {size} was published on loopback: manifest, torrents, checksums.",
            f"2. It was fetched by HTTP and by torrent, in {format_duration(seconds)}; both brought the same bytes.",
            f"3. Every byte was verified before it became visible (content digest {content}...).",
            "4. The bundled PyTorch runtime answered from exactly those files.",
            "5. Nothing is left running, and the demo's caches are gone.",
            '6. The real model: mistral-fetch run mistral-7b "The best thing about open weights is"   (14.5 GB)',
        ]
    )
