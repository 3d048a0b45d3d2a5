"""What the benchmarks share: processes that are measured, files of random bytes, and nginx on a free port."""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mistral_fetch.units import format_size

NGINX = """
daemon off; master_process off; pid {work}/nginx.pid; error_log {work}/nginx.log;
events {{ worker_connections 1024; }}
http {{
  {http} sendfile on; sendfile_max_chunk 4m; tcp_nopush on;
  client_body_temp_path {work}/body; proxy_temp_path {work}/proxy; fastcgi_temp_path {work}/fcgi;
  uwsgi_temp_path {work}/uwsgi; scgi_temp_path {work}/scgi;
  server {{ listen {address}:{port} {tls}; root {root}; {locations} }}
}}
"""


@dataclass(frozen=True)
class Stage:
    """One process: what it was, how long it and its children took, its peak memory, what it printed.

    ``peak_bytes`` is never below this program's own size, which the kernel counts for the moment between fork and
    exec; :func:`own_peak_bytes` says how much that is.
    """

    name: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str


@dataclass(frozen=True)
class Summary:
    """The middle and the ends of what was measured several times."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Summarise at least one value."""
        return cls(*(round(value, 3) for value in (statistics.median(values), min(values), max(values))))


def measure(name: str, argv: Sequence[str], environment: Mapping[str, str] | None = None) -> Stage:
    """Run a command to its end and show how it went.

    Raises:
        SystemExit: It failed; its output was shown.
    """
    started = time.monotonic()
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env={**os.environ, **(environment or {})}, text=True
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = round(time.monotonic() - started, 2)
    process.stdout.close()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{name} failed with exit code {process.returncode}: {' '.join(argv)}\n{output[-2000:]}")
    cpu_seconds = round(usage.ru_utime + usage.ru_stime, 2)
    stage = Stage(name, seconds, cpu_seconds, usage.ru_maxrss * 1024, output)
    peak = format_size(stage.peak_bytes)
    print(f"{name:34} {seconds:8.1f} s   CPU {cpu_seconds:7.1f} s   peak {peak:>9}", flush=True)
    return stage


def own_peak_bytes() -> int:
    """Return below which size no peak can be told."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Nginx:
    """A web server that runs."""

    url: str
    process: subprocess.Popen[bytes]

    def cpu_seconds(self) -> float:
        """Return the processor time it has used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def nginx(
    root: Path,
    work: Path,
    *,
    address: str = "127.0.0.1",
    port: int = 0,
    certificate: tuple[Path, Path] | None = None,
    locations: str = "",
    http: str = "access_log off;",
    prefix: Sequence[str] = (),
) -> Iterator[Nginx]:
    """Serve a directory.

    Args:
        root: What to serve.
        work: Where nginx may write; one directory for each server.
        address: Where to listen.
        port: A free one of this host if it is 0.
        certificate: Certificate chain and key; https if given.
        locations: Further lines for the server's block.
        http: Further lines for the block around it; by default no log.
        prefix: What stands before the command, such as ``ip netns exec NAME``.
    """
    work.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    tls = "ssl; ssl_certificate {}; ssl_certificate_key {}".format(*certificate) if certificate else ""
    config = work / "nginx.conf"
    config.write_text(
        NGINX.format(work=work, root=root, address=address, port=port, tls=tls, locations=locations, http=http)
    )
    (work / "nginx.pid").unlink(missing_ok=True)
    process = subprocess.Popen([*prefix, "nginx", "-p", str(work), "-c", str(config)])
    try:
        _wait_for(work / "nginx.pid", process)  # written when it listens
        yield Nginx(f"{'https' if certificate else 'http'}://{address}:{port}", process)
    finally:
        process.terminate()
        process.wait()


def _wait_for(file: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 10
    while not file.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"nginx did not start; see {file.with_name('nginx.log')}")
        time.sleep(0.02)


def free_port() -> int:
    """Return a port of loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_certificate(directory: Path) -> tuple[Path, tuple[Path, Path]]:
    """Make an authority and a certificate for 127.0.0.1; return the authority's certificate, and chain and key."""
    directory.mkdir(parents=True, exist_ok=True)
    authority, key = directory / "ca.pem", directory / "ca.key"
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30"]
    usage = ["-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign"]
    _quietly([*new, "-keyout", str(key), "-out", str(authority), "-subj", "/CN=benchmark authority", *usage])
    leaf, leaf_key = directory / "leaf.pem", directory / "leaf.key"
    signed = ["-CA", str(authority), "-CAkey", str(key), "-subj", "/CN=127.0.0.1"]
    usage = ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"]
    _quietly([*new, "-keyout", str(leaf_key), "-out", str(leaf), *signed, *usage])
    return authority, (leaf, leaf_key)


def _quietly(argv: Sequence[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(argv)} failed:\n{done.stderr}")


def random_file(path: Path, size: int) -> None:
    """Write ``size`` random bytes, unless a file of that size is there already."""
    if path.exists() and path.stat().st_size == size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        # By another program, to stay small: see Stage.
        subprocess.run(["head", "-c", str(size), "/dev/urandom"], stdout=file, check=True)


def publish(directory: Path, out: Path, *options: str) -> Path:
    """Publish a model with the program itself; return its manifest."""
    argv = [sys.executable, "-m", "mistral_fetch", "publish", str(directory), "--out", str(out), "--quiet", *options]
    measure("publish", argv)
    return out / f"{directory.name}.meta4"


def missing_programs(*names: str) -> list[str]:
    """Return which of these programs are not installed."""
    return [name for name in names if shutil.which(name) is None]


def case_names(cases: Collection[str]) -> Callable[[str], list[str]]:
    """Return how ``--cases`` is read: names with commas between them, each of them known."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(cases):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}")
        return names

    return read
