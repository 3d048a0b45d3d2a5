"""The memory of a model that is spread over several ranks of one machine: of each, and of all together."""

from __future__ import annotations

from dataclasses import replace

import torch

from mistral_runtime.device import Compute, MemoryPlan, plan_memory
from mistral_runtime.tensor_parallel import Shard


def share_threads(compute: Compute, ranks: int) -> Compute:
    """Return the choice for each of `ranks` processes on one machine, and apply it: the threads are shared out."""
    threads = max(1, compute.threads // ranks)
    torch.set_num_threads(threads)
    reason = f"for each of {ranks} ranks: {compute.threads}, {compute.threads_reason}, shared out"
    return replace(compute, threads=threads, threads_reason=reason)


def plan_ranks(shard: Shard, compute: Compute, *, context: int, prefill_chunk: int) -> tuple[MemoryPlan, str]:
    """Return the plan that has to fit and a line about a single rank.

    On the CPU all ranks take from one memory, so their sum has to fit. Each CUDA device has its own, all slices are
    alike, and the one with the least room decides.
    """
    local = plan_memory(shard.local_config, compute, context=context, prefill_chunk=prefill_chunk)
    one = replace(local, weights=shard.parameter_count() * compute.dtype.itemsize)
    line = f"ranks: {shard.ranks}, each with {one.parts()}"
    if compute.device.type == "cpu":
        together = {part: getattr(one, part) * shard.ranks for part in ("weights", "cache", "workspace")}
        return replace(one, **together), line
    room = min(torch.cuda.mem_get_info(index)[0] for index in range(shard.ranks))
    return replace(one, available=room, device=f"each of {shard.ranks} devices"), line
