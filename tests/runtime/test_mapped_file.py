"""Addresses of mapped files to offsets in them, from the kernel's own table."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from mistral_runtime.mapped_file import Mapping, find_mappings, offset_of

MAPPINGS = [Mapping(0x1000, 0x3000, 0), Mapping(0x8000, 0x9000, 0x2000)]


@pytest.mark.parametrize(
    "address, length, offset",
    [
        (0x1000, 0x2000, 0),
        (0x1010, 1, 0x10),
        (0x8000, 0x1000, 0x2000),
        (0x8FFF, 1, 0x2FFF),
        (0x0FFF, 1, None),
        (0x2FFF, 2, None),
        (0x3000, 1, None),
        (0x8FFF, 2, None),
    ],
)
def test_only_what_lies_in_one_mapping_has_an_offset(address: int, length: int, offset: int | None) -> None:
    assert offset_of(address, length, MAPPINGS) == offset


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="told on Linux only")
def test_a_mapped_file_is_found_through_a_link(tmp_path: Path) -> None:
    data = bytes(range(256)) * 64
    (tmp_path / "a file").write_bytes(data)
    (tmp_path / "link").symlink_to(tmp_path / "a file")
    mapped = torch.from_file(str(tmp_path / "a file"), size=len(data), dtype=torch.uint8)
    mappings = find_mappings(tmp_path / "link")
    assert offset_of(mapped.data_ptr(), len(data), mappings) == 0
    assert offset_of(mapped[777:].data_ptr(), 1000, mappings) == 777
    assert offset_of(torch.zeros(8).data_ptr(), 32, mappings) is None
    assert offset_of(mapped.data_ptr(), len(data) + mmap.PAGESIZE, mappings) is None


def test_another_file_of_that_name_or_number_is_not_taken_for_it(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.touch()
    inode = path.stat().st_ino
    lines = [
        f"1000-2000 r--p 00000000 fe:00 {inode}                     {path}",
        f"3000-4000 r--p 00001000 fe:00 {inode + 1}                     {path}",
        f"5000-6000 r--p 00001000 fe:00 {inode}                     {path} (deleted)",
        "7000-8000 rw-p 00000000 00:00 0 ",
        "9000-a000 rw-p 00000000 00:00 0                          [heap]",
        "nonsense",
    ]
    (tmp_path / "maps").write_text("\n".join(lines))
    assert find_mappings(path, tmp_path / "maps") == [Mapping(0x1000, 0x2000, 0)]


def test_where_nothing_is_told_nothing_is_found(tmp_path: Path) -> None:
    (tmp_path / "weights").touch()
    assert find_mappings(tmp_path / "weights", tmp_path / "absent") == []
    assert find_mappings(tmp_path / "absent") == []
