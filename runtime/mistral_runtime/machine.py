"""What this machine grants this process: memory that can still be used, and cores.

Owns the reading of /proc and of control groups (versions 1 and 2); decides nothing. Every function takes the root
of the file system, so that tests can show it another machine.
"""

from __future__ import annotations

import math
import os
import resource
import sys
from pathlib import Path

_NO_LIMIT = 1 << 60  # version 1 says "no limit" with a number near 2^63


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes this process can still take before the machine or its control group runs out.

    The smaller of the kernel's MemAvailable and what every enclosing control group has left; None where neither is
    known. File pages count as free in both: they can be given up and read again.
    """
    candidates = [
        _mem_available(root),
        _group_room(root, "memory", ("memory.max", "memory.current", "active_file", "inactive_file")),
        _group_room(
            root,
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_active_file", "total_inactive_file"),
        ),
    ]
    known = [value for value in candidates if value is not None]
    return min(known) if known else None


def usable_cores(root: Path = Path("/")) -> int:
    """Return how many threads can run at once: the affinity mask, capped by the control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _group_folders(root, "cpu") if (quota := _quota(folder)) is not None]
    return max(1, min([cores, *(math.ceil(quota) for quota in quotas)]))


def peak_resident_bytes(root: Path = Path("/")) -> int:
    """Return this process's largest resident size, mapped files included.

    From VmHWM where there is one: what getrusage reports may stem from the program that started this one.
    """
    for line in _read(root / "proc/self/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # elsewhere it counts in KiB


def _mem_available(root: Path) -> int | None:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _group_room(root: Path, controller: str, names: tuple[str, str, str, str]) -> int | None:
    """Return the least room among this process's groups of one version, whose file names are `names`."""
    limit_name, usage_name, *file_pages = names
    rooms = []
    for folder in _group_folders(root, controller):
        limit, usage = _number(folder / limit_name), _number(folder / usage_name)
        if limit is None or usage is None or limit >= _NO_LIMIT:
            continue
        stat = dict(line.split() for line in _read(folder / "memory.stat").splitlines() if len(line.split()) == 2)
        rooms.append(max(0, limit - usage + sum(int(stat.get(name, 0)) for name in file_pages)))
    return min(rooms) if rooms else None


def _group_folders(root: Path, controller: str) -> list[Path]:
    """Return this process's group folders for `controller`, innermost first: a limit on any of them binds.

    Lines of /proc/self/cgroup read "0::/path" (version 2) or "4:memory:/path" (version 1). Inside a container the
    path may be the host's while the mount shows only the inside; its parents then still lead to the mount's top.
    """
    folders = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        mount = root / "sys/fs/cgroup"
        if controllers:
            if controller not in controllers.split(","):
                continue
            mount = mount / controller
        inner = mount / path.lstrip("/")
        folders += [folder for folder in (inner, *inner.parents) if folder == mount or mount in folder.parents]
    return folders


def _quota(folder: Path) -> float | None:
    """Return a group's CPU quota in cores: "max 100000" in cpu.max, or −1 in version 1, means none."""
    fields = _read(folder / "cpu.max").split()
    if not fields:
        fields = [_read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()]
    if len(fields) != 2 or not fields[0].isdigit() or not fields[1].isdigit() or fields[1] == "0":
        return None
    return int(fields[0]) / int(fields[1])


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    """Return a kernel file's text, or nothing where it is absent or not ours to read."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
