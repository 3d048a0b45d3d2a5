"""A decode step whose layers are compiled by torch.compile (Inductor), ready for every later position.

One layer is compiled, once, and serves all of them: they differ in their weights alone. What changes from token to
token is a tensor's content (the slot, the angles) or a size that is marked as dynamic (how many positions there are,
how many there is room for), so no token compiles anything again. Keys and values stay where `kv_cache.py` has
them: compiled and eager steps can follow each other in one answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mistral_runtime.attention import grouped_attention
from mistral_runtime.engine import Step, eager_step
from mistral_runtime.kv_cache import RollingKVCache
from mistral_runtime.layers import TransformerBlock
from mistral_runtime.rope import rope_cos_sin
from mistral_runtime.transformer import Transformer

Block = Callable[..., Tensor]


class OneSlot:
    """One layer's buffers, for storing one position where a tensor says: what a decode step needs of a cache."""

    def __init__(self, keys: Tensor, values: Tensor, slot: Tensor, seen: Tensor) -> None:
        """Take the buffers (B, K, C, D), the slot to fill (1,), and a tensor with as many rows as are then filled, S.

        The number comes as a shape because a compiler takes sizes for symbols, but other numbers for constants.
        """
        self._keys, self._values, self._slot, self._filled = keys, values, slot, seen.shape[0]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store keys and values (B, 1, K, D) and return what q (B, 1, H, D) gathers of all of them, (B, 1, H·D)."""
        self._keys.index_copy_(2, self._slot, k.transpose(1, 2))
        self._values.index_copy_(2, self._slot, v.transpose(1, 2))
        seen = self._keys.narrow(2, 0, self._filled), self._values.narrow(2, 0, self._filled)
        return grouped_attention(q, *seen, None)


def block_step(
    layer: TransformerBlock,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slot: Tensor,
    seen: Tensor,
) -> Tensor:
    """Return `x` (B, 1, dim) after one layer; what is compiled. See `OneSlot` for the last four."""
    out: Tensor = layer(x, cos, sin, OneSlot(keys, values, slot, seen), 0)
    return out


def decode_with(block: Block) -> Step:
    """Return a step for one token that computes each layer by `block`, which has the arguments of `block_step`."""

    @torch.inference_mode()
    def step(model: Transformer, ids: Sequence[int], cache: RollingKVCache, *, last_only: bool = True) -> Tensor:
        # Of one token the last logits are all there are, whatever `last_only` says.
        (token,) = ids
        cache.require_room(1)
        if not cache.hides_nothing(1):
            raise ValueError("a compiled step knows no mask: it needs a cache without slack")
        position, device = cache.length, model.device
        slot = torch.tensor([position % cache.capacity], device=device)
        seen = torch.empty(min(position + 1, cache.capacity), 0, device=device)
        cos, sin = rope_cos_sin(
            range(position, position + 1), head_dim=model.config.head_dim, theta=model.config.rope_theta, device=device
        )
        x: Tensor = model.tok_embeddings(torch.tensor([[token]], device=device))  # (1, 1, dim)
        for layer, keys, values in zip(model.layers, cache.keys, cache.values, strict=True):
            x = block(layer, x, cos, sin, keys, values, slot, seen)
        cache.advance(1)
        logits: Tensor = model.output(model.norm(x))
        return logits.float()[0].cpu()  # (1, V)

    return step


def compile_decode(model: Transformer) -> Step:
    """Compile the model's decode step and return it; the result never compiles, whatever it is called with.

    Takes from seconds to a minute, all of it in here: where the compiled code does not fit a call after all, the result
    computes that call eagerly.

    Raises:
        Exception: Whatever torch has to say where there is no compiler, or where it cannot compile this model.
    """
    import torch._inductor.config

    # The compiler runs beside an answer: a pool of workers would take the cores that one needs, and would outlive us.
    torch._inductor.config.compile_threads = 1
    compiled: Block = torch.compile(block_step)

    def marked(layer: TransformerBlock, x: Tensor, cos: Tensor, sin: Tensor, *tensors: Tensor) -> Tensor:
        keys, values, slot, seen = tensors
        for tensor, dimension in ((keys, 2), (values, 2), (seen, 0)):
            torch._dynamo.mark_dynamic(tensor, dimension)
        return compiled(layer, x, cos, sin, keys, values, slot, seen)

    _run(model, decode_with(marked), context=24)
    step = decode_with(compiled)
    # Another length and another room, where any assumption that was built in by mistake would show.
    with torch.compiler.set_stance("fail_on_recompile"):
        _run(model, step, context=40)

    def never_compiling(
        model: Transformer, ids: Sequence[int], cache: RollingKVCache, *, last_only: bool = True
    ) -> Tensor:
        with torch.compiler.set_stance("eager_on_recompile"):
            return step(model, ids, cache, last_only=last_only)

    return never_compiling


def _run(model: Transformer, step: Step, *, context: int) -> None:
    cache = model.new_cache(context)
    eager_step(model, [1] * (context // 3), cache)
    for _ in range(context // 2):
        step(model, [1], cache)
