"""All that needs CUDA: capturing graphs, replaying them, and reading their results without waiting.

Each has an equal without CUDA that runs the same function eagerly, so that everything above can be tested anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol

import torch
from torch import Tensor

WARM_UPS = 2  # the first makes libraries allocate their workspaces, which no capture may contain


class Runner(Protocol):
    """Runs a function of static tensors, again and again under the same key."""

    @property
    def name(self) -> str:
        """What results call it."""

    def run(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """Return what `compute` returns. The tensor may be overwritten by the next call."""


class EagerRunner:
    """Calls the function."""

    name = "static"

    def run(self, _key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """Return what `compute` returns."""
        return compute()


class GraphRunner:
    """Captures the function once per key and replays it. All graphs share one memory pool: one runs at a time.

    `compute` must read and write tensors that live as long as this does, and running it twice must do what running it
    once does: the warm-up runs it for real.
    """

    name = "cuda-graphs"

    def __init__(self) -> None:
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """Return the static output of the key's graph, after a replay."""
        if key not in self._graphs:
            self._graphs[key] = self._capture(compute)
        graph, output = self._graphs[key]
        graph.replay()
        return output

    def _capture(self, compute: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                compute()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = compute()
        return graph, output


class LateReader:
    """Copies a small tensor of int64 to the host in the background; `read` waits for that copy alone.

    Two buffers take turns, so the next copy may begin before the last one was read.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._hosts = [torch.empty(count, dtype=torch.int64, pin_memory=self._is_cuda) for _ in range(2)]
        self._events = [torch.cuda.Event() for _ in range(2)] if self._is_cuda else []  # type: ignore[no-untyped-call]
        self._turn = 0

    def begin(self, values: Tensor) -> Callable[[], list[int]]:
        """Begin to copy `values` (N); return what waits and gives them, good until the next but one `begin`."""
        turn, self._turn = self._turn, 1 - self._turn
        host = self._hosts[turn][: len(values)]
        host.copy_(values, non_blocking=True)
        if self._is_cuda:
            self._events[turn].record()

        def read() -> list[int]:
            if self._is_cuda:
                self._events[turn].synchronize()
            return host.tolist()

        return read


def runner_for(device: torch.device) -> Runner:
    """Return graphs where there is CUDA, and plain calls elsewhere."""
    return GraphRunner() if device.type == "cuda" else EagerRunner()
