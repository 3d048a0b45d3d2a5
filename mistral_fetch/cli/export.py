"""``export hf``, ``gguf-source``, ``ollama``, ``oci``: a model of the cache as other programs expect it, by links."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mistral_fetch.cli.options import FrontEnd, command, stop_on_signals
from mistral_fetch.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from mistral_fetch.export.directory import Exported
    from mistral_fetch.export.links import Placer
    from mistral_fetch.export.model import Model

_EXIT_CODES = "Exit codes: 0 ok (also when it was there), 2 usage or another layout, 3 not in the cache, 9 disk, 13 something else is there, 32 damaged."  # noqa: E501
Ref = Annotated[str, typer.Argument(metavar="REF", help="A complete model of the cache.")]
To = Annotated[Path, typer.Option("--to", metavar="DIR", help="The directory to make.")]
Symlink = Annotated[bool, typer.Option("--symlink", help="Symbolic links into the cache; also to another disk.")]
Copy = Annotated[bool, typer.Option("--copy", help="Copies, which stay when the cache goes.")]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    command(app, "export hf", epilog=_EXIT_CODES)(export_hf)
    command(app, "export gguf-source", epilog=_EXIT_CODES)(export_gguf)
    command(app, "export ollama", epilog=_EXIT_CODES)(export_for_ollama)
    command(app, "export oci", epilog=_EXIT_CODES)(export_image)


def export_hf(
    front: FrontEnd,
    ref: Ref,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="HF_HOME", help="Another home than that of Hugging Face's programs.")
    ] = None,
    repo: Annotated[
        str | None, typer.Option("--repo", metavar="ORG/NAME", help="What to call a model that came from no hub.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Let the revision stand for this model there.")] = False,
    symlink: Symlink = False,
    copy: Copy = False,
) -> int:
    """Add a model to Hugging Face's cache, so that transformers and vLLM load it offline."""
    from mistral_fetch.export.hub_view import export_hub_view, hub_name
    from mistral_fetch.transfer.local import settings_catalog
    from mistral_fetch.transfer.shelves import hub_cache_directory

    hub_cache = hub_cache_directory() if to is None else _absolute(to) / "hub"
    if hub_cache is None:
        raise NotFoundError(
            "there is no place for Hugging Face's cache",
            detail="expected a home directory, or HF_HOME to name one, got none",
            hint="name it: --to HF_HOME",
        )

    def lay_out(model: Model, placer: Placer) -> Exported:
        name = hub_name(model, settings_catalog(front.settings), repo)
        return export_hub_view(model, name, hub_cache, placer, replaces_ref=replace)

    return _export(front, ref, lay_out, symlink=symlink, copy=copy)


def export_gguf(front: FrontEnd, ref: Ref, to: To, symlink: Symlink = False, copy: Copy = False) -> int:
    """Make a directory that llama.cpp's converter reads; of a .pth its safetensors copy is taken."""
    from mistral_fetch.export.directory import export_gguf_source

    def lay_out(model: Model, placer: Placer) -> Exported:
        return export_gguf_source(model, _absolute(to), placer)

    return _export(front, ref, lay_out, symlink=symlink, copy=copy)


def export_for_ollama(front: FrontEnd, ref: Ref, to: To, symlink: Symlink = False, copy: Copy = False) -> int:
    """Make a directory with a Modelfile for ollama create: template, stop words and licence included."""
    from mistral_fetch.export.directory import export_ollama

    def lay_out(model: Model, placer: Placer) -> Exported:
        return export_ollama(model, _absolute(to), placer)

    return _export(front, ref, lay_out, symlink=symlink, copy=copy)


def export_image(
    front: FrontEnd,
    ref: Ref,
    to: To,
    tag: Annotated[str, typer.Option("--tag", metavar="TAG", help="The image's tag (default: latest).")] = "latest",
    symlink: Symlink = False,
    copy: Copy = False,
) -> int:
    """Make an OCI image layout as the CNCF ModelPack spec describes models, for registries and image volumes."""
    from mistral_fetch.export.oci import export_oci

    def lay_out(model: Model, placer: Placer) -> Exported:
        return export_oci(model, _absolute(to), placer, tag)

    return _export(front, ref, lay_out, symlink=symlink, copy=copy)


def _export(
    front: FrontEnd, ref: str, lay_out: Callable[[Model, Placer], Exported], *, symlink: bool, copy: bool
) -> int:
    from mistral_fetch.export.links import LinkMode, Placer
    from mistral_fetch.export.model import load_model
    from mistral_fetch.sources.base import StopSignal
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.transfer.local import require_local

    if symlink and copy:
        raise UsageError(
            "--symlink and --copy exclude each other", detail="expected one of them, got both", hint="leave one out"
        )
    mode = LinkMode.SYMBOLIC if symlink else LinkMode.COPY if copy else LinkMode.SHARE
    layout, stop = Layout(front.settings.home), StopSignal()
    model = load_model(layout, require_local(layout, ref, front.settings), prefers_converted=True)
    undo = stop_on_signals(stop.set)
    try:
        exported = lay_out(model, Placer(mode, stop.check))
    finally:
        undo()
    front.note(f"{model.key}: {'was there already' if exported.was_complete else exported.how}")
    front.note(f"next: {exported.next_step}")
    fields = {
        "ref": model.key,
        "directory": str(exported.directory),
        "was_complete": exported.was_complete,
        "how": exported.how,
        "next": exported.next_step,
    }
    front.result(fields, str(exported.directory))
    return 0


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except (OSError, RuntimeError, ValueError) as error:
        raise NotFoundError(
            f"there is no place {path}", detail=f"expected a directory to make, got: {error}", hint="check --to"
        ) from error
