"""``show`` and ``list --catalog``: what is known of a model, how well, and what this cache has of it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mistral_fetch.cli.options import FrontEnd, command, stop_on_signals
from mistral_fetch.errors import NotInCache, UsageError
from mistral_fetch.ref import CatalogRef, parse_ref
from mistral_fetch.units import format_size_both


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    command(app, "show", trust=True, epilog="Exit codes: 0 ok, 2 usage, 3 not found.")(show)


def show(
    front: FrontEnd,
    ref: Annotated[str, typer.Argument(metavar="REF", help="A catalog name, or anything that was pulled.")],
    details: Annotated[bool, typer.Option("--details", help="Also every file with its digests.")] = False,
) -> int:
    """Show a model: its channels, licence and credit, links, scores, and what this cache has of it."""
    from mistral_fetch.catalog_show import show_fields, show_text
    from mistral_fetch.transfer.local import settings_catalog

    held = _held(front, ref)
    fields: dict[str, Any] = {}
    text: list[str] = []
    # A key that ``list`` printed (model.meta4#1a2b...) has no form of its own to parse.
    parsed = parse_ref(ref) if not held or _is_catalog_name(ref) else None
    if isinstance(parsed, CatalogRef):
        catalog = settings_catalog(front.settings)
        release = catalog.find(parsed.name, parsed.version)
        fields = show_fields(catalog, release)
        text = [show_text(catalog, release, details=details)]
    elif not held:
        raise NotInCache(
            f"{ref} is not in the cache at {front.settings.home}",
            detail="expected a catalog name or a model in the cache, got neither",
            hint=f"fetch it with: mistral-fetch pull {ref}",
        )
    text.append(_held_text(held) if held else "In this cache\n  nothing yet")
    front.result({**fields, "cache": held}, "\n\n".join(text))
    return 0


def list_catalog(front: FrontEnd) -> int:
    """Print what can be fetched."""
    from mistral_fetch.catalog_show import catalog_rows
    from mistral_fetch.cli.render import table
    from mistral_fetch.sources.base import StopSignal
    from mistral_fetch.transfer.catalogs import current_catalog

    stop = StopSignal()
    undo = stop_on_signals(stop.set)
    try:
        with front.reporter() as report:
            catalog = current_catalog(front.settings, report, stop).catalog
    finally:
        undo()
    headings, rows, fields = catalog_rows(catalog)
    front.result(fields, table(headings, rows))
    return 0


def _is_catalog_name(text: str) -> bool:
    try:
        return isinstance(parse_ref(text), CatalogRef)
    except UsageError:
        return False


def _held(front: FrontEnd, text: str) -> list[dict[str, Any]]:
    from mistral_fetch.store.derived import describe_derived
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.snapshots import find_refs, find_snapshot, load_provenance
    from mistral_fetch.transfer.local import local_key, readable_layouts

    layout = Layout(front.settings.home)
    held = []
    key = local_key(layout, text, front.settings)
    for place in (layout, *readable_layouts(front.settings.shared_homes)):
        for record in find_refs(place, key):
            directory = find_snapshot(place, record.content_digest)
            if directory is not None:
                # What this name was pulled by: the snapshot may since have got the papers of another one.
                papers = {**load_provenance(directory), "ref": record.key, "channel": record.channel}
                made = describe_derived(place, record.content_digest)
                held.append({"directory": str(directory), **papers, "derived": made})
    return held


def _held_text(held: list[dict[str, Any]]) -> str:
    lines = ["In this cache"]
    for model in held:
        lines.append(f"  {model['directory']} (by {model['channel']})")
        if isinstance(signature := model.get("signature"), dict):
            lines.append(f"    signed by: {signature.get('key')}, the {signature.get('kind')}")
        for key in ("name", "version", "licence", "credit", "source_url"):
            lines += [f"    {key.replace('_', ' ')}: {model[key]}"] if model.get(key) else []
        for file in model.get("files", []):
            size = format_size_both(int(file["size"]))
            lines.append(f"    {file['path']}  {size}  {file['assurance']}  sha256:{file['sha256']}")
            origin = f"from {', '.join(file['sources'])}".replace("from adopted from", "adopted from")
            lines.append(f"      {origin}, verified {file['verified_at']}")
        for made in model["derived"]:
            lines.append(f"    {made['recipe']}  {format_size_both(made['bytes_on_disk'])}  {made['state']}")
            lines.append(f"      {made['directory']}")
    return "\n".join(lines)
