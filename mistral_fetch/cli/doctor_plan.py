"""What ``doctor REF`` says of a model: where it is, or who would be asked for it. Without --network nobody is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_fetch.cli.doctor_report import Finding, fail, good
from mistral_fetch.cli.options import FrontEnd
from mistral_fetch.ref import CatalogRef, DirectoryRef, HubRef, MagnetRef, ManifestRef, Ref, TorrentRef, parse_ref
from mistral_fetch.units import format_size

if TYPE_CHECKING:
    from mistral_fetch.catalog_values import Channel, Release


def model(front: FrontEnd, text: str, *, may_ask: bool) -> Finding:
    """Return where a model is or would come from; with ``may_ask`` its descriptions are fetched, its files never."""
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.transfer.local import find_local, local_key

    layout = Layout(front.settings.home)
    key = local_key(layout, text, front.settings)
    held = find_local(layout, key, front.settings.via)
    if held is not None:
        told = f"complete in {held.directory}, by {held.record.channel}; nothing would be asked"
        return good(told, ref=key, directory=str(held.directory), channel=held.record.channel)
    if may_ask:
        return _asked(front, text)
    ways = _ways(front, parse_ref(text))
    if front.settings.offline:
        return fail(f"{key} is not complete here, and the network is off limits", "run it without --offline", ref=key)
    told = "; then ".join(ways)
    return Finding("ok", f"would ask {told}", f"with its sizes: mistral-fetch doctor {text} --network", {"ways": ways})


def _asked(front: FrontEnd, text: str) -> Finding:
    from mistral_fetch.cli.preview import plan_pull

    plan = plan_pull(front, text, refresh=False)
    hosts = sorted({source for file in plan.files for source in file.sources})
    facts: dict[str, Any] = {
        "ref": plan.key,
        "channel": plan.channel,
        "sources": hosts,
        "to_fetch_bytes": plan.to_fetch_bytes,
        "disk_bytes": plan.disk_bytes,
        "assurance": sorted({file.assurance for file in plan.files}),
    }
    told = f"would fetch {format_size(plan.to_fetch_bytes)} by {plan.channel} from {', '.join(hosts) or 'nowhere'}"
    if plan.refusal is not None:
        return fail(f"{told}; refused: {plan.refusal.what}; {plan.refusal.detail}", plan.refusal.hint, **facts)
    return Finding("ok", told, f"file by file: mistral-fetch pull {text} --dry-run", facts)


def _ways(front: FrontEnd, ref: Ref) -> list[str]:
    if isinstance(ref, CatalogRef):
        from mistral_fetch.transfer.local import settings_catalog

        release = settings_catalog(front.settings).find(ref.name, ref.version)
        return _of_release(front, release)
    if isinstance(ref, HubRef):
        return [f"the hub at {_hub_host()}"]
    if isinstance(ref, ManifestRef) and not ref.is_url:
        return _of_manifest(ref)
    if isinstance(ref, ManifestRef | TorrentRef):
        return [f"what {ref.location} names"]
    if isinstance(ref, MagnetRef):
        return [f"the swarm ({_swarm(front)})"]
    assert isinstance(ref, DirectoryRef)
    return ["nobody: it is a directory"]


def _of_release(front: FrontEnd, release: Release) -> list[str]:
    from mistral_fetch.digest import Assurance

    floor, refused = front.settings.min_assurance, {"http": {"torrent"}, "torrent": {"hub", "archive"}}
    allowed = [
        channel
        for channel in release.channels
        if channel.weights_assurance >= floor and channel.kind not in refused.get(front.settings.via, set())
    ]
    if not allowed:
        return [f"nobody: no channel reaches {Assurance(floor).label} by --via {front.settings.via}"]
    return [_of_channel(front, channel) for channel in allowed]


def _of_channel(front: FrontEnd, channel: Channel) -> str:
    size = channel.size or channel.size_at_least
    amount = "" if size is None else f", {'' if channel.size else 'at least '}{format_size(size)}"
    proof = channel.weights_assurance.label
    where = {"hub": f"the hub at {_hub_host()}", "torrent": f"the official torrent ({_swarm(front)})"}
    return f"{where.get(channel.kind, 'the publisher for its archive')} ({proof}{amount})"


def _of_manifest(ref: ManifestRef) -> list[str]:
    from mistral_fetch.metalink import parse_metalink
    from mistral_fetch.sources.urls import host_of
    from mistral_fetch.transfer.local import read_local_file

    base = Path(ref.location).expanduser().absolute().as_uri()
    manifest = parse_metalink(read_local_file(ref.location), base)
    urls = [mirror.url for entry in manifest.files for mirror in entry.mirrors]
    beside = "the folder beside the manifest"
    hosts = list(dict.fromkeys(beside if url.startswith("file:") else host_of(url) for url in urls))
    torrents = ["its torrents"] if any(entry.torrents for entry in manifest.files) else []
    return [f"{', '.join([*hosts, *torrents]) or 'nobody'} ({format_size(manifest.size)})"]


def _hub_host() -> str:
    from mistral_fetch.sources.hub import hub_endpoint
    from mistral_fetch.sources.urls import host_of

    return host_of(hub_endpoint())


def _swarm(front: FrontEnd) -> str:
    settings = front.settings
    means = [
        f"{len(settings.peers)} named peers" if settings.peers else "",
        "its trackers" if settings.trackers else "",
        "the DHT" if settings.dht else "",
        "the local network" if settings.lsd else "",
    ]
    return "by " + (", ".join(mean for mean in means if mean) or "nothing: no way to find peers is on")
