"""One file that several sources fill together: who is asked for it, and who no longer and why."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from mistral_fetch.errors import MistralFetchError
from mistral_fetch.manifest import MirrorUrl
from mistral_fetch.sources.base import Target
from mistral_fetch.sources.failover import give_up
from mistral_fetch.sources.mirror_state import MirrorState


@dataclass(eq=False)
class FileJob:
    """One file, the mirrors that may have it, and why those that do not were left out."""

    target: Target
    addresses: dict[MirrorState, MirrorUrl] = field(default_factory=dict)
    """Where to ask, in the manifest's order of preference."""
    unusable: list[MistralFetchError] = field(default_factory=list)
    causes: dict[Hashable, MistralFetchError] = field(default_factory=dict)
    """Why a mirror, or whoever else could bring it, is asked no more."""
    reserve: list[MirrorState] = field(default_factory=list)
    """Mirrors among the addresses that are asked only when no other is left."""
    whole_only: list[MirrorState] = field(default_factory=list)
    """Mirrors that answer every range with the whole file."""

    def give_up(self) -> MistralFetchError:
        """Return the one error that stands for everybody who failed at the file."""
        kind = "mirror" if all(isinstance(asked, MirrorState) for asked in self.causes) else "source"
        return give_up(self.target.entry, [*self.unusable, *self.causes.values()], kind)


def may_be_split(job: FileJob) -> bool:
    """Return whether several connections may fill one file: wrong bytes cannot stay unnoticed.

    A file within one archive may, too: each answer is held to the version whose headers were read.
    """
    archives = {address.url for address in job.addresses.values() if address.member}
    is_in_one_archive = len(archives) == 1 and all(address.member for address in job.addresses.values())
    return bool(job.target.entry.digests) or job.target.partial.known_pieces is not None or is_in_one_archive
