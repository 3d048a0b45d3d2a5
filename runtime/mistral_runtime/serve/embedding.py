"""The mean of what a prompt's positions became, as a vector of length one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mistral_runtime.errors import NonFiniteLogits
from mistral_runtime.kv_cache import RollingKVCache
from mistral_runtime.transformer import Transformer


@torch.inference_mode()
def summed_states(model: Transformer, ids: Sequence[int], cache: RollingKVCache) -> Tensor:
    """Append ids (T) to a sequence and return the sum of the last layer's normed output over them, (dim) in float32."""
    caught: list[Tensor] = []

    def catch(_layer: nn.Module, _inputs: object, output: Tensor) -> None:
        caught.append(output)

    hook = model.layers[-1].register_forward_hook(catch)
    try:
        model(torch.tensor([list(ids)], device=model.device), cache, last_only=True)
    finally:
        hook.remove()
    states: Tensor = model.norm(caught[0])  # (1, T, dim)
    return states[0].float().sum(0).cpu()


def unit_vector(total: Tensor) -> list[float]:
    """Return a vector scaled to length one; the number of positions in a sum does not matter to that.

    Raises:
        NonFiniteLogits: It has no direction.
    """
    wide = total.double()
    length = float(wide.norm())
    if not 0 < length < float("inf"):
        raise NonFiniteLogits(
            "the model computed a value that is not a number",
            detail=f"expected a vector of finite length above 0, found {length}",
            hint="verify the snapshot; if it is intact, try --dtype float32",
        )
    values: list[float] = (wide / length).tolist()
    return values
