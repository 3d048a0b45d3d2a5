"""Compiling the C beside this file, once per machine, into a library that only this user can have written.

Owns the compiler's command line and the cache. The library's name is a digest of all that decides its instructions, so
one that was built for another machine, another source or another torch is never loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("rows.c")
TILES_SOURCE = Path(__file__).with_name("tiles.c")
ATTENTION_SOURCE = Path(__file__).with_name("attention.c")
ROWWISE_SOURCE = Path(__file__).with_name("rowwise.c")
_HEADERS = Path(__file__).parent
CACHE_VARIABLE = "MISTRAL_RUNTIME_CACHE"
_OPTIONS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-ffp-contract=off", "-std=gnu11")
_COMPILER_SECONDS = 120
_SEAL_BYTES = hashlib.sha256().digest_size


class BuildFailed(Exception):
    """There is no library, and why; the caller goes on without."""


def load_library(source: Path | None = None) -> ctypes.CDLL:
    """Return the library of one source, by default `SOURCE`, compiled at the first use on this machine (seconds).

    A library in the cache that is not, byte for byte, what was compiled under its name is made anew.

    Raises:
        BuildFailed: No compiler, no directory of our own, or the compiler refused.
    """
    source = source or SOURCE
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise BuildFailed("no C compiler")
    openmp = _torch_openmp()
    key = _key(source, compiler, openmp)
    path = _cache_directory() / f"{source.stem}-{key}.so"
    try:
        if not path.exists() or not _is_sealed(path, key):
            _compile(source, compiler, openmp, path, key)
        _require_ours(path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildFailed(f"the compiled kernels cannot be kept or loaded: {error}") from error


def _seal(library: bytes, key: str) -> bytes:
    """Return what stands behind a library in its file, where no loader looks."""
    return hashlib.sha256(key.encode() + library).digest()


def _is_sealed(path: Path, key: str) -> bool:
    """Say whether a file is what was compiled under this key: the loader would run, or crash on, anything else."""
    data = path.read_bytes()
    library, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    return seal == _seal(library, key)


def _torch_openmp() -> Path:
    """Return the OpenMP library that torch has loaded: with a second, two teams of threads would fight for cores."""
    try:
        maps = os.fsdecode(Path("/proc/self/maps").read_bytes())
    except OSError as error:
        raise BuildFailed("only on Linux") from error
    for line in maps.splitlines():
        path = line.partition("/")[2]
        if "libgomp" in path.rpartition("/")[2]:
            return Path(f"/{path}")
    raise BuildFailed(f"torch {torch.__version__} has not loaded libgomp")


def _cache_directory() -> Path:
    """Return a directory that nobody else can write to: a library is code."""
    configured = os.environ.get(CACHE_VARIABLE)
    if configured:
        directory = Path(configured)
    else:
        try:
            directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mistral-runtime"
        except RuntimeError as error:  # a container's user may have no home
            raise BuildFailed(f"no directory to keep them in: {error}") from error
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BuildFailed(f"{directory} cannot be made: {error.strerror}") from error
    _require_ours(directory)
    return directory


def _require_ours(path: Path) -> None:
    status = path.stat()
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildFailed(f"{path} belongs to, or can be written by, others")


def _key(source: Path, compiler: str, openmp: Path) -> str:
    digest = hashlib.sha256()
    version = _run([compiler, "--version"])
    headers = [path.read_text() for path in sorted(_HEADERS.glob("*.h"))]
    machine = (version, " ".join(_OPTIONS), str(openmp), torch.__version__, _processor())
    for part in (source.read_text(), *headers, *machine):
        digest.update(os.fsencode(part) + b"\0")
    return digest.hexdigest()[:24]


def _processor() -> str:
    """Return what this processor is and can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compile(source: Path, compiler: str, openmp: Path, path: Path, key: str) -> None:
    """Compile into a hidden directory and rename: two processes at once, or one that dies, leave no half library."""
    with tempfile.TemporaryDirectory(prefix=".build-", dir=path.parent) as scratch:
        made, library = Path(scratch, "kernels.o"), Path(scratch, "kernels.so")
        _run([compiler, *_OPTIONS, "-I", str(_HEADERS), "-c", str(source), "-o", str(made)])
        # Linked by name, not with -fopenmp: that would bring the system's own OpenMP.
        _run([compiler, "-shared", str(made), str(openmp), "-lm", "-o", str(library)])
        with library.open("r+b") as file:
            seal = _seal(file.read(), key)
            file.write(seal)
        library.chmod(0o700)
        library.replace(path)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_COMPILER_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailed(f"{command[0]} failed: {error}") from error
    if done.returncode:
        raise BuildFailed(f"{command[0]} failed: {(done.stderr.strip().splitlines() or ['no reason given'])[0][:200]}")
    return done.stdout
