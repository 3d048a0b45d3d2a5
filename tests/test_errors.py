from __future__ import annotations

import inspect
import re

import pytest

from mistral_fetch import errors
from mistral_fetch.errors import AllSourcesFailed, ExitCode, MirrorStatus, MistralFetchError, kebab_case

EVERY_ERROR = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, MistralFetchError)]


def make(kind: type[MistralFetchError], what: str = "w", detail: str = "d", hint: str = "h") -> MistralFetchError:
    if kind is AllSourcesFailed:
        return AllSourcesFailed(what, [], hint=hint)
    if kind is MirrorStatus:
        return MirrorStatus(what, detail=detail, hint=hint, status=404)
    return kind(what, detail=detail, hint=hint)


def test_the_tree_at_the_top_names_every_error() -> None:
    tree = inspect.getdoc(errors) or ""
    assert {kind.__name__ for kind in EVERY_ERROR} <= set(re.findall(r"\w+", tree))


@pytest.mark.parametrize("kind", EVERY_ERROR, ids=lambda kind: kind.__name__)
def test_every_error_says_what_it_means_and_has_an_exit_code(kind: type[MistralFetchError]) -> None:
    assert (kind.__doc__ or "").strip()
    error = make(kind)
    assert error.exit_code in set(ExitCode)
    assert (error.exit_code is ExitCode.BUG) == (kind is MistralFetchError)
    assert error.kind == kebab_case(kind.__name__)
    assert str(error) == "w"


@pytest.mark.parametrize("kind", EVERY_ERROR, ids=lambda kind: kind.__name__)
def test_three_lines_whatever_is_in_them(kind: type[MistralFetchError]) -> None:
    lines = make(kind, "a\nb", "c\r\n\u2028d", "e\x0bf\x85g").lines()
    assert len(lines) == 3
    assert all(len(line.splitlines()) == 1 for line in lines)


def test_exit_codes_are_the_documented_ones() -> None:
    assert {code.name: code.value for code in ExitCode} == {
        "OK": 0,
        "BUG": 1,
        "USAGE": 2,
        "NOT_FOUND": 3,
        "NOT_AUTHORISED": 4,
        "STALLED": 5,
        "NO_SOURCE": 6,
        "DISK": 9,
        "LOCKED": 11,
        "CONFLICT": 13,
        "BAD_MANIFEST": 20,
        "ROLLED_BACK": 21,
        "INTEGRITY": 32,
        "ASSURANCE": 33,
        "RUNTIME": 40,
        "INTERRUPTED": 130,
    }


@pytest.mark.parametrize(
    "name, expected", [("DigestMismatch", "digest-mismatch"), ("NoPeers", "no-peers"), ("Stalled", "stalled")]
)
def test_kinds_are_kebab_case(name: str, expected: str) -> None:
    assert kebab_case(name) == expected


def test_causes_that_agree_give_their_exit_code_and_others_give_6() -> None:
    gated, wrong = make(errors.GatedRepository), make(errors.DigestMismatch)
    assert AllSourcesFailed("x", [gated, gated], hint="h").exit_code == 4
    assert AllSourcesFailed("x", [gated, wrong], hint="h").exit_code == 6
    assert AllSourcesFailed("x", [make(errors.NoPeers), wrong], hint="h").exit_code == 32, "nobody there is no opinion"
    assert AllSourcesFailed("x", [make(errors.NoPeers)] * 2, hint="h").exit_code == 6
    assert AllSourcesFailed("x", [], hint="h").exit_code == 6
    assert AllSourcesFailed("x", [gated, wrong], hint="h").causes == (gated, wrong)


@pytest.mark.parametrize("status, is_permanent", [(404, True), (403, True), (408, False), (429, False), (503, False)])
def test_only_a_status_that_may_pass_is_worth_another_try(status: int, is_permanent: bool) -> None:
    assert MirrorStatus("x", detail="d", hint="h", status=status).is_permanent is is_permanent
