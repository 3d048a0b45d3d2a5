"""``--quantize`` and ``quantize``: the runtime as what makes quantised weights, and says which ones it can use."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_fetch.cli.choices import QuantizeTo
from mistral_fetch.cli.options import FrontEnd
from mistral_fetch.errors import RuntimeFailed

if TYPE_CHECKING:
    from mistral_fetch.launch.locate import Interpreter
    from mistral_fetch.store.derived import Product
    from mistral_fetch.transfer.channels import PullResult
    from mistral_fetch.transfer.derive import Derivation, Form

# The key names a directory that people see in `list`, so it is held to what they can read and type.
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,119}")
# What the runtime tells of its work that is worth asking for again later.
FACTS = ("seconds", "peak_rss_bytes", "tensors", "quality")


@dataclass(frozen=True)
class Quantizer:
    """What the runtime on this machine makes of weights when asked for int8 or int4."""

    interpreter: Interpreter
    to: QuantizeTo
    recipe: str
    form: Form


def find_quantizer(front: FrontEnd, interpreter: Interpreter, to: QuantizeTo) -> Quantizer:
    """Ask the runtime for its recipe, which reads no model: before 13 GB are fetched, not after.

    Raises:
        RuntimeFailed: It cannot quantise, or its answer makes no sense.
    """
    from mistral_fetch.launch.answer import ask_runtime
    from mistral_fetch.transfer.quantize import PRODUCT_NAME, quantized_form

    answer = ask_runtime(interpreter, "quantize", ["--describe", f"--to={to.value}"], [])
    recipe, key, product = (answer.get(name) for name in ("recipe", "key", "product"))
    if not isinstance(recipe, str) or not isinstance(key, str) or not _KEY.fullmatch(key) or product != PRODUCT_NAME:
        raise RuntimeFailed(
            "the runtime's answer to quantize --describe makes no sense",
            detail=f"expected a recipe, a key and {PRODUCT_NAME}, got {str(answer)[:80]}",
            hint="does MISTRAL_FETCH_PYTHON name another installation? mistral-fetch doctor shows it",
        )
    return Quantizer(interpreter, to, recipe, quantized_form(key, to.value))


def quantize_model(front: FrontEnd, quantizer: Quantizer, result: PullResult) -> Derivation:
    """Make the quantised copy of a model that was just pulled, or find it."""
    from mistral_fetch.cli.derive import ask_for_product, derive_model

    form = quantizer.form

    def make(snapshot: Path, draft: Path) -> Product:
        options = [f"--to={quantizer.to.value}", f"--reserve={front.settings.disk_reserve}"]
        options += ["--quiet"] * front.wants_no_text
        expected = {"file": form.product, "recipe": quantizer.recipe, "key": form.key}
        return ask_for_product(quantizer.interpreter, "quantize", options, [snapshot, draft], expected, FACTS)

    return derive_model(front, form, result, make)
