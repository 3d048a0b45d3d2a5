"""Which files remote, uncompressed tars hold, and where: each archive's headers are walked once and remembered.

The walk itself is :mod:`.tar_walk`'s business, a single range :mod:`.ranged`'s.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from mistral_fetch.errors import ManifestError, NotAModelFile
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.sources.http_client import HttpClient
from mistral_fetch.sources.ranged import RangedFile
from mistral_fetch.sources.tar_walk import Member, Window, walk_tar
from mistral_fetch.sources.urls import redact

__all__ = ["Member", "TarIndex", "Window", "walk_tar"]


@dataclass
class _Archive:
    """What is known of one address; ``refusal`` is why its headers cannot be used, for the next who asks."""

    file: RangedFile
    lock: threading.Lock = field(default_factory=threading.Lock)
    members: dict[str, Member] | None = None
    refusal: ManifestError | None = None


class TarIndex:
    """Finds files inside remote archives; each archive's headers are read once, by whichever thread asks first.

    Args:
        client: The door to the web.
        stop: Ends the wait for a server at once when it is set.
    """

    def __init__(self, client: HttpClient, stop: StopSignal | None = None) -> None:
        self._client = client
        self._stop = stop or StopSignal()
        self._archives: dict[str, _Archive] = {}
        self._lock = threading.Lock()

    def members(self, url: str) -> tuple[Member, ...]:
        """Return the files of the archive at ``url``, in its order.

        Raises:
            ManifestError: See :func:`walk_tar`.
            MirrorError, AccessError, OfflineRefused: Its headers cannot be had.
            Interrupted: ``stop`` was set.
        """
        return tuple(self._walked(url).values())

    def locate(self, url: str, member: str) -> Member:
        """Return where the file ``member`` lies in the archive at ``url``.

        Raises:
            NotAModelFile: This is no archive that can be used, or it does not hold the file.
            MirrorError, AccessError, OfflineRefused, Interrupted: See :meth:`members`.
        """
        try:
            members = self._walked(url)
        except ManifestError as error:
            raise NotAModelFile(error.what, detail=error.detail, hint="use another mirror") from error
        if member not in members:
            raise NotAModelFile(
                f"{redact(url)} does not hold {member}",
                detail=f"expected it among the files of the archive, got {len(members)} others",
                hint="use another mirror; the manifest may name the wrong archive",
            )
        return members[member]

    def whole_size(self, url: str) -> int:
        """Return the bytes of the whole archive.

        Raises:
            MirrorError, AccessError, OfflineRefused, Interrupted: See :meth:`members`.
        """
        return self._archive(url).file.size()

    def validator(self, url: str) -> str:
        """Return what the server called the version whose headers were read (a strong ETag or a date), or ''.

        Whoever asks for a file's bytes should get them from the same version.

        Raises:
            MirrorError, AccessError, OfflineRefused, Interrupted: See :meth:`members`.
        """
        return self._archive(url).file.validator()

    def window(self, url: str) -> Window:
        """Return a reader for what lies between the files: headers, padding and the end mark.

        Raises:
            MirrorError, AccessError, OfflineRefused, Interrupted: See :meth:`members`.
        """
        file = self._archive(url).file
        return Window(file.read, file.size())

    def _archive(self, url: str) -> _Archive:
        with self._lock:
            return self._archives.setdefault(url, _Archive(RangedFile(self._client, url, self._stop)))

    def _walked(self, url: str) -> dict[str, Member]:
        archive = self._archive(url)
        with archive.lock:
            if archive.refusal is not None:
                raise archive.refusal
            if archive.members is None:
                try:
                    found = walk_tar(archive.file.read, archive.file.size())
                    archive.members = {member.path: member for member in found}
                except ManifestError as error:
                    archive.refusal = type(error)(f"{redact(url)}: {error.what}", detail=error.detail, hint=error.hint)
                    raise archive.refusal from error
            return archive.members
