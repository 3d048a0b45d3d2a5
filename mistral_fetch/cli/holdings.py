"""What ``list`` says: models with what each has to itself, what is unfinished, and a total that is what ``du`` says."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_fetch.cli.options import FrontEnd
from mistral_fetch.errors import StoreError
from mistral_fetch.units import format_duration, format_size

if TYPE_CHECKING:
    from mistral_fetch.store.inventory import Inventory
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.snapshots import RefRecord


def holdings_fields(front: FrontEnd, layout: Layout, held: Inventory, partials: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a cache holds, and what lies in shared caches."""
    from mistral_fetch.store.snapshots import list_refs
    from mistral_fetch.transfer.local import readable_layouts

    models = _own_rows(layout, held, list_refs(layout))
    for shared in readable_layouts(front.settings.shared_homes):
        nothing = {"exclusive_bytes": 0, "shared_bytes": 0, "used_at": None, "pinned": False}
        models += [{**_model_row(shared, record), **nothing, "home": str(shared.home)} for record in list_refs(shared)]
    parts = {
        "models": sum(model["exclusive_bytes"] for model in models),
        "shared": held.all_shared_bytes,
        "unfinished": sum(held.partials.values()) + sum(held.drafts.values()),
        "trash": held.trash_bytes,
        "unused": held.unused_bytes + _nameless_bytes(held),
        "other": held.rest_bytes,
    }
    quota = front.settings.cache_quota or None
    disk = {**parts, "total": held.total_bytes, "quota": quota} if held.total_bytes else None
    return {"models": models, "partials": partials, "disk_bytes": disk}


def _own_rows(layout: Layout, held: Inventory, records: Sequence[RefRecord]) -> list[dict[str, Any]]:
    """Return a row for every name. What a model takes stands beside its first name only, so that the column adds up."""
    owners = held.owners
    by_digest = {model.content_digest: model for model in held.models}
    rows, counted = [], set()
    for record in records:
        model = by_digest.get(record.content_digest)
        if model is None:
            continue  # named since the inventory was taken
        is_first = model.content_digest not in counted
        counted.add(model.content_digest)
        row = {
            **_model_row(layout, record),
            "exclusive_bytes": held.exclusive_bytes(model, owners) if is_first else 0,
            "shared_bytes": held.shared_bytes(model, owners),
            "used_at": int(model.used_at),
            "pinned": model.is_pinned,
            "home": str(layout.home),
        }
        rows.append(row)
    return rows


def _nameless_bytes(held: Inventory) -> int:
    owners = held.owners
    return sum(held.exclusive_bytes(model, owners) for model in held.models if not model.records)


def _model_row(layout: Layout, record: RefRecord) -> dict[str, Any]:
    from mistral_fetch.store.derived import describe_derived
    from mistral_fetch.store.snapshots import find_snapshot, load_provenance

    directory = find_snapshot(layout, record.content_digest)
    files: list[dict[str, Any]] = []
    if directory is not None:
        try:
            files = load_provenance(directory).get("files", [])
        except StoreError:
            directory = None
    return {
        "ref": record.key,
        "channel": record.channel,
        "directory": str(layout.snapshot(record.content_digest)),
        "size": sum(int(file.get("size", 0)) for file in files),
        "assurance": ", ".join(sorted({str(file.get("assurance")) for file in files})),
        "pulled_at": record.pulled_at,
        "state": "complete" if directory else "damaged",
        "derived": describe_derived(layout, record.content_digest),
    }


def partial_rows(layout: Layout, held: Inventory) -> list[dict[str, Any]]:
    """Return what is unfinished, file by file."""
    from mistral_fetch.store.gc import allocated_bytes
    from mistral_fetch.store.partial_notes import TORRENT_STATE

    return [
        {"directory": str(directory), "bytes_on_disk": allocated_bytes(directory), **describe(directory)}
        for directory in sorted(held.partials)
        if describe(directory)["path"] != TORRENT_STATE
    ]


def describe(directory: Path) -> dict[str, Any]:
    """Return to what an unfinished file belongs, as far as that was noted."""
    from mistral_fetch.store.partial_notes import read_description

    noted = read_description(directory)
    if noted is None:
        return {"ref": "unknown", "path": directory.name, "since": int(directory.stat().st_mtime)}
    return asdict(noted)


def holdings_text(fields: dict[str, Any]) -> str:
    """Return the same for people; nothing for an empty cache."""
    from mistral_fetch.cli.render import table

    text = []
    if fields["models"]:
        headings = ["MODEL", "CHANNEL", "SIZE", "EXCLUSIVE", "SHARED", "ASSURANCE", "PULLED", "USED", "STATE"]
        text.append(table(headings, [row for model in fields["models"] for row in _rows(model)]))
    if fields["partials"]:
        rows = [
            [str(p["ref"]), str(p["path"]), f"{format_size(p['bytes_on_disk'])} on disk", _age(p["since"])]
            for p in fields["partials"]
        ]
        text.append(table(["UNFINISHED", "FILE", "HELD", "BEGUN"], rows))
    disk = fields.get("disk_bytes")
    if disk and (text or disk["trash"] or disk["unused"]):
        parts = [f"{format_size(disk[part])} {part}" for part in list(disk)[:-2] if disk[part]]
        quota = f" of a quota of {format_size(disk['quota'])}" if disk["quota"] else ""
        text.append(f"{format_size(disk['total'])} on disk{quota}: {', '.join(parts)}")
    return "\n\n".join(text)


def _rows(model: dict[str, Any]) -> list[list[str]]:
    """Return a model's line, and one for each form its weights were converted to."""
    pulled, used = _age(model["pulled_at"]), "" if model["used_at"] is None else _age(model["used_at"])
    own, shared = format_size(model["exclusive_bytes"]), format_size(model["shared_bytes"])
    state = model["state"] + (", pinned" if model["pinned"] else "")
    if model["used_at"] is None:
        own, shared, state = "", "", f"{state}, in {model['home']}"
    size = format_size(model["size"])
    row = [model["ref"], model["channel"], size, own, shared, model["assurance"], pulled, used, state]
    made = [
        ["", d["recipe"], format_size(d["bytes_on_disk"]), "", "", "", "", "", d["state"]] for d in model["derived"]
    ]
    return [row, *made]


def _age(since: int) -> str:
    return f"{format_duration(max(0, time.time() - since))} ago"
