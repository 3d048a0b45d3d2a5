"""A stored tensor's bytes, in order and in bounded memory, whatever its size.

Owns how mapped tensors are cut into chunks and how their pages are given back. Knows nothing of what the bytes are
for. Row-major and little-endian, which is how safetensors stores them.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from mistral_runtime.weights import release_file_pages, to_interleaved

# Large enough that handing a chunk to another thread costs nothing, small enough for a dozen of them to be little.
CHUNK_BYTES = 16 << 20


def stream_bytes(tensor: Tensor) -> Iterator[memoryview]:
    """Give the bytes of a file-mapped tensor; each chunk is valid until the next one is asked for.

    A tensor with strides is copied a block of rows at a time. Its rows may be spread over all of its storage, so that
    this much of the file is resident meanwhile.
    """
    if not tensor.is_contiguous():
        for block in _blocks(tensor):
            yield _raw(block.contiguous())
            release_file_pages(_storage_of(tensor))
        return
    flat = flat_bytes(tensor)
    for begin in range(0, len(flat), CHUNK_BYTES):
        chunk, following = flat[begin : begin + CHUNK_BYTES], flat[begin + CHUNK_BYTES : begin + 2 * CHUNK_BYTES]
        _read_ahead(following)
        yield chunk.numpy().data
        release_file_pages(chunk)


def stream_interleaved(tensor: Tensor, head_dim: int) -> Iterator[memoryview]:
    """Give the bytes of Hugging Face's wq or wk in Mistral's order of rows, one head at a time."""
    for head in _split(tensor, head_dim):
        yield _raw(to_interleaved(head, head_dim))
        release_file_pages(head)


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Cut a tensor along its first dimension, and along the next where one row alone is too large."""
    if tensor.nbytes <= CHUNK_BYTES or tensor.dim() == 0:
        yield tensor
        return
    rows = CHUNK_BYTES * len(tensor) // tensor.nbytes
    for block in _split(tensor, max(rows, 1)):
        if rows:
            yield block
        else:
            yield from _blocks(block[0])


def _split(tensor: Tensor, rows: int) -> Iterator[Tensor]:
    return (tensor[begin : begin + rows] for begin in range(0, len(tensor), rows))


def flat_bytes(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor's bytes as a tensor, without copying them."""
    return tensor.reshape(-1).view(torch.uint8)


def _raw(tensor: Tensor) -> memoryview:
    return flat_bytes(tensor).numpy().data


def _storage_of(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _read_ahead(chunk: Tensor) -> None:
    """Ask the kernel to read mapped pages before they are needed; otherwise each small part of them is waited for."""
    if not sys.platform.startswith("linux") or not chunk.nbytes:
        return
    begin = chunk.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = chunk.data_ptr() + chunk.nbytes - begin
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), ctypes.c_int(mmap.MADV_WILLNEED))
