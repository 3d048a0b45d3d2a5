"""uvicorn on a socket of ours: from the first connection to the last answer.

The first signal lets answers under way finish, for a time; the second ends them.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import uvicorn

from mistral_runtime.serve.application import build_application
from mistral_runtime.serve.connection import Connection
from mistral_runtime.serve.engine_port import EngineFailed
from mistral_runtime.serve.guard import GuardRules
from mistral_runtime.serve.notify import notify
from mistral_runtime.serve.service import Service

KEEP_ALIVE_CONNECTION_SECONDS = 75


class _Server(uvicorn.Server):
    """uvicorn, but for the signals, which are handled here."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """Serves until it is told to stop.

    Args:
        service: What answers.
        rules: Who may ask.
        drain_seconds: How long answers may take after the first signal.
        report: Tells people what happens.
        handles_signals: Whether SIGINT and SIGTERM are this server's; only possible in the main thread.

    Attributes:
        failure: Why the engine did not load, if it did not.
        has_cut_off: Whether answers were ended before their end.
    """

    def __init__(
        self,
        service: Service,
        rules: GuardRules,
        *,
        drain_seconds: float,
        report: Callable[[str], None],
        handles_signals: bool = True,
    ) -> None:
        self._service = service
        self._drain_seconds = drain_seconds
        self._report = report
        self._handles_signals = handles_signals
        self._server = _Server(
            uvicorn.Config(
                build_application(service, rules),
                http=Connection,
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_CONNECTION_SECONDS,
                # uvicorn counts whole seconds.
                timeout_graceful_shutdown=max(1, round(drain_seconds)),
            )
        )
        self.failure: EngineFailed | None = None
        self.has_cut_off = False

    @property
    def was_forced(self) -> bool:
        """Whether a second signal ended the server."""
        return self._server.force_exit

    async def serve(self, listener: socket.socket, *, tell_listening: Callable[[], None]) -> None:
        """Load the engine and answer requests until `stop`."""
        self._handle_signals()
        await self._service.engine.start()
        watch = asyncio.ensure_future(self._watch_engine())
        serving = asyncio.ensure_future(self._server.serve([listener]))
        try:
            await self._until_listening(serving)
            if not serving.done():
                tell_listening()
            await serving
            # Those that had no more time were told to end just now.
            self.has_cut_off = self.was_forced or bool(self._server.server_state.tasks)
        finally:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch
            await self._end_engine()

    def stop(self) -> None:
        """End: at first once all is answered, the second time at once."""
        if self._service.is_draining:
            self._server.force_exit = True
            return
        self._service.is_draining = True
        notify("STOPPING=1")
        self._report(f"stopping: answers under way have {self._drain_seconds:g} s; a second signal ends them")
        self._server.should_exit = True

    def _handle_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM) if self._handles_signals else ():
            # What whoever started us wants ignored stays so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                asyncio.get_running_loop().add_signal_handler(number, self.stop)

    async def _until_listening(self, serving: asyncio.Future[None]) -> None:
        while not self._server.started and not serving.done():
            await asyncio.sleep(0.01)

    async def _watch_engine(self) -> None:
        try:
            await self._service.engine.wait_ready()
        except EngineFailed as error:
            self.failure = error
            self._server.should_exit = True
            return
        ready = self._service.require_ready()
        self._report(f"ready: {ready.weights} on {ready.device}, loaded in {ready.load_seconds:.1f} s")
        notify("READY=1")

    async def _end_engine(self) -> None:
        # One that still loads has nothing to finish, and would be waited for until it has loaded.
        if not self.was_forced and self._service.engine.state == "ready":
            await self._service.engine.drain(self._drain_seconds)
        await self._service.engine.close()
