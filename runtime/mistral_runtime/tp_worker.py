"""A rank other than 0: load one slice of the model, then follow rank 0's steps until it closes the pipe.

Run by `tp_launch.py` as a process of its own. Nothing it prints reaches the user but the traceback of a bug.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from queue import SimpleQueue

from mistral_runtime.errors import MistralRuntimeError
from mistral_runtime.tp_protocol import RankOptions, RankReport, StepOrder

# How long the current step may still take once rank 0 is gone. A collective that waits for it may never return.
GRACE_SECONDS = 2.0


class Orders:
    """What rank 0 wants, read by a thread, so that its end is noticed in the middle of a step as well."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[StepOrder | None] = SimpleQueue()
        self.ended = threading.Event()
        threading.Thread(target=self._read, name="orders", daemon=True).start()

    def next(self) -> StepOrder | None:
        """Wait for the next step; None when there is none to come."""
        return self._queue.get()

    def _read(self) -> None:
        for line in sys.stdin.buffer:
            if line.endswith(b"\n"):  # a last line without one was cut short by the end of its writer
                self._queue.put(StepOrder.from_line(line))
        self.ended.set()
        self._queue.put(None)
        threading.Event().wait(GRACE_SECONDS)
        os._exit(1)


def run_rank(options: RankOptions, orders: Orders) -> None:
    """Load, then compute what is ordered.

    Raises:
        MistralRuntimeError: The slice could not be loaded.
    """
    import torch
    import torch.distributed as dist

    from mistral_runtime.device import DTYPES
    from mistral_runtime.engine import eager_step
    from mistral_runtime.snapshot import find_weights, load_config
    from mistral_runtime.tensor_parallel import Shard, connect, join_group, load_shard
    from mistral_runtime.weights import open_checkpoint

    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    files = find_weights(Path(options.directory))
    shard = Shard(load_config(Path(options.directory), files.layout), options.rank, options.ranks)
    checkpoint = open_checkpoint(files, shard.config)
    _report(RankReport(stage="started"))
    join_group(Path(options.meeting_file), rank=options.rank, ranks=options.ranks, device=device)
    model = load_shard(checkpoint, shard, device=device, dtype=DTYPES[options.dtype])
    connect(model, shard)
    _report(RankReport(stage="ready"))
    cache = model.new_cache(1)
    while (order := orders.next()) is not None:
        if order.context is not None:
            cache = model.new_cache(order.context)
        eager_step(model, order.ids, cache)
    dist.destroy_process_group()


def _report(report: RankReport) -> None:
    sys.stdout.buffer.write(report.to_line())
    sys.stdout.buffer.flush()


def main(argument: str) -> int:
    """Run one rank and return its exit code."""
    orders = Orders()
    try:
        run_rank(RankOptions.from_json(argument), orders)
    except MistralRuntimeError as error:
        _report(RankReport(error=error))
        return error.exit_code
    except (RuntimeError, OSError):
        # An exchange broke off. If that is because another rank ended, rank 0 says so, and ends this one or its pipe.
        if not orders.ended.wait(GRACE_SECONDS):
            raise
        return 1
    return 0
