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
ATTENTION_SOURCE = Path(__file__).with_name("attention.c")
CACHE_VARIABLE = "MISTRAL_RUNTIME_CACHE"
_OPTIONS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-ffp-contract=off", "-std=gnu11")
_COMPILER_SECONDS = 120


class BuildFailed(Exception):
    """There is no library, and why; the caller goes on without."""


def load_library(source: Path = SOURCE) -> ctypes.CDLL:
    """Return the library compiled from one source, building it at the first use on this machine (seconds).

    Raises:
        BuildFailed: No compiler, no directory of our own, or the compiler refused.
    """
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise BuildFailed("no C compiler")
    openmp = _torch_openmp()
    directory = _cache_directory()
    path = directory / f"{source.stem}-{_key(source, compiler, openmp)}.so"
    if not path.exists():
        _compile(source, compiler, openmp, path)
    _require_ours(path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildFailed(f"the compiled kernels cannot be loaded: {error}") from error


def _torch_openmp() -> Path:
    """Return the OpenMP library that torch has loaded: with a second, two teams of threads would fight for cores."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="ascii", errors="replace")
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
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mistral-runtime"
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
    for part in (source.read_text(), version, " ".join(_OPTIONS), str(openmp), torch.__version__, _processor()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:24]


def _processor() -> str:
    """Return what this processor is and can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compile(source: Path, compiler: str, openmp: Path, path: Path) -> None:
    """Compile into a hidden directory and rename: two processes at once, or one that dies, leave no half library."""
    with tempfile.TemporaryDirectory(prefix=".build-", dir=path.parent) as scratch:
        made, library = Path(scratch, "kernels.o"), Path(scratch, "kernels.so")
        _run([compiler, *_OPTIONS, "-c", str(source), "-o", str(made)])
        # Linked by name, not with -fopenmp: that would bring the system's own OpenMP.
        _run([compiler, "-shared", str(made), str(openmp), "-lm", "-o", str(library)])
        library.chmod(0o700)
        library.replace(path)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILER_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailed(f"{command[0]} failed: {error}") from error
    if done.returncode:
        raise BuildFailed(f"{command[0]} failed: {(done.stderr.strip().splitlines() or ['no reason given'])[0][:200]}")
    return done.stdout
