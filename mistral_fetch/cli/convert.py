"""``pull --convert``: the runtime as what makes the converted weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_fetch.cli.options import FrontEnd, stop_on_signals
from mistral_fetch.errors import RuntimeFailed

if TYPE_CHECKING:
    from mistral_fetch.store.derived import Product
    from mistral_fetch.transfer.channels import PullResult
    from mistral_fetch.transfer.convert import Conversion


def require_runtime(front: FrontEnd, refs: list[str]) -> None:
    """Refuse before 13 GB are fetched, not after, unless all of it is converted already.

    Raises:
        RuntimeMissing: Nothing here can convert.
    """
    from mistral_fetch.launch.locate import find_interpreter
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.transfer.convert import find_conversion
    from mistral_fetch.transfer.local import find_local, local_key

    layout = Layout(front.settings.home)
    for text in refs:
        here = find_local(layout, local_key(layout, text, front.settings), front.settings.via)
        if here is None or find_conversion(layout, here.record.content_digest) is None:
            find_interpreter(front.settings.python)
            return


def convert_model(front: FrontEnd, result: PullResult) -> Conversion:
    """Make the safetensors copy of a model that was just pulled, or find it."""
    from mistral_fetch.sources.base import StopSignal
    from mistral_fetch.transfer.convert import convert

    def make(snapshot: Path, draft: Path) -> Product:
        return _make(front, snapshot, draft)

    stop = StopSignal()
    undo = stop_on_signals(stop.set)
    try:
        with front.reporter() as report:
            return convert(result.key, result.content_digest, front.settings, report, stop, make)
    finally:
        undo()


def conversion_fields(conversion: Conversion) -> dict[str, Any]:
    """Return what ``pull --json`` says of a conversion."""
    return {
        "recipe": conversion.recipe,
        "directory": str(conversion.directory),
        "file": conversion.product.path,
        "size": conversion.product.size,
        "sha256": conversion.product.sha256,
        "was_complete": conversion.was_complete,
    }


def _make(front: FrontEnd, snapshot: Path, draft: Path) -> Product:
    from mistral_fetch.digest import Digest
    from mistral_fetch.launch.answer import ask_runtime
    from mistral_fetch.launch.locate import find_interpreter
    from mistral_fetch.store.derived import Product
    from mistral_fetch.transfer.convert import PRODUCT_NAME, SAFETENSORS_RECIPE

    interpreter = find_interpreter(front.settings.python)
    reserve = f"--reserve={front.settings.disk_reserve}"
    answer = ask_runtime(interpreter, "convert", [reserve], [str(snapshot), str(draft)])
    try:
        if (answer["file"], answer["recipe"]) != (PRODUCT_NAME, SAFETENSORS_RECIPE):
            raise ValueError(f"{answer['file']} by {answer['recipe']}")
        return Product(PRODUCT_NAME, int(answer["size"]), Digest("sha256", str(answer["sha256"])).value)
    except (KeyError, TypeError, ValueError) as error:
        raise RuntimeFailed(
            "the runtime converted something else than what it was asked for",
            detail=f"expected {PRODUCT_NAME} by {SAFETENSORS_RECIPE}, got: {error}",
            hint="does MISTRAL_FETCH_PYTHON name another installation? mistral-fetch doctor shows it",
        ) from error
