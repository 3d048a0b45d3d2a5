"""The engine as a process: what it answers, and what becomes of both ends when one of them dies."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from mistral_runtime.serve.engine_client import EngineClient
from mistral_runtime.serve.engine_port import EngineFailed, EngineUnavailable, QueueFull
from mistral_runtime.serve.protocol import Embed, Finished, Generate, Grammar, Token

FLAGS = ("--threads", "1", "--quiet", "--max-running", "2", "--cache-positions", "4096")
_Result = TypeVar("_Result")


def run(work: Coroutine[Any, Any, _Result]) -> _Result:
    return asyncio.run(asyncio.wait_for(work, 120))


async def collect(client: EngineClient, request: Generate) -> tuple[list[int], Finished]:
    tokens = []
    async for item in client.generate(request):
        if isinstance(item, Finished):
            return tokens, item
        if isinstance(item, Token):
            tokens.append(item.token)
    raise AssertionError("no end")


async def exhaust(answer: AsyncIterator[object]) -> None:
    async for _ in answer:
        pass


def test_one_process_from_its_start_through_a_crash_to_its_end(demo_directory: Path) -> None:
    async def work() -> None:
        client = EngineClient([str(demo_directory), *FLAGS], max_queue=1)
        with pytest.raises(EngineUnavailable, match="loading"):
            await client.generate(Generate("early", [1], 1)).__anext__()
        await client.start()
        await client.wait_ready()
        assert client.ready is not None
        assert client.state == "ready"
        assert (client.ready.max_running, client.ready.vocab_size) == (2, 1024)
        # Answers at once are the answers one after the other.
        wanted = [Generate(f"r{i}", [1, 60 + i, 70], 20) for i in range(2)]
        together = await asyncio.gather(*(collect(client, request) for request in wanted))
        apart = [await collect(client, request) for request in wanted]
        assert [tokens for tokens, _ in together] == [tokens for tokens, _ in apart]
        assert all(end.reason == "length" for _, end in together)
        assert sum(x * x for x in await client.embed(Embed("e", [1, 60, 70]))) == pytest.approx(1)
        _, refused = await collect(client, Generate("g", [1], 5, grammar=Grammar("regex", "[")))
        assert refused.error is not None
        assert "regex" in refused.error["detail"]

        # More than may be under way are refused; a place is free again when an answer is closed early.
        endless = [client.generate(Generate(f"e{i}", [1, 60], 3000)) for i in range(3)]
        assert [type(await answer.__anext__()) for answer in endless[:2]] == [Token, Token]
        third = asyncio.ensure_future(endless[2].__anext__())
        while client.in_flight < 3:
            await asyncio.sleep(0)
        with pytest.raises(QueueFull) as full:
            await collect(client, Generate("more", [1], 1))
        assert full.value.retry_after >= 1
        await endless[0].aclose()
        assert isinstance(await third, Token)  # the one that waited runs now

        # The process dies: everybody under way is told, and it comes back once.
        killed = client.process_id
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        for answer in endless[1:]:
            with pytest.raises(EngineUnavailable):
                await exhaust(answer)
        assert (client.state, client.in_flight) == ("restarting", 0)
        await client.wait_ready()
        assert client.process_id != killed
        assert (await collect(client, wanted[0]))[0] == together[0][0]
        # Signals that a terminal or a supervisor sends to all are not the engine's to obey.
        assert client.process_id is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(client.process_id, number)

        # Drained: what is under way is answered, nothing new is taken, the process is gone.
        last = asyncio.ensure_future(collect(client, Generate("last", [1, 60], 40)))
        while client.in_flight < 1:
            await asyncio.sleep(0)
        await client.drain(60)
        tokens, end = await last
        assert (len(tokens), end.reason) == (40, "length")
        with pytest.raises(EngineUnavailable, match="draining"):
            await collect(client, wanted[0])
        with pytest.raises(ProcessLookupError):
            os.kill(client.process_id, 0)

    run(work())


def test_a_snapshot_that_does_not_load_fails_with_its_three_lines(tmp_path: Path) -> None:
    async def work() -> None:
        client = EngineClient([str(tmp_path), *FLAGS])
        await client.start()
        with pytest.raises(EngineFailed) as failed:
            await client.wait_ready()
        assert failed.value.exit_code == 40
        assert len(failed.value.text.splitlines()) == 3
        assert str(tmp_path) in failed.value.text
        assert client.state == "failed"
        await client.close()

    run(work())


# A parent that starts an engine, says its id once it is loaded, and is killed.
_PARENT = """
import asyncio, os, signal, sys
from mistral_runtime.serve.engine_client import EngineClient
from mistral_runtime.serve.protocol import Generate
async def work():
    client = EngineClient(sys.argv[1:])
    await client.start()
    await client.wait_ready()
    answer = client.generate(Generate("endless", [1, 60], 3000))
    await answer.__anext__()
    assert "torch" not in sys.modules
    print(client.process_id, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(work())
"""


def test_an_engine_does_not_outlive_its_parent(demo_directory: Path) -> None:
    async def work() -> None:
        parent = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _PARENT, str(demo_directory), *FLAGS, stdout=asyncio.subprocess.PIPE
        )
        assert parent.stdout is not None
        # The engine inherited this end: the reading comes to an end when both are gone.
        assert int(await parent.stdout.read()) > 0
        assert await parent.wait() == -signal.SIGKILL

    run(work())


def test_an_engine_that_is_told_garbage_ends(demo_directory: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "mistral_runtime", "engine", demo_directory, "--fd", str(theirs.fileno()), *FLAGS],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
        )
        theirs.close()
        ours.sendall(b'{"is":"generate","id":"a"}\n')
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 40
    assert b"not a message" in errors


def test_the_command_is_of_no_use_without_a_socket(demo_directory: Path) -> None:
    command = [sys.executable, "-m", "mistral_runtime", "engine", demo_directory, "--fd", "999"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 3
    assert "--fd" in done.stderr
