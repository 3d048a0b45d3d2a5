"""One model spread over several processes of one machine, each with a slice of every large matrix.

Megatron's scheme (Shoeybi et al. 2019, arXiv 1909.08053, section 3). wq, wk, wv, w1 and w3 are cut by rows, that is by
output: each rank has whole heads and whole hidden units of its own. wo and w2 are cut by columns, that is by
input: each rank's product is a part of a sum, and one all-reduce adds the parts up. Two sums a layer are all that is
ever exchanged, and the vocabulary's slices once a step. Norms and embeddings are the same on every rank.

Owns which slice is whose and what is exchanged. Knows nothing of how ranks are started (`tp_launch.py`).

Plain collectives, not DTensor: they ask nothing of the layers in between but that they can be called, so that a
packed or quantised matrix takes the place of a plain one without knowing that it is a slice.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from mistral_runtime.config import ModelConfig
from mistral_runtime.errors import BadRequest, DeviceUnavailable
from mistral_runtime.layers import FeedForward, TransformerBlock
from mistral_runtime.linear_rows import use_row_kernels
from mistral_runtime.transformer import Transformer
from mistral_runtime.weights import PERMUTED_NAMES, Checkpoint, load_model

# How long one rank waits for another in a step. A rank that died is noticed at once, whatever this says; it only ends
# the wait for one that is stopped or hopelessly swapped out.
STEP_TIMEOUT = timedelta(minutes=5)

_CUT_BY_ROWS = ("wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight")
_CUT_BY_COLUMNS = ("wo.weight", "w2.weight")


def check_ranks(config: ModelConfig, ranks: int) -> None:
    """Refuse a number of ranks that would cut through a head or a hidden unit.

    Raises:
        BadRequest: It does not divide; the hint lists the numbers that do.
    """
    if config.moe is not None and ranks != 1:
        raise BadRequest(
            "a mixture of experts cannot be spread over several ranks",
            detail=f"expected a dense model, found {config.moe.num_experts} experts and --tp {ranks}",
            hint="leave --tp out",
        )
    common = math.gcd(config.n_kv_heads, config.hidden_dim)
    if ranks < 1 or common % ranks:
        works = ", ".join(str(count) for count in range(1, common + 1) if common % count == 0)
        raise BadRequest(
            f"this model cannot be spread over {ranks} ranks",
            detail=f"expected a number that divides its {config.n_kv_heads} key heads and {config.hidden_dim} hidden "
            f"units, found {ranks}",
            hint=f"set --tp to one of: {works}",
        )


def check_rank_devices(device: torch.device, ranks: int) -> None:
    """Refuse a device that cannot serve so many ranks.

    Raises:
        DeviceUnavailable: Neither a CPU nor as many CUDA devices as there are ranks.
    """
    if device.type == "cpu":
        return
    found = torch.cuda.device_count() if device.type == "cuda" else 0
    if found < ranks:
        raise DeviceUnavailable(
            f"{device.type} cannot hold {ranks} ranks",
            detail=f"expected {ranks} CUDA devices or the CPU, found {found} CUDA devices",
            hint="lower --tp, or add --device cpu",
        )


@dataclass(frozen=True)
class Shard:
    """What one rank has of a model.

    Attributes:
        config: The whole model.
        rank: Which slice, from 0.
        ranks: How many slices; must pass `check_ranks`.
    """

    config: ModelConfig
    rank: int
    ranks: int

    @property
    def local_config(self) -> ModelConfig:
        """The model as one rank sees it: fewer heads and hidden units, the same stream and vocabulary."""
        return replace(
            self.config,
            n_heads=self.config.n_heads // self.ranks,
            n_kv_heads=self.config.n_kv_heads // self.ranks,
            hidden_dim=self.config.hidden_dim // self.ranks,
        )

    @property
    def vocabulary(self) -> range:
        """The token ids whose logits this rank computes; slices differ by one where the size does not divide."""
        size = self.config.vocab_size
        return range(self.rank * size // self.ranks, (self.rank + 1) * size // self.ranks)

    def parameter_count(self) -> int:
        """Return the number of weights that this rank holds."""
        unused_rows = self.config.vocab_size - len(self.vocabulary)
        return self.local_config.parameter_count() - unused_rows * self.config.dim

    def slice_weight(self, name: str, tensor: Tensor) -> Tensor:
        """Return this rank's part of a whole tensor in Mistral's order: a view by rows, a copy by columns.

        A view of mapped file pages leaves the other ranks' pages untouched, so they are never read. Columns are
        strided, and a copy is what lets the pages they came from go.
        """
        if name.endswith(_CUT_BY_ROWS):
            return tensor.chunk(self.ranks, dim=0)[self.rank]
        if name.endswith(_CUT_BY_COLUMNS):
            return tensor.chunk(self.ranks, dim=1)[self.rank].contiguous()
        if name == "output.weight":
            return tensor[self.vocabulary.start : self.vocabulary.stop]
        return tensor

    def build_model(self, local_config: ModelConfig) -> Transformer:
        """Return an empty model of this rank's shapes, on the current default device."""
        model = Transformer(local_config)
        model.output = nn.Linear(local_config.dim, len(self.vocabulary), bias=False)
        return model


def load_shard(checkpoint: Checkpoint, shard: Shard, *, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Load one rank's slices. The result computes parts of sums until `connect` has joined it to the others."""

    def slice_weight(name: str, tensor: Tensor) -> Tensor:
        part = shard.slice_weight(name, tensor)
        # wq and wk of Hugging Face files come as reordered copies: a view would keep the whole copy alive.
        was_copied = checkpoint.files.layout == "huggingface" and name.endswith(PERMUTED_NAMES)
        return part.clone() if was_copied else part

    model = load_model(
        checkpoint,
        shard.local_config,
        device=device,
        dtype=dtype,
        transforms=[slice_weight],
        build=shard.build_model,
    )
    use_row_kernels(model)
    return model


def connect(model: Transformer, shard: Shard) -> None:
    """Put the exchanges between ranks into a loaded model; the group must have been joined.

    After whatever replaces matrices by packed ones: the exchange is wrapped around them.
    """
    for layer in model.layers:
        assert isinstance(layer, TransformerBlock)
        layer.attention.register_module("wo", SummedOverRanks(layer.attention.wo))
        assert isinstance(layer.feed_forward, FeedForward)
        layer.feed_forward.register_module("w2", SummedOverRanks(layer.feed_forward.w2))
    model.register_module("output", GatheredVocabulary(model.output, shard))


class SummedOverRanks(nn.Module):
    """A matrix cut by columns: every rank multiplies its part of the input, and the products are added up."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        """Return the whole product (…, out) of this rank's columns of the input, (…, in / ranks)."""
        product: Tensor = self.part(x)
        # On the CPU the parts are added in float32: gloo takes every type, but a sum of bfloat16 parts would be rounded
        # once more per rank. Over NVLink the bytes count, and NCCL's sum in the type itself is what everybody uses.
        total = product.float() if product.device.type == "cpu" else product
        dist.all_reduce(total)
        return total.to(product.dtype)


class GatheredVocabulary(nn.Module):
    """The output projection cut by rows: every rank computes some tokens' logits, and all of them get all."""

    def __init__(self, part: nn.Module, shard: Shard) -> None:
        super().__init__()
        self.part = part
        self._sizes = [len(replace(shard, rank=rank).vocabulary) for rank in range(shard.ranks)]

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the whole vocabulary, (…, V) in float32."""
        logits: Tensor = self.part(x).float()  # (…, V / ranks)
        # Collectives want equal sizes; where the vocabulary does not divide, a slice lacks one column.
        padded = pad(logits, (0, max(self._sizes) - logits.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in self._sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[..., :size] for part, size in zip(parts, self._sizes, strict=True)], dim=-1)


def join_group(meeting_file: Path, *, rank: int, ranks: int, device: torch.device) -> None:
    """Connect to the other ranks, which all call this with the same file; returns when all of them are there.

    They meet in a file and talk over the loopback device. torch's other meeting place, a TCPStore, listens on every
    address of the machine.
    """
    loopback = "lo" if Path("/sys/class/net/lo").exists() else "lo0"  # Linux, BSD and macOS
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback
    if device.type == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.FileStore(str(meeting_file), ranks),  # type: ignore[attr-defined]  # public, but not in its __all__
        rank=rank,
        world_size=ranks,
        timeout=STEP_TIMEOUT,
    )
