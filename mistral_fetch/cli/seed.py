"""``seed``: give a model away to torrent peers, as a service in the foreground."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistral_fetch.cli.models import find_model, prepare, refuse_offline
from mistral_fetch.cli.options import FrontEnd, command, stop_on_signals, write_out
from mistral_fetch.cli.services import StatusListen, preparing, serving
from mistral_fetch.cli.terminal import json_line
from mistral_fetch.errors import ConfigError, TorrentMismatch, UsageError
from mistral_fetch.units import format_size, parse_size

if TYPE_CHECKING:
    from mistral_fetch.bittorrent.metainfo import Metainfo
    from mistral_fetch.publish.model import ModelFiles
    from mistral_fetch.publish.seed import SeedEnded, SeedOptions, SeedReady

DEFAULT_LISTEN = "6881-6889"
_EXIT_CODES = (
    "Exit codes: 0 stopped (SIGTERM, Ctrl-C), ratio or duration reached, 2 usage, 3 not found, 6 offline, 9 disk, "
    "11 port in use, 32 wrong pieces."
)


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    command(app, "seed", epilog=_EXIT_CODES)(seed)


def seed(
    front: FrontEnd,
    ref: Annotated[str, typer.Argument(metavar="REF|DIR", help="A complete model of the cache, or a directory.")],
    torrent: Annotated[
        list[Path] | None,
        typer.Option("--torrent", metavar="FILE", help="The .torrent to seed; NAME.v1.torrent beside it goes along."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="OUT", help="Where the torrents are kept (default: in the cache)."),
    ] = None,
    listen: Annotated[
        str,
        typer.Option(
            "--listen", metavar="[HOST:]PORT[-PORT]", help=f"Where peers connect (default: {DEFAULT_LISTEN})."
        ),
    ] = DEFAULT_LISTEN,
    tracker: Annotated[
        list[str] | None, typer.Option("--tracker", metavar="URL", help="A tracker to tell; may be repeated.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option("--ratio", metavar="R", help="Stop after R copies were uploaded.", min=0)
    ] = None,
    duration: Annotated[
        float | None, typer.Option("--duration", metavar="SECONDS", help="Stop after this time.", min=0)
    ] = None,
    limit: Annotated[
        str | None, typer.Option("--limit", metavar="RATE", help="The most to send, such as 10MB/s.")
    ] = None,
    slots: Annotated[
        int | None, typer.Option("--slots", metavar="N", help="Peers served at a time (default: all).", min=1)
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse to seed when any piece is wrong.")] = False,
    dht: Annotated[bool, typer.Option("--dht", help="Announce in the public DHT.")] = False,
    lsd: Annotated[bool, typer.Option("--lsd", help="Announce on the local network.")] = False,
    status_listen: StatusListen = None,
) -> int:
    """Check every piece of a model, then give it away to torrent peers until told to stop."""
    from mistral_fetch.publish.listen import check_free
    from mistral_fetch.publish.metrics import Metrics
    from mistral_fetch.publish.notify import Supervisor
    from mistral_fetch.publish.seed import Seeding, magnet_of
    from mistral_fetch.sources.base import StopSignal
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.use import in_use

    refuse_offline(front, "seed")
    options = _options(listen, limit, slots, ratio, duration, strict, dht, lsd, front.settings.encryption)
    trackers = _trackers(tracker or [])
    model, stop = find_model(front, ref), StopSignal()
    metrics, supervisor = Metrics("seed", model=model.name), Supervisor()
    with ExitStack() as stack:
        stack.callback(stop_on_signals(stop.set))
        stack.enter_context(in_use(Layout(front.settings.home), model.directory, f"seed {ref}"))
        check_free(options.listen)
        status_url = stack.enter_context(serving(status_listen, metrics))
        report = stack.enter_context(front.reporter())
        torrents, places, kept = _torrents(front, model, torrent or [], out, trackers, report, supervisor, stop)

        def on_ready(ready: SeedReady) -> None:
            if kept is not None:
                _keep_magnets(kept, model.name, [magnet_of(one) for one in torrents])
            _print_ready(front, ready, torrents, kept, status_url)

        seeding = Seeding(model.name, torrents, places, options, metrics, supervisor, report, stop.is_set)
        ended = seeding.run(on_ready)
    _print_end(front, ended)
    return 0


def _options(
    listen: str,
    limit: str | None,
    slots: int | None,
    ratio: float | None,
    duration: float | None,
    strict: bool,
    dht: bool,
    lsd: bool,
    encryption: str,
) -> SeedOptions:
    from mistral_fetch.bittorrent.station import SeedLimits
    from mistral_fetch.publish.listen import parse_listen
    from mistral_fetch.publish.seed import SeedOptions

    try:
        rate = parse_size(limit) if limit else None
    except ValueError as error:
        raise ConfigError("--limit cannot be used", detail=str(error), hint="for example --limit 10MB/s") from error
    return SeedOptions(
        parse_listen(listen), SeedLimits(rate or None, slots), ratio, duration, strict, dht, lsd, encryption
    )


def _trackers(urls: list[str]) -> tuple[str, ...]:
    for url in urls:
        if not url.startswith(("udp://", "http://", "https://")) or not url.isprintable():
            raise UsageError(
                f"--tracker cannot be {url[:80]!r}",
                detail="expected an announce address that begins with udp://, http:// or https://",
                hint="mistral-fetch seed --help explains the options",
            )
    return tuple(dict.fromkeys(urls))


def _torrents(
    front: FrontEnd,
    model: ModelFiles,
    named: list[Path],
    out: Path | None,
    trackers: tuple[str, ...],
    report: Any,
    supervisor: Any,
    stop: Any,
) -> tuple[list[Metainfo], dict[str, Path], Path | None]:
    """Return the torrents to seed, where their files lie, and where the torrents are kept if we made them."""
    from mistral_fetch.publish.build import plan_publication

    if named:
        torrents = [torrent for path in _with_twins(named) for torrent in [_load(path)]]
        files = model.files or tuple(plan_publication(model.directory))
        kept = None
    else:
        made = prepare(front, model, out, preparing(report, stop, supervisor, model.name), trackers)
        torrents, files, kept = [made.read.hybrid, made.read.plain], made.files, made.out
    places = {file.path: file.location for file in files}
    for torrent in torrents:
        _check_is_of(torrent, places, model)
    places |= {f.path: model.directory / f.path for t in torrents for f in t.files if f.path not in places}
    return [replace(t, trackers=tuple(dict.fromkeys((*trackers, *t.trackers)))) for t in torrents], places, kept


def _with_twins(named: list[Path]) -> list[Path]:
    """Add the hybrid of a plain torrent and the other way round, where it lies beside it."""
    found: dict[Path, None] = {}
    for path in named:
        base = path.name.removesuffix(".torrent").removesuffix(".v1")
        twins = [path.with_name(f"{base}.torrent"), path.with_name(f"{base}.v1.torrent")]
        found.update(dict.fromkeys([twin for twin in twins if twin.is_file()] or [path]))
    return list(found)


def _load(path: Path) -> Metainfo:
    from mistral_fetch.bittorrent.metainfo import parse_metainfo
    from mistral_fetch.transfer.local import read_local_file

    return parse_metainfo(read_local_file(str(path)))


def _check_is_of(torrent: Metainfo, places: dict[str, Path], model: ModelFiles) -> None:
    if not any(file.path in places for file in torrent.files):
        raise TorrentMismatch(
            f"the torrent {torrent.name} describes none of the files of {model.name}",
            detail=f"expected files such as {next(iter(places))}, got {torrent.files[0].path}",
            hint="name the torrent that was published from these files, or leave --torrent out",
        )


def _keep_magnets(kept: Path, name: str, magnets: list[str]) -> None:
    from mistral_fetch.store.durable import disk_errors, write_durably

    path = kept / f"{name}.magnet"
    data = "".join(f"{magnet}\n" for magnet in magnets).encode()
    with disk_errors("writing the magnet links", path):
        if not path.is_file() or path.read_bytes() != data:
            write_durably(path, data)


def _print_ready(
    front: FrontEnd, ready: SeedReady, torrents: list[Metainfo], kept: Path | None, status_url: str
) -> None:
    if not front.is_json:
        size = format_size(ready.size)
        write_out(f"ready: seeding {ready.name} ({size}) on {ready.address}, {ready.magnet}")
        for torrent in torrents:
            hashes = [f"v1 {torrent.info_hash_v1}"] if torrent.info_hash_v1 else []
            hashes += [f"v2 {torrent.info_hash_v2}"] if torrent.info_hash_v2 else []
            front.note(f"  {_label(torrent)}: {', '.join(hashes)}")
        if kept is not None:
            front.note(f"  torrents and magnet links: {kept}")
        if status_url:
            front.note(f"  status: {status_url}/status, {status_url}/metrics")
        return
    fields = {
        "event": "ready",
        "name": ready.name,
        "address": ready.host or "*",
        "port": ready.port,
        "size": ready.size,
        "offered_bytes": ready.offered_bytes,
        "magnet": ready.magnet,
        "plain_magnet": ready.plain_magnet,
        "info_hashes": [hash_ for t in torrents for hash_ in (t.info_hash_v1, t.info_hash_v2) if hash_],
        "torrents": [
            {"kind": _label(t), "info_hash_v1": t.info_hash_v1, "info_hash_v2": t.info_hash_v2} for t in torrents
        ],
        "kept_in": str(kept) if kept is not None else None,
        "status_url": status_url or None,
    }
    write_out(json_line(fields))


def _print_end(front: FrontEnd, ended: SeedEnded) -> None:
    fields = {
        "event": "end",
        "uploaded_bytes": ended.uploaded_bytes,
        "seconds": ended.seconds,
        "reason": ended.reason,
    }
    if front.is_json:
        write_out(json_line(fields))
    else:
        front.note(f"{ended.reason}: {format_size(ended.uploaded_bytes)} uploaded in {ended.seconds:.0f} s")


def _label(torrent: Metainfo) -> str:
    if torrent.info_hash_v1 and torrent.info_hash_v2:
        return "hybrid"
    return "v2" if torrent.info_hash_v2 else "v1"
