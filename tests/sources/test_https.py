"""https end to end on loopback, with an authority that only these tests trust."""

from __future__ import annotations

import shutil
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from mistral_fetch.errors import MirrorUnreachable
from mistral_fetch.simulators.mirror import Fault, MirrorSimulator
from mistral_fetch.sources.http_client import HttpClient, HttpSettings
from tests.sources.conftest import DATA, NAME, PATIENCE, PIECE, Download

OPENSSL = shutil.which("openssl")
pytestmark = pytest.mark.skipif(OPENSSL is None, reason="needs the openssl program to make a certificate")


@pytest.fixture
def secure(certificate: Path) -> Iterator[MirrorSimulator]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with MirrorSimulator({NAME: DATA}, tls=context) as mirror:
        yield mirror


@pytest.fixture
def trusting(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpClient]:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with HttpClient(HttpSettings(retry=PATIENCE)) as client:
        yield client


def test_a_file_comes_over_https_and_resumes(tmp_path: Path, trusting: HttpClient, secure: MirrorSimulator) -> None:
    download = Download(tmp_path / "partial", trusting)
    secure.script(NAME, [Fault(end_at=3 * PIECE + 7)])
    download.run(secure)
    download.assert_complete()
    assert len(secure.requests()) == 2


def test_an_unknown_authority_is_refused_at_once(download: Download, secure: MirrorSimulator) -> None:
    with pytest.raises(MirrorUnreachable, match="certificate") as caught:
        download.run(secure)
    assert "SSL_CERT_FILE" in caught.value.hint
    assert caught.value.is_permanent
    assert secure.served == []


def test_https_never_falls_back_to_http(
    tmp_path: Path, trusting: HttpClient, secure: MirrorSimulator, mirror: MirrorSimulator
) -> None:
    download = Download(tmp_path / "partial", trusting)
    secure.always(NAME, Fault(redirect_to=mirror.url(NAME)))
    with pytest.raises(MirrorUnreachable, match="redirects"):
        download.run(secure)
    assert mirror.served == []


def test_http_may_be_sent_on_to_https(
    tmp_path: Path, trusting: HttpClient, secure: MirrorSimulator, mirror: MirrorSimulator
) -> None:
    download = Download(tmp_path / "partial", trusting)
    mirror.always(NAME, Fault(redirect_to=secure.url(NAME)))
    download.run(mirror)
    download.assert_complete()
