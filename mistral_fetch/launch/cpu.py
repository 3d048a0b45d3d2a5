"""How many threads the runtime may use: this process's affinity and the control group's quota, whichever is less."""

from __future__ import annotations

import math
from pathlib import Path

from mistral_fetch import system


def usable_threads(cgroup_root: Path = Path("/sys/fs/cgroup"), own_cgroup: Path = Path("/proc/self/cgroup")) -> int:
    """Return the number of threads that can run at once, at least 1.

    PyTorch counts the machine's cores; in a container with a quota its threads would then throttle each other.
    """
    cores = system.usable_cores()
    quota = _quota(cgroup_root, own_cgroup)
    return max(1, min(cores, math.ceil(quota)) if quota else cores)


def _quota(root: Path, own_cgroup: Path) -> float | None:
    """Return the tightest CPU quota in cores on the way from our control group to the root (v2, then v1)."""
    quotas = [quota for path in _own_directories(root, own_cgroup) if (quota := _read_v2(path / "cpu.max"))]
    v1 = _read_v1(root / "cpu")
    return min([*quotas, *([v1] if v1 else [])], default=None)


def _own_directories(root: Path, own_cgroup: Path) -> list[Path]:
    directories = [root]
    try:
        lines = own_cgroup.read_text("utf-8", "replace").splitlines()
    except OSError:
        return directories
    for line in lines:
        if line.startswith("0::"):
            current = root
            for part in Path(line[3:].lstrip("/")).parts:
                if part == "..":  # a namespace that shows a parent: there is nothing of ours below the root
                    break
                current = current / part
                directories.append(current)
    return directories


def _read_v2(path: Path) -> float | None:
    try:
        quota, period = path.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _read_v1(directory: Path) -> float | None:
    try:
        quota = int((directory / "cpu.cfs_quota_us").read_text())
        period = int((directory / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 and period > 0 else None
