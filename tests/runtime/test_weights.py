"""Weight files that are not what they claim: each with the error it must raise, and nothing run or read beyond it."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mistral_runtime.config import ModelConfig
from mistral_runtime.errors import (
    CheckpointError,
    DtypeMismatch,
    MalformedCheckpoint,
    MissingFile,
    MissingShard,
    MissingTensor,
    ShapeMismatch,
    UnexpectedTensor,
    UnsafePickle,
    UnsupportedModel,
)
from mistral_runtime.safetensors_header import load_header
from mistral_runtime.snapshot import find_weights, load_config
from mistral_runtime.transformer import Transformer
from mistral_runtime.weights import load_model, open_checkpoint

WriteSnapshot = Callable[..., dict[str, Tensor]]


def _load(directory: Path) -> Transformer:
    files = find_weights(directory)
    config = load_config(directory, files.layout)
    return load_model(open_checkpoint(files, config), config)


def _refused(directory: Path, error: type[CheckpointError], *mentions: str) -> None:
    """Assert that loading raises `error` in three lines that mention every string."""
    with pytest.raises(error) as caught:
        _load(directory)
    assert type(caught.value) is error
    assert str(caught.value).count("\n") == 2
    for mention in mentions:
        assert mention in str(caught.value)


# --- which files are read -------------------------------------------------------------------------------------


def test_safetensors_are_preferred_to_pickle(tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    for layout in ("pth", "huggingface", "consolidated"):
        write_snapshot(tmp_path, layout)
    files = find_weights(tmp_path)
    assert files.layout == "consolidated.safetensors"
    assert files.passed_over == ("model.safetensors.index.json", "consolidated.00.pth")
    (tmp_path / "consolidated.safetensors").unlink()
    assert find_weights(tmp_path).layout == "huggingface"


def test_one_unsharded_file_needs_no_index(tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    weights = write_snapshot(tmp_path, "huggingface")
    merged: dict[str, Tensor] = {}
    for shard in sorted(tmp_path.glob("model-*.safetensors")):
        merged |= load_file(shard)
        shard.unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file(merged, tmp_path / "model.safetensors")
    for name, tensor in _load(tmp_path).state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_links_into_a_store_are_followed(tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    write_snapshot(tmp_path / "blobs", "huggingface")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for blob in (tmp_path / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(blob)
    assert _load(snapshot).config.dim == 64


def test_empty_directory_and_no_directory_are_told(tmp_path: Path) -> None:
    _refused(tmp_path, MissingFile, "consolidated.safetensors", "consolidated.00.pth")
    _refused(tmp_path / "absent", MissingFile, "absent")


def test_configuration_must_be_there(tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    write_snapshot(tmp_path)
    (tmp_path / "params.json").unlink()
    _refused(tmp_path, MissingFile, "params.json or config.json")


def test_weights_split_for_several_devices_are_refused(tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    write_snapshot(tmp_path)
    (tmp_path / "consolidated.01.pth").write_bytes(b"")
    _refused(tmp_path, UnsupportedModel, "consolidated.01.pth")


@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_weights_does_not_block(tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    for layout, name in (("pth", "consolidated.00.pth"), ("consolidated", "consolidated.safetensors")):
        write_snapshot(tmp_path / layout, layout)
        (tmp_path / layout / name).unlink()
        os.mkfifo(tmp_path / layout / name)
        _refused(tmp_path / layout, MissingFile, name, "regular file")


# --- names, shapes, dtypes: the same rules for every layout ------------------------------------------------------


def _edit(directory: Path, layout: str, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Apply `change` to the tensors of a written snapshot (of the second shard where there are two)."""
    if layout == "pth":
        path = directory / "consolidated.00.pth"
        tensors = torch.load(path, weights_only=True)
        change(tensors)
        torch.save(tensors, path)
        return
    name = "consolidated.safetensors" if layout == "consolidated" else "model-00002-of-00002.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(directory / name).items()}
    change(tensors)
    save_file(tensors, directory / name)


def _last_wv(tensors: dict[str, Tensor]) -> str:
    return next(
        name for name in sorted(tensors) if name.endswith(("1.attention.wv.weight", "1.self_attn.v_proj.weight"))
    )


def test_missing_tensor_is_named(layout: str, tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    write_snapshot(tmp_path, layout)
    _edit(tmp_path, layout, lambda tensors: tensors.__delitem__(_last_wv(tensors)))
    _refused(tmp_path, MissingTensor, "v_proj" if layout == "huggingface" else "layers.1.attention.wv.weight")


def test_extra_tensor_is_named(layout: str, tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    write_snapshot(tmp_path, layout)
    _edit(tmp_path, layout, lambda tensors: tensors.__setitem__("layers.9.stowaway", torch.zeros(3)))
    _refused(tmp_path, UnexpectedTensor, "layers.9.stowaway")


def test_wrong_shape_is_told_with_both_shapes(layout: str, tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    write_snapshot(tmp_path, layout)
    # The transpose has as many bytes: only the shape can give it away.
    _edit(
        tmp_path, layout, lambda tensors: tensors.update({_last_wv(tensors): tensors[_last_wv(tensors)].T.contiguous()})
    )
    _refused(tmp_path, ShapeMismatch, "(32, 64)", "(64, 32)")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8])
def test_wrong_dtype_is_told(dtype: torch.dtype, layout: str, tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    write_snapshot(tmp_path, layout)
    _edit(tmp_path, layout, lambda tensors: tensors.update({_last_wv(tensors): tensors[_last_wv(tensors)].to(dtype)}))
    _refused(tmp_path, DtypeMismatch, "v_proj" if layout == "huggingface" else "wv")


def test_derived_rotary_buffers_of_old_exports_are_ignored(tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    write_snapshot(tmp_path, "huggingface")
    buffer = "model.layers.1.self_attn.rotary_emb.inv_freq"
    _edit(tmp_path, "huggingface", lambda tensors: tensors.__setitem__(buffer, torch.zeros(8)))
    assert _load(tmp_path).config.n_layers == 2


# --- pickles ------------------------------------------------------------------------------------------------------


class _Attack:
    """Pickles into a call of os.system that would leave a file behind."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.sentinel}",)


def test_pickle_that_would_run_code_does_not_run_it(tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    weights: dict[str, Any] = dict(write_snapshot(tmp_path))
    sentinel = tmp_path / "ran"
    weights["norm.weight"] = _Attack(sentinel)
    torch.save(weights, tmp_path / "consolidated.00.pth")
    _refused(tmp_path, UnsafePickle, "posix.system")
    assert not sentinel.exists()
    # The attack is real: an unguarded load runs it.
    torch.load(tmp_path / "consolidated.00.pth", weights_only=False)
    assert sentinel.exists()


def test_pickle_that_hides_its_globals_does_not_run_either(tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    # Protocol 4 takes the global's name from the stack, where a listing of the instructions need not find it.
    write_snapshot(tmp_path)
    sentinel = tmp_path / "ran"
    _replace_pickle(tmp_path / "consolidated.00.pth", pickle.dumps(_Attack(sentinel), protocol=4))
    with pytest.raises((UnsafePickle, MalformedCheckpoint)):
        _load(tmp_path)
    assert not sentinel.exists()


def test_bare_pickle_that_would_run_code_does_not_run_it(tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    write_snapshot(tmp_path)
    sentinel = tmp_path / "ran"
    (tmp_path / "consolidated.00.pth").write_bytes(pickle.dumps(_Attack(sentinel)))
    _refused(tmp_path, MalformedCheckpoint, "consolidated.00.pth")
    assert not sentinel.exists()


def _replace_pickle(path: Path, payload: bytes) -> None:
    """Put another data.pkl into the zip archive that torch.save wrote."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, payload if name.endswith("data.pkl") else data)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x80\x02.",
        b"\x80\x02]q\x00.",
        b"\x80\x02cbuiltins\neval\nX\x04\x00\x00\x001+1 \x85R.",
        b"\x80\x02c__builtin__\ngetattr\n.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02" + b"(" * 5000 + b".",
        b"\x80\x02}(X\x01\x00\x00\x00aK\x01u.",
        b"\xff" * 100,
    ],
    ids=["empty", "no-value", "list", "eval", "getattr", "rebuild-nothing", "marks", "not-a-tensor", "noise"],
)
def test_hostile_instructions_in_the_archive_are_refused(
    payload: bytes, tmp_path: Path, write_snapshot: WriteSnapshot
) -> None:
    write_snapshot(tmp_path)
    _replace_pickle(tmp_path / "consolidated.00.pth", payload)
    with pytest.raises((UnsafePickle, MalformedCheckpoint)) as caught:
        _load(tmp_path)
    assert "consolidated.00.pth" in caught.value.what


def _number(value: int, size: int) -> bytes:
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little")


# A tuple of a few bytes that has 2 to the power of 60 parts when it is hashed or written out.
_DOUBLING = b")" + b"q\x00h\x00\x86" * 60
GREEDY_PICKLES = {
    "doubling-key": b"\x80\x02}" + _DOUBLING + b"K\x01s.",
    "doubling-storage-name": b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    + _DOUBLING
    + b"X\x03\x00\x00\x00cpuK\x04tQ.",
    "doubling-argument": b"\x80\x02ccollections\nOrderedDict\n" + _DOUBLING + b"\x85R.",
    "storage-called": b"\x80\x02ctorch\nFloatStorage\n" + _number(10**10, 5) + b"\x85R.",
    "weights-as-state": b"\x80\x02ccollections\nOrderedDict\n)R(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQb.",
    "bytearray": b"\x80\x02cbuiltins\nbytearray\n" + _number(10**10, 5) + b"\x85R.",
    "bytearray-beyond-any-memory": b"\x80\x02cbuiltins\nbytearray\n" + _number(10**14, 6) + b"\x85R.",
    "untyped-storage": b"\x80\x02ctorch.storage\nUntypedStorage\n" + _number(10**10, 5) + b"\x85R.",
    "number-of-2040-bits": b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".",
    "string-of-4-gigabytes": b"\x80\x02X\xff\xff\xff\xff.",
    "protocol-4": b"\x80\x04}.",
    "many-dicts": b"\x80\x02" + b"}" * (1 << 20) + b".",
}


@pytest.mark.parametrize("name", GREEDY_PICKLES)
def test_pickle_that_asks_for_memory_is_refused_before_it_gets_any(
    name: str, tmp_path: Path, write_snapshot: WriteSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_snapshot(tmp_path)
    _replace_pickle(tmp_path / "consolidated.00.pth", GREEDY_PICKLES[name])
    monkeypatch.setattr(torch, "load", lambda *_args, **_kwargs: pytest.fail("the pickle was run"))
    with pytest.raises((UnsafePickle, MalformedCheckpoint)) as caught:
        _load(tmp_path)
    assert "consolidated.00.pth" in caught.value.what


def test_pickle_that_would_inflate_is_refused_unread(tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    write_snapshot(tmp_path)
    with zipfile.ZipFile(tmp_path / "consolidated.00.pth", "w") as archive:
        archive.writestr("a/data.pkl", bytes(64 << 20), zipfile.ZIP_DEFLATED)
    _refused(tmp_path, MalformedCheckpoint, "uncompressed", "data.pkl")


@pytest.mark.parametrize("record", ["a/data.pkl", "a/byteorder"])
def test_large_record_beside_the_weights_is_refused(record: str, tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    write_snapshot(tmp_path)
    with zipfile.ZipFile(tmp_path / "consolidated.00.pth", "w") as archive:
        archive.writestr(record, bytes((16 << 20) + 1))
    _refused(tmp_path, MalformedCheckpoint, str((16 << 20) + 1), record)


@pytest.mark.parametrize("second", ["archive/DATA.PKL", "other/data.pkl", "archive/x/data.pkl"])
def test_second_pickle_is_refused(second: str, tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    write_snapshot(tmp_path)
    path = tmp_path / "consolidated.00.pth"
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    folder = next(iter(members)).partition("/")[0]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (members | {second.replace("archive", folder): b"\x80\x02}."}).items():
            archive.writestr(name, data)
    _refused(tmp_path, MalformedCheckpoint, str(path))


@pytest.mark.parametrize("kind", [MemoryError, RecursionError])
def test_running_out_while_unpickling_is_the_files_fault(
    kind: type[Exception], tmp_path: Path, write_snapshot: WriteSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_snapshot(tmp_path)

    def exhausted(*_args: Any, **_kwargs: Any) -> None:
        raise kind

    monkeypatch.setattr(torch, "load", exhausted)
    _refused(tmp_path, MalformedCheckpoint, kind.__name__)


def test_state_dicts_as_modules_and_parameters_save_them_are_accepted(
    tmp_path: Path, write_snapshot: WriteSnapshot
) -> None:
    weights = write_snapshot(tmp_path)
    ordered = OrderedDict((name, torch.nn.Parameter(tensor)) for name, tensor in weights.items())
    ordered._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    torch.save(ordered, tmp_path / "consolidated.00.pth")
    for name, tensor in _load(tmp_path).state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_a_few_bytes_posing_as_a_large_tensor_are_refused(tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    weights = write_snapshot(tmp_path)
    name = "layers.0.feed_forward.w1.weight"
    weights[name] = torch.zeros(1).expand(weights[name].shape)
    torch.save(weights, tmp_path / "consolidated.00.pth")
    _refused(tmp_path, MalformedCheckpoint, name, "strides")


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -1])
def test_truncated_pth_is_refused(keep: Any, tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    write_snapshot(tmp_path)
    path = tmp_path / "consolidated.00.pth"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    _refused(tmp_path, MalformedCheckpoint, str(path))


@pytest.mark.parametrize("spoil", ["first record cut", "last record cut", "record missing", "compressed", "all empty"])
def test_archive_whose_records_do_not_match_its_tensors_is_refused(
    spoil: str, tmp_path: Path, write_snapshot: WriteSnapshot
) -> None:
    write_snapshot(tmp_path)
    path = tmp_path / "consolidated.00.pth"
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    records = sorted((name for name in members if "/data/" in name), key=lambda name: int(name.rsplit("/", 1)[1]))
    if spoil == "first record cut":
        members[records[0]] = members[records[0]][:4]
    elif spoil == "last record cut":
        members[records[-1]] = members[records[-1]][:4]
    elif spoil == "record missing":
        del members[records[3]]
    elif spoil == "all empty":
        members |= dict.fromkeys(records, b"")
    method = zipfile.ZIP_DEFLATED if spoil == "compressed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    _refused(tmp_path, MalformedCheckpoint, str(path))


# --- safetensors headers ------------------------------------------------------------------------------------------


def _file(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)
    return path


def _entry(begin: int, end: int, *, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def test_header_of_two_gigabytes_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 2 << 30))
        stream.truncate(3 << 30)  # sparse: the claim fits into the file, only the cap refuses it
    with pytest.raises(MalformedCheckpoint, match="2147483648"):
        load_header(path)


HOSTILE_HEADERS: dict[str, tuple[object, bytes, str]] = {
    "overlap": ({"a": _entry(0, 8), "b": _entry(4, 12)}, bytes(12), "overlaps"),
    "same-bytes-twice": ({"a": _entry(0, 8), "b": _entry(0, 8)}, bytes(8), "overlaps"),
    "hole": ({"a": _entry(0, 4), "b": _entry(8, 12)}, bytes(12), "hole"),
    "hole-at-start": ({"a": _entry(4, 8)}, bytes(8), "hole"),
    "bytes-left-over": ({"a": _entry(0, 4)}, bytes(8), "end at byte 4 of 8"),
    "beyond-the-end": ({"a": _entry(0, 16)}, bytes(8), "end at byte 16 of 8"),
    "backwards": ({"a": _entry(8, 0, shape=[0])}, bytes(8), "data_offsets"),
    "negative": ({"a": _entry(-4, 0, shape=[4])}, bytes(4), "data_offsets"),
    "shape-times-dtype": ({"a": _entry(0, 8, dtype="F32", shape=[3])}, bytes(8), "need 12"),
    "overflowing-shape": ({"a": _entry(0, 8, shape=[1 << 40, 1 << 40])}, bytes(8), "need"),
    "negative-shape": ({"a": _entry(0, 4, shape=[-2, -2])}, bytes(4), "shape"),
    "true-as-a-size": ({"a": _entry(0, 1, shape=[True])}, bytes(1), "shape"),
    "float-shape": ({"a": {"dtype": "U8", "shape": [4.0], "data_offsets": [0, 4]}}, bytes(4), "shape"),
    "too-many-dimensions": ({"a": _entry(0, 1, shape=[1] * 20)}, bytes(1), "shape"),
    "unknown-dtype": ({"a": _entry(0, 4, dtype="F4")}, bytes(4), "F4"),
    "extra-field": ({"a": _entry(0, 4) | {"code": "x"}}, bytes(4), "exactly"),
    "missing-field": ({"a": {"dtype": "U8", "shape": [4]}}, bytes(4), "exactly"),
    "not-an-object": ({"a": 7}, bytes(4), "exactly"),
    "duplicate-name": (b'{"a":{},"a":{}}', b"", "twice"),
    "array": ([], b"", "object"),
    "not-json": (b"{", b"", "Expecting"),
    "not-utf8": (b"\xff\xff", b"", "utf-8"),
    "deep": (b"[" * 200_000, b"", "deep"),
    "metadata-not-text": ({"__metadata__": {"a": 1}, "a": _entry(0, 1)}, bytes(1), "__metadata__"),
}


@pytest.mark.parametrize("name", HOSTILE_HEADERS)
def test_hostile_header_is_refused(name: str, tmp_path: Path) -> None:
    header, data, mention = HOSTILE_HEADERS[name]
    path = _file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(MalformedCheckpoint) as caught:
        load_header(path)
    assert mention in caught.value.detail
    assert str(path) in caught.value.what


@pytest.mark.parametrize("content", [b"", b"\x01", bytes(7), struct.pack("<Q", 1), struct.pack("<Q", 2**64 - 1)])
def test_file_too_short_for_its_header_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(MalformedCheckpoint):
        load_header(tmp_path / "x.safetensors")


def test_what_the_library_writes_is_accepted(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, 5), "b": torch.zeros(0, 4), "c": torch.ones(2, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    entries = load_header(tmp_path / "x.safetensors")
    assert {name: entry.shape for name, entry in entries.items()} == {"a": (3, 5), "b": (0, 4), "c": (2,)}


def test_data_that_starts_at_an_odd_offset_loads(
    tmp_path: Path, tiny_config: ModelConfig, write_snapshot: WriteSnapshot
) -> None:
    weights = write_snapshot(tmp_path, "consolidated", dtype=torch.bfloat16)
    path = tmp_path / "consolidated.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length].rstrip()
    header += b" " * (1 - (8 + len(header)) % 2)
    assert (8 + len(header)) % 2 == 1
    _file(path, header, data[8 + length :])
    for name, tensor in _load(tmp_path).state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("layout", ["consolidated", "huggingface"])
@pytest.mark.parametrize("cut", [1, 1000])
def test_truncated_safetensors_are_refused(
    cut: int, layout: str, tmp_path: Path, write_snapshot: WriteSnapshot
) -> None:
    write_snapshot(tmp_path, layout)
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-cut])
    _refused(tmp_path, MalformedCheckpoint, str(path))


def test_longer_safetensors_are_refused(tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    write_snapshot(tmp_path, "consolidated")
    with (tmp_path / "consolidated.safetensors").open("ab") as stream:
        stream.write(b"\0")
    _refused(tmp_path, MalformedCheckpoint, "consolidated.safetensors")


# --- the index of shards --------------------------------------------------------------------------------------------


def _edit_index(directory: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_missing_shard_is_named(tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    write_snapshot(tmp_path, "huggingface")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    _refused(tmp_path, MissingShard, "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b.safetensors", "x.bin", "x\0.safetensors"],
)
def test_shard_outside_the_directory_is_refused(shard: str, tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    write_snapshot(tmp_path / "snapshot", "huggingface")
    (tmp_path / "x.safetensors").write_bytes(b"")
    _edit_index(tmp_path / "snapshot", lambda names: names.update({"lm_head.weight": shard}))
    _refused(tmp_path / "snapshot", MalformedCheckpoint, "unsafe shard")


def test_index_that_points_to_the_wrong_shard_is_refused(tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    write_snapshot(tmp_path, "huggingface")
    _edit_index(tmp_path, lambda names: names.update({"lm_head.weight": "model-00002-of-00002.safetensors"}))
    _refused(tmp_path, MissingTensor, "lm_head.weight", "model-00002-of-00002.safetensors")


def test_tensor_in_two_shards_is_refused(tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    write_snapshot(tmp_path, "huggingface")
    first = load_file(tmp_path / "model-00001-of-00002.safetensors")
    _edit(tmp_path, "huggingface", lambda tensors: tensors.update({"lm_head.weight": first["lm_head.weight"]}))
    _refused(tmp_path, MalformedCheckpoint, "lm_head.weight", "model-00001-of-00002.safetensors")


@pytest.mark.parametrize("content", [b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b"nonsense"])
def test_index_without_a_map_is_refused(content: bytes, tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    write_snapshot(tmp_path, "huggingface")
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    _refused(tmp_path, MalformedCheckpoint, "model.safetensors.index.json")
