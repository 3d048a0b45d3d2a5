"""Rank 0 of a model that is spread over several processes: starts the others, leads them, ends with them.

Owns the processes. Rank 0 is the process the user started: it alone has the tokenizer, the sampling and the standard
streams. Whatever ends one rank ends all of them: a rank that dies is noticed by the end of its pipe, and a rank
whose leader dies notices the same (`tp_protocol.py`).

Not torchrun: its agent would be the process in the terminal, and it ends every rank at the first Ctrl-C, which in a
chat only stops the answer; and the store where its ranks meet listens on every address of the machine.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

import torch.distributed as dist
from torch import Tensor

from mistral_runtime.device import Compute, dtype_name
from mistral_runtime.engine import eager_step
from mistral_runtime.errors import MistralRuntimeError, RankLost
from mistral_runtime.kv_cache import RollingKVCache
from mistral_runtime.tensor_parallel import Shard, connect, join_group, load_shard
from mistral_runtime.terminal import write_err
from mistral_runtime.tp_protocol import RankOptions, RankReport, Stage, StepOrder
from mistral_runtime.transformer import Transformer
from mistral_runtime.weights import Checkpoint

# After another rank ended: how long this thread has to notice and to leave on its own. It may sit in a read from the
# terminal or in a collective that never returns.
GRACE_SECONDS = 3.0

# Finds this very package wherever it is, without putting anything else on the import path.
_BOOTSTRAP = """
import importlib.util, sys
sys.path[:] = [entry for entry in sys.path if entry]
folder, argument = sys.argv[1:]
spec = importlib.util.spec_from_file_location(
    "mistral_runtime", folder + "/__init__.py", submodule_search_locations=[folder])
sys.modules["mistral_runtime"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from mistral_runtime.tp_worker import main
sys.exit(main(argument))
"""


class Ranks:
    """The other ranks, from their start to their end. Use it as a context."""

    def __init__(self, checkpoint: Checkpoint, shard: Shard, compute: Compute) -> None:
        """Start the processes; they find, check and load their slices while this one does.

        Args:
            checkpoint: The whole model's weights.
            shard: Rank 0 of the shards.
            compute: How every rank computes; `threads` are each rank's own.
        """
        self._checkpoint, self._shard, self._compute = checkpoint, shard, compute
        self._events: SimpleQueue[Stage | None] = SimpleQueue()
        self._failure: MistralRuntimeError | None = None
        self._failed = threading.Event()
        self._closing = threading.Event()
        self._out_of_step = False
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="mistral-runtime-ranks-")  # readable by its owner alone
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(1, shard.ranks):
                self._start(rank)
        except BaseException:
            self.close()
            raise

    @property
    def process_ids(self) -> list[int]:
        """The ids of the other ranks' processes."""
        return [process.pid for process in self._processes]

    def load(self) -> Transformer:
        """Join the others, load this rank's slices and wait until every rank has its own.

        Raises:
            MistralRuntimeError: Another rank's error, or RankLost.
        """
        device = self._compute.device
        self._wait_for_all("started")
        join_group(self._meeting_file, rank=0, ranks=self._shard.ranks, device=device)
        model = load_shard(self._checkpoint, self._shard, device=device, dtype=self._compute.dtype)
        connect(model, self._shard)
        self._wait_for_all("ready")
        return model

    def step(self, model: Transformer, ids: Sequence[int], cache: RollingKVCache, *, last_only: bool = True) -> Tensor:
        """Compute one step on all ranks together; an `engine.Step`.

        Raises:
            RankLost: Another rank ended.
        """
        order = StepOrder(list(ids), None if cache.length else cache.capacity).to_line()
        self._out_of_step = True  # until it is done: an interruption leaves the others waiting in an exchange
        try:
            for process in self._processes:
                assert process.stdin is not None
                process.stdin.write(order)
                process.stdin.flush()
            logits = eager_step(model, ids, cache, last_only=last_only)
        except (RuntimeError, OSError):
            # Either the exchange broke off because a rank ended, which its pipe tells at about the same time, or a bug.
            if not self._failed.wait(GRACE_SECONDS / 2):
                raise
            assert self._failure is not None
            raise self._failure from None
        self._out_of_step = False
        return logits

    def close(self) -> None:
        """End the other ranks and wait for them. May be called again."""
        self._closing.set()
        if self._out_of_step:
            self._kill()
        for process in self._processes:
            _hang_up(process)
        # NCCL takes leave of every rank, and would wait for those that are gone.
        if dist.is_initialized() and not (self._out_of_step and self._compute.device.type == "cuda"):
            dist.destroy_process_group()
        for process in self._processes:
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._folder.cleanup()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _meeting_file(self) -> Path:
        return Path(self._folder.name) / "meeting"

    def _start(self, rank: int) -> None:
        options = RankOptions(
            directory=str(self._checkpoint.files.paths[0].parent),
            meeting_file=str(self._meeting_file),
            rank=rank,
            ranks=self._shard.ranks,
            device=self._compute.device.type,
            dtype=dtype_name(self._compute.dtype),
            threads=self._compute.threads,
        )
        process = subprocess.Popen(
            [sys.executable, "-c", _BOOTSTRAP, str(Path(__file__).parent), options.to_json()],
            env={**os.environ, "OMP_NUM_THREADS": str(self._compute.threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ctrl-C in a terminal goes to the whole group. What it means is rank 0's to decide.
            start_new_session=True,
        )
        self._processes.append(process)
        threading.Thread(target=self._listen, args=(rank, process), name=f"rank {rank}", daemon=True).start()

    def _listen(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        """Pass on what one rank reports, until it ends."""
        error = None
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                report = RankReport.from_line(line)
                error = report.error
                if report.stage is not None:
                    self._events.put(report.stage)
        code = process.wait()
        if not self._closing.is_set():
            self._fail(error or _lost(rank, code))

    def _fail(self, error: MistralRuntimeError) -> None:
        """Remember the first error, end the other ranks, and in the end this one."""
        with self._lock:
            if self._failure is not None:
                return
            self._failure = error
        self._kill()
        self._failed.set()
        self._events.put(None)
        if not self._closing.wait(GRACE_SECONDS):
            write_err(f"error: {error.what}\n  {error.detail}\n  {error.hint}")
            os._exit(error.exit_code)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()

    def _wait_for_all(self, stage: Stage) -> None:
        # A rank reports `ready` only after all, this one included, have met: so the stages never mix.
        for _ in self._processes:
            reported = self._events.get()
            if reported is None:
                assert self._failure is not None
                raise self._failure
            assert reported == stage


def _hang_up(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    try:
        process.stdin.close()
    except BrokenPipeError:
        return  # an order that it did not live to read


def _lost(rank: int, code: int) -> RankLost:
    if code >= 0:
        ended = f"exit code {code}"
    else:
        known = -code in set(signal.Signals)
        ended = f"the end by {signal.Signals(-code).name if known else f'signal {-code}'}"
    return RankLost(
        f"rank {rank} of the model ended, so the others ended too",
        detail=f"expected it to stay until the answer is complete, found {ended}",
        hint="SIGKILL often means that memory ran out: lower --context or --tp; see any message above",
    )
