"""What is missing, how much disk that takes, and what will vouch for it. Pure: it reads values, never the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mistral_fetch.digest import Assurance
from mistral_fetch.errors import AssuranceTooLow, OutOfSpace
from mistral_fetch.manifest import FileEntry
from mistral_fetch.units import format_size


@dataclass(frozen=True)
class FileState:
    """What the store knows of one file: a blob's digest, or the verified bytes of a partial."""

    blob_sha256: str | None
    present_bytes: int


@dataclass(frozen=True)
class Plan:
    """Which files to fetch, and the bytes involved."""

    to_fetch: tuple[FileEntry, ...]
    total_bytes: int
    present_bytes: int

    @property
    def missing_bytes(self) -> int:
        """Return how many bytes have to come from somewhere, which is also the disk they need."""
        return self.total_bytes - self.present_bytes


def plan_transfer(files: tuple[FileEntry, ...], states: Mapping[str, FileState]) -> Plan:
    """Return what has to be fetched, given each file's state by path. Every size must be known."""
    to_fetch = tuple(entry for entry in files if states[entry.path].blob_sha256 is None)
    present = sum(
        (entry.size or 0) if states[entry.path].blob_sha256 else states[entry.path].present_bytes for entry in files
    )
    return Plan(to_fetch, sum(entry.size or 0 for entry in files), present)


def check_assurance(files: tuple[FileEntry, ...], source_proves: Assurance, floor: Assurance) -> None:
    """Refuse a source before a byte is fetched if nothing strong enough would vouch for a file.

    Raises:
        AssuranceTooLow: Neither the manifest's digests nor the source itself reach ``floor``.
    """
    for entry in files:
        reached = max(entry.assurance, source_proves)
        if reached < floor:
            pin = "pin its publisher's key with --trust-key FILE" if floor is Assurance.SIGNED else ""
            raise AssuranceTooLow(
                f"nothing strong enough vouches for {entry.path}",
                detail=f"expected at least {floor.label}, got {reached.label}",
                hint=f"{pin or 'choose another channel with --via'}, or accept it with --min-assurance {reached.label}",
            )


def check_quota(size: int, quota_bytes: int, home: str) -> None:
    """Refuse a model that alone is more than the cache may take, before its first byte; 0 is no quota.

    Raises:
        OutOfSpace: It is.
    """
    if quota_bytes and size > quota_bytes:
        raise OutOfSpace(
            f"the quota of the cache at {home} is smaller than this model",
            detail=f"expected at most {format_size(quota_bytes)}, got a model of {format_size(size)}",
            hint="raise cache_quota (MISTRAL_FETCH_CACHE_QUOTA), or choose another cache with --home DIR",
        )


def check_disk(plan: Plan, free_bytes: int, reserve_bytes: int, home: str) -> None:
    """Refuse a transfer that would fill the disk, before its first byte.

    Raises:
        OutOfSpace: The missing bytes and the reserve are more than what is free.
    """
    needed = plan.missing_bytes + reserve_bytes
    if plan.missing_bytes and free_bytes < needed:
        raise OutOfSpace(
            f"not enough space in the cache at {home}",
            detail=(
                f"expected {format_size(needed)} free ({format_size(plan.missing_bytes)} to fetch and"
                f" {format_size(reserve_bytes)} in reserve), got {format_size(free_bytes)}"
            ),
            hint="free some space, choose another disk with --home DIR, or lower MISTRAL_FETCH_DISK_RESERVE",
        )
