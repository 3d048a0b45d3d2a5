"""The published weight files, checked and handed over as one Transformer.

Owns the three layouts, the map from Hugging Face's names, the un-permutation of wq and wk, and every check of
name, shape and dtype. Nothing is read twice and almost nothing is copied: tensors stay mapped from the files.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mistral_runtime.config import ModelConfig
from mistral_runtime.errors import (
    DtypeMismatch,
    MalformedCheckpoint,
    MissingTensor,
    ShapeMismatch,
    UnexpectedTensor,
    UnsafePickle,
    UnsupportedModel,
)
from mistral_runtime.pth_archive import check_archive
from mistral_runtime.safetensors_header import load_header
from mistral_runtime.snapshot import WeightFiles
from mistral_runtime.strict_json import require_regular_file
from mistral_runtime.transformer import Transformer

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# The unpickler follows a stranger's instructions; each of these ways to stumble is the file's fault.
_STUMBLES = (
    RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, OSError, MemoryError, AssertionError,
    struct.error, zipfile.BadZipFile,
)  # fmt: skip  # RecursionError is a RuntimeError
_HINT = "the weights do not belong to this configuration, or are damaged; verify the snapshot or fetch it again"

_HF_TOP_NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
_HF_LAYER_NAMES = {
    "input_layernorm.weight": "attention_norm.weight",
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "block_sparse_moe.gate.weight": "feed_forward.gate.weight",
}
_HF_EXPERT = re.compile(r"block_sparse_moe\.(experts\.(?:0|[1-9][0-9]{0,3})\.w[123]\.weight)")
# Mixtral with all experts of a layer in one tensor: so transformers 5 holds it in memory, and so some early files are.
_FUSED_EXPERTS = re.compile(r".+\.(experts\.(gate_up_proj|down_proj)|block_sparse_moe\.w[123])")
# Hugging Face stores the rows of these in another order; see `to_interleaved`.
PERMUTED_NAMES = ("attention.wq.weight", "attention.wk.weight")
_HF_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,4})\.(.+)")
_HF_BUFFER = re.compile(r"model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq")  # derived; old exports carry it


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the file describes it, before any of its bytes are read."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    path: Path
    stored_name: str

    @property
    def nbytes(self) -> int:
        """Size of its elements; 0 where there are none or their type is not known."""
        return 0 if isinstance(self.dtype, str) else math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """Validated weights that have not been read yet.

    `tensors` has exactly the model's names; `read` maps one of them from its file without copying.
    """

    files: WeightFiles
    dtype: torch.dtype
    tensors: dict[str, TensorInfo]
    read: Callable[[TensorInfo], Tensor] = field(repr=False)

    @property
    def weight_bytes(self) -> int:
        """Size of all tensors as stored."""
        return sum(info.nbytes for info in self.tensors.values())


def open_checkpoint(files: WeightFiles, config: ModelConfig, *, allow_views: bool = False) -> Checkpoint:
    """Validate the weight files against `config` from their headers alone.

    Args:
        files: The weight files.
        config: The model they are to make.
        allow_views: Let tensors of a `.pth` be views with strides, which have to be copied to be used.

    Raises:
        CheckpointError: One of its kinds, naming the file and the tensor.
    """
    stored, read = open_tensors(files, allow_views=allow_views)
    _refuse_fused_experts(stored)
    _check_names_and_shapes(stored, config, files)
    return Checkpoint(files, _common_dtype(stored), stored, read)


def open_tensors(
    files: WeightFiles, *, allow_views: bool = False
) -> tuple[dict[str, TensorInfo], Callable[[TensorInfo], Tensor]]:
    """Return the tensors by Mistral's names, whether or not they make a model, and what maps one of them.

    Raises:
        CheckpointError: A file is not what its name promises.
    """
    if files.layout == "consolidated.pth":
        return _open_pth(files.paths[0], allow_views=allow_views)
    stored, read = _open_safetensors(files)
    return (_mistral_names(stored) if files.layout == "huggingface" else stored), read


WeightTransform = Callable[[str, Tensor], Tensor]
"""Takes a tensor's name and its value in Mistral's order, and returns what the model is to have instead."""


def load_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    transforms: Sequence[WeightTransform] = (),
    build: Callable[[ModelConfig], Transformer] = Transformer,
) -> Transformer:
    """Build the model around the checkpoint's tensors, after ``transforms`` in their order.

    ``build`` makes the empty model, for shapes that the configuration alone does not tell.

    On the CPU and at the stored dtype the weights are the mapped file pages themselves. The exception is wq and wk
    of Hugging Face files, which are put into Mistral's order, so that both layouts hold the same bits and
    give the same tokens. Those two are 9 % of the weights; the file pages they came from are released one tensor at a
    time, so that the resident size stays that of the weights.
    """
    device = torch.device(device)
    dtype = dtype or checkpoint.dtype
    with torch.device("meta"):
        model = build(config)
    state = {}
    for name, info in checkpoint.tensors.items():
        mapped = checkpoint.read(info)
        tensor = mapped
        if checkpoint.files.layout == "huggingface" and name.endswith(PERMUTED_NAMES):
            tensor = to_interleaved(tensor, config.head_dim)
        for transform in transforms:
            tensor = transform(name, tensor)
        tensor = tensor.to(device=device, dtype=dtype)
        if tensor.data_ptr() != mapped.data_ptr():
            release_file_pages(mapped)
        state[name] = tensor
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def dtype_label(dtype: torch.dtype | str) -> str:
    """Return a number type as safetensors calls it, such as BF16."""
    return next((label for label, known in DTYPES.items() if known == dtype), str(dtype))


def to_interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of wq or wk from Hugging Face's rotary pairs (i, i + D/2) to Mistral's (2i, 2i + 1)."""
    rows, columns = weight.shape
    return weight.view(rows // head_dim, 2, head_dim // 2, columns).transpose(1, 2).reshape(rows, columns)


def release_file_pages(mapped: Tensor) -> None:
    """Take the pages of a file-mapped tensor out of this process; a later read maps them again.

    Without it, every tensor that was converted would count twice until the file is closed: once as the copy, once as
    resident file pages. Linux only, where resident size is also what gets a process killed.
    """
    if not sys.platform.startswith("linux"):
        return
    page = mmap.PAGESIZE
    begin = -(-mapped.data_ptr() // page) * page  # first whole page
    end = (mapped.data_ptr() + mapped.nbytes) // page * page
    if end > begin:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(mmap.MADV_DONTNEED))


def _open_safetensors(files: WeightFiles) -> tuple[dict[str, TensorInfo], Callable[[TensorInfo], Tensor]]:
    stored: dict[str, TensorInfo] = {}
    for path in files.paths:
        for name, entry in load_header(path).items():
            if name in stored:
                raise MalformedCheckpoint(
                    f"{path} repeats the tensor {name}",
                    detail=f"expected it once, found it in {stored[name].path.name} as well",
                    hint=_HINT,
                )
            stored[name] = TensorInfo(entry.shape, DTYPES.get(entry.dtype, entry.dtype), path, name)
    if files.index is not None:
        _check_index(files.index, stored)
    handles: dict[Path, Any] = {}

    def read(info: TensorInfo) -> Tensor:
        try:
            if info.path not in handles:
                handles[info.path] = safe_open(info.path, framework="pt")
            tensor: Tensor = handles[info.path].get_tensor(info.stored_name)
        except (SafetensorError, OSError) as error:
            raise MalformedCheckpoint(
                f"cannot read {info.stored_name} from {info.path}",
                detail=f"expected a readable tensor, found: {error}",
                hint=_HINT,
            ) from error
        return tensor

    return stored, read


def _check_index(index: dict[str, str], stored: dict[str, TensorInfo]) -> None:
    for name, shard in index.items():
        if name not in stored or stored[name].path.name != shard:
            found = f"in {stored[name].path.name}" if name in stored else "in no shard"
            raise MissingTensor(
                f"the tensor {name} is not in {shard}",
                detail=f"expected where the index says, found {found}",
                hint=_HINT,
            )


def _open_pth(path: Path, *, allow_views: bool) -> tuple[dict[str, TensorInfo], Callable[[TensorInfo], Tensor]]:
    tensors = _load_pth(path, allow_views=allow_views)
    stored = {name: TensorInfo(tuple(tensor.shape), tensor.dtype, path, name) for name, tensor in tensors.items()}
    return stored, lambda info: tensors[info.stored_name]


def _load_pth(path: Path, *, allow_views: bool) -> dict[str, Tensor]:
    """Map a `.pth` file weights-only.

    A pickle is a program. Its instructions are looked through first without running them, so that the error can
    name what it asks for and nothing is allocated for it; then torch's restricted unpickler does the loading.
    """
    require_regular_file(path, hint=_HINT)
    try:
        records = check_archive(path)
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsafePickle(
            f"{path} is not only weights",
            detail=f"expected tensors, found: {_first_line(error)}",
            hint="do not load it with another tool; fetch the model again, or a safetensors version of it",
        ) from error
    except _STUMBLES as error:
        raise MalformedCheckpoint(
            f"{path} is not a readable .pth file",
            detail=f"expected a zip archive made by torch.save, found: {_first_line(error)}",
            hint=_HINT,
        ) from error
    tensors = _require_plain_tensors(loaded, path, allow_views=allow_views)
    _require_whole_records(tensors, records, path)
    return tensors


def _require_whole_records(tensors: dict[str, Tensor], records: list[zipfile.ZipInfo], path: Path) -> None:
    """Raise unless every storage has an uncompressed record of its own size in the archive.

    A map does not look at records: where one is cut short or compressed, the bytes that follow it in the file would
    pass for weights.
    """
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    stored = [info.file_size for info in records if info.compress_type == zipfile.ZIP_STORED]
    if len(stored) != len(records) or sorted(storages.values()) != sorted(stored):
        raise MalformedCheckpoint(
            f"{path} holds records of another size than its tensors",
            detail=f"expected {len(storages)} uncompressed records with {sum(storages.values())} bytes, "
            f"found {len(stored)} with {sum(stored)}",
            hint=_HINT,
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or repr(error)


def _shown(name: object) -> str:
    """Return a key for an error; one that is not text may nest too deeply, or too often, to be written out."""
    return repr(name[:80]) if isinstance(name, str) else f"a {type(name).__name__}"


def _require_plain_tensors(loaded: object, path: Path, *, allow_views: bool) -> dict[str, Tensor]:
    if not isinstance(loaded, dict):
        raise MalformedCheckpoint(
            f"{path} holds no table of tensors", detail=f"expected a dict, found {type(loaded).__name__}", hint=_HINT
        )
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise MalformedCheckpoint(
                f"{path} holds something that is not a tensor",
                detail=f"expected names and tensors, found {_shown(name)}: {type(tensor).__name__}",
                hint=_HINT,
            )
        # A few bytes with zero strides can pose as a tensor of any size.
        is_plain = tensor.is_contiguous() or (allow_views and not _overlaps_itself(tensor))
        if tensor.layout != torch.strided or not is_plain or tensor.device.type != "cpu":
            raise MalformedCheckpoint(
                f"{path} holds an unusual tensor {name}",
                detail=f"expected a plain contiguous one, found strides {tuple(tensor.stride())}",
                hint=_HINT,
            )
    return loaded


def _overlaps_itself(tensor: Tensor) -> bool:
    """Return whether two of a tensor's elements may be the same bytes: then it is larger than what it is made of."""
    reach = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * size
    return False


def mistral_name(name: str) -> str | None:
    """Return Mistral's name for a tensor of a Hugging Face file, or None where it is none of the model's."""
    layer = _HF_LAYER.fullmatch(name)
    if layer is None:
        return _HF_TOP_NAMES.get(name)
    expert = _HF_EXPERT.fullmatch(layer[2])
    inner = f"feed_forward.{expert[1]}" if expert else _HF_LAYER_NAMES.get(layer[2])
    return None if inner is None else f"layers.{layer[1]}.{inner}"


def _mistral_names(stored: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    renamed: dict[str, TensorInfo] = {}
    for name, info in stored.items():
        if _HF_BUFFER.fullmatch(name):
            continue
        new_name = mistral_name(name) or name
        if new_name in renamed:
            raise MalformedCheckpoint(
                f"{info.path} holds {name} under another name as well",
                detail=f"expected one tensor for {new_name}, found {renamed[new_name].stored_name} too",
                hint=_HINT,
            )
        renamed[new_name] = info
    return renamed


def _refuse_fused_experts(stored: dict[str, TensorInfo]) -> None:
    for name, info in stored.items():
        if _FUSED_EXPERTS.fullmatch(name):
            raise UnsupportedModel(
                f"{info.path} keeps all experts of a layer in one tensor",
                detail=f"expected three tensors an expert, such as …experts.0.w1.weight, found {info.stored_name}",
                hint="use the published files of the model, which have one expert a tensor",
            )


def _check_names_and_shapes(stored: dict[str, TensorInfo], config: ModelConfig, files: WeightFiles) -> None:
    expected = config.tensor_shapes()
    where = files.paths[0].name if len(files.paths) == 1 else f"{len(files.paths)} shards"
    for name in sorted(expected.keys() - stored.keys()):
        raise MissingTensor(
            f"the tensor {name} is missing from {where} in {files.paths[0].parent}",
            detail=f"expected {len(expected)} tensors, found {len(expected.keys() & stored.keys())} of them",
            hint=_HINT,
        )
    for name in sorted(stored.keys() - expected.keys()):
        raise UnexpectedTensor(
            f"{stored[name].path} holds the unknown tensor {stored[name].stored_name}",
            detail=f"expected the {len(expected)} tensors of the configuration, found {len(stored)}",
            hint=_HINT,
        )
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise ShapeMismatch(
                f"the tensor {stored[name].stored_name} in {stored[name].path} has another shape",
                detail=f"expected {shape} from the configuration, found {stored[name].shape}",
                hint=_HINT,
            )


def _common_dtype(stored: dict[str, TensorInfo]) -> torch.dtype:
    first = next(iter(stored.values()))
    expected = "bfloat16, float16 or float32"
    for info in stored.values():
        if info.dtype not in DTYPES.values() or info.dtype != first.dtype:
            raise DtypeMismatch(
                f"the tensor {info.stored_name} in {info.path} has another number type",
                detail=f"expected {expected}, the same for all, found {info.dtype}",
                hint=_HINT,
            )
    assert isinstance(first.dtype, torch.dtype)
    return first.dtype
