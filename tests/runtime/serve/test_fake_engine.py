"""The engine for tests behaves as the real one where a server can tell."""

from __future__ import annotations

import asyncio

import pytest

from mistral_runtime.serve.engine_port import EngineUnavailable
from mistral_runtime.serve.fake_engine import FakeEngine
from mistral_runtime.serve.protocol import Finished, Generate, Token


def test_it_answers_is_cancelled_and_dies_as_told() -> None:
    async def work() -> None:
        engine = FakeEngine(dies_after=6)
        await engine.start()
        items = [item async for item in engine.generate(Generate("a", [7, 8], 3))]
        assert [item.token for item in items if isinstance(item, Token)] == [7, 8, 7]
        assert isinstance(items[-1], Finished)
        closed = engine.generate(Generate("closed", [7, 8], 3))
        await closed.__anext__()
        await closed.aclose()
        assert (engine.cancelled, engine.in_flight) == (["closed"], 0)
        with pytest.raises(EngineUnavailable, match="in the middle"):
            [item async for item in engine.generate(Generate("long", [7], 9))]
        assert engine.state == "failed"

    asyncio.run(work())
