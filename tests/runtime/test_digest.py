"""One digest for a tensor whatever the file it comes from, and another one for anything that differs."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mistral_runtime import tensor_bytes
from mistral_runtime.__main__ import main
from mistral_runtime.digest import digest_snapshot
from mistral_runtime.errors import (
    CheckpointError,
    DtypeMismatch,
    MalformedCheckpoint,
    MissingFile,
    MissingShard,
    ShapeMismatch,
    UnsafePickle,
)

WriteSnapshot = Callable[..., dict[str, Tensor]]
SHARD = "model-00002-of-00002.safetensors"


def _edit_safetensors(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_layout_has_the_same_digests(
    dtype: torch.dtype, layout: str, tmp_path: Path, write_snapshot: WriteSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is the tensors before they were written; the chunks are small enough to matter."""
    monkeypatch.setattr(tensor_bytes, "CHUNK_BYTES", 1000)
    weights = write_snapshot(tmp_path, layout, dtype=dtype)
    found = digest_snapshot(tmp_path)
    assert list(found.tensors) == sorted(weights)
    for name, tensor in weights.items():
        told = found.tensors[name]
        assert told.sha256 == hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest(), name
        assert (told.dtype, told.shape) == ("BF16" if dtype is torch.bfloat16 else "F32", tuple(tensor.shape))
    assert found.tensor_bytes == sum(tensor.nbytes for tensor in weights.values())


def test_views_and_derived_buffers_count_as_what_they_stand_for(tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    weights = write_snapshot(tmp_path / "pth")
    name = "layers.0.attention.wo.weight"
    torch.save({**weights, name: weights[name].t().contiguous().t()}, tmp_path / "pth/consolidated.00.pth")
    write_snapshot(tmp_path / "hub", "huggingface")
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _edit_safetensors(tmp_path / "hub" / SHARD, lambda tensors: tensors.update({buffer: torch.ones(8)}))
    assert digest_snapshot(tmp_path / "pth").sha256 == digest_snapshot(tmp_path / "hub").sha256


def _flip_a_bit(tensors: dict[str, Tensor]) -> None:
    tensors["norm.weight"].view(torch.int32)[5] ^= 1


def _reshape(tensors: dict[str, Tensor]) -> None:
    tensors["norm.weight"] = tensors["norm.weight"].reshape(8, 8)


def _retype(tensors: dict[str, Tensor]) -> None:
    tensors["norm.weight"] = tensors["norm.weight"].to(torch.float16)


@pytest.mark.parametrize("change", [_flip_a_bit, _reshape, _retype])
def test_whatever_differs_has_another_digest(
    change: Callable[[dict[str, Tensor]], None], tmp_path: Path, write_snapshot: WriteSnapshot
) -> None:
    write_snapshot(tmp_path, "consolidated")
    before = digest_snapshot(tmp_path)
    _edit_safetensors(tmp_path / "consolidated.safetensors", change)
    after = digest_snapshot(tmp_path)
    assert {n for n in before.tensors if before.tensors[n] != after.tensors[n]} == {"norm.weight"}
    assert before.sha256 != after.sha256


def test_tensors_that_make_no_model_are_digested_too(tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    """So that it can be told which one is missing."""

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["norm.weight"]
        tensors["stranger"] = torch.zeros(0)
        tensors["scalar"] = torch.tensor(3.0)

    write_snapshot(tmp_path, "consolidated")
    (tmp_path / "params.json").unlink()
    _edit_safetensors(tmp_path / "consolidated.safetensors", change)
    found = digest_snapshot(tmp_path).tensors
    assert "norm.weight" not in found
    assert (found["stranger"].shape, found["stranger"].sha256) == ((0,), hashlib.sha256().hexdigest())
    assert found["scalar"].sha256 == hashlib.sha256(struct.pack("<f", 3.0)).hexdigest()


# --- hostile weights -----------------------------------------------------------------------------------------------


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _claim_a_header(path: Path, length: int) -> None:
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])


def _overlap(path: Path) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first, second = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])[:2]
    begin, end = header[first]["data_offsets"]
    size = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
    header[second]["data_offsets"] = [begin, begin + size]
    assert end > begin
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])


def _run_code(path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (exec, ("raise SystemExit(66)",))

    torch.save({"norm.weight": Attack()}, path)


def _two_names(path: Path) -> None:
    _edit_safetensors(path, lambda tensors: tensors.update({"norm.weight": torch.ones(64)}))


HOSTILE: dict[str, tuple[str, str, Callable[[Path], object], type[CheckpointError]]] = {
    "safetensors cut short": ("consolidated", "consolidated.safetensors", _cut, MalformedCheckpoint),
    "shard cut short": ("huggingface", SHARD, _cut, MalformedCheckpoint),
    "header beyond the file": (
        "consolidated",
        "consolidated.safetensors",
        lambda path: _claim_a_header(path, 1 << 40),
        MalformedCheckpoint,
    ),
    "header of the largest number": (
        "huggingface",
        SHARD,
        lambda path: _claim_a_header(path, (1 << 64) - 1),
        MalformedCheckpoint,
    ),
    "overlapping tensors": ("consolidated", "consolidated.safetensors", _overlap, MalformedCheckpoint),
    "shard missing": ("huggingface", SHARD, Path.unlink, MissingShard),
    "pickle that runs code": ("pth", "consolidated.00.pth", _run_code, UnsafePickle),
    "pickle cut short": ("pth", "consolidated.00.pth", _cut, MalformedCheckpoint),
    "one tensor under two names": ("huggingface", SHARD, _two_names, MalformedCheckpoint),
    "numbers of a strange type": (
        "consolidated",
        "consolidated.safetensors",
        lambda path: _edit_safetensors(path, lambda t: t.update(x=torch.ones(3, dtype=torch.int64))),
        DtypeMismatch,
    ),
    "queries that are no whole heads": (
        "huggingface",
        SHARD,
        lambda path: _edit_safetensors(path, lambda t: t.update({_A_QUERY: torch.ones(17, 64)})),
        ShapeMismatch,
    ),
}
_A_QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_weights_are_refused_in_words(
    name: str, tmp_path: Path, write_snapshot: WriteSnapshot, capfd: pytest.CaptureFixture[str]
) -> None:
    layout_name, file, spoil, error = HOSTILE[name]
    write_snapshot(tmp_path, layout_name)
    spoil(tmp_path / file)
    with pytest.raises(error) as caught:
        digest_snapshot(tmp_path)
    assert type(caught.value) is error
    assert main(["digest", str(tmp_path), "--json"]) == 40
    printed = capfd.readouterr()
    assert json.loads(printed.out)["error"]["what"] == caught.value.what
    assert printed.err == ""


def test_an_empty_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(MissingFile):
        digest_snapshot(tmp_path)


# --- the command line ----------------------------------------------------------------------------------------------


def test_several_directories_are_one_answer(
    tmp_path: Path, write_snapshot: WriteSnapshot, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("pth", "huggingface"):
        write_snapshot(tmp_path / name, name)
    assert main(["digest", str(tmp_path / "pth"), str(tmp_path / "huggingface"), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    a, b = told["snapshots"]
    assert (a["layout"], b["layout"]) == ("consolidated.pth", "huggingface")
    assert (a["files"], len(b["files"])) == (["consolidated.00.pth"], 2)
    assert a["directory"] == str(tmp_path / "pth")
    assert (a["tensors"], a["tensors_sha256"]) == (b["tensors"], b["tensors_sha256"])
    lines = [[name, t["dtype"], t["shape"], t["sha256"]] for name, t in sorted(a["tensors"].items())]
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    assert a["tensors_sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_people_get_a_line_a_tensor(
    tmp_path: Path, write_snapshot: WriteSnapshot, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = write_snapshot(tmp_path)
    assert main(["digest", str(tmp_path)]) == 0
    *lines, last = capfd.readouterr().out.splitlines()
    assert len(lines) == len(weights)
    assert lines[0].endswith("  F32 [32, 64]  'layers.0.attention.wk.weight'")
    assert last.endswith(f"  all {len(weights)} tensors of {tmp_path}")
