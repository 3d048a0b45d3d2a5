"""Programs that download one large file from a web server, each as one command line: ours and its peers."""

from __future__ import annotations

import shlex
import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FILE, REPOSITORY = "model.bin", "org/repo"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# As huggingface_hub called it while it used it: its concurrency, its chunk size, its patience.
HF_TRANSFER = """
import sys, hf_transfer
hf_transfer.download(url=sys.argv[1], filename=sys.argv[2], max_files=100, chunk_size=10 * 1024 * 1024,
                     parallel_failures=3, max_retries=5, headers={})
"""
HF_HUB = """
import sys, huggingface_hub
huggingface_hub.hf_hub_download(sys.argv[1], sys.argv[2])
"""
OURS, OURS_WHOLE, BARE = "ours, piece hashes", "ours, sha256 only", "bare loop, nothing hashed"
CURL, HF = "curl, then openssl dgst", "hf_transfer"


@dataclass(frozen=True)
class Served:
    """What is served where."""

    base: str
    folder: Path
    """On this machine: holds the manifests, and the model's folder."""
    size: int
    sha256: str
    authority: Path | None = None
    """The certificate to trust, for https."""

    @property
    def url(self) -> str:
        """Return the file's address."""
        return f"{self.base}/model/{FILE}"


@dataclass(frozen=True)
class Downloader:
    """One command that fetches the file into the scratch directory."""

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    must_say: str = ""
    """What it prints when the digest is right, where nothing but its output tells."""


def downloaders(served: Served, scratch: Path, peers: Path | None) -> list[Downloader]:
    """Return every downloader that can run here.

    Args:
        served: What to fetch.
        scratch: An empty directory; all they write goes there.
        peers: An interpreter that has hf_transfer and huggingface_hub; None leaves both out.
    """
    trust = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    if served.authority:
        trust |= dict.fromkeys(("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"), str(served.authority))
    found = [*_ours(served, scratch), _curl(served, scratch), *_aria2(served, scratch)]
    if peers is not None:
        found += _hugging_face(served, scratch, peers)
    if served.authority is None:
        found.append(_bare_loop(served, scratch))
    return [Downloader(one.name, one.argv, {**trust, **one.environment}, one.must_say) for one in found]


def _ours(served: Served, scratch: Path) -> Iterator[Downloader]:
    home = {"MISTRAL_FETCH_HOME": str(scratch / "cache")}
    for name, manifest in ((OURS, "model.meta4"), (OURS_WHOLE, "whole.meta4")):
        pull = [sys.executable, "-m", "mistral_fetch", "pull", f"{served.base}/{manifest}", "--via", "http", "--quiet"]
        yield Downloader(name, pull, home)


def _curl(served: Served, scratch: Path) -> Downloader:
    out = shlex.quote(str(scratch / FILE))
    trust = f"--cacert {shlex.quote(str(served.authority))}" if served.authority else ""
    line = f"curl -sS --fail {trust} -o {out} {served.url} && openssl dgst -sha256 {out}"
    return Downloader(CURL, ["sh", "-c", line], must_say=served.sha256)


def _aria2(served: Served, scratch: Path) -> Iterator[Downloader]:
    # Without allocation: writing zeros first, its default, would only slow it down.
    aria2 = ["aria2c", "-q", "-x8", "-s8", "--file-allocation=none", f"--dir={scratch}", "--seed-time=0"]
    aria2 += [f"--ca-certificate={served.authority}"] if served.authority else []
    aria2 += ["--follow-metalink=false", "--enable-dht=false", "--bt-enable-lpd=false"]
    yield Downloader("aria2c -x8 --checksum", [*aria2, f"--checksum=sha-256={served.sha256}", served.url])
    manifest = [f"--metalink-base-uri={served.base}/", "-M", str(served.folder / "http.meta4")]
    yield Downloader("aria2c -x8 -M model.meta4", [*aria2, *manifest])


def _hugging_face(served: Served, scratch: Path, peers: Path) -> Iterator[Downloader]:
    yield Downloader(HF, [str(peers), "-c", HF_TRANSFER, served.url, str(scratch / FILE)])
    environment = {
        "HF_ENDPOINT": served.base,
        "HF_HOME": str(scratch / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    }
    yield Downloader("huggingface_hub, own", [str(peers), "-c", HF_HUB, REPOSITORY, FILE], environment)


def _bare_loop(served: Served, scratch: Path) -> Downloader:
    script = str(Path(__file__).with_name("ceiling.py"))
    return Downloader(BARE, [sys.executable, script, "--url", served.url, "--out", str(scratch / FILE)])


def hub_location(file: Path, size: int, sha256: str) -> str:
    """Return nginx's lines for an address that looks like the hub's, as huggingface_hub wants to see it."""
    headers = {"X-Repo-Commit": COMMIT, "X-Linked-Size": size, "X-Linked-Etag": f'"{sha256}"'}
    lines = " ".join(f"add_header {name} '{value}';" for name, value in headers.items())
    return f"location = /{REPOSITORY}/resolve/main/{FILE} {{ alias {file}; {lines} }}"


def find_peers(given: str, work: Path) -> Path | None:
    """Return an interpreter that has the peers: the given one, or one in an environment made for it.

    Args:
        given: ``auto``, ``none`` or the path of an interpreter.
        work: Where to make the environment.
    """
    if given == "none":
        return _skip("--peers none was given")
    python = Path(given) if given != "auto" else work / "peers" / "bin" / "python"
    if given == "auto" and not python.exists():
        print("making an environment for hf_transfer and huggingface_hub", flush=True)
        venv.create(work / "peers", with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "hf_transfer", "huggingface_hub"]
        if subprocess.run(pip, check=False).returncode:
            return _skip("pip could not install them")
    try:
        probe = subprocess.run([str(python), "-c", "import hf_transfer, huggingface_hub"], check=False)
    except OSError as error:
        return _skip(f"{python}: {error.strerror}")
    return python if probe.returncode == 0 else _skip(f"{python} cannot import them")


def _skip(reason: str) -> None:
    print(f"hf_transfer and huggingface_hub are left out: {reason}", flush=True)
