"""``pull --convert``: the runtime as what makes the converted weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mistral_fetch.cli.options import FrontEnd

if TYPE_CHECKING:
    from mistral_fetch.store.derived import Product
    from mistral_fetch.transfer.channels import PullResult
    from mistral_fetch.transfer.derive import Derivation


def require_runtime(front: FrontEnd, refs: list[str]) -> None:
    """Refuse before 13 GB are fetched, not after, unless all of it is converted already.

    Raises:
        RuntimeMissing: Nothing here can convert.
    """
    from mistral_fetch.launch.locate import find_interpreter
    from mistral_fetch.store.derived import find_derived
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.transfer.convert import SAFETENSORS
    from mistral_fetch.transfer.local import find_local, local_key

    layout = Layout(front.settings.home)
    for text in refs:
        here = find_local(layout, local_key(layout, text, front.settings), front.settings.via)
        if here is None or find_derived(layout, SAFETENSORS.key, here.record.content_digest) is None:
            find_interpreter(front.settings.python)
            return


def convert_model(front: FrontEnd, result: PullResult) -> Derivation:
    """Make the safetensors copy of a model that was just pulled, or find it."""
    from mistral_fetch.cli.derive import ask_for_product, derive_model
    from mistral_fetch.launch.locate import find_interpreter
    from mistral_fetch.transfer.convert import SAFETENSORS

    def make(snapshot: Path, draft: Path) -> Product:
        interpreter = find_interpreter(front.settings.python)
        reserve = f"--reserve={front.settings.disk_reserve}"
        expected = {"file": SAFETENSORS.product, "recipe": SAFETENSORS.key}
        return ask_for_product(interpreter, "convert", [reserve], [snapshot, draft], expected)

    return derive_model(front, SAFETENSORS, result, make)
