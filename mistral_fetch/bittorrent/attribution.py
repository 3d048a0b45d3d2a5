"""Who sent the bytes of a piece that failed. Pure bookkeeping; no libtorrent, no clock.

libtorrent says which piece failed and whom it banned, but not which peers the piece came from, and it may ban the
only honest seed together with a hostile one when both had a part in failed pieces. So: a peer is *proven* a liar
when a failed piece came from it alone, every block. Banned without proof it is only a *suspect*, and may be tried
again when nobody else is left.

Noting every block has a price (a tenth of the transfer's work), so it begins with the second peer: as long as there
was one, all came from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Attribution:
    """What is known about the peers of one transfer; ``blocks_in_piece`` tells how many make a piece whole."""

    blocks_in_piece: Callable[[int], int]
    seen: dict[str, None] = field(default_factory=dict)
    """Every peer that ever connected."""
    proven: dict[str, int] = field(default_factory=dict)
    """Peers that sent a whole wrong piece, and which."""
    suspects: dict[str, None] = field(default_factory=dict)
    """Peers that were banned without proof, in order."""
    _senders: dict[int, dict[str, set[int]]] = field(default_factory=dict)

    @property
    def needs_blocks(self) -> bool:
        """Return whether blocks have to be noted to know who sent what."""
        return len(self.seen) > 1

    def peer_connected(self, address: str) -> None:
        """Note that a peer may send something from now on."""
        self.seen[address] = None

    def block_received(self, piece: int, block: int, address: str) -> None:
        """Note that a peer sent a block of a piece."""
        self._senders.setdefault(piece, {}).setdefault(address, set()).add(block)

    def piece_passed(self, piece: int) -> None:
        """Forget who sent a piece that matched."""
        self._senders.pop(piece, None)

    def piece_failed(self, piece: int) -> str | None:
        """Note that a piece did not match; return the peer this proves a liar, if it is news."""
        liar = self._only_sender(piece, self._senders.pop(piece, {}))
        if liar is None or liar in self.proven:
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

    def begin_trial(self) -> str | None:
        """Return the suspect to try alone, taken off the list, and forget all blocks: they are asked for again."""
        for address in self.suspects:
            del self.suspects[address]
            self._senders.clear()
            return address
        return None

    def _only_sender(self, piece: int, senders: dict[str, set[int]]) -> str | None:
        if not self.needs_blocks:
            return next(iter(self.seen), None)
        if len(senders) != 1:
            return None
        [(address, blocks)] = senders.items()
        # Blocks that came before noting began may be another peer's.
        return address if len(blocks) >= self.blocks_in_piece(piece) else None
