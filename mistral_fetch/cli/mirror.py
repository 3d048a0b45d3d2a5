"""``mirror``: serve models over HTTP on a local network, as a service in the foreground."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistral_fetch.cli.models import all_models, find_model, prepare, refuse_offline
from mistral_fetch.cli.options import FrontEnd, command, stop_on_signals, write_out
from mistral_fetch.cli.services import StatusListen, preparing, serving
from mistral_fetch.cli.terminal import json_line
from mistral_fetch.errors import NotInCache
from mistral_fetch.units import format_size

if TYPE_CHECKING:
    from mistral_fetch.publish.model import ModelFiles
    from mistral_fetch.publish.site import ServedModel

DEFAULT_LISTEN = "127.0.0.1:8080"
LOOK_SECONDS = 0.2
_EXIT_CODES = (
    "Exit codes: 0 stopped (SIGTERM, Ctrl-C) or duration reached, 2 usage, 3 not found, 6 offline, 9 disk, "
    "11 port in use, 40 the extra 'serve' is missing."
)


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    command(app, "mirror", epilog=_EXIT_CODES)(mirror)


def mirror(
    front: FrontEnd,
    ref: Annotated[
        str | None,
        typer.Argument(metavar="REF|DIR", help="What to serve (default: every complete model of the cache)."),
    ] = None,
    listen: Annotated[
        str,
        typer.Option("--listen", metavar="[HOST:]PORT[-PORT]", help=f"Where to listen (default: {DEFAULT_LISTEN})."),
    ] = DEFAULT_LISTEN,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="OUT", help="Where manifest and torrents are kept (default: in the cache)."),
    ] = None,
    duration: Annotated[
        float | None, typer.Option("--duration", metavar="SECONDS", help="Stop after this time.", min=0)
    ] = None,
    access_log: Annotated[bool, typer.Option("--access-log", help="A line for each request.")] = False,
    status_listen: StatusListen = None,
) -> int:
    """Serve models over HTTP, read-only and with ranges, laid out as publish lays them out."""
    from mistral_fetch.publish.listen import check_free, parse_listen, told_ports
    from mistral_fetch.publish.metrics import Metrics
    from mistral_fetch.publish.mirror import MirrorServer
    from mistral_fetch.publish.notify import Supervisor
    from mistral_fetch.publish.site import build_site
    from mistral_fetch.publish.watch import FileWatch
    from mistral_fetch.sources.base import StopSignal

    refuse_offline(front, "mirror")
    address, stop, metrics, supervisor = parse_listen(listen), StopSignal(), Metrics("mirror"), Supervisor()
    with ExitStack() as stack:
        stack.callback(stop_on_signals(stop.set))
        check_free(address)
        status_url = stack.enter_context(serving(status_listen, metrics))
        served = _served(front, ref, out, supervisor, stop, stack)
        site = build_site(served, has_index=ref is None)
        server = stack.enter_context(MirrorServer(address, site, metrics, logs_access=access_log))
        for line in told_ports(address, server.port):
            front.note(line)
        size = sum(model.read.manifest.size for model in served)
        names = ", ".join(model.name for model in served)
        metrics.offer(names, size, size)
        watch = FileWatch({path: resource.location for path, resource in site.items() if resource.location})
        began = time.monotonic()
        while not (reason := _reason_to_end(stop, duration, began)):
            if server.is_running and not metrics.is_ready:
                metrics.set_ready(True)
                supervisor.ready(f"serving {names} at {server.url}")
                _print_ready(front, served, server.url, ref is None, status_url)
            if changed := watch.changed():
                front.note(f"{', '.join(changed[:3])} changed on the disk and cannot be had until a restart")
            supervisor.sign_of_life()
            stop.wait(LOOK_SECONDS)
        supervisor.stopping()
        metrics.set_ready(False)
    _print_end(front, metrics, time.monotonic() - began, reason)
    return 0


def _served(
    front: FrontEnd, ref: str | None, out: Path | None, supervisor: Any, stop: Any, stack: ExitStack
) -> list[ServedModel]:
    """Return what to serve, its manifests and torrents made where missing; it is in use until ``stack`` ends."""
    from mistral_fetch.publish.site import ServedModel
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.use import in_use

    models = [find_model(front, ref)] if ref is not None else all_models(front)
    if not models:
        raise NotInCache(
            f"there is nothing to serve in the cache at {front.settings.home}",
            detail="expected a complete model, got none",
            hint="pull one first, or name a directory: mistral-fetch mirror DIR",
        )
    served = []
    with front.reporter() as report:
        for name, model in _named_apart(models).items():
            stack.enter_context(in_use(Layout(front.settings.home), model.directory, f"mirror {name}"))
            made = prepare(front, model, out, preparing(report, stop, supervisor, model.name))
            served.append(ServedModel(name, made.out, made.read, made.files, model.name))
    return served


def _named_apart(models: list[ModelFiles]) -> dict[str, ModelFiles]:
    """Give models of one name an address each: two channels bring different files under one name."""
    named: dict[str, ModelFiles] = {}
    for model in models:
        name = model.name if model.name not in named else f"{model.name}-{model.content_digest[:8]}"
        named[name] = model
    return named


def _reason_to_end(stop: Any, duration: float | None, began: float) -> str:
    if stop.is_set():
        return "stopped"
    return "duration" if duration is not None and time.monotonic() - began >= duration else ""


def _print_ready(front: FrontEnd, served: list[ServedModel], url: str, has_index: bool, status_url: str) -> None:
    manifests = [f"{url}/{model.name}.meta4" for model in served]
    size = sum(model.read.manifest.size for model in served)
    if front.is_json:
        fields = {
            "event": "ready",
            "url": url,
            "models": [
                {"name": model.name, "manifest": manifest, "size": model.read.manifest.size}
                for model, manifest in zip(served, manifests, strict=True)
            ],
            "size": size,
            "index": f"{url}/" if has_index else None,
            "status_url": status_url or None,
        }
        write_out(json_line(fields))
        return
    what = served[0].name if len(served) == 1 else f"{len(served)} models"
    write_out(f"ready: serving {what} ({format_size(size)}) at {manifests[0] if len(served) == 1 else url + '/'}")
    if status_url:
        front.note(f"  status: {status_url}/status, {status_url}/metrics")


def _print_end(front: FrontEnd, metrics: Any, seconds: float, reason: str) -> None:
    sent = metrics.snapshot()["uploaded_bytes"].get("http", 0)
    if front.is_json:
        fields = {"event": "end", "uploaded_bytes": sent, "seconds": round(seconds, 3), "reason": reason}
        write_out(json_line(fields))
    else:
        front.note(f"{reason}: {format_size(sent)} sent in {seconds:.0f} s")
