"""Pulls with pinned keys: what a pinned key signed comes, and is known as signed; nothing else is fetched."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mistral_fetch.metalink import serialise_metalink
from mistral_fetch.simulators.mirror import Fault
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.store.derived import Product, Recipe, write_derived
from mistral_fetch.store.layout import Layout
from tests.cli.conftest import FILES
from tests.keys import bundle_over, make_keys

pytest.importorskip("model_signing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def ours(folder):
    return make_keys(folder, "ours")


@pytest.fixture(scope="module")
def second(folder):
    return make_keys(folder, "second", curve="SECP384R1")


@pytest.fixture
def publisher():
    return PublisherSimulator(FILES, name="tiny")


@pytest.fixture
def mirror(publisher, ours):
    with publisher.serve(key=ours.private) as serving:
        yield serving


def assert_refused(shown, code, kind, mirror=None):
    """Check the three lines, and that no model file was asked for."""
    assert (shown.code, shown.out) == (code, ""), shown.err
    assert len(shown.err.splitlines()) == 3, shown.err
    assert kind in shown.err
    if mirror is not None:
        assert [request.path for request in mirror.requests() if request.path.startswith("tiny/")] == []


def test_what_the_pinned_key_signed_is_known_as_signed(program, mirror, ours):
    shown = program("pull", mirror.url("tiny.meta4"), "--trust-key", ours.public, "--json", "--quiet")
    assert (shown.code, shown.err) == (0, "")
    assert shown.json["assurance"] == "signed"
    papers = json.loads((Path(shown.json["directory"]) / "PROVENANCE.json").read_text())
    assert papers["signature"]["key"] == f"sha256:{ours.key.fingerprint}"
    assert {file["assurance"] for file in papers["files"]} == {"signed"}
    again = program("pull", mirror.url("tiny.meta4"), "--trust-key", ours.public, "--json")
    assert again.json["was_complete"]
    assert program("list", "--json").json["models"][0]["assurance"] == "signed"
    assert f"signed by: sha256:{ours.key.fingerprint}" in program("show", mirror.url("tiny.meta4")).out


def test_the_highest_floor_is_reached_by_a_signature_only(program, mirror, ours):
    floor = ("pull", mirror.url("tiny.meta4"), "--min-assurance", "signed", "--quiet")
    refused = program(*floor)
    assert_refused(refused, 33, "expected at least signed, got sha256", mirror)
    assert "--trust-key FILE" in refused.err
    assert program(*floor, "--trust-key", ours.public).code == 0


def test_without_a_key_a_signature_is_not_even_asked_for(program, mirror):
    shown = program("pull", mirror.url("tiny.meta4"), "--json", "--quiet")
    assert (shown.code, shown.json["assurance"]) == (0, "sha256")
    assert mirror.requests("tiny.meta4.sig") == []


def test_an_unsigned_manifest_is_refused(program, mirror, ours):
    del mirror.files["tiny.meta4.sig"]
    shown = program("pull", mirror.url("tiny.meta4"), "--trust-key", ours.public, "--quiet")
    assert_refused(shown, 20, "tiny.meta4 is not signed", mirror)


def test_a_stranger_s_signature_is_refused(program, mirror, second):
    shown = program("pull", mirror.url("tiny.meta4"), "--trust-key", second.public, "--quiet")
    assert_refused(shown, 20, "got one by another key", mirror)


def test_either_of_two_pinned_keys_will_do(program, mirror, ours, second):
    keys = ("--trust-key", second.public, "--trust-key", ours.public)
    assert program("pull", mirror.url("tiny.meta4"), *keys, "--quiet").code == 0


def test_a_changed_manifest_is_refused_before_it_is_read(program, mirror, ours):
    mirror.files["tiny.meta4"] = b"<" + mirror.files["tiny.meta4"]  # which is no XML any more
    shown = program("pull", mirror.url("tiny.meta4"), "--trust-key", ours.public, "--quiet")
    assert_refused(shown, 20, "is not what a pinned key signed", mirror)


def test_the_signature_of_another_manifest_is_refused(program, mirror, publisher, ours):
    other = replace(publisher.info, version="2")
    manifest = serialise_metalink(replace(publisher.manifest(), info=other))
    mirror.files["tiny.meta4.sig"] = publisher.sign(manifest, ours.private)
    shown = program("pull", mirror.url("tiny.meta4"), "--trust-key", ours.public, "--quiet")
    assert_refused(shown, 20, "as it was signed", mirror)


def test_the_name_is_not_signed_but_the_content_is(program, mirror, ours):
    """A mirror may call the file as it likes; what the model is called stands in it."""
    for ending in ("", ".sig"):
        mirror.files[f"renamed.meta4{ending}"] = mirror.files[f"tiny.meta4{ending}"]
    shown = program("pull", mirror.url("renamed.meta4"), "--trust-key", ours.public, "--json", "--quiet")
    assert shown.code == 0
    assert json.loads((Path(shown.json["directory"]) / "PROVENANCE.json").read_text())["name"] == "tiny"


@pytest.mark.parametrize(
    "lie, says",
    [
        (Fault(body=b"x" * 70_000), "too large to be one"),
        (Fault(body=b'{"a":' * 9_000), "the signature"),
        (Fault(body=b"<html>please log in</html>"), "the signature"),
        (Fault(body=json.dumps({"mediaType": "text/plain"}).encode()), "the signature"),
    ],
    ids=["huge", "deep", "a web page", "another media type"],
)
def test_hostile_signatures_are_explained(program, mirror, ours, lie, says):
    mirror.always("tiny.meta4.sig", lie)
    shown = program("pull", mirror.url("tiny.meta4"), "--trust-key", ours.public, "--quiet")
    assert_refused(shown, 20, says, mirror)


def test_a_bundle_that_only_looks_right_is_refused(program, mirror, ours):
    mirror.files["tiny.meta4.sig"] = json.dumps(bundle_over(mirror.files["tiny.meta4"], ours.key)).encode()
    shown = program("pull", mirror.url("tiny.meta4"), "--trust-key", ours.public, "--quiet")
    assert_refused(shown, 20, "got one that this key did not make", mirror)


def test_a_server_that_does_not_say_is_not_an_unsigned_manifest(program, mirror, ours):
    mirror.always("tiny.meta4.sig", Fault(status=403))
    shown = program("pull", mirror.url("tiny.meta4"), "--trust-key", ours.public, "--quiet")
    assert shown.code == 4


@pytest.mark.parametrize("ref", ["hf:org/repo", "model.torrent", f"magnet:?xt=urn:btih:{'a' * 40}"])
def test_what_cannot_be_signed_is_refused(program, ours, ref):
    Path("model.torrent").write_bytes(b"never read")
    for more in ([], ["--dry-run"]):
        assert_refused(program("pull", ref, "--trust-key", ours.public, "--quiet", *more), 20, "cannot be signed")


def test_a_local_manifest_has_its_signature_beside_it(program, manifest, publisher, ours):
    pull = ("pull", "tiny.meta4", "--trust-key", ours.public, "--json", "--quiet")
    assert program(*pull).json["error"]["kind"] == "unsigned-manifest"
    Path("tiny.meta4.sig").write_bytes(publisher.sign(manifest.read_bytes(), ours.private))
    assert program(*pull).json["assurance"] == "signed"


def test_what_came_without_a_signature_gets_one_without_new_bytes(program, mirror, ours):
    url = mirror.url("tiny.meta4")
    assert program("pull", url, "--quiet").code == 0
    sent = mirror.bytes_sent("tiny/weights.bin")
    offline = program("pull", url, "--trust-key", ours.public, "--offline", "--quiet")
    assert_refused(offline, 20, "no pinned key vouches for it")
    shown = program("pull", url, "--trust-key", ours.public, "--json", "--quiet")
    assert (shown.json["was_complete"], shown.json["assurance"]) == (False, "signed")
    assert mirror.bytes_sent("tiny/weights.bin") == sent
    assert program("pull", url, "--trust-key", ours.public, "--offline", "--quiet").code == 0


def test_papers_that_prove_less_do_not_replace_a_signature(program, mirror, ours):
    url = mirror.url("tiny.meta4")
    assert program("pull", url, "--trust-key", ours.public, "--quiet").code == 0
    assert program("pull", url, "--refresh", "--quiet").code == 0
    assert program("verify", url, "--trust-key", ours.public, "--quiet").code == 0


def test_a_new_key_takes_the_place_of_the_old_one(program, mirror, publisher, ours, second):
    url = mirror.url("tiny.meta4")
    directory = Path(program("pull", url, "--trust-key", ours.public, "--quiet").out.strip())
    newer = serialise_metalink(replace(publisher.manifest(), info=replace(publisher.info, version="2")))
    mirror.files["tiny.meta4"], mirror.files["tiny.meta4.sig"] = newer, publisher.sign(newer, second.private)
    assert program("pull", url, "--trust-key", second.public, "--quiet").code == 0
    assert program("verify", url, "--trust-key", ours.public, "--quiet").code == 20
    assert program("verify", url, "--trust-key", second.public, "--quiet").code == 0
    assert len(list((directory / ".signed").iterdir())) == 2


# verify.


@pytest.fixture
def pulled_signed(program, mirror, ours):
    done = program("pull", mirror.url("tiny.meta4"), "--trust-key", ours.public, "--quiet")
    assert done.code == 0, done.err
    return Path(done.out.strip())


def verify(program, *more):
    return program("verify", *more, "--quiet")


def test_verify_says_who_signed(program, pulled_signed, ours, mirror):
    shown = program("verify", mirror.url("tiny.meta4"), "--trust-key", ours.public, "--json", "--quiet")
    assert (shown.code, shown.json["models"][0]["signed_by"]) == (0, f"sha256:{ours.key.fingerprint}")
    assert program("verify", "--json").json["models"][0]["signed_by"] is None


def test_what_was_made_of_a_signed_model_is_verified_but_needs_no_signature(program, pulled_signed, ours, mirror):
    def make(draft):
        (draft / "made.bin").write_bytes(b"made")
        return Product("made.bin", 4, hashlib.sha256(b"made").hexdigest())

    write_derived(Layout(program.home), Recipe("made-1", "made", ["weights.bin"]), pulled_signed.name, make)
    shown = program("verify", mirror.url("tiny.meta4"), "--trust-key", ours.public, "--quiet")
    assert (shown.code, shown.err) == (0, "")
    assert "(made-1): as it was made\n" in shown.out
    assert shown.out.count("signed by") == 1


def test_verify_by_another_key_fails(program, pulled_signed, second, mirror):
    assert_refused(verify(program, mirror.url("tiny.meta4"), "--trust-key", second.public), 20, "another key")


@pytest.mark.parametrize("ending", ["", ".sig"])
def test_a_signed_document_that_was_changed_is_noticed(program, pulled_signed, ours, ending):
    path = next(p for p in (pulled_signed / ".signed").iterdir() if p.name.endswith(".sig") == bool(ending))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert_refused(verify(program, "--trust-key", ours.public), 20, "signature")


def test_a_model_changed_together_with_its_papers_is_noticed(program, pulled_signed, ours):
    """Whoever may write to the cache can make everything fit, but for what was signed."""
    import hashlib

    manifest = pulled_signed / "manifest.meta4"
    honest, forged = (hashlib.sha256(data).hexdigest() for data in (FILES["params.json"], b'{"dim": 9}\n'))
    (pulled_signed / "params.json").unlink()
    (pulled_signed / "params.json").write_bytes(b'{"dim": 9}\n')
    text = re.sub(r"(<file name=\"params.json\">.*?)<pieces.*?</pieces>", r"\1", manifest.read_text(), flags=re.S)
    manifest.write_text(text.replace(honest, forged))
    complete = json.loads((pulled_signed / ".complete").read_text())
    complete["manifest_sha256"] = hashlib.sha256(manifest.read_bytes()).hexdigest()
    (pulled_signed / ".complete").write_text(json.dumps(complete))
    assert verify(program).code == 0
    assert_refused(verify(program, "--trust-key", ours.public), 20, "params.json in")


def test_a_key_on_the_command_line_demands_a_signature_one_in_the_settings_does_not(program, pulled, ours, environment):
    shown = verify(program, "tiny.meta4", "--trust-key", ours.public)
    assert_refused(shown, 20, "has no signature in this cache")
    environment.setenv("MISTRAL_FETCH_TRUST_KEYS", str(ours.public))
    assert verify(program, "tiny.meta4").code == 0


@pytest.mark.interop
def test_a_snapshot_is_checked_by_the_library_alone(program, tmp_path, ours, publisher):
    made = publisher.publish(tmp_path, key=ours.private)
    shown = program("pull", made.manifest_path, "--trust-key", ours.public, "--quiet")
    check = [sys.executable, "-m", "model_signing", "verify", "key", shown.out.strip(), "--allow_symlinks"]
    check += ["--signature", str(tmp_path / "tiny.sig"), "--public_key", str(ours.public)]
    assert subprocess.run(check, capture_output=True, check=False).returncode == 0


# repair.


def test_a_repaired_model_is_still_signed(program, mirror, pulled_signed, ours):
    url = mirror.url("tiny.meta4")
    blob = (pulled_signed / "weights.bin").resolve()
    blob.chmod(0o644)
    blob.write_bytes(bytes(blob.stat().st_size))
    (pulled_signed / "params.json").unlink()  # so that the snapshot is laid out anew
    demanding = ("--trust-key", ours.public, "--min-assurance", "signed", "--quiet")
    repaired = program("repair", url, *demanding)
    assert repaired.code == 0, repaired.err
    assert program("verify", url, "--trust-key", ours.public, "--quiet").code == 0
    assert program("pull", url, *demanding, "--offline").code == 0


def test_a_lost_signature_is_repaired_like_a_file(program, mirror, pulled_signed, ours):
    url = mirror.url("tiny.meta4")
    for path in (pulled_signed / ".signed").iterdir():
        path.unlink()
    assert program("repair", url, "--trust-key", ours.public, "--quiet").code == 0
    assert program("verify", url, "--trust-key", ours.public, "--quiet").code == 0


# Expiry.


def test_an_expired_manifest_is_refused_and_a_model_that_is_here_stays(program, mirror, publisher, ours):
    url, keys = mirror.url("tiny.meta4"), ("--trust-key", ours.public, "--quiet")
    assert program("pull", url, *keys).code == 0
    over = serialise_metalink(
        replace(publisher.manifest(), info=replace(publisher.info, expires="2020-01-31T00:00:00Z"))
    )
    mirror.files["tiny.meta4"], mirror.files["tiny.meta4.sig"] = over, publisher.sign(over, ours.private)
    assert_refused(program("pull", url, *keys, "--refresh"), 21, "held until 2020-01-31T00:00:00Z")
    assert program("pull", url, *keys).code == 0
    unsigned = program("pull", url, "--refresh", "--progress", "none")
    assert unsigned.code == 0


# Settings.


def test_keys_come_from_the_environment_and_the_file_and_can_be_taken_back(program, mirror, second, environment, ours):
    url = mirror.url("tiny.meta4")
    environment.setenv("MISTRAL_FETCH_TRUST_KEYS", f"{second.public}")
    assert program("pull", url, "--quiet").code == 20
    assert program("pull", url, "--trust-key", "none", "--quiet").code == 0
    environment.setenv("MISTRAL_FETCH_TRUST_KEYS", f"{second.public}:{ours.public}")
    assert program("pull", url, "--quiet").code == 0
    environment.delenv("MISTRAL_FETCH_TRUST_KEYS")
    config = Path("config.toml")
    config.write_text(f'trust_keys = ["{second.public}"]\n')
    environment.setenv("MISTRAL_FETCH_CONFIG", str(config))
    assert program("pull", url, "--refresh", "--quiet").code == 20


def test_a_complete_model_is_found_without_the_library(program, mirror, pulled_signed, ours):
    """The library takes half a second to import, and a script may pull before every run."""
    script = "import sys; from mistral_fetch.transfer.pull import *; from mistral_fetch.ref import parse_ref\n"
    script += (
        "found = pull(parse_ref(sys.argv[1]), Settings(Path(sys.argv[2]), trust_keys=(sys.argv[3],)), print, None)\n"
    )
    script += "print(found.assurance, sorted({'model_signing', 'cryptography', 'httpx'} & set(sys.modules)))"
    command = [sys.executable, "-c", script, mirror.url("tiny.meta4"), str(program.home), str(ours.public)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "signed []\n"


def test_a_key_that_is_gone_stops_everything(program, pulled, environment):
    environment.setenv("MISTRAL_FETCH_TRUST_KEYS", "/nowhere/key.pub")
    shown = program("pull", "tiny.meta4")
    assert (shown.code, shown.out) == (2, "")
    assert "'/nowhere/key.pub'" in shown.err


def test_a_private_key_is_no_key_to_trust(program, manifest, ours):
    shown = program("pull", "tiny.meta4", "--trust-key", ours.private, "--quiet")
    assert (shown.code, "holds no public key" in shown.err) == (2, True)


# publish and sign.


def test_publish_signs_what_it_wrote(program, manifest, ours):
    shown = program("publish", "tiny", "--out", "out", "--sign", ours.private, "--expires", "2099-01-31", "--json")
    assert shown.code == 0, shown.err
    assert shown.json["signature"] == "out/tiny.meta4.sig"
    assert shown.json["files_signature"] == "out/tiny.sig"
    assert 'm:expires="2099-01-31T23:59:59Z"' in Path("out/tiny.meta4").read_text()
    Path("tiny").rename("out/tiny")
    pulled = program("pull", "out/tiny.meta4", "--trust-key", ours.public, "--json", "--quiet")
    assert pulled.json["assurance"] == "signed"


def test_a_key_that_cannot_sign_is_told_before_the_weights_are_read(program, manifest, ours):
    shown = program("publish", "tiny", "--out", "out", "--sign", ours.public, "--quiet")
    assert_refused(shown, 2, "cannot sign with")
    assert not Path("out").exists()


def test_the_passphrase_comes_from_the_environment(program, manifest, environment, tmp_path):
    locked = make_keys(tmp_path, "locked", passphrase="correct horse")
    assert program("sign", "tiny.meta4", "--key", locked.private).code == 2
    environment.setenv("MISTRAL_FETCH_SIGN_PASSPHRASE", "correct horse")
    shown = program("sign", "tiny.meta4", "--key", locked.private)
    assert (shown.code, shown.out) == (0, "tiny.meta4.sig\n")
    assert program("pull", "tiny.meta4", "--trust-key", locked.public, "--quiet").code == 0


@pytest.mark.parametrize(
    "name, content, code",
    [("x.json", b"{}", 20), ("x.meta4", b"<x/>", 20), ("x.txt", b"hello", 2), ("missing.json", None, 3)],
)
def test_nothing_is_signed_that_no_pull_would_accept(program, ours, name, content, code):
    if content is not None:
        Path(name).write_bytes(content)
    shown = program("sign", name, "--key", ours.private, "--quiet")
    assert (shown.code, len(shown.err.splitlines())) == (code, 3)
    assert not Path(f"{name}.sig").exists()


@pytest.mark.parametrize("date", ["2027", "31.1.2027", "2027-02-30", "2027-01-31T00:00:00+01:00", "never"])
def test_a_date_that_is_none_is_refused(program, manifest, date):
    shown = program("publish", "tiny", "--out", "out", "--expires", date, "--quiet")
    assert_refused(shown, 2, f"--expires cannot be {date!r}")
