"""`.pth` to safetensors: the same bytes under the same names, in little memory, and all of the file or none of it."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import mistral_runtime
from mistral_fetch.transfer.convert import SAFETENSORS
from mistral_runtime import convert as convert_module
from mistral_runtime import file_writer, tensor_bytes
from mistral_runtime.__main__ import main
from mistral_runtime.config import ModelConfig
from mistral_runtime.convert import OUTPUT_NAME, RECIPE, convert
from mistral_runtime.errors import (
    BadRequest,
    CheckpointError,
    DiskFull,
    MalformedCheckpoint,
    MissingTensor,
    UnsupportedModel,
    WriteFailed,
)
from mistral_runtime.safetensors_header import DATA_ALIGNMENT
from mistral_runtime.snapshot import find_weights, load_config
from mistral_runtime.tensor_bytes import stream_bytes
from mistral_runtime.weights import load_model, open_checkpoint

WriteSnapshot = Callable[..., dict[str, Tensor]]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(mistral_runtime.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
# About 330 MB in bfloat16, most of it in a few large tensors.
LARGE = ModelConfig(
    dim=2048,
    n_layers=2,
    head_dim=128,
    hidden_dim=8192,
    n_heads=16,
    n_kv_heads=4,
    vocab_size=10_000,
    norm_eps=1e-5,
    rope_theta=1e4,
    sliding_window=8,
)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    directory = tmp_path / "out"
    directory.mkdir()
    return directory


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut even tiny tensors into many chunks, and sync often."""
    monkeypatch.setattr(tensor_bytes, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(file_writer, "COPY_BYTES", 1000)
    monkeypatch.setattr(file_writer, "_HASH_BYTES", 777)
    monkeypatch.setattr(file_writer, "SYNC_BYTES", 5000)


def _refuse_to_copy(code: int, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernel copy `after` times, and then say why it cannot."""
    copy, calls = os.copy_file_range, itertools.count()

    def refuse(*arguments: Any) -> int:
        if next(calls) < after:
            return copy(*arguments)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", refuse)


def _same_tensors(path: Path, weights: dict[str, Tensor]) -> None:
    found = load_file(path)
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


needs_copy_file_range = pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="the kernel copies nothing here")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.usefixtures("small_chunks")
def test_the_result_has_the_same_tensors_and_is_what_was_said(
    dtype: torch.dtype, tmp_path: Path, out: Path, write_snapshot: WriteSnapshot
) -> None:
    weights = write_snapshot(tmp_path / "source", dtype=dtype)
    done = convert(tmp_path / "source", out)
    data = done.path.read_bytes()
    assert [path.name for path in out.iterdir()] == [OUTPUT_NAME]
    assert (done.size, done.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert done.tensors == len(weights)
    _same_tensors(done.path, weights)


def test_the_file_is_laid_out_as_the_format_says(tmp_path: Path, out: Path, write_snapshot: WriteSnapshot) -> None:
    weights = write_snapshot(tmp_path / "source", dtype=torch.bfloat16)
    data = convert(tmp_path / "source", out).path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert (8 + length) % DATA_ALIGNMENT == 0
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt", "recipe": RECIPE}
    assert list(header) == list(weights)
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        assert (entry["dtype"], entry["shape"]) == ("BF16", list(weights[name].shape))
        assert data[begin:end] == weights[name].view(torch.uint8).numpy().tobytes(), name


def test_the_library_reads_it_and_so_do_we(tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    """In the same directory it is preferred to the pickle, and makes the same model."""
    weights = write_snapshot(tmp_path, dtype=torch.bfloat16)
    convert(tmp_path, tmp_path)
    with safe_open(tmp_path / OUTPUT_NAME, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "recipe": RECIPE}
    files = find_weights(tmp_path)
    assert files.layout == "consolidated.safetensors"
    config = load_config(tmp_path, files.layout)
    for name, tensor in load_model(open_checkpoint(files, config), config).state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_two_conversions_give_the_same_bytes(tmp_path: Path, out: Path, write_snapshot: WriteSnapshot) -> None:
    write_snapshot(tmp_path / "source")
    (tmp_path / "second").mkdir()
    assert convert(tmp_path / "source", out).sha256 == convert(tmp_path / "source", tmp_path / "second").sha256


@needs_copy_file_range
@pytest.mark.parametrize("code, after", [(errno.EXDEV, 0), (errno.ENOSYS, 0), (errno.EINVAL, 5)])
@pytest.mark.usefixtures("small_chunks")
def test_where_the_kernel_cannot_copy_the_bytes_are_read(
    code: int,
    after: int,
    tmp_path: Path,
    out: Path,
    write_snapshot: WriteSnapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = write_snapshot(tmp_path / "source")
    _refuse_to_copy(code, after, monkeypatch)
    done = convert(tmp_path / "source", out)
    assert done.sha256 == hashlib.sha256(done.path.read_bytes()).hexdigest()
    _same_tensors(done.path, weights)


def test_without_a_map_of_the_source_the_bytes_are_read(
    tmp_path: Path, out: Path, write_snapshot: WriteSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = write_snapshot(tmp_path / "source")
    monkeypatch.setattr(convert_module, "find_mappings", lambda _path: [])
    _refuse_to_copy(errno.EIO, 0, monkeypatch)
    _same_tensors(convert(tmp_path / "source", out).path, weights)


@needs_copy_file_range
def test_a_source_that_becomes_shorter_is_told(
    tmp_path: Path, out: Path, write_snapshot: WriteSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_snapshot(tmp_path / "source")
    monkeypatch.setattr(os, "copy_file_range", lambda *_arguments: 0)
    with pytest.raises(WriteFailed, match="shorter"):
        convert(tmp_path / "source", out)


def test_both_programs_mean_the_same_recipe_and_file() -> None:
    assert (SAFETENSORS.key, SAFETENSORS.product) == (RECIPE, OUTPUT_NAME)


# --- tensors that do not lie in the file as they are ---------------------------------------------------------------


def _resave(source: Path, change: Callable[[dict[str, Tensor]], None]) -> dict[str, Tensor]:
    path = source / "consolidated.00.pth"
    weights = torch.load(path, weights_only=True)
    change(weights)
    torch.save(weights, path)
    return dict(weights)


def _transposed(weights: dict[str, Tensor]) -> None:
    for name in ("layers.0.attention.wq.weight", "layers.1.feed_forward.w2.weight", "output.weight"):
        weights[name] = weights[name].t().contiguous().t()


def _sliced(weights: dict[str, Tensor]) -> None:
    for name in ("layers.0.attention.wk.weight", "tok_embeddings.weight"):
        wide = torch.cat([weights[name], torch.full_like(weights[name], 7.0)], dim=1)
        weights[name] = wide[:, : weights[name].shape[1]]


def _one_storage(weights: dict[str, Tensor]) -> None:
    whole = torch.cat([weights["tok_embeddings.weight"], weights["output.weight"]])
    rows = len(weights["output.weight"])
    weights["tok_embeddings.weight"], weights["output.weight"] = whole[:rows], whole[rows:]


def _tied(weights: dict[str, Tensor]) -> None:
    weights["output.weight"] = weights["tok_embeddings.weight"]


def _parameters(weights: dict[str, Tensor]) -> None:
    for name, tensor in weights.items():
        weights[name] = torch.nn.Parameter(tensor)


@pytest.mark.parametrize("change", [_transposed, _sliced, _one_storage, _tied, _parameters])
@pytest.mark.usefixtures("small_chunks")
def test_views_and_shared_storages_become_plain_tensors(
    change: Callable[[dict[str, Tensor]], None], tmp_path: Path, out: Path, write_snapshot: WriteSnapshot
) -> None:
    write_snapshot(tmp_path / "source", dtype=torch.bfloat16)
    weights = _resave(tmp_path / "source", change)
    _same_tensors(convert(tmp_path / "source", out).path, weights)


@pytest.mark.parametrize("name", ["layers.0.feed_forward.w1.weight", "norm.weight"])
def test_a_few_bytes_posing_as_a_large_tensor_are_refused(
    name: str, tmp_path: Path, out: Path, write_snapshot: WriteSnapshot
) -> None:
    def expand(weights: dict[str, Tensor]) -> None:
        weights[name] = torch.zeros(1).expand(weights[name].shape)

    write_snapshot(tmp_path / "source")
    _resave(tmp_path / "source", expand)
    with pytest.raises(MalformedCheckpoint, match="strides"):
        convert(tmp_path / "source", out)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("shape", [(0,), (), (1,), (3, 0, 5), (7, 11), (2, 3, 5, 7)])
def test_any_shape_streams_as_its_bytes(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_bytes, "CHUNK_BYTES", 16)
    tensor = torch.randn(shape)
    backwards = tuple(reversed(range(tensor.dim())))
    mirrored = tensor.permute(backwards).contiguous().permute(backwards)
    for view in (tensor, mirrored):
        chunks = [bytes(chunk) for chunk in stream_bytes(view)]
        assert b"".join(chunks) == tensor.numpy().tobytes()
        assert max(map(len, chunks), default=0) <= 16


# --- what cannot be converted --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout_name", ["consolidated", "huggingface"])
def test_weights_without_a_pickle_need_no_conversion(
    layout_name: str, tmp_path: Path, out: Path, write_snapshot: WriteSnapshot
) -> None:
    write_snapshot(tmp_path / "source", layout_name)
    with pytest.raises(BadRequest, match="nothing to convert"):
        convert(tmp_path / "source", out)


def test_what_is_there_already_is_not_replaced(tmp_path: Path, out: Path, write_snapshot: WriteSnapshot) -> None:
    write_snapshot(tmp_path / "source")
    (out / OUTPUT_NAME).write_bytes(b"mine")
    with pytest.raises(BadRequest, match="there already"):
        convert(tmp_path / "source", out)
    assert (out / OUTPUT_NAME).read_bytes() == b"mine"


class Spoiled(NamedTuple):
    change: Callable[[Path], object]
    error: type[CheckpointError]


def _cut(source: Path) -> None:
    path = source / "consolidated.00.pth"
    path.write_bytes(path.read_bytes()[:-1000])


SPOILED = {
    "cut short": Spoiled(_cut, MalformedCheckpoint),
    "a tensor missing": Spoiled(lambda s: _resave(s, lambda w: w.pop("norm.weight")), MissingTensor),
    "split over files": Spoiled(lambda s: (s / "consolidated.01.pth").write_bytes(b""), UnsupportedModel),
    "no zip": Spoiled(lambda s: (s / "consolidated.00.pth").write_bytes(b"PK" * 900), MalformedCheckpoint),
    "no configuration": Spoiled(lambda s: (s / "params.json").unlink(), CheckpointError),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_weights_leave_nothing(name: str, tmp_path: Path, out: Path, write_snapshot: WriteSnapshot) -> None:
    write_snapshot(tmp_path / "source")
    SPOILED[name].change(tmp_path / "source")
    with pytest.raises(SPOILED[name].error):
        convert(tmp_path / "source", out)
    assert list(out.iterdir()) == []


# --- the disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, code, error",
    [
        pytest.param("copy_file_range", errno.ENOSPC, DiskFull, marks=needs_copy_file_range),
        pytest.param("copy_file_range", errno.EIO, WriteFailed, marks=needs_copy_file_range),
        ("preadv", errno.EIO, WriteFailed),
        ("fsync", errno.EDQUOT, DiskFull),
        ("fsync", errno.EIO, WriteFailed),
    ],
)
@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.usefixtures("small_chunks")
def test_a_disk_that_fails_is_explained_and_nothing_is_left(
    at: int,
    call: str,
    code: int,
    error: type[Exception],
    tmp_path: Path,
    out: Path,
    write_snapshot: WriteSnapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_snapshot(tmp_path / "source")
    done, calls = getattr(os, call), []

    def fail(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) >= at:
            raise OSError(code, os.strerror(code))
        return done(*arguments)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(error) as caught:
        convert(tmp_path / "source", out)
    assert type(caught.value) is error
    assert OUTPUT_NAME in str(caught.value)
    assert list(out.iterdir()) == []


def test_the_file_is_durable_before_it_has_its_name(
    tmp_path: Path, out: Path, write_snapshot: WriteSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_snapshot(tmp_path / "source")
    steps: list[str] = []

    def watch(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            steps.append(name)
            return call(*arguments)

        return watched

    for name in ("pwrite", "fsync"):
        monkeypatch.setattr(os, name, watch(name, getattr(os, name)))
    monkeypatch.setattr(convert_module, "find_mappings", lambda _path: [])
    monkeypatch.setattr(Path, "replace", watch("replace", Path.replace))
    convert(tmp_path / "source", out)
    assert steps[-4:] == ["pwrite", "fsync", "replace", "fsync"]


def test_a_short_write_goes_on_where_it_ended(
    tmp_path: Path, out: Path, write_snapshot: WriteSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = write_snapshot(tmp_path / "source")
    pwrite = os.pwrite
    monkeypatch.setattr(convert_module, "find_mappings", lambda _path: [])
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:777], offset))
    _same_tensors(convert(tmp_path / "source", out).path, weights)


def test_a_disk_that_is_full_while_bytes_are_read_and_written_is_explained(
    tmp_path: Path, out: Path, write_snapshot: WriteSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_snapshot(tmp_path / "source")
    monkeypatch.setattr(convert_module, "find_mappings", lambda _path: [])
    pwrite, calls = os.pwrite, itertools.count()

    def fail(*arguments: Any) -> int:
        if next(calls) < 3:
            return pwrite(*arguments)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(DiskFull):
        convert(tmp_path / "source", out)
    assert list(out.iterdir()) == []


def test_a_disk_without_room_is_refused_before_a_byte(
    tmp_path: Path, out: Path, write_snapshot: WriteSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_snapshot(tmp_path / "source")
    size = convert(tmp_path / "source", out).size
    (out / OUTPUT_NAME).unlink()

    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda _path: Usage(size + 99))
    with pytest.raises(DiskFull, match="not enough space"):
        convert(tmp_path / "source", out, reserve_bytes=100)
    assert list(out.iterdir()) == []
    assert convert(tmp_path / "source", out, reserve_bytes=99).size == size


def test_a_directory_that_is_not_there_is_explained(tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    write_snapshot(tmp_path / "source")
    with pytest.raises(WriteFailed, match="absent"):
        convert(tmp_path / "source", tmp_path / "absent")


# --- as a process --------------------------------------------------------------------------------------------------

# Signals itself when something was written for the n-th time.
STRUCK = """
import itertools, os, sys
from mistral_runtime import file_writer, tensor_bytes
from mistral_runtime.__main__ import main
tensor_bytes.CHUNK_BYTES = file_writer.COPY_BYTES = 1000
number, at = int(sys.argv.pop(1)), int(sys.argv.pop(1))
advance, count = file_writer.FileWriter._advance, itertools.count(1)
def struck(self, length):
    if next(count) == at:
        os.kill(os.getpid(), number)
    advance(self, length)
file_writer.FileWriter._advance = struck
sys.exit(main(sys.argv[1:]))
"""


def _strike(number: signal.Signals, at: int, source: Path, out: Path) -> int:
    argv = [sys.executable, "-c", STRUCK, str(int(number)), str(at), "convert", str(source), str(out)]
    return subprocess.run(argv, env=ENVIRONMENT, capture_output=True, timeout=60, check=False).returncode


def test_a_kill_leaves_no_file_of_that_name(tmp_path: Path, out: Path, write_snapshot: WriteSnapshot) -> None:
    write_snapshot(tmp_path / "source")
    assert _strike(signal.SIGKILL, 40, tmp_path / "source", out) == -signal.SIGKILL
    assert [path.name for path in out.iterdir() if not path.name.startswith(".")] == []
    assert convert(tmp_path / "source", out).path.exists()


def test_a_stop_leaves_nothing_at_all(tmp_path: Path, out: Path, write_snapshot: WriteSnapshot) -> None:
    write_snapshot(tmp_path / "source")
    assert _strike(signal.SIGTERM, 40, tmp_path / "source", out) == 130
    assert list(out.iterdir()) == []


def _large_pth(directory: Path) -> int:
    """Write a model of about 330 MB; return its size."""
    directory.mkdir()
    weights = {
        name: torch.zeros(shape, dtype=torch.bfloat16) + len(name) for name, shape in LARGE.tensor_shapes().items()
    }
    torch.save(weights, directory / "consolidated.00.pth")
    keys = ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size")
    params = {key: getattr(LARGE, key) for key in keys}
    (directory / "params.json").write_text(json.dumps(params | {"sliding_window": 8}))
    return (directory / "consolidated.00.pth").stat().st_size


def _told(*arguments: object) -> dict[str, Any]:
    """Return what a process of its own printed."""
    argv = [sys.executable, "-m", "mistral_runtime", *map(str, arguments), "--json"]
    done = subprocess.run(argv, env=ENVIRONMENT, stdout=subprocess.PIPE, timeout=120, check=True)
    return dict(json.loads(done.stdout))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are given back on Linux only")
def test_memory_does_not_grow_with_the_model(tmp_path: Path, out: Path, write_snapshot: WriteSnapshot) -> None:
    """Peak resident size, as the kernel counted it, beside that of a tiny model: torch's own share differs by build."""
    size = _large_pth(tmp_path / "large")
    write_snapshot(tmp_path / "tiny")
    (tmp_path / "tiny-out").mkdir()
    base = _told("convert", tmp_path / "tiny", tmp_path / "tiny-out")["peak_rss_bytes"]
    converted = _told("convert", tmp_path / "large", out)
    (out / "params.json").write_bytes((tmp_path / "large" / "params.json").read_bytes())
    hashed = _told("digest", tmp_path / "large", out)
    assert size > 300_000_000
    assert converted["peak_rss_bytes"] - base < size // 3
    assert hashed["peak_rss_bytes"] - base < size // 3
    assert len({snapshot["tensors_sha256"] for snapshot in hashed["snapshots"]}) == 1


# --- the command line ----------------------------------------------------------------------------------------------


def test_the_command_says_what_it_wrote(
    tmp_path: Path, out: Path, write_snapshot: WriteSnapshot, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = write_snapshot(tmp_path / "source", dtype=torch.bfloat16)
    assert main(["convert", str(tmp_path / "source"), str(out), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    data = (out / OUTPUT_NAME).read_bytes()
    assert told["seconds"] > 0
    assert told["peak_rss_bytes"] > 10**7
    del told["seconds"], told["peak_rss_bytes"]
    assert told == {
        "file": OUTPUT_NAME,
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "recipe": RECIPE,
        "tensors": len(weights),
        "dtype": "BF16",
    }
    (out / OUTPUT_NAME).unlink()
    assert main(["convert", str(tmp_path / "source"), str(out)]) == 0
    text = f"{out / OUTPUT_NAME}: {len(weights)} tensors, {len(data)} bytes, sha256:{told['sha256']}\n"
    assert capfd.readouterr() == (text, "")


def test_a_program_gets_errors_where_it_looks_for_results(
    tmp_path: Path, out: Path, write_snapshot: WriteSnapshot, capfd: pytest.CaptureFixture[str]
) -> None:
    write_snapshot(tmp_path)
    _cut(tmp_path)
    assert main(["convert", str(tmp_path), str(out)]) == 40
    printed = capfd.readouterr()
    assert printed.out == ""
    assert main(["convert", str(tmp_path), str(out), "--json"]) == 40
    told = capfd.readouterr()
    error = json.loads(told.out)["error"]
    assert error["kind"] == "malformed-checkpoint"
    assert printed.err == f"error: {error['what']}\n  {error['detail']}\n  {error['hint']}\n"
    assert told.err == ""
