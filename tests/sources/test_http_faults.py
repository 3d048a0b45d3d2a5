"""Every way a mirror can misbehave, alone and beside an honest one, from the start and when resuming."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from mistral_fetch.errors import (
    AllSourcesFailed,
    GatedRepository,
    MirrorStatus,
    MirrorTimeout,
    MirrorUnreachable,
    MistralFetchError,
    NotAModelFile,
    NotAuthorised,
    PieceMismatch,
    RangeRefused,
    SizeMismatch,
)
from mistral_fetch.events import SourceFailed, SourceLied
from mistral_fetch.simulators.mirror import Fault, MirrorSimulator
from tests.sources.conftest import DATA, NAME, PIECE, Download

HTML = b"<html><body>Please log in</body></html>"


@dataclass(frozen=True)
class Case:
    """A fault that stays, and the error it ends in if there is no other mirror."""

    fault: Fault
    error: type[MistralFetchError]
    exit_code: int
    needs_pieces: bool = False
    """Without piece hashes only the check of the whole file, after the fetch, can notice."""
    only_resumed: bool = False
    """Only visible to a request for a range."""


CASES = {
    "wrong byte": Case(Fault(wrong_bytes_at=(7 * PIECE + 1,)), PieceMismatch, 32, needs_pieces=True),
    "shorter file": Case(Fault(size=9 * PIECE), SizeMismatch, 32),
    "longer file": Case(Fault(size=len(DATA) + 1), SizeMismatch, 32),
    "longer file, length untold": Case(
        Fault(size=len(DATA) + 70_000, no_length=True, ignores_range=True), SizeMismatch, 32
    ),
    "shorter file, length untold": Case(
        Fault(size=9 * PIECE, no_length=True, ignores_range=True), MirrorUnreachable, 6
    ),
    "web page": Case(Fault(body=HTML, ignores_range=True, headers={"Content-Type": "text/html"}), NotAModelFile, 6),
    "web page, length untold": Case(
        Fault(body=HTML, ignores_range=True, headers={"Content-Type": "Text/HTML; charset=utf-8"}, no_length=True),
        NotAModelFile,
        6,
    ),
    "another small file": Case(Fault(body=b'{"error": "no"}', ignores_range=True), SizeMismatch, 32),
    "gzip": Case(Fault(is_gzipped=True), NotAModelFile, 6),
    "gzip, said in capitals": Case(Fault(headers={"Content-Encoding": "GZIP"}), NotAModelFile, 6),
    "401": Case(Fault(status=401), NotAuthorised, 4),
    "403": Case(Fault(status=403), NotAuthorised, 4),
    "gated, no token": Case(Fault(status=401, headers={"X-Error-Code": "GatedRepo"}), NotAuthorised, 4),
    "404": Case(Fault(status=404), MirrorStatus, 6),
    "429 for ever": Case(Fault(status=429, headers={"Retry-After": "0"}), MirrorStatus, 6),
    "429, come back tomorrow": Case(Fault(status=429, headers={"Retry-After": "86400"}), MirrorStatus, 6),
    "503 for ever": Case(Fault(status=503), MirrorStatus, 6),
    "204": Case(Fault(status=204, body=b""), MirrorStatus, 6),
    "resets at once": Case(Fault(reset_at=0), MirrorUnreachable, 6),
    "resets early": Case(Fault(reset_at=1000), MirrorUnreachable, 6),
    "ends early": Case(Fault(end_at=1000), MirrorUnreachable, 6),
    "redirects in circles": Case(Fault(redirect_to=f"/{NAME}"), MirrorUnreachable, 6),
    "redirects to a file": Case(Fault(redirect_to="file:///etc/passwd"), MirrorUnreachable, 6),
    "redirects to nowhere": Case(Fault(redirect_to="http://[broken"), MirrorUnreachable, 6),
    "another range": Case(Fault(shift_range=100), RangeRefused, 6, only_resumed=True),
    "an untrue range": Case(Fault(content_range=f"bytes 0-99/{len(DATA)}"), RangeRefused, 6, only_resumed=True),
    "a range of another file": Case(
        Fault(content_range=f"bytes {3 * PIECE}-{len(DATA) - 1}/{len(DATA) + 5}"), SizeMismatch, 32, only_resumed=True
    ),
    "a senseless range": Case(Fault(content_range="bytes -5-x/*"), RangeRefused, 6, only_resumed=True),
    "416": Case(
        Fault(status=416, headers={"Content-Range": f"bytes */{len(DATA)}"}), RangeRefused, 6, only_resumed=True
    ),
    "416 for a shorter file": Case(
        Fault(status=416, headers={"Content-Range": "bytes */100"}), SizeMismatch, 32, only_resumed=True
    ),
}
MATRIX = [
    pytest.param(case, pins, is_resumed, id=f"{name}-{pins}-{'resumed' if is_resumed else 'fresh'}")
    for name, case in CASES.items()
    for pins in ("pieces", "sha256")
    for is_resumed in (False, True)
    if not (case.needs_pieces and pins != "pieces") and not (case.only_resumed and not is_resumed)
]


@pytest.mark.parametrize("case, pins, is_resumed", MATRIX)
def test_the_only_mirror_misbehaves(
    case: Case, pins: str, is_resumed: bool, download: Download, mirror: MirrorSimulator
) -> None:
    download.pins = pins
    if is_resumed:
        download.begin_with(0, 1, 2)
    mirror.always(NAME, case.fault)
    with pytest.raises(MistralFetchError) as caught:
        download.run(mirror)
    assert isinstance(caught.value, case.error), caught.value.lines()
    assert caught.value.exit_code == case.exit_code
    assert all(caught.value.lines())
    assert mirror.base_url in " ".join(caught.value.lines())
    if is_resumed:
        assert {0, 1, 2}.isdisjoint(download.partial().missing_pieces())
        download.assert_nothing_wrong_recorded()
    # The next run, with the mirror repaired, trips over nothing.
    mirror.always(NAME, Fault())
    download.source = None
    download.run(mirror)
    if pins == "pieces" or is_resumed or case.error is not SizeMismatch:
        download.assert_complete()


@pytest.mark.parametrize("case, pins, is_resumed", MATRIX)
def test_an_honest_mirror_takes_over(
    case: Case, pins: str, is_resumed: bool, download: Download, mirror: MirrorSimulator, honest: MirrorSimulator
) -> None:
    download.pins = pins
    if is_resumed:
        download.begin_with(0, 1, 2)
    mirror.always(NAME, case.fault)
    download.run(mirror, honest)
    if pins == "pieces" or "wrong" not in str(case):
        download.assert_complete()
    complaints = [*download.of_kind(SourceFailed), *download.of_kind(SourceLied)]
    assert {event.source for event in complaints} == {mirror.base_url.removeprefix("http://")}
    assert honest.bytes_sent() <= len(DATA)


PASSING = {
    "reset": Fault(reset_at=4 * PIECE + 99),
    "end": Fault(end_at=4 * PIECE + 99),
    "503": Fault(status=503),
    "429": Fault(status=429, headers={"Retry-After": "0"}),
    "408": Fault(status=408),
    "ended chunkless": Fault(no_length=True, end_at=2 * PIECE),
}


@pytest.mark.parametrize("pins", ["pieces", "sha256", "nothing"])
@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_tried_again_and_goes_on_where_it_stopped(
    name: str, pins: str, download: Download, mirror: MirrorSimulator
) -> None:
    download.pins = pins
    mirror.script(NAME, [PASSING[name]])
    download.run(mirror)
    download.assert_complete()
    # What a reset overtakes on its way was sent but never read; nothing else is sent twice.
    assert mirror.bytes_sent() <= len(DATA) + (4 * PIECE + 99 if name == "reset" else 0)
    assert all(event.will_retry for event in download.of_kind(SourceFailed))


def test_progress_resets_the_count_of_attempts(download: Download, mirror: MirrorSimulator) -> None:
    mirror.script(NAME, [Fault(end_at=PIECE + 10)] * 8)  # more than the policy's attempts
    download.run(mirror)
    download.assert_complete()
    assert len(mirror.requests()) == 9


def test_a_mirror_that_sends_a_byte_and_hangs_up_is_not_asked_for_ever(
    download: Download, mirror: MirrorSimulator
) -> None:
    mirror.always(NAME, Fault(end_at=1))
    with pytest.raises(MirrorUnreachable):
        download.run(mirror)
    assert len(mirror.requests()) == 3


def test_a_liar_is_named_and_never_asked_again(
    download: Download, mirror: MirrorSimulator, honest: MirrorSimulator
) -> None:
    mirror.always(NAME, Fault(wrong_bytes_at=(3 * PIECE,)))
    download.run(mirror, honest)
    download.assert_complete()
    (lie,) = download.of_kind(SourceLied)
    assert isinstance(lie, SourceLied)
    assert lie.source == mirror.base_url.removeprefix("http://")
    assert f"[{3 * PIECE}, {4 * PIECE})" in lie.where
    assert lie.expected != lie.actual
    asked = len(mirror.requests())
    download.partial().reset()
    download.run(mirror, honest)
    assert len(mirror.requests()) == asked
    download.assert_complete()


def test_right_pieces_of_a_liar_are_kept(download: Download, mirror: MirrorSimulator, honest: MirrorSimulator) -> None:
    mirror.always(NAME, Fault(wrong_bytes_at=(8 * PIECE,)))
    download.run(mirror, honest)
    download.assert_complete()
    assert honest.bytes_sent() == len(DATA) - 8 * PIECE


def test_different_failures_are_all_kept_in_order(
    download: Download, mirror: MirrorSimulator, honest: MirrorSimulator
) -> None:
    mirror.always(NAME, Fault(status=404))
    honest.always(NAME, Fault(size=5))
    with pytest.raises(AllSourcesFailed) as caught:
        download.run(mirror, honest)
    assert [type(cause) for cause in caught.value.causes] == [MirrorStatus, SizeMismatch]
    assert caught.value.exit_code == 32, "who could not be reached has no say"


@pytest.mark.parametrize("hang_at", [-1, 0, 4 * PIECE + 99])
@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_silent_mirror_ends_in_a_timeout_or_in_another_mirror(
    hang_at: int, is_resumed: bool, impatient: Download, mirror: MirrorSimulator, honest: MirrorSimulator
) -> None:
    if is_resumed:
        impatient.begin_with(0, 1, 2)
    mirror.always(NAME, Fault(hang_at=hang_at))
    if hang_at <= 0:
        with pytest.raises(MirrorTimeout) as caught:
            impatient.run(mirror)
        assert caught.value.exit_code == 5
    impatient.run(mirror, honest)
    impatient.assert_complete()


def test_after_a_silence_it_goes_on_where_it_stopped(impatient: Download, mirror: MirrorSimulator) -> None:
    mirror.script(NAME, [Fault(hang_at=4 * PIECE + 99)])
    impatient.run(mirror)
    impatient.assert_complete()
    assert mirror.requests()[1].range == f"bytes={4 * PIECE + 99}-{len(DATA) - 1}"


@pytest.mark.parametrize("fault, exit_code", [(Fault(status=401), 4), (Fault(size=5), 32)])
def test_alike_failures_keep_their_exit_code(
    fault: Fault, exit_code: int, download: Download, mirror: MirrorSimulator, honest: MirrorSimulator
) -> None:
    mirror.always(NAME, fault)
    honest.always(NAME, fault)
    with pytest.raises(AllSourcesFailed) as caught:
        download.run(mirror, honest)
    assert caught.value.exit_code == exit_code


def test_without_any_mirror_it_says_so(download: Download) -> None:
    with pytest.raises(AllSourcesFailed, match=NAME):
        download.run_urls()


def test_an_address_that_is_none_fails_alone(download: Download, honest: MirrorSimulator) -> None:
    download.run_urls("http://", "http://bad host/x", honest.url(NAME))
    download.assert_complete()


def test_nobody_listens(download: Download, honest: MirrorSimulator) -> None:
    with MirrorSimulator({}) as gone:
        address = gone.url(NAME)
    download.run_urls(address, honest.url(NAME))
    download.assert_complete()


def test_gated_with_a_token_names_the_page_to_ask_at(download: Download, mirror: MirrorSimulator) -> None:
    url = mirror.url("mistralai/Mistral-7B-v0.1/resolve/main/x").replace("http://", "http://me:secret@")
    mirror.always("mistralai/Mistral-7B-v0.1/resolve/main/x", Fault(status=403, headers={"X-Error-Code": "GatedRepo"}))
    with pytest.raises(GatedRepository) as caught:
        download.run_urls(url)
    assert "https://huggingface.co/mistralai/Mistral-7B-v0.1" in caught.value.hint
    assert "secret" not in " ".join(caught.value.lines())
