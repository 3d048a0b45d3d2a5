"""Work that would keep the event loop from answering anybody else: reading long bodies, tokenising long prompts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

_Result = TypeVar("_Result")
# Two: a long prompt must not hold up a short one, and the processors belong to the engine.
_POOL = ThreadPoolExecutor(2, thread_name_prefix="serve-text")


async def in_thread(work: Callable[..., _Result], *arguments: Any) -> _Result:
    """Return what `work` returns, computed beside the event loop."""
    return await asyncio.get_running_loop().run_in_executor(_POOL, work, *arguments)
