"""The runtime as what makes another form of a pulled model's weights; ``convert`` and ``quantizer`` say which."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_fetch.cli.options import FrontEnd, stop_on_signals
from mistral_fetch.errors import RuntimeFailed

if TYPE_CHECKING:
    from mistral_fetch.launch.locate import Interpreter
    from mistral_fetch.store.derived import Product
    from mistral_fetch.transfer.channels import PullResult
    from mistral_fetch.transfer.derive import Derivation, Form


def derive_model(front: FrontEnd, form: Form, result: PullResult, make: Callable[[Path, Path], Product]) -> Derivation:
    """Make a form of a model that was just pulled, or find it."""
    from mistral_fetch.sources.base import StopSignal
    from mistral_fetch.transfer.derive import derive

    stop = StopSignal()
    undo = stop_on_signals(stop.set)
    try:
        with front.reporter() as report:
            return derive(form, result.key, result.content_digest, front.settings, report, stop, make)
    finally:
        undo()


def derivation_fields(derivation: Derivation) -> dict[str, Any]:
    """Return what ``--json`` says of a form of a model."""
    return {
        "recipe": derivation.key,
        "directory": str(derivation.directory),
        "file": derivation.product.path,
        "size": derivation.product.size,
        "sha256": derivation.product.sha256,
        "was_complete": derivation.was_complete,
    }


def ask_for_product(
    interpreter: Interpreter,
    command: str,
    options: Sequence[str],
    directories: Sequence[Path],
    expected: dict[str, str],
    facts: Collection[str] = (),
) -> Product:
    """Let the runtime make a file and return what it told of it.

    Args:
        interpreter: What the runtime runs in.
        command: The runtime's command, and ``options`` for it.
        options: See ``command``.
        directories: The snapshot, and where to write.
        expected: What its answer must have; ``file`` is the product's path.
        facts: Keys of its answer that are worth keeping, where it has them.

    Raises:
        RuntimeFailed: See :func:`mistral_fetch.launch.answer.ask_runtime`; or it made something else.
        OutOfSpace, StoreError: It could not write.
        Interrupted: It was asked to stop.
    """
    from mistral_fetch.digest import Digest
    from mistral_fetch.launch.answer import ask_runtime
    from mistral_fetch.store.derived import Product

    answer = ask_runtime(interpreter, command, options, [str(directory) for directory in directories])
    try:
        if (got := {key: answer[key] for key in expected}) != expected:
            raise ValueError(_by(got))
        digest = Digest("sha256", str(answer["sha256"]))
        kept = {key: answer[key] for key in facts if answer.get(key) is not None}
        return Product(expected["file"], int(answer["size"]), digest.value, kept)
    except (KeyError, TypeError, ValueError) as error:
        raise RuntimeFailed(
            "the runtime made something else than what it was asked for",
            detail=f"expected {_by(expected)}, got: {error}",
            hint="does MISTRAL_FETCH_PYTHON name another installation? mistral-fetch doctor shows it",
        ) from error


def _by(answer: dict[str, Any]) -> str:
    return f"{answer['file']} by {answer.get('key', answer['recipe'])}"
