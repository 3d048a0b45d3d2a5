"""``compare``: whether two models hold the same tensors, whatever files they are stored in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mistral_fetch.cli.options import FrontEnd, command
from mistral_fetch.cli.paths import local_directory
from mistral_fetch.errors import ExitCode, RuntimeFailed, printable
from mistral_fetch.ref import DirectoryRef, parse_ref
from mistral_fetch.units import format_size

_EXIT_CODES = (
    "Exit codes: 0 the same, 2 usage, 3 not complete in the cache, 32 not the same, 40 the weights cannot be read,"
    " 130 interrupted."
)
_SHOWN = 20


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    command(app, "compare", epilog=_EXIT_CODES)(compare)


def compare(
    front: FrontEnd,
    first: Annotated[str, typer.Argument(metavar="A", help="A model of the cache, or a directory.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The other one.")],
) -> int:
    """Prove that two models hold the same tensors, whatever the layout: .pth, safetensors or Hugging Face shards."""
    from mistral_fetch.launch.answer import ask_runtime
    from mistral_fetch.launch.locate import find_interpreter

    directories = [str(_directory(front, text)) for text in (first, second)]
    interpreter = find_interpreter(front.settings.python)
    answer = ask_runtime(interpreter, "digest", [], directories)
    try:
        a, b = answer["snapshots"]
        differences = find_differences(a["tensors"], b["tensors"])
        fields = {
            "same": not differences,
            "models": [_summary(text, model) for text, model in ((first, a), (second, b))],
            "differences": differences,
        }
        text = _text(fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RuntimeFailed(
            "the runtime's answer to digest makes no sense",
            detail=f"expected the tensors of two models, got: {error!r}",
            hint="does MISTRAL_FETCH_PYTHON name another installation? mistral-fetch doctor shows it",
        ) from error
    front.result(fields, text)
    return int(ExitCode.INTEGRITY if differences else ExitCode.OK)


def find_differences(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what two tables of tensors do not agree on: ``problem`` is missing, dtype, shape or bytes.

    A tensor that one of them lacks has null on that side.
    """
    found = []
    for name in sorted(a.keys() | b.keys()):
        left, right = a.get(name), b.get(name)
        if left != right:
            found.append({"tensor": name, "problem": _problem(left, right), "a": left, "b": right})
    return found


def _problem(left: dict[str, Any] | None, right: dict[str, Any] | None) -> str:
    if left is None or right is None:
        return "missing"
    return next((key for key in ("dtype", "shape") if left[key] != right[key]), "bytes")


def _directory(front: FrontEnd, text: str) -> Path:
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.snapshots import find_refs
    from mistral_fetch.transfer.local import require_local

    layout = Layout(front.settings.home)
    if not find_refs(layout, text) and isinstance(parse_ref(text), DirectoryRef):
        return local_directory(text)
    return require_local(layout, text, front.settings).directory


def _summary(text: str, model: dict[str, Any]) -> dict[str, Any]:
    kept = {key: model[key] for key in ("directory", "layout", "files", "tensor_bytes", "tensors_sha256")}
    return {"model": text, **kept, "tensors": len(model["tensors"])}


def _text(fields: dict[str, Any]) -> str:
    a, b = fields["models"]
    lines = [f"{side}: {model['model']} ({model['layout']})" for side, model in (("A", a), ("B", b))]
    differences = fields["differences"]
    if not differences:
        size = format_size(int(a["tensor_bytes"]))
        return "\n".join([*lines, f"the same {a['tensors']} tensors, {size}: sha256:{a['tensors_sha256']}"])
    lines += [_line(difference) for difference in differences[:_SHOWN]]
    if len(differences) > _SHOWN:
        lines.append(f"and {len(differences) - _SHOWN} more; --json lists all of them")
    total = max(int(a["tensors"]), int(b["tensors"]))
    return "\n".join([*lines, f"not the same: {len(differences)} of {total} tensors differ"])


def _line(difference: dict[str, Any]) -> str:
    problem, a, b = (difference[key] for key in ("problem", "a", "b"))
    name = printable(difference["tensor"])  # a stranger's: it must not look like a line of ours
    if problem == "missing":
        return f"{name}: only in {'A' if b is None else 'B'}"
    if problem == "bytes":
        return f"{name}: A has sha256:{a['sha256']}, B has sha256:{b['sha256']}"
    return f"{name}: {problem} {a[problem]} in A, {b[problem]} in B"
