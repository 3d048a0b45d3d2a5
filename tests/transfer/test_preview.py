"""What a plan counts as present is what a pull would find."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from mistral_fetch.config import Settings
from mistral_fetch.errors import AssuranceTooLow
from mistral_fetch.ref import parse_ref
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.partial_notes import CommittedBlob
from mistral_fetch.store.partials import Partial
from mistral_fetch.transfer.channels import Job
from mistral_fetch.transfer.local import ref_key
from mistral_fetch.transfer.offer import Offer, partial_key
from mistral_fetch.transfer.preview import Preview, _present_bytes, preview
from tests.transfer.conftest import Puller

MODEL = PublisherSimulator({"w.bin": random.Random(71).randbytes(200_000)})
ENTRY = MODEL.manifest().files[0]


@pytest.mark.parametrize("identity, present", [("manifest-1", 0), ("btih-1", 200_000)])
def test_a_note_is_believed_only_where_the_name_is_the_content_s(puller: Puller, identity: str, present: int) -> None:
    layout, entry = Layout(puller.home), replace(ENTRY, digests=())
    offer = Offer("x", identity, MODEL.manifest(has_sha256=False), ())
    assert ENTRY.pieces is not None
    assert ENTRY.sha256 is not None
    partial = Partial(layout.partial(partial_key(offer, entry)), 200_000, ENTRY.pieces)
    partial.set_committed(CommittedBlob(ENTRY.sha256, 200_000, ENTRY.pieces))
    layout.blob(ENTRY.sha256).parent.mkdir(parents=True)
    layout.blob(ENTRY.sha256).write_bytes(MODEL.files["w.bin"])
    assert _present_bytes(layout, offer, entry) == present


def plan(puller: Puller, ref: str, **given: object) -> Preview:
    settings = Settings(home=puller.home, dht=False, disk_reserve=0, connect_timeout=1.0, **given)  # type: ignore[arg-type]
    job = Job(ref_key(parse_ref(ref), settings), Layout(puller.home), settings, puller.events.append, puller.stop)
    return preview(parse_ref(ref), job)


def test_the_next_source_is_looked_at_where_the_first_proves_too_little(puller: Puller, tmp_path) -> None:
    publication = MODEL.publish(tmp_path)
    text = publication.manifest_path.read_text()
    weak = "\n".join(line for line in text.splitlines() if "sha-256" not in line and "<hash" not in line)
    publication.manifest_path.write_text(weak.replace("</pieces>", ""))
    found = plan(puller, str(publication.manifest_path))
    assert found.refusal is None
    assert found.files[0].assurance == "btv2"
    assert found.files[0].sources[0].startswith("torrent ")
    refused = plan(puller, str(publication.manifest_path), via="http")
    assert isinstance(refused.refusal, AssuranceTooLow)


def test_the_plan_is_what_the_pull_then_does(puller: Puller) -> None:
    with MODEL.serve() as mirror:
        url = mirror.url("model.meta4")
        expected = plan(puller, url)
        result = puller(url)
    assert (expected.to_fetch_bytes, expected.channel) == (result.received_bytes, result.channel)
    assert expected.files[0].assurance == result.assurance
