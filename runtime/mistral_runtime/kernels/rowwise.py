"""Calling the compiled norms, rotations and gates with tensors, after checking everything that C does not."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import silu

from mistral_runtime.kernels.build import ROWWISE_SOURCE
from mistral_runtime.kernels.calling import try_to_load

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


class RowwiseKernels:
    """What a layer does between its products, in bfloat16 on the CPU, each as one call.

    A row gets the same bits whatever is beside it. Results are torch's but for the order of a norm's sum and the last
    digits of an exponential or a fused product: at most one unit in the last place of bfloat16.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._norm = library.norm_bf16
        self._norm.argtypes = [*[_POINTER] * 5, _LONG, _LONG, ctypes.c_float, _INT]
        self._rope = library.rope_bf16
        self._rope.argtypes = [*[_POINTER] * 6, *[_LONG] * 5, _INT]
        self._gate = library.gate_bf16
        self._gate.argtypes = [*[_POINTER] * 3, _LONG, _INT]
        for function in (self._norm, self._rope, self._gate):
            function.restype = None

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return x (…, dim) scaled to unit root mean square, times weight (dim)."""
        return self._normed(x, None, weight, eps)[1]

    def add_and_norm(self, x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return x + added, both (…, dim), and that as `norm` returns it."""
        return self._normed(x, added, weight, eps)

    def _normed(self, x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, dim = _plain(x), x.shape[-1]
        _require(weight.dtype == torch.bfloat16 and weight.shape == (dim,) and weight.is_contiguous(), x, weight)
        normed, sums, addend = torch.empty_like(x), x, None
        if added is not None:
            added, sums = _plain(added), torch.empty_like(x)
            _require(added.shape == x.shape, x, added)
            addend = added.data_ptr()
        self._norm(
            x.data_ptr(),
            addend,
            weight.data_ptr(),
            sums.data_ptr(),
            normed.data_ptr(),
            *(x.numel() // dim, dim, eps, torch.get_num_threads()),
        )
        return sums, normed

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return q (B, T, H, D) and k (B, T, K, D) turned by the angles of `rope.rope_cos_sin`, (T, 1, D)."""
        q, k = _plain(q), _plain(k)
        batch, count, heads, head_dim = q.shape
        fits = k.shape == (batch, count, k.shape[2], head_dim) and not head_dim % 2
        _require(fits, q, k)
        for angles in (cos, sin):
            is_plain = angles.dtype == torch.float32 and angles.is_contiguous()
            _require(is_plain and angles.shape == (count, 1, head_dim), q, angles)
        turned = torch.empty_like(q), torch.empty_like(k)
        self._rope(
            *(t.data_ptr() for t in (q, k, cos, sin, *turned)),
            *(batch * count, count, heads, k.shape[2], head_dim, torch.get_num_threads()),
        )
        return turned

    def gate(self, a: Tensor, b: Tensor) -> Tensor:
        """Return silu(a) · b for two tensors of one shape."""
        a, b = _plain(a), _plain(b)
        _require(a.shape == b.shape, a, b)
        gated = torch.empty_like(a)
        self._gate(a.data_ptr(), b.data_ptr(), gated.data_ptr(), a.numel(), torch.get_num_threads())
        return gated


def kernels_for(x: Tensor) -> RowwiseKernels | None:
    """Return the kernels where they are made for such rows: bfloat16 on the CPU, no gradients, no compiler of steps."""
    if torch.is_grad_enabled() or x.dtype != torch.bfloat16 or not x.is_cpu or torch.compiler.is_compiling():
        return None
    return rowwise_kernels()


@lru_cache(maxsize=1)
def rowwise_kernels() -> RowwiseKernels | None:
    """Return the kernels, built and checked, or None where they cannot be had."""
    return try_to_load(ROWWISE_SOURCE, RowwiseKernels, _self_check)[0]


def _self_check(kernels: RowwiseKernels) -> str:
    """Hold the library against torch on small numbers: a compiler can be wrong, and a cached file damaged."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(2, 3, 4, 20, generator=generator).bfloat16() for _ in range(2))
    weight, angles = y[0, 0, 0], x[0, :, :1].float()
    sums, normed = kernels.add_and_norm(x, y, weight, 1e-5)
    wide = sums.float()
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight.float()
    swapped = x.float().view(2, 3, 4, 10, 2).flip(-1).flatten(-2)
    turned, _ = kernels.rope(x, y, angles, -angles)
    pairs = (
        (sums, (x + y).float()),
        (normed, expected),
        (turned, (x.float() - swapped) * angles),
        (kernels.gate(x, y), silu(x.float()) * y.float()),
    )
    is_right = all(torch.allclose(found.float(), exact, rtol=0.02, atol=0.02) for found, exact in pairs)
    return "" if is_right else "a compiled norm, rotation or gate computes something else than torch"


def _plain(x: Tensor) -> Tensor:
    if x.dtype != torch.bfloat16 or not x.is_cpu:
        raise ValueError(f"expected bfloat16 on the CPU, found {x.dtype} on {x.device}")
    return x if x.is_contiguous() else x.contiguous()


def _require(fits: bool, one: Tensor, other: Tensor) -> None:
    if not fits:
        raise ValueError(f"{one.dtype} {tuple(one.shape)} and {other.dtype} {tuple(other.shape)} do not fit")
