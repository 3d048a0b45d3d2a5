"""Several answers to one request, told as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from mistral_runtime.serve.answering import Piece

_Told = tuple[int, "Piece | BaseException | None"]


async def merged(answers: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[tuple[int, Piece], None]:
    """Give (index, piece) of all answers, each answer's pieces in their order. The first error ends them all.

    Bounded: an answer is not read further than a piece ahead of whoever listens.
    """
    if len(answers) == 1:
        async with aclosing(answers[0]) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    queue: asyncio.Queue[_Told] = asyncio.Queue(len(answers))
    tasks = [asyncio.ensure_future(_pump(index, pieces, queue)) for index, pieces in enumerate(answers)]
    try:
        open_answers = len(tasks)
        while open_answers:
            index, told = await queue.get()
            if isinstance(told, BaseException):
                raise told
            if told is None:
                open_answers -= 1
            else:
                yield index, told
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(index: int, pieces: AsyncGenerator[Piece, None], queue: asyncio.Queue[_Told]) -> None:
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                await queue.put((index, piece))
    except Exception as error:  # noqa: BLE001 - whoever listens raises it
        await queue.put((index, error))
    else:
        await queue.put((index, None))
