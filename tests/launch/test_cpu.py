"""Threads: what the affinity mask and the control group's quota leave, whichever is less."""

from __future__ import annotations

import os

import pytest

from mistral_fetch.launch.cpu import usable_threads


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of eight cores with control groups in ``tmp_path/cgroup``."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    root = tmp_path / "cgroup"
    (root / "a/b").mkdir(parents=True)
    own = tmp_path / "self"
    own.write_text("0::/a/b\n")

    def threads():
        return usable_threads(root, own)

    threads.root, threads.own = root, own
    return threads


def test_without_a_quota_the_affinity_counts(machine):
    assert machine() == 8


@pytest.mark.parametrize(
    "limit, expected",
    [
        ("max 100000", 8),
        ("200000 100000", 2),
        ("150000 100000", 2),  # one and a half cores: a second thread still helps
        ("10000 100000", 1),
        ("9900000 100000", 8),
        ("100000", 8),  # malformed: no quota that we know of
        ("many 100000", 8),
        ("100000 0", 8),
        ("", 8),
    ],
)
def test_a_quota_caps_them(machine, limit, expected):
    (machine.root / "a/b/cpu.max").write_text(limit)
    assert machine() == expected


def test_the_tightest_quota_on_the_way_up_counts(machine):
    (machine.root / "a/cpu.max").write_text("300000 100000")
    (machine.root / "a/b/cpu.max").write_text("500000 100000")
    assert machine() == 3


def test_in_a_container_the_root_itself_has_the_quota(machine):
    (machine.root / "cpu.max").write_text("400000 100000")
    machine.own.write_text("0::/../../elsewhere\n")
    assert machine() == 4


def test_version_one_of_control_groups(machine):
    (machine.root / "cpu").mkdir()
    (machine.root / "cpu/cpu.cfs_quota_us").write_text("250000")
    (machine.root / "cpu/cpu.cfs_period_us").write_text("100000")
    machine.own.write_text("4:cpu,cpuacct:/docker/x\n")
    assert machine() == 3
    (machine.root / "cpu/cpu.cfs_quota_us").write_text("-1")
    assert machine() == 8


def test_without_control_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3}, raising=False)
    assert usable_threads(tmp_path / "none", tmp_path / "none either") == 1


def test_this_machine_has_at_least_one():
    assert 1 <= usable_threads() <= (os.cpu_count() or 1)
