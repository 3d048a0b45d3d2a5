"""The whole server on a real socket: clients that leave, wait, dawdle, and signals that end it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from contextlib import asynccontextmanager, suppress

import pytest

from mistral_runtime.serve.engine_port import EngineFailed
from mistral_runtime.serve.guard import GuardRules
from mistral_runtime.serve.http_server import HttpServer
from mistral_runtime.serve.protocol import Finished, Token

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}]}
PATIENCE = 30


class Running:
    """A server under way."""

    def __init__(self, service, server, port):
        self.service = service
        self.server = server
        self.port = port
        self.writers = []
        self.raw = None

    async def open(self):
        """Open a connection, closed with the server."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        return reader, writer

    async def is_open(self):
        """Say whether the port still takes connections."""
        with suppress(OSError):
            await self.open()
            return True
        return False

    async def send(self, method, path, body=None):
        """Send a request; return the streams."""
        reader, writer = await self.open()
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        await writer.drain()
        return reader, writer

    async def status(self, method, path, body=None):
        """Send a request; return the status."""
        reader, writer = await self.send(method, path, body)
        line = await reader.readline()
        writer.close()
        return int(line.split()[1])


@asynccontextmanager
async def running(service, rules=None, *, drain_seconds=30.0):
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # a reader that dawdles is felt soon
    port = listener.getsockname()[1]
    server = HttpServer(service, rules or GuardRules(), drain_seconds=drain_seconds, report=lambda _line: None)
    listening = asyncio.Event()
    task = asyncio.ensure_future(server.serve(listener, tell_listening=listening.set))
    waits = asyncio.ensure_future(listening.wait())
    await asyncio.wait({task, waits}, return_when=asyncio.FIRST_COMPLETED)
    run = Running(service, server, port)
    run.task = task
    try:
        yield run
    finally:
        waits.cancel()
        if not task.done():
            server.stop()  # twice: nothing is waited for
            server.stop()
        await asyncio.wait_for(asyncio.shield(task), PATIENCE)
        for writer in run.writers:
            writer.transport.abort()
        if run.raw is not None:
            run.raw.close()
        await asyncio.sleep(0)


def test(coroutine):
    asyncio.run(asyncio.wait_for(coroutine, PATIENCE * 2))


test.__test__ = False


async def until(holds):
    while not holds():
        await asyncio.sleep(0.005)


def stalling(event):
    """Return a script that says one token and then waits for the event."""

    def script(request):
        return [Token(request.id, 6303), event, Token(request.id, 6303), Finished(request.id, "stop", 4, 0, 2)]

    return script


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("abruptly", [True, False])
def test_computing_ends_when_the_client_leaves(make_service, stream, abruptly):
    async def scenario():
        service = make_service(stalling(asyncio.Event()))
        async with running(service) as run:
            _reader, writer = await run.send("POST", CHAT, ASK | {"stream": stream, "n": 2})
            await until(lambda: len(service.engine.told) == 2)
            if abruptly:
                writer.transport.abort()
            else:
                writer.close()
            await until(lambda: len(service.engine.closed) == 2)
            assert service.metrics.text().count(b'finished_reason="abort",model_name="tiny"} 2.0') == 1

    test(scenario())


def test_an_answer_under_way_outlives_the_first_signal(make_service):
    async def scenario():
        go_on = asyncio.Event()
        service = make_service(stalling(go_on))
        async with running(service) as run:
            reader, _writer = await run.send("POST", CHAT, ASK | {"stream": True})
            await reader.readuntil(b"wind")
            os.kill(os.getpid(), signal.SIGTERM)
            await until(lambda: service.is_draining)
            while await run.is_open():
                await asyncio.sleep(0.01)
            go_on.set()
            rest = await reader.read()
            assert b"[DONE]" in rest
            await run.task
            assert not run.server.has_cut_off
            assert service.engine.calls == ["start", "drain 30", "close"]

    test(scenario())


def test_the_second_signal_ends_at_once(make_service):
    async def scenario():
        service = make_service(stalling(asyncio.Event()))
        async with running(service) as run:
            reader, _writer = await run.send("POST", CHAT, ASK | {"stream": True})
            await reader.readuntil(b"wind")
            os.kill(os.getpid(), signal.SIGINT)
            await until(lambda: service.is_draining)
            os.kill(os.getpid(), signal.SIGINT)
            await run.task
            assert run.server.was_forced
            assert run.server.has_cut_off
            assert service.engine.calls == ["start", "close"]

    test(scenario())


def test_an_answer_that_takes_too_long_is_cut_off(make_service):
    async def scenario():
        service = make_service(stalling(asyncio.Event()))
        async with running(service, drain_seconds=1) as run:
            reader, _writer = await run.send("POST", CHAT, ASK | {"stream": True})
            await reader.readuntil(b"wind")
            run.server.stop()
            await run.task
            await until(lambda: service.engine.closed)
            assert run.server.has_cut_off
            assert not run.server.was_forced

    test(scenario())


def test_an_engine_that_does_not_load_ends_the_server(make_service):
    async def scenario():
        service = make_service()

        async def load():
            raise EngineFailed(40, "error: no weights")

        service.engine.load = load
        async with running(service) as run:
            await run.task
            assert run.server.failure.exit_code == 40

    test(scenario())


def test_the_server_answers_while_the_engine_loads(make_service):
    async def scenario():
        loaded = asyncio.Event()
        service = make_service()
        service.engine.load = loaded.wait
        service.engine.state = "loading"
        async with running(service) as run:
            assert await run.status("GET", "/health") == 200
            assert await run.status("GET", "/ready") == 503
            assert await run.status("POST", CHAT, ASK) == 503
            service.engine.state = "ready"
            loaded.set()
            assert await run.status("POST", CHAT, ASK) == 200

    test(scenario())


def test_an_engine_that_still_loads_is_not_waited_for(make_service):
    async def scenario():
        service = make_service()
        service.engine.load = asyncio.Event().wait
        service.engine.state = "loading"
        async with running(service) as run:
            run.server.stop()
            await run.task
            assert service.engine.calls == ["start", "close"]

    test(scenario())


def test_comments_are_sent_while_nothing_comes(make_service):
    async def scenario():
        go_on = asyncio.Event()
        service = make_service(stalling(go_on))
        service.keep_alive_seconds = 0.02
        async with running(service) as run:
            reader, _writer = await run.send("POST", CHAT, ASK | {"stream": True})
            await reader.readuntil(b"wind")
            await reader.readuntil(b": keep-alive\n\n")
            await reader.readuntil(b": keep-alive\n\n")
            go_on.set()
            await reader.readuntil(b"[DONE]")

    test(scenario())


def test_a_prompt_that_takes_long_is_kept_alive_before_its_first_token(make_service, monkeypatch):
    async def scenario():
        go_on = asyncio.Event()
        service = make_service(lambda request: [go_on, *stalling(go_on)(request)])
        service.keep_alive_seconds = 0.02
        monkeypatch.setattr("mistral_runtime.serve.event_stream.REFUSAL_SECONDS", 0.01)
        async with running(service) as run:
            reader, _writer = await run.send("POST", CHAT, ASK | {"stream": True})
            await reader.readuntil(b": keep-alive\n\n")
            go_on.set()
            await reader.readuntil(b"[DONE]")

    test(scenario())


def test_a_body_that_does_not_come_is_not_waited_for(make_service):
    async def scenario():
        async with running(make_service(), GuardRules(body_seconds=0.05)) as run:
            reader, writer = await run.open()
            writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\n{{".encode())
            assert b" 408 " in await reader.readline()
            await reader.read()  # the connection is closed

    test(scenario())


@pytest.mark.parametrize("before", ["", "GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"], ids=["first", "second"])
def test_a_head_that_drips_in_is_not_waited_for(make_service, monkeypatch, before):
    async def scenario():
        monkeypatch.setattr("mistral_runtime.serve.connection.HEAD_SECONDS", 0.3)
        async with running(make_service()) as run:
            reader, writer = await run.open()
            writer.write(before.encode())
            if before:
                await reader.readuntil(b"}")
                assert await run.status("GET", "/health") == 200
            writer.write(b"GET /health HTTP/1.1\r\n")
            while not reader.at_eof():
                writer.write(b"x: y\r\n")
                with suppress(asyncio.TimeoutError, ConnectionError):
                    await asyncio.wait_for(reader.read(1), 0.02)

    test(scenario())


def test_a_client_that_leaves_amid_its_body_is_no_bug(make_service, capfd):
    async def scenario():
        lines = []
        async with running(make_service(), GuardRules(log=lines.append)) as run:
            _reader, writer = await run.open()
            writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\n{{".encode())
            await writer.drain()
            writer.close()
            await until(lambda: lines)
            assert " 499 " in lines[0]

    test(scenario())
    assert capfd.readouterr().err == ""


def test_a_reader_that_dawdles_holds_nobody_up(make_service):
    async def scenario():
        tokens = 3000

        def script(request):
            return [*(Token(request.id, 6303) for _ in range(tokens)), Finished(request.id, "stop", 4, 0, tokens)]

        service = make_service(script)
        async with running(service) as run:
            slow = run.raw = socket.socket()
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(("127.0.0.1", run.port))
            body = json.dumps(ASK | {"stream": True}).encode()
            slow.sendall(
                f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
            )
            await until(lambda: len(service.engine.told) > 10)
            assert await run.status("POST", CHAT, ASK) == 200
            first = service.engine.told[0]
            assert service.engine.told.count(first) < tokens  # the buffer is bounded: it was not read to its end
            slow.shutdown(socket.SHUT_RDWR)
            slow.close()
            await until(lambda: first in service.engine.closed)

    test(scenario())


def test_many_idle_connections_cost_nobody_an_answer(make_service):
    async def scenario():
        async with running(make_service()) as run:
            for _ in range(200):
                await run.open()
            assert await run.status("POST", CHAT, ASK) == 200

    test(scenario())


def test_long_texts_are_tokenised_beside_the_event_loop(make_service):
    async def scenario():
        service = make_service()
        async with running(service) as run:
            reader, _writer = await run.send("POST", "/tokenize", {"prompt": "the wind goes over the hill. " * 40_000})
            answer = asyncio.ensure_future(reader.readline())
            answered_meanwhile = 0
            while not answer.done():
                assert await run.status("GET", "/health") == 200
                answered_meanwhile += not answer.done()
            assert b" 200 " in await answer
            assert answered_meanwhile > 0

    test(scenario())


def test_garbage_on_the_wire_is_a_400(make_service):
    async def scenario():
        async with running(make_service()) as run:
            reader, writer = await run.open()
            writer.write(b"\x16\x03\x01\x00\xff\r\n\r\n")
            assert b" 400 " in await reader.readline()
            reader, writer = await run.open()
            writer.write(b"GET /v1/models HTTP/1.1\r\nhost: a\r\nhost: localhost\r\n\r\n")
            assert b" 400 " in await reader.readline()

    test(scenario())
