"""Locking what a swarm or a signed manifest offers, and pulling exactly that."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mistral_fetch.config import Settings
from mistral_fetch.digest import Assurance
from mistral_fetch.errors import IntegrityError, OfflineRefused, UnsignedManifest, UsageError
from mistral_fetch.lock_file import LockedModel, LockFile, parse_lock, serialise_lock
from mistral_fetch.metalink import serialise_metalink
from mistral_fetch.provision import WantedModel
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.snapshots import list_refs
from mistral_fetch.transfer.channels import PullResult
from mistral_fetch.transfer.frozen import pull_locked
from mistral_fetch.transfer.locking import lock_model
from tests.keys import make_keys
from tests.transfer.conftest import Puller, Seed

FILES = {"weights.bin": random.Random(3).randbytes(200_000), "params.json": b"{}"}
PUBLISHER = PublisherSimulator(FILES, name="model")


def settings_of(puller: Puller, **changes: Any) -> Settings:
    patience = {"connect_timeout": 2.0, "read_timeout": 1.0, "peer_timeout": 1.0, "stall_timeout": 5.0}
    return Settings(home=puller.home, disk_reserve=0, hf_cache=False, **(patience | changes))


def lock(puller: Puller, ref: str, **changes: Any) -> LockedModel:
    """Lock one reference, by way of the text of a lock file."""
    model = lock_model(WantedModel(ref), Path("/"), settings_of(puller, **changes), puller.report, puller.stop)
    (read,) = parse_lock(serialise_lock(LockFile((model,))), "x").models
    assert read == model
    return read


def sync(puller: Puller, model: LockedModel, **changes: Any) -> PullResult:
    return pull_locked(model, Path("/"), settings_of(puller, **changes), puller.report, StopSignal())


@pytest.mark.swarm
@pytest.mark.parametrize("kind", ["v1", "hybrid"])
def test_a_torrent_is_locked_by_its_info_hash(kind: str, puller: Puller, tmp_path: Path, seed: Seed) -> None:
    made = PUBLISHER.publish(tmp_path)
    torrent = made.plain_torrent_path if kind == "v1" else made.torrent_path
    model = lock(puller, str(torrent))
    assert model.identity.startswith("btih-" if kind == "v1" else "btmh-")
    assert model.assurance is (Assurance.BTV1 if kind == "v1" else Assurance.BTV2)
    peer = seed(torrent, tmp_path / "model")
    result = sync(puller, model, peers=(peer,))
    puller.assert_exact(result, PUBLISHER)
    again = sync(puller, model, offline=True)
    assert (again.was_complete, again.directory) == (True, result.directory)


def test_a_torrent_of_other_files_of_the_same_sizes_is_refused(puller: Puller, tmp_path: Path) -> None:
    made = PUBLISHER.publish(tmp_path / "then")
    model = lock(puller, str(made.plain_torrent_path))
    others = {path: bytes(reversed(data)) for path, data in FILES.items()}
    now = PublisherSimulator(others, name="model").publish(tmp_path / "now")
    made.plain_torrent_path.write_bytes(now.plain_torrent_path.read_bytes())
    with pytest.raises(IntegrityError, match="otherwise than when it was locked"):
        sync(puller, model)
    puller.assert_nothing_published()


def test_a_mirror_that_serves_other_bytes_is_an_integrity_error(puller: Puller, tmp_path: Path) -> None:
    """The manifest has no sha256 any more, but the lock has."""
    with PUBLISHER.serve() as mirror:
        model = lock(puller, mirror.url("model.meta4"))
    liar = PublisherSimulator({path: bytes(reversed(data)) for path, data in FILES.items()}, name="model")
    with liar.serve(liar.manifest(piece_length=None, has_sha256=False)) as mirror:
        moved = replace(model, ref=mirror.url("model.meta4"))
        with pytest.raises(IntegrityError):
            sync(puller, moved, min_assurance=Assurance.SIZE)
    puller.assert_nothing_published()


def test_nothing_is_asked_once_it_is_complete(puller: Puller) -> None:
    with PUBLISHER.serve() as mirror:
        model = lock(puller, mirror.url("model.meta4"))
        sync(puller, model)
        asked = len(mirror.requests())
        assert sync(puller, model).was_complete
        assert len(mirror.requests()) == asked
    assert len(list_refs(Layout(puller.home))) == 1


def test_offline_is_refused_before_anything_is_made(puller: Puller) -> None:
    with PUBLISHER.serve() as mirror:
        model = lock(puller, mirror.url("model.meta4"))
    with pytest.raises(OfflineRefused):
        sync(puller, model, offline=True)
    with pytest.raises(OfflineRefused):
        lock(puller, model.ref, offline=True)
    assert not puller.home.exists()


def test_a_channel_that_there_is_not_is_named(puller: Puller, tmp_path: Path) -> None:
    path = tmp_path / "model.meta4"
    path.write_bytes(serialise_metalink(PUBLISHER.manifest()))
    wanted = WantedModel(str(path), channel="torrent")
    with pytest.raises(UsageError, match="not offered by the channel torrent"):
        lock_model(wanted, Path("/"), settings_of(puller), puller.report, puller.stop)


def test_with_a_pinned_key_only_what_is_signed_is_locked_and_synced(puller: Puller, tmp_path: Path) -> None:
    pair = make_keys(tmp_path, "publisher")
    made = PUBLISHER.publish(tmp_path)
    keys = (str(pair.public),)
    with pytest.raises(UnsignedManifest):
        lock(puller, str(made.manifest_path), trust_keys=keys)
    unsigned = lock(puller, str(made.manifest_path))
    made = PUBLISHER.publish(tmp_path / "signed", key=pair.private)
    model = lock(puller, str(made.manifest_path), trust_keys=keys)
    assert model.assurance is Assurance.SIGNED
    assert sync(puller, model, trust_keys=keys).assurance == "signed"
    made.manifest_path.with_name("model.meta4.sig").unlink()
    assert sync(puller, model, trust_keys=keys).was_complete
    with pytest.raises(UnsignedManifest):
        sync(Puller(tmp_path / "another"), unsigned, trust_keys=keys)
