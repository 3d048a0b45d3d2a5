"""Quantised weights of a pulled model as a form: smaller, so that a token needs fewer bytes of memory read.

Which recipes there are, and what their keys are made of, is the runtime's business: its torch and this processor decide
who can use the result, so a cache that moves to another machine grows another directory and never uses the wrong one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from mistral_fetch.errors import UsageError
from mistral_fetch.manifest import Manifest
from mistral_fetch.transfer.derive import Form, Work

PRODUCT_NAME = "quantized.safetensors"
# Bytes written for 100 bytes of 16-bit weights read: 8 or 4 bits a weight, their scales, and the tensors that stay as
# they are or at 8 bits. Mistral 7B takes 51.7 and 28.4; this much room is asked for before the disk is touched, and the
# runtime, which knows every tensor's shape, asks again for the exact size.
SIZE_PERCENT = {"int8": 53, "int4": 29}

# The layouts that the runtime can read, in its order of preference (`find_weights`): it reads the first there is.
_READ = (
    re.compile(r"consolidated\.safetensors"),
    re.compile(r"model-[0-9]+-of-[0-9]+\.safetensors"),
    re.compile(r"model\.safetensors"),
    re.compile(r"consolidated\.[0-9]{2}\.pth"),
)
# Every file of weights and every index, whoever reads it: beside quantised weights none of them has a use.
_REPLACED = re.compile(
    r"[^/]+\.safetensors|consolidated\.[0-9]{2}\.pth|pytorch_model[^/]*\.bin|(model|pytorch_model)[^/]*\.index\.json"
)


def quantized_form(key: str, to: str) -> Form:
    """Return the form of weights quantised ``to`` int8 or int4 by the runtime's recipe ``key``."""
    return Form(
        key=key,
        product=PRODUCT_NAME,
        weight_format="quantized-safetensors",
        verb="quantize",
        noun=f"{to} weights",
        plan=_planner(SIZE_PERCENT[to]),
    )


def _planner(percent: int) -> Callable[[str, Manifest], Work]:
    def plan(name: str, manifest: Manifest) -> Work:
        paths = [entry.path for entry in manifest.files]
        size = sum(manifest.entry(path).size or 0 for path in _chosen(name, paths))
        return Work([path for path in paths if _REPLACED.fullmatch(path)], -(-size * percent // 100))

    return plan


def _chosen(name: str, paths: Sequence[str]) -> list[str]:
    """Return the weights that the runtime will read."""
    found = [[path for path in paths if layout.fullmatch(path)] for layout in _READ]
    chosen = next((layout for layout in found if layout), None)
    if chosen is None:
        raise UsageError(
            f"{name} has no weights that can be quantized",
            detail="expected consolidated.safetensors, model.safetensors or its shards, or consolidated.00.pth",
            hint=f"see what it consists of: mistral-fetch show {name}",
        )
    return chosen
