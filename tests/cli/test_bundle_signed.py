"""Bundles of models that a signed catalog vouched for: believed again on the other side, by the same rules."""

from __future__ import annotations

import hashlib
from datetime import datetime, timezone

import pytest

from mistral_fetch.bundle import trust
from mistral_fetch.simulators.hub import HubRepository, HubSimulator
from tests.cli import test_signed_catalog as catalogs
from tests.keys import make_keys

pytest.importorskip("model_signing")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return make_keys(tmp_path_factory.mktemp("keys"), "ours")


@pytest.fixture
def carried(program, environment, keys):
    """Make ``model.tar`` of a model that was pulled by version 3 of a signed catalog; the network is gone then."""
    path = catalogs.lay(catalogs.catalog(3), keys)
    environment.setenv("MISTRAL_FETCH_CATALOG", str(path.resolve()))
    environment.setenv("MISTRAL_FETCH_TRUST_KEYS", str(keys.public))
    with HubSimulator({"org/model": HubRepository(catalogs.FILES)}) as hub:
        environment.setenv("HF_ENDPOINT", hub.base_url)
        pulled = program("pull", "model", "--json", "--quiet")
        assert (pulled.code, pulled.json["assurance"]) == (0, "signed"), pulled.err
    made = program("bundle", "create", "model", "-o", "model.tar", "--quiet")
    assert made.code == 0, made.err


def take(program, home):
    return program("bundle", "import", "model.tar", "--home", home, "--json", "--quiet")


def test_a_signed_catalog_s_word_goes_along(program, environment, carried, keys):
    shown = program("bundle", "verify", "model.tar", "--json", "--quiet")
    assert shown.json["models"][0]["signed_by"] == f"sha256:{keys.key.fingerprint}"
    taken = take(program, "other")
    assert (taken.code, taken.json["models"][0]["assurance"]) == (0, "signed"), taken.out
    # A pull on the other side is content with it, and asks nobody.
    again = program("pull", "model", "--home", "other", "--offline", "--json", "--quiet")
    assert (again.code, again.json["was_complete"]) == (0, True), again.out
    assert program("verify", "model", "--home", "other", "--quiet").code == 0


def test_the_other_side_needs_no_catalog_of_its_own(program, environment, carried):
    environment.delenv("MISTRAL_FETCH_CATALOG")
    assert take(program, "other").json["models"][0]["assurance"] == "signed"


def test_a_catalog_that_was_rolled_back_is_refused(program, environment, carried, keys):
    catalogs.lay(catalogs.catalog(5), keys)
    assert program("list", "--catalog", "--home", "other", "--quiet").code == 0
    refused = take(program, "other")
    assert (refused.code, refused.json["error"]["kind"]) == (21, "rolled-back")
    assert program("list", "--home", "other", "--json", "--quiet").json["models"] == []


def test_pins_of_the_catalog_in_force_are_compared(program, environment, carried, keys):
    other = {**catalogs.FILES, "config.json": b'{"model_type": "other"} '}
    fields = catalogs.catalog(5).replace(
        hashlib.sha256(catalogs.FILES["config.json"]).hexdigest().encode(),
        hashlib.sha256(other["config.json"]).hexdigest().encode(),
    )
    catalogs.lay(fields, keys)
    refused = take(program, "other")
    assert (refused.code, refused.json["error"]["kind"]) == (20, "bad-signature")


def test_a_catalog_whose_last_day_is_over_is_refused(program, environment, keys):
    path = catalogs.lay(catalogs.catalog(3, "2999-01-01T00:00:00Z"), keys)
    environment.setenv("MISTRAL_FETCH_CATALOG", str(path.resolve()))
    environment.setenv("MISTRAL_FETCH_TRUST_KEYS", str(keys.public))
    with HubSimulator({"org/model": HubRepository(catalogs.FILES)}) as hub:
        environment.setenv("HF_ENDPOINT", hub.base_url)
        assert program("pull", "model", "--quiet").code == 0
    assert program("bundle", "create", "model", "-o", "model.tar", "--quiet").code == 0
    environment.delenv("MISTRAL_FETCH_CATALOG")
    environment.setattr(trust, "now_utc", lambda: datetime(2999, 1, 2, tzinfo=timezone.utc))
    assert take(program, "other").code == 21
