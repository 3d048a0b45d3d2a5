"""Who sent the bytes of a piece that failed. Pure bookkeeping; no libtorrent, no clock.

libtorrent says which piece failed and whom it banned, but not which peers the piece came from, and it may ban the
only honest seed together with a hostile one when both had a part in failed pieces. So: a peer is *proven* a liar
when every block of a failed piece came from it. Banned without proof it is only a *suspect*, and may be tried again
when nobody else is left.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Attribution:
    """What is known about the peers of one transfer."""

    proven: dict[str, int] = field(default_factory=dict)
    """Peers that sent a whole wrong piece, and which."""
    suspects: dict[str, None] = field(default_factory=dict)
    """Peers that were banned without proof, in order."""
    failed_pieces: list[int] = field(default_factory=list)
    _senders: dict[int, set[str]] = field(default_factory=dict)

    def block_received(self, piece: int, address: str) -> None:
        """Note that a peer sent a part of a piece."""
        self._senders.setdefault(piece, set()).add(address)

    def piece_passed(self, piece: int) -> None:
        """Forget who sent a piece that matched."""
        self._senders.pop(piece, None)

    def piece_failed(self, piece: int) -> str | None:
        """Note that a piece did not match; return the peer this proves a liar, if it is news."""
        self.failed_pieces.append(piece)
        senders = self._senders.pop(piece, set())
        if len(senders) != 1:
            return None
        liar = next(iter(senders))
        if liar in self.proven:
            return None
        self.proven[liar] = piece
        self.suspects.pop(liar, None)
        return liar

    def banned(self, address: str) -> bool:
        """Note that libtorrent banned a peer; return whether that was without proof."""
        if address in self.proven:
            return False
        self.suspects[address] = None
        return True

    def forget_blocks(self) -> None:
        """Forget parts of pieces: they are asked for again, from whomever."""
        self._senders.clear()

    def next_suspect(self) -> str | None:
        """Return a peer to try alone, and take it off the list."""
        for address in self.suspects:
            del self.suspects[address]
            return address
        return None

    def are_welcome(self, addresses: Iterable[str]) -> list[str]:
        """Return those that were never proven liars."""
        return [address for address in addresses if address not in self.proven]
