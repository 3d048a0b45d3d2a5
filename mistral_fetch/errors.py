"""Every error a user can meet, and the exit code it ends in.

This module owns the vocabulary of failure; it imports nothing of ours and does no I/O.

    MistralFetchError
      UsageError                     ConfigError · AmbiguousRef
      NotFoundError                  UnknownModel · NotInCache
      AccessError                    NotAuthorised · GatedRepository
      ManifestError                  MalformedManifest · MalformedBundle · UnsafePath · UnsupportedFormat ·
                                     UnsafeTorrent
      TrustError                     UnsignedManifest · BadSignature · RolledBack · Expired
      IntegrityError                 SizeMismatch · DigestMismatch · PieceMismatch · TorrentMismatch
      AssuranceTooLow
      TransferError                  (is_permanent: asking the same source again cannot help)
        MirrorError                  MirrorUnreachable · MirrorTimeout · MirrorStatus · RangeRefused ·
                                     ContentChanged · NotAModelFile
        SwarmError                   NoPeers · MetadataTimeout · Stalled
        AllSourcesFailed             (keeps each source's cause, in order)
        OfflineRefused
      StoreError                     StoreLocked · OutOfSpace · StoreNotWritable · UnsupportedLayout · Conflict
      PublishError                   ListenRefused
      LaunchError                    RuntimeMissing · RuntimeFailed
      Interrupted

Groups end in ``Error``; causes state the fact. Every error is three lines: what happened to which file and
source, what was expected and what came instead, and what to type next.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import IntEnum


class ExitCode(IntEnum):
    """The process exit codes; stable, documented in ``docs/exit-codes.md``."""

    OK = 0
    BUG = 1
    USAGE = 2
    NOT_FOUND = 3
    NOT_AUTHORISED = 4
    STALLED = 5
    NO_SOURCE = 6
    DISK = 9
    LOCKED = 11
    CONFLICT = 13
    BAD_MANIFEST = 20
    ROLLED_BACK = 21
    INTEGRITY = 32
    ASSURANCE = 33
    RUNTIME = 40
    INTERRUPTED = 130


def printable(text: str) -> str:
    """Return text that cannot move a terminal's cursor: what is not printable is escaped."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def kebab_case(class_name: str) -> str:
    """Return ``DigestMismatch`` as ``digest-mismatch``: the names scripts see."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", class_name).lower()


class MistralFetchError(Exception):
    """Anything this program can explain.

    Args:
        what: What happened, to which file, from which source.
        detail: What was expected and what came instead.
        hint: What to type or do next.
    """

    exit_code: ExitCode = ExitCode.BUG

    def __init__(self, what: str, *, detail: str, hint: str) -> None:
        super().__init__(what)
        self.what = what
        self.detail = detail
        self.hint = hint

    @property
    def kind(self) -> str:
        """Return the stable kebab-case name scripts may match on, such as ``digest-mismatch``."""
        return kebab_case(type(self).__name__)

    def lines(self) -> tuple[str, str, str]:
        """Return the three lines every front end prints, each one free of line breaks."""
        what, detail, hint = (printable(" ".join(text.split())) for text in (self.what, self.detail, self.hint))
        return what, detail, hint


class UsageError(MistralFetchError):
    """The command line or the configuration asks for something that makes no sense."""

    exit_code = ExitCode.USAGE


class ConfigError(UsageError):
    """A setting has a value that cannot be used."""


class AmbiguousRef(UsageError):
    """A model reference fits more than one thing."""


class NotFoundError(MistralFetchError):
    """The thing asked for does not exist."""

    exit_code = ExitCode.NOT_FOUND


class UnknownModel(NotFoundError):
    """No catalog entry, file or repository has this name."""


class NotInCache(NotFoundError):
    """The model is known but not complete in this cache."""


class AccessError(MistralFetchError):
    """A server wants credentials, or better ones."""

    exit_code = ExitCode.NOT_AUTHORISED


class NotAuthorised(AccessError):
    """No credentials were sent, or they were refused."""


class GatedRepository(AccessError):
    """The credentials are good, but access to this repository was not granted."""


class ManifestError(MistralFetchError):
    """A description of files cannot be believed."""

    exit_code = ExitCode.BAD_MANIFEST


class MalformedManifest(ManifestError):
    """A manifest does not follow its format."""


class MalformedBundle(ManifestError):
    """A bundle is not, byte for byte, what its table of contents makes of it."""


class UnsafePath(ManifestError):
    """A file name from outside would leave its directory or clash with another."""


class UnsupportedFormat(ManifestError):
    """A manifest or container uses a feature this program does not have."""


class UnsafeTorrent(ManifestError):
    """A torrent's metadata is malformed, hostile or too large to be honest."""


class TrustError(MistralFetchError):
    """No pinned key vouches for a description of files, or not for this one today."""

    exit_code = ExitCode.BAD_MANIFEST


class UnsignedManifest(TrustError):
    """Keys are pinned, but a manifest, a catalog or a reference comes without a signature."""


class BadSignature(TrustError):
    """A signature is malformed, by another key, or of other bytes."""


class RolledBack(TrustError):
    """A signed document is older than one that was seen before, or another one of the same version."""

    exit_code = ExitCode.ROLLED_BACK


class Expired(TrustError):
    """A signed document's last day is over."""

    exit_code = ExitCode.ROLLED_BACK


class IntegrityError(MistralFetchError):
    """Bytes are not the bytes that were promised."""

    exit_code = ExitCode.INTEGRITY


class SizeMismatch(IntegrityError):
    """A file is shorter or longer than promised."""


class DigestMismatch(IntegrityError):
    """A whole file's digest differs."""


class PieceMismatch(IntegrityError):
    """One piece's digest differs."""


class TorrentMismatch(IntegrityError):
    """A torrent describes other files than the manifest it came with."""


class AssuranceTooLow(MistralFetchError):
    """Nothing strong enough vouches for a file."""

    exit_code = ExitCode.ASSURANCE


class TransferError(MistralFetchError):
    """Bytes could not be had.

    ``is_permanent`` is answered by the source: true means that asking the same source again cannot help.
    """

    exit_code = ExitCode.NO_SOURCE
    is_permanent = False


class MirrorError(TransferError):
    """One HTTP mirror failed."""


class MirrorUnreachable(MirrorError):
    """No connection could be made: name, route, refusal or TLS."""


class MirrorTimeout(MirrorError):
    """The mirror stopped answering."""

    exit_code = ExitCode.STALLED


class MirrorStatus(MirrorError):
    """The mirror answered with a status that is no use."""

    def __init__(self, what: str, *, detail: str, hint: str, status: int) -> None:
        super().__init__(what, detail=detail, hint=hint)
        self.status = status

    @property
    def is_permanent(self) -> bool:  # type: ignore[override]
        """A client error will be answered alike next time; a server error may pass."""
        return self.status < 500 and self.status not in {408, 425, 429}


class RangeRefused(MirrorError):
    """The mirror answered a range request with another range.

    ``sends_all`` is true where it sent the whole file instead, which is of use to whoever reads it from its beginning.
    """

    is_permanent = True

    def __init__(self, what: str, *, detail: str, hint: str, sends_all: bool = False) -> None:
        super().__init__(what, detail=detail, hint=hint)
        self.sends_all = sends_all


class ContentChanged(MirrorError):
    """The file at this address is not the one the transfer began with."""


class NotAModelFile(MirrorError):
    """The mirror answered 200 with something else, such as a login page."""

    is_permanent = True


class SwarmError(TransferError):
    """The swarm failed."""


class NoPeers(SwarmError):
    """No peer that has the data was found in time."""


class MetadataTimeout(SwarmError):
    """No peer sent the torrent's metadata in time."""


class Stalled(SwarmError):
    """Peers are connected, but no bytes came for too long."""

    exit_code = ExitCode.STALLED


class AllSourcesFailed(TransferError):
    """No source could deliver; each one's cause is kept, in the order they were tried.

    The exit code is the causes' own where they agree; one that could not be reached at all has no say, so that a
    lying mirror or a gated repository is not hidden by a dead swarm.
    """

    def __init__(self, what: str, causes: Sequence[MistralFetchError], *, hint: str) -> None:
        detail = "; ".join(f"{cause.what}: {cause.detail}" for cause in causes) or "there was no source to try"
        super().__init__(what, detail=detail, hint=hint)
        self.causes = tuple(causes)
        codes = {cause.exit_code for cause in causes} - {ExitCode.NO_SOURCE}
        self.exit_code = codes.pop() if len(codes) == 1 else ExitCode.NO_SOURCE


class OfflineRefused(TransferError):
    """The network would be needed, but ``--offline`` forbids it."""

    is_permanent = True


class StoreError(MistralFetchError):
    """The cache cannot do what it was asked to."""

    exit_code = ExitCode.DISK


class StoreLocked(StoreError):
    """Another process holds the lock; its name and age are in the detail."""

    exit_code = ExitCode.LOCKED


class OutOfSpace(StoreError):
    """The disk is full, or would be."""


class StoreNotWritable(StoreError):
    """The cache lies where this process may not write."""


class UnsupportedLayout(StoreError):
    """The cache was written by a version this one does not understand."""


class Conflict(StoreError):
    """Two things that exclude each other were asked for, such as removing a model that is in use."""

    exit_code = ExitCode.CONFLICT


class PublishError(MistralFetchError):
    """A directory cannot be published as it is."""

    exit_code = ExitCode.USAGE


class ListenRefused(PublishError):
    """An address or port to serve on cannot be had: another process has it, or this machine has no such address."""

    exit_code = ExitCode.LOCKED


class LaunchError(MistralFetchError):
    """The runtime could not do its work."""

    exit_code = ExitCode.RUNTIME


class RuntimeMissing(LaunchError):
    """No interpreter with the runtime's packages was found."""


class RuntimeFailed(LaunchError):
    """The runtime ended abnormally."""


class Interrupted(MistralFetchError):
    """The user or the system asked to stop; what was verified is kept."""

    exit_code = ExitCode.INTERRUPTED
