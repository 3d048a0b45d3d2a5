"""``pull --dry-run``: the plan of a transfer, for people and for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mistral_fetch.cli.options import FrontEnd, stop_on_signals
from mistral_fetch.ref import parse_ref
from mistral_fetch.units import format_size

if TYPE_CHECKING:
    from mistral_fetch.transfer.preview import FilePreview, Preview


def print_plans(front: FrontEnd, refs: list[str], *, refresh: bool) -> int:
    """Print what a pull would do; the exit code is that of the first model it would refuse, else 0."""
    plans = [plan_pull(front, text, refresh=refresh) for text in refs]
    fields = [_fields(front, plan) for plan in plans]
    front.result(fields[0] if len(fields) == 1 else fields, "\n\n".join(_text(front, plan) for plan in plans))
    return next((int(plan.refusal.exit_code) for plan in plans if plan.refusal is not None), 0)


def plan_pull(front: FrontEnd, text: str, *, refresh: bool) -> Preview:
    """Return what a pull would do, asking for descriptions but for no content.

    Raises:
        MistralFetchError: The pull would end in it before there is anything to plan with.
    """
    from mistral_fetch.sources.base import StopSignal
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.transfer.channels import Job
    from mistral_fetch.transfer.preview import preview
    from mistral_fetch.transfer.pull import name_today

    ref, stop = parse_ref(text), StopSignal()
    undo = stop_on_signals(stop.set)
    try:
        with front.reporter() as report:
            key, catalog = name_today(ref, front.settings, report, stop, keeps=False)
            job = Job(key, Layout(front.settings.home), front.settings, report, stop, front.adopt_from, catalog)
            return preview(ref, job, refresh=refresh)
    finally:
        undo()


def _fields(front: FrontEnd, plan: Preview) -> dict[str, Any]:
    return {
        "ref": plan.key,
        "dry_run": True,
        "was_complete": plan.directory is not None,
        "directory": str(plan.directory) if plan.directory else None,
        "channel": plan.channel,
        "files": [_file_fields(file) for file in plan.files],
        "total_bytes": sum(file.size for file in plan.files),
        "present_bytes": sum(file.present_bytes for file in plan.files),
        "adoptable_bytes": plan.adoptable_bytes,
        "to_fetch_bytes": plan.to_fetch_bytes,
        "disk": {
            "needed_bytes": plan.disk_bytes,
            "reserve_bytes": front.settings.disk_reserve,
            "free_bytes": plan.free_bytes,
        },
        "refused": _refusal(plan),
    }


def _file_fields(file: FilePreview) -> dict[str, Any]:
    return {
        "path": file.path,
        "size": file.size,
        "present_bytes": file.present_bytes,
        "missing_bytes": file.missing_bytes,
        "sources": list(file.sources),
        "adoptable": [str(path) for path in file.adoptable],
        "assurance": file.assurance,
    }


def _refusal(plan: Preview) -> dict[str, Any] | None:
    if plan.refusal is None:
        return None
    what, detail, hint = plan.refusal.lines()
    code = int(plan.refusal.exit_code)
    return {"kind": plan.refusal.kind, "what": what, "detail": detail, "hint": hint, "exit_code": code}


def _text(front: FrontEnd, plan: Preview) -> str:
    from mistral_fetch.cli.render import table

    if plan.directory is not None:
        return f"{plan.key}: complete in {plan.directory}; nothing to fetch"
    rows = [
        [file.path, format_size(file.size), format_size(file.missing_bytes), _origin(file), file.assurance]
        for file in plan.files
    ]
    lines = [table(["FILE", "SIZE", "MISSING", "FROM", "ASSURANCE"], rows)]
    total = format_size(sum(file.size for file in plan.files))
    adopted = f", {format_size(plan.adoptable_bytes)} to adopt if right" if plan.adoptable_bytes else ""
    lines.append(f"{plan.key}: would fetch {format_size(plan.to_fetch_bytes)} of {total} by {plan.channel}{adopted}")
    reserve = format_size(front.settings.disk_reserve)
    needed, free = format_size(plan.disk_bytes), format_size(plan.free_bytes)
    lines.append(f"disk: {needed} needed and {reserve} kept in reserve, {free} free")
    if plan.refusal is not None:
        what, detail, hint = plan.refusal.lines()
        lines += [f"would be refused (exit {int(plan.refusal.exit_code)}): {what}", f"  {detail}", f"  {hint}"]
    return "\n".join(lines)


def _origin(file: FilePreview) -> str:
    if file.adoptable:
        return f"adopted from {file.adoptable[0]}"
    return ", ".join(file.sources) or "nowhere"
