"""What a node of a fleet asks of whole seeds: only what no other node has, at random, a few pieces at a time.

Left to itself, every node asks a seed for whatever it lacks, and the seed's line carries most pieces several times
while the lines between the nodes are idle. Nodes that choose at random among the pieces nobody has choose different
ones, and take the rest from each other.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from mistral_fetch.bittorrent.metainfo import Metainfo
from mistral_fetch.bittorrent.shared import SharedDownload
from mistral_fetch.units import KIB, smoothed

# So much is asked of seeds ahead of what they send, or their line would be idle between two pieces. Not more: what is
# asked for and has not come, other nodes may ask for as well.
ASKED_SECONDS = 0.3
LEAST_ASKED_BYTES = 128 * KIB
# For so long the other nodes may bring nothing before the seeds are asked for what those have.
PATIENCE_SECONDS = 2.0
_RATE_SECONDS = 0.5
_SMOOTHING = 0.3


class SeedFeed:
    """Chooses pieces for one node and adds them to its download; implements :class:`~.hand_over.Taker`.

    Args:
        shared: The node's download, which exchanges pieces with the other nodes.
        metainfo: The torrent.
        wanted: The indices of the files that are wanted.
        clock: Monotonic seconds; tests pass their own.
        chance: Where the order comes from; tests pass their own.
    """

    def __init__(
        self,
        shared: SharedDownload,
        metainfo: Metainfo,
        wanted: Collection[int],
        clock: Callable[[], float] = time.monotonic,
        chance: random.Random | None = None,
    ) -> None:
        self._shared, self._clock = shared, clock
        self._piece_length = metainfo.piece_length
        files = set(wanted)
        self._order = [
            piece
            for piece in range(metainfo.piece_count)
            if any(file.index in files for file in metainfo.files_in_piece(piece))
        ]
        (chance or random.Random()).shuffle(self._order)
        self._asked: set[int] = set()
        self._taken: set[int] = set()
        self._received: Mapping[int, int] = {}
        self._rate: float | None = None
        self._window = clock(), 0
        self._heard = clock()
        self.is_over = False

    def begin(self) -> None:
        """Forget what was asked for: the session that was asked is a new one."""
        self._asked, self._taken, self._received = set(), set(), {}
        self.is_over = False

    @property
    def is_alone(self) -> bool:
        """Return that nobody has to give up here: that is for the node's own download to decide."""
        return False

    def nodes_delivered(self) -> None:
        """Note that the other nodes brought something."""
        self._heard = self._clock()

    def choose(self, availability: Sequence[int]) -> Collection[int]:
        """Return which pieces to ask of the seeds now; what they have need not be looked at, it is everything."""
        self._asked -= self._taken
        room = max(LEAST_ASKED_BYTES, (self._rate or 0.0) * ASKED_SECONDS) - self._outstanding()
        if room > 0:
            self._asked.update(self._candidates()[: math.ceil(room / self._piece_length)])
        return self._asked

    def advanced(self, received_bytes: Mapping[int, int]) -> None:
        """Note how much has come of the pieces that were asked for."""
        self._received = received_bytes

    def _outstanding(self) -> int:
        return sum(self._piece_length - self._received.get(piece, 0) for piece in self._asked)

    def take(self, piece: int, data: bytes) -> Collection[int]:
        """Add a piece to the node's download, which offers it to the others from then on."""
        self._shared.add(piece, data)
        self._taken.add(piece)
        began, length = self._window
        self._window = began, length + len(data)
        self._observe(self._clock())
        return (piece,)

    def _candidates(self) -> list[int]:
        missing = self._shared.missing() - self._asked - self._taken - self._shared.received_bytes().keys()
        elsewhere = self._shared.availability()
        nobody = [piece for piece in self._order if piece in missing and not (elsewhere and elsewhere[piece])]
        is_quiet = self._clock() - self._heard > PATIENCE_SECONDS
        return nobody or ([piece for piece in self._order if piece in missing] if is_quiet else [])

    def _observe(self, now: float) -> None:
        began, length = self._window
        if now - began >= _RATE_SECONDS:
            self._rate = smoothed(self._rate, length / (now - began), _SMOOTHING)
            self._window = now, 0
