"""Telling mirrors apart: fine, without ranges, stale, lying, unreachable."""

from __future__ import annotations

import hashlib

import pytest

from mistral_fetch.errors import ExitCode
from mistral_fetch.publish.check_address import addresses_below, addresses_in_manifest, claims_of
from mistral_fetch.publish.mirror_check import MirrorCheck, Verdict
from mistral_fetch.simulators.mirror import Fault
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.sources.http_client import HttpClient, HttpSettings
from mistral_fetch.sources.retry import RetryPolicy

SIZE = 600_000  # ten pieces of 64 KiB
WEIGHTS = hashlib.shake_128(b"weights").digest(SIZE)
OTHER = hashlib.shake_128(b"other").digest(SIZE)
PUBLISHER = PublisherSimulator({"weights.bin": WEIGHTS, "sub/params.json": b'{"dim": 8}'}, name="m")
MANIFEST = PUBLISHER.manifest()


@pytest.fixture
def http():
    retry = RetryPolicy(attempts=2, first_delay_seconds=0.01)
    with HttpClient(HttpSettings(read_timeout_seconds=5, retry=retry)) as client:
        yield client


@pytest.fixture
def mirror():
    with PUBLISHER.serve() as simulator:
        yield simulator


def check(http, mirror, *, seed=1, pieces=30, url=None, manifest=MANIFEST):
    url = url or mirror.url("m/")
    addresses = addresses_below(manifest, url)
    return MirrorCheck(
        http, seed, pieces, lambda: claims_of(http, manifest, url, addresses, is_own_manifest=False)
    ).run(manifest, addresses)


def finding_of(finding, path="weights.bin"):
    return next(file for file in finding.files if file.path == path)


def test_an_honest_mirror_is_fine(http, mirror):
    found = check(http, mirror)
    assert (found.verdict, found.reason, found.piece_count) == (Verdict.FINE, "", 11)
    weights = finding_of(found)
    assert (weights.size, weights.validator != "") == (SIZE, True)
    assert found.verdict.exit_code == ExitCode.OK


def test_only_what_is_needed_is_fetched_and_the_same_seed_asks_for_the_same(http, mirror):
    spans = [
        [proof.span for file in check(http, mirror, seed=seed, pieces=3).files for proof in file.proofs]
        for seed in (5, 5, 6)
    ]
    assert spans[0] == spans[1] != spans[2]
    assert len(spans[0]) == 3
    assert mirror.bytes_sent("m/weights.bin") <= 9 * 65536


def test_a_mirror_without_ranges(http, mirror):
    mirror.always("m/weights.bin", Fault(ignores_range=True))
    found = check(http, mirror)
    assert (found.verdict, found.verdict.exit_code) == (Verdict.NO_RANGES, ExitCode.NO_SOURCE)
    assert "does not do ranges" in found.reason
    assert finding_of(found).proofs[0].is_right
    assert finding_of(found, "sub/params.json").verdict is Verdict.FINE


def test_a_mirror_without_ranges_may_lie_as_well(http, mirror):
    mirror.always("m/weights.bin", Fault(ignores_range=True, wrong_bytes_at=(0,)))
    assert check(http, mirror).verdict is Verdict.LYING


@pytest.mark.parametrize("fault", [Fault(shift_range=100), Fault(max_range_bytes=100)], ids=["shifted", "cut"])
def test_a_mirror_that_answers_with_other_ranges(http, mirror, fault):
    mirror.always("m/weights.bin", fault)
    assert check(http, mirror).verdict is Verdict.NO_RANGES


def stale_in_bytes(mirror):
    mirror.files["m/weights.bin"] = OTHER
    del mirror.files["m.meta4"]


def stale_in_size(mirror):
    mirror.files["m/weights.bin"] = OTHER[:-1000]


def stale_in_its_papers(mirror):
    """Most of the file is the same in both versions; the pieces asked for happen to be right."""
    sums = f"{hashlib.sha256(OTHER).hexdigest()}  weights.bin\n"
    mirror.files["SHA256SUMS"] = sums.encode()
    del mirror.files["m.meta4"]


def stale_in_its_manifest(mirror):
    from mistral_fetch.metalink import serialise_metalink

    other = PublisherSimulator({**PUBLISHER.files, "weights.bin": OTHER}, name="m")
    mirror.files["m.meta4"] = serialise_metalink(other.manifest())
    mirror.files["m/weights.bin"] = OTHER


@pytest.mark.parametrize("age", [stale_in_bytes, stale_in_size, stale_in_its_papers, stale_in_its_manifest])
def test_a_stale_mirror(http, mirror, age):
    age(mirror)
    found = check(http, mirror)
    assert (found.verdict, found.verdict.exit_code) == (Verdict.STALE, ExitCode.INTEGRITY)


def test_a_stale_file_tells_its_date(http, mirror):
    stale_in_bytes(mirror)
    assert "last modified Wed, 27 Sep 2023" in check(http, mirror).reason


def test_a_mirror_with_some_wrong_pieces_lies(http, mirror):
    mirror.always("m/weights.bin", Fault(wrong_bytes_at=(70_000,)))
    found = check(http, mirror)
    assert (found.verdict, found.verdict.exit_code) == (Verdict.LYING, ExitCode.INTEGRITY)
    assert "1 of 10 pieces are wrong" in found.reason
    assert [str(proof.span) for proof in finding_of(found).proofs if not proof.is_right] == ["[65536, 131072)"]


def test_one_wrong_piece_leads_to_further_questions(http, mirror):
    """With a single piece asked for, wrong everywhere and wrong here could not be told apart."""
    mirror.always("m/weights.bin", Fault(wrong_bytes_at=(70_000,)))
    seeds = [seed for seed in range(200) if any(_first(http, mirror, seed))][:1]
    found = check(http, mirror, seed=seeds[0], pieces=1)
    assert found.verdict is Verdict.LYING
    assert len(finding_of(found).proofs) == 4


def _first(http, mirror, seed):
    import random

    every = [("sub/params.json", 0), *(("weights.bin", index) for index in range(10))]
    addresses = [address.path for address in addresses_below(MANIFEST, mirror.url("m/"))]
    every.sort(key=lambda item: (addresses.index(item[0]), item[1]))
    return [item == ("weights.bin", 1) for item in random.Random(seed).sample(every, 1)]


def test_answers_that_change_are_lies(http, mirror):
    wrong = [Fault(wrong_bytes_at=tuple(range(at, SIZE, 65536))) for at in (0, 1, 2, 3, 4, 5)]
    mirror.script("m/weights.bin", wrong * 10)
    found = check(http, mirror)
    assert found.verdict is Verdict.LYING
    assert "answers change from one request to the next" in found.reason


def test_another_version_under_checksums_that_promise_the_right_one_is_a_lie(http, mirror):
    mirror.files["m/weights.bin"] = OTHER
    found = check(http, mirror)
    assert found.verdict is Verdict.LYING
    assert "its own checksums promise this version" in found.reason


@pytest.mark.parametrize(
    "fault", [Fault(status=404), Fault(status=503), Fault(reset_at=10)], ids=["404", "503", "reset"]
)
def test_a_file_that_cannot_be_had(http, mirror, fault):
    mirror.always("m/weights.bin", fault)
    found = check(http, mirror)
    assert (found.verdict, found.verdict.exit_code) == (Verdict.UNREACHABLE, ExitCode.NO_SOURCE)


def test_a_hiccup_is_forgiven(http, mirror):
    mirror.script("m/weights.bin", [Fault(status=503), None])
    assert check(http, mirror).verdict is Verdict.FINE


def test_nobody_there_is_asked_once(http):
    found = check(http, None, url="http://127.0.0.1:1/m/")
    assert (found.verdict, len(found.files)) == (Verdict.UNREACHABLE, 1)


def test_small_files_without_piece_hashes_are_proved_whole(http, mirror):
    manifest = PUBLISHER.manifest(piece_length=None)
    assert check(http, mirror, manifest=manifest).piece_count == 2
    mirror.always("m/weights.bin", Fault(wrong_bytes_at=(5,)))
    assert check(http, mirror, manifest=manifest).verdict is not Verdict.FINE


def test_a_single_file_is_named_by_its_own_address(http, mirror):
    found = check(http, mirror, url=mirror.url("m/sub/params.json"))
    assert [file.path for file in found.files] == ["sub/params.json"]
    assert found.verdict is Verdict.FINE


def test_a_manifest_names_the_files_of_its_own_server():
    url = "http://here.example/x/m.meta4"
    mirrors = ["http://other.example/m", "http://here.example/y"]
    addresses = addresses_in_manifest(PUBLISHER.manifest(mirrors), url)
    assert {address.url for address in addresses} == {
        "http://here.example/y/weights.bin",
        "http://here.example/y/sub/params.json",
    }
