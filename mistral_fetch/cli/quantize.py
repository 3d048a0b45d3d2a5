"""``quantize``: keep a smaller copy of a model's weights, which ``run --quantize`` and its like then use."""

from __future__ import annotations

from typing import Annotated

import typer

from mistral_fetch.cli.choices import QuantizeTo
from mistral_fetch.cli.fetch import RUN_EXIT_CODES, RefArgument, fetch
from mistral_fetch.cli.options import FrontEnd, command
from mistral_fetch.errors import UsageError
from mistral_fetch.ref import DirectoryRef, parse_ref
from mistral_fetch.units import format_size


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    command(app, "quantize", transfer=True, epilog=RUN_EXIT_CODES)(quantize)


def quantize(
    front: FrontEnd,
    ref: RefArgument,
    to: Annotated[QuantizeTo, typer.Option("--to", metavar="int8|int4", help="Bits of a weight.")],
) -> int:
    """Fetch a model if it is missing, keep a quantized copy of its weights, and print that copy's directory."""
    from mistral_fetch.cli.derive import derivation_fields
    from mistral_fetch.cli.quantizer import find_quantizer, quantize_model
    from mistral_fetch.launch.locate import find_interpreter

    if isinstance(parse_ref(ref), DirectoryRef):
        raise UsageError(
            f"{ref} is a directory, not a model of the cache",
            detail="expected a model that is pulled: a copy is kept by the digest of what it was made from",
            hint=f"quantize it anew at each start with: mistral-fetch run {ref} --quantize {to.value}",
        )
    quantizer = find_quantizer(front, find_interpreter(front.settings.python), to)
    result = fetch(front, ref)
    made = quantize_model(front, quantizer, result)
    if not made.was_complete:
        front.note(f"{result.key}: {format_size(made.product.size)} of {to.value} weights kept as {made.key}")
    fields = {
        "ref": result.key,
        "content_digest": result.content_digest,
        **derivation_fields(made),
        "recipe": quantizer.recipe,
        "key": made.key,
        "made": dict(made.product.facts),
    }
    front.result(fields, str(made.directory))
    return 0
