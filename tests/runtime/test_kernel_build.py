"""Compiling the kernels: once, by one's own compiler, into one's own directory; and doing without."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mistral_runtime
from mistral_runtime import linear_rows
from mistral_runtime.__main__ import main
from mistral_runtime.kernels import build, calling, rows, tiles
from mistral_runtime.kernels.build import BuildFailed, load_library
from mistral_runtime.kernels.rows import kernels_reason, row_kernels

WriteSnapshot = Callable[..., dict[str, Tensor]]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(mistral_runtime.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
has_compiler = pytest.mark.skipif(
    kernels_reason() in ("no C compiler", "only on Linux"), reason="nothing compiles kernels here"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache of this test's own, in which what is compiled is not optimised, to be quick."""
    directory = tmp_path / "kernels"
    monkeypatch.setenv(build.CACHE_VARIABLE, str(directory))
    monkeypatch.setattr(build, "_OPTIONS", ("-O0", "-march=x86-64", "-fopenmp", "-fPIC", "-std=gnu11"))
    return directory


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget for this test what was found out about the kernels."""
    for module in (rows, tiles):
        monkeypatch.setattr(module, "_try_to_load", module._try_to_load.__wrapped__)


def _compiler_that(does: str, directory: Path) -> Path:
    path = directory / "cc"
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)
    return path


def _multiplies(library: ctypes.CDLL) -> bool:
    """Say whether a library computes what ours does."""
    ones = torch.ones(1, 7, dtype=torch.bfloat16)
    return float(rows.RowKernels(library).bf16(ones, ones)) == 7


@has_compiler
def test_the_library_is_compiled_once_and_only_ours_to_change(cache: Path) -> None:
    assert _multiplies(load_library())
    (path,) = cache.iterdir()
    assert (cache.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o700)
    made = path.stat().st_mtime_ns
    load_library()
    assert [p.stat().st_mtime_ns for p in cache.iterdir()] == [made]


@has_compiler
@pytest.mark.parametrize("damage", ["garbage", "empty", "cut", "a bit", "another key's"])
def test_a_library_that_is_not_what_was_compiled_is_made_anew(
    damage: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(mode=0o700)
    compiler = build.shutil.which("cc")
    path = cache / f"rows-{build._key(build.SOURCE, compiler, build._torch_openmp())}.so"
    if damage == "another key's":
        # Compiled and sealed in good order, from a source that computes something else.
        source = cache.parent / "rows.c"
        source.write_text(build.SOURCE.read_text().replace("= narrow(sums", "= narrow(2 * sums"))
        with monkeypatch.context() as patch:
            patch.setattr(build, "SOURCE", source)
            assert not _multiplies(load_library())
        (other,) = cache.iterdir()
        assert other != path
        other.rename(path)
    else:
        build._compile(build.SOURCE, compiler, build._torch_openmp(), path, path.stem.removeprefix("rows-"))
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        path.unlink()
        path.write_bytes(
            {"garbage": b"garbage" * 99, "empty": b"", "cut": whole[:9000], "a bit": bytes(flipped)}[damage]
        )
    before = path.stat().st_ino
    assert _multiplies(load_library())
    assert path.stat().st_ino != before
    assert [p.name for p in cache.iterdir()] == [path.name]


@has_compiler
def test_a_directory_or_a_library_that_others_can_write_to_is_refused(cache: Path) -> None:
    load_library()
    (path,) = cache.iterdir()
    for changed, mode in ((path, 0o770), (cache, 0o777), (cache, 0o720)):
        before = changed.stat().st_mode
        changed.chmod(mode)
        with pytest.raises(BuildFailed, match="others"):
            load_library()
        changed.chmod(before)


@has_compiler
def test_a_cache_that_cannot_be_written_is_a_reason_to_go_without(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file")
    with pytest.raises(BuildFailed, match="cannot be made"):
        load_library()
    cache.unlink()

    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build.tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(BuildFailed, match="No space"):
        load_library()


@has_compiler
def test_two_processes_at_once_leave_one_whole_library(cache: Path) -> None:
    program = "from mistral_runtime.kernels.rows import kernels_reason; print(kernels_reason())"
    started = [
        subprocess.Popen([sys.executable, "-c", program], env=ENVIRONMENT | {build.CACHE_VARIABLE: str(cache)},
                         stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]  # fmt: skip
    assert [process.communicate()[0] for process in started] == ["compiled for this machine\n"] * 2
    (path,) = cache.iterdir()
    assert build._is_sealed(path, path.stem.removeprefix("rows-"))


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("trouble", ["no compiler", "fails", "hangs", "no home", "off"])
def test_without_kernels_there_is_a_reason(
    trouble: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = trouble
    if trouble == "no compiler":
        monkeypatch.setenv("PATH", "")
        reason = "no C compiler"
    elif trouble == "fails":
        does = 'test "$1" = --version || { echo "internal error" >&2; exit 1; }'
        monkeypatch.setenv("CC", str(_compiler_that(does, tmp_path)))
        reason = "failed: internal error"
    elif trouble == "hangs":
        monkeypatch.setenv("CC", str(_compiler_that("exec sleep 60", tmp_path)))
        monkeypatch.setattr(build, "_COMPILER_SECONDS", 0.1)
        reason = "timed out"
    elif trouble == "no home":
        for name in (build.CACHE_VARIABLE, "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)

        def nowhere() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", nowhere)
        reason = "home directory"
    else:
        monkeypatch.setenv(calling.DISABLE_VARIABLE, "off")
        reason = "MISTRAL_RUNTIME_KERNELS=off"
    assert row_kernels.__wrapped__() is None
    assert reason in kernels_reason()
    assert not cache.exists() or list(cache.iterdir()) == []


@has_compiler
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    "kernel, right, wrong",
    [
        ("bf16", "sums[r * ROWS + i] += acc[r][i][l]", "sums[r * ROWS + i] -= acc[r][i][l]"),
        ("int8", ".bits = bits == 8 ? 16 : 8,", ".bits = 8,"),
        ("int4", "MOST_ROWS, 1 << (bits - 1)", "MOST_ROWS, bits == 4 ? 7 : 128"),
    ],
)
def test_a_compiler_that_is_wrong_is_found_out(
    kernel: str, right: str, wrong: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name = (rows, "SOURCE") if kernel == "bf16" else (tiles, "TILES_SOURCE")
    published = getattr(module, name)
    source = tmp_path / published.name
    assert right in published.read_text()
    source.write_text(published.read_text().replace(right, wrong))
    monkeypatch.setattr(module, name, source)
    made, reason = module._try_to_load()
    assert (made, reason) == (None, f"the compiled {kernel} kernel computes something else than torch")
    assert len(list(cache.iterdir())) == 1


@has_compiler
def test_a_header_that_changes_makes_another_library(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_library()
    headers = tmp_path / "headers"
    headers.mkdir()
    for path in build._HEADERS.glob("*.h"):
        (headers / path.name).write_text(path.read_text() + "/* changed */")
    monkeypatch.setattr(build, "_HEADERS", headers)
    load_library()
    assert len(list(cache.iterdir())) == 2


@pytest.mark.usefixtures("fresh", "cache")
@pytest.mark.parametrize("flags", [[], ["--quantize", "int8"], ["--quantize", "int4"]])
def test_a_model_answers_without_a_compiler(
    flags: list[str],
    tmp_path: Path,
    write_snapshot: WriteSnapshot,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_snapshot(tmp_path / "model", dtype=torch.bfloat16)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(linear_rows, "row_kernels", row_kernels.__wrapped__)
    monkeypatch.setattr(linear_rows, "tile_kernels", tiles.tile_kernels.__wrapped__)
    arguments = ["--max-tokens", "3", "--device", "cpu", "--dtype", "bfloat16", "--threads", "1", "--quiet"]
    assert main(["generate", str(tmp_path / "model"), "wind", *arguments, *flags]) == 0
    assert capsys.readouterr().out
