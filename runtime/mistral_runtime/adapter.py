"""LoRA adapter files, checked against the model they are to change and read.

Hu et al. 2021, "LoRA", arXiv 2106.09685, section 4.1: a weight W (out, in) becomes W + scale · B · A with A (r, in) and
B (out, r). Owns the two layouts in which such pairs are published, their names and their scales:

- mistral-finetune: `lora.safetensors` with `layers.0.attention.wq.lora_A.weight`, in Mistral's order of rows. The scale
  is `lora.scaling` of the `params.json` beside it, else 2.0, the default of mistral-finetune and mistral-inference.
- PEFT: `adapter_model.safetensors` with `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`, in Hugging
  Face's order, and `adapter_config.json` with `r` and `lora_alpha`. The scale is alpha / r, or alpha / √r with
  `use_rslora`.

What is done with the pairs is in `lora.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mistral_runtime.adapter_config import AdapterScale, finetune_scale, load_peft_config
from mistral_runtime.config import ModelConfig
from mistral_runtime.errors import (
    DtypeMismatch,
    MalformedCheckpoint,
    MissingFile,
    MissingTensor,
    ShapeMismatch,
    UnexpectedTensor,
    UnsafePickle,
)
from mistral_runtime.snapshot import WeightFiles
from mistral_runtime.strict_json import require_regular_file
from mistral_runtime.weights import DTYPES, PERMUTED_NAMES, TensorInfo, mistral_name, open_tensors, to_interleaved

FILE_NAMES = ("lora.safetensors", "adapter_model.safetensors")
_PICKLE_NAMES = ("adapter_model.bin", "lora.pth", "lora.00.pth", "lora.pt")
_PEFT_PREFIX = "base_model.model."
_PAIR_NAME = re.compile(r"(.+)\.lora_(A|B)\.weight")
_HINT = "the adapter is damaged or was made for another model; name the one that was trained on this model"


@dataclass(frozen=True)
class LowRankPair:
    """One matrix's change: `a` (r, in) and `b` (out, r), rows of `b` in Mistral's order."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Adapter:
    """A validated adapter in memory; `pairs` is by the name of the matrix, such as `layers.0.attention.wq`."""

    path: Path
    layout: str
    rank: int
    scale: AdapterScale
    pairs: dict[str, LowRankPair]

    @property
    def nbytes(self) -> int:
        """Size of all pairs as stored."""
        return sum(pair.a.nbytes + pair.b.nbytes for pair in self.pairs.values())


def open_adapter(path: Path, config: ModelConfig, *, scale: float | None = None) -> Adapter:
    """Read the adapter in `path`, a file or the directory that holds it, for the model of `config`.

    Args:
        path: See the module for the names.
        config: The model that is to be changed.
        scale: Wins over what the adapter says.

    Raises:
        CheckpointError: One of its kinds: no such file, a pickle, no LoRA pairs, another model's, or not finite.
    """
    file = _find(path)
    stored, read = _open(file)
    is_peft = any(name.startswith(_PEFT_PREFIX) for name in stored)
    halves = _halves(stored, file, _peft_target if is_peft else _finetune_target)
    shapes = config.tensor_shapes()
    ranks = {_checked_rank(target, pair, shapes, file) for target, pair in halves.items()}
    if len(ranks) != 1:
        raise ShapeMismatch(
            f"{file} mixes ranks", detail=f"expected the same for every matrix, found {sorted(ranks)[:8]}", hint=_HINT
        )
    rank = ranks.pop()
    if is_peft:
        told = load_peft_config(file.with_name("adapter_config.json"), rank=rank, names=_peft_modules(stored))
    else:
        _require_every_layer(set(halves), config, file)
        told = finetune_scale(file.with_name("params.json"), rank=rank)
    pairs = {target: _read_pair(target, pair, config, read, is_peft=is_peft) for target, pair in halves.items()}
    layout = "peft" if is_peft else "mistral-finetune"
    return Adapter(file, layout, rank, told if scale is None else AdapterScale(scale, "as asked"), pairs)


def _find(path: Path) -> Path:
    if not path.is_dir():
        require_regular_file(path, hint="name an adapter's .safetensors file, or the directory that holds it")
        return path
    for name in FILE_NAMES:
        if (path / name).exists():
            return path / name
    for name in _PICKLE_NAMES:
        if (path / name).exists():
            raise _pickle(path / name)
    raise MissingFile(
        f"no adapter in {path}",
        detail=f"expected {' or '.join(FILE_NAMES)}, found neither",
        hint="name the adapter's file, or the directory that holds it",
    )


def _open(file: Path) -> tuple[dict[str, TensorInfo], Callable[[TensorInfo], Tensor]]:
    try:
        return open_tensors(WeightFiles("consolidated.safetensors", (file,)))
    except MalformedCheckpoint:
        # Looked at only now: a header of 640 bytes begins like a pickle too.
        with file.open("rb") as stream:
            begin = stream.read(4)
        if begin == b"PK\x03\x04" or (begin[:1] == b"\x80" and begin[1:2] in b"\x02\x03\x04\x05"):
            raise _pickle(file) from None
        raise


def _pickle(file: Path) -> UnsafePickle:
    return UnsafePickle(
        f"{file} is a pickle, which can run code",
        detail=f"expected safetensors, such as {' or '.join(FILE_NAMES)}, found an archive of torch.save",
        hint="ask for the adapter as safetensors; mistral-finetune and PEFT write it so unless told otherwise",
    )


def _finetune_target(module: str) -> str | None:
    return module


def _peft_target(module: str) -> str | None:
    name = mistral_name(module.removeprefix(_PEFT_PREFIX) + ".weight") if module.startswith(_PEFT_PREFIX) else None
    return None if name is None else name.removesuffix(".weight")


def _peft_modules(stored: dict[str, TensorInfo]) -> list[str]:
    return [name.removeprefix(_PEFT_PREFIX).partition(".lora_")[0] for name in stored]


def _halves(
    stored: dict[str, TensorInfo], file: Path, target_of: Callable[[str], str | None]
) -> dict[str, dict[str, TensorInfo]]:
    """Return A and B of every matrix that the file changes."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in stored.items():
        matched = _PAIR_NAME.fullmatch(name)
        target = target_of(matched[1]) if matched else None
        if matched is None or target is None:
            raise UnexpectedTensor(
                f"{file} holds the unknown tensor {name}",
                detail="expected lora_A.weight and lora_B.weight of the model's matrices alone, found something else",
                hint=_HINT,
            )
        if info.dtype not in DTYPES.values():
            raise DtypeMismatch(
                f"the tensor {name} in {file} has another number type",
                detail=f"expected bfloat16, float16 or float32, found {info.dtype}",
                hint=_HINT,
            )
        found.setdefault(target, {})[matched[2]] = info
    for target, pair in found.items():
        if len(pair) != 2:
            missing = "lora_B" if "A" in pair else "lora_A"
            raise MissingTensor(
                f"{file} holds half a pair for {target}", detail=f"expected A and B, found no {missing}", hint=_HINT
            )
    if not found:
        raise MissingTensor(f"{file} changes nothing", detail="expected LoRA pairs, found no tensor", hint=_HINT)
    return found


def _checked_rank(target: str, pair: dict[str, TensorInfo], shapes: dict[str, tuple[int, ...]], file: Path) -> int:
    """Return r of one pair; its shapes must be (r, in) and (out, r) of a matrix that the model has."""
    shape = shapes.get(f"{target}.weight", ())
    if len(shape) != 2 or target == "tok_embeddings":
        raise UnexpectedTensor(
            f"{file} changes {target}, and this model has no such matrix",
            detail=f"expected matrices of the model's layers, or its output, found {pair['A'].stored_name}",
            hint=_HINT,
        )
    a, b = pair["A"].shape, pair["B"].shape
    rank = a[0] if len(a) == 2 else 0
    if rank < 1 or a != (rank, shape[1]) or b != (shape[0], rank):
        raise ShapeMismatch(
            f"the pair for {target} in {file} does not fit the model",
            detail=f"expected A (r, {shape[1]}) and B ({shape[0]}, r), found A {a} and B {b}",
            hint=_HINT,
        )
    return rank


def _require_every_layer(targets: set[str], config: ModelConfig, file: Path) -> None:
    """Raise unless all layers are changed alike: mistral-finetune does so, an adapter of a shallower model does not."""
    inner = {target.split(".", 2)[2] for target in targets if target.startswith("layers.")}
    expected = {f"layers.{layer}.{name}" for layer in range(config.n_layers) for name in inner}
    for target in sorted(expected - targets):
        raise MissingTensor(
            f"{file} leaves out {target}",
            detail=f"expected the same matrices in each of {config.n_layers} layers, found {len(targets)} in all",
            hint=_HINT,
        )


def _read_pair(
    target: str,
    pair: dict[str, TensorInfo],
    config: ModelConfig,
    read: Callable[[TensorInfo], Tensor],
    *,
    is_peft: bool,
) -> LowRankPair:
    a, b = read(pair["A"]), read(pair["B"])
    for half, tensor in (("A", a), ("B", b)):
        if not bool(torch.isfinite(tensor).all()):
            raise MalformedCheckpoint(
                f"the tensor {pair[half].stored_name} in {pair[half].path} is not finite",
                detail="expected numbers, found NaN or infinity",
                hint=_HINT,
            )
    if is_peft and f"{target}.weight".endswith(PERMUTED_NAMES):
        b = to_interleaved(b, config.head_dim)  # B's rows are those of W
    return LowRankPair(a, b)
