"""From a torrent's pieces to those of the files' own grids, whatever both are and in whatever order they come."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from mistral_fetch.sources.swarm_pieces import PieceTranslator
from mistral_fetch.spans import PieceGrid

SIZES = [1000, 1, 64, 300, 128]


class Asker:
    """Wants every piece, a few at a time, and keeps what it is brought."""

    is_over = False
    is_alone = False

    def __init__(self, grids, chance) -> None:
        self.waiting = [(number, index) for number, grid in enumerate(grids) for index in range(grid.count)]
        chance.shuffle(self.waiting)
        self.brought = {}
        self.told = {}

    def choose(self, has):
        return {key for key in self.waiting[:3] if has(*key)}

    def advanced(self, received_bytes):
        self.told = received_bytes

    def bring(self, key, data) -> None:
        assert key not in self.brought
        self.brought[key] = bytes(data)
        self.waiting.remove(key)


@pytest.mark.parametrize("torrent_piece", [16, 64, 100, 256])
@pytest.mark.parametrize("file_piece", [64, 256])
@pytest.mark.parametrize("seed", range(5))
def test_every_piece_arrives_whole_and_once(torrent_piece, file_piece, seed):
    chance = random.Random(seed)
    contents = [chance.randbytes(size) for size in SIZES]
    offsets = [sum(SIZES[:number]) for number in range(len(SIZES))]  # without padding, as in a v1 torrent
    torrent = b"".join(contents)
    grids = [PieceGrid(size, file_piece) for size in SIZES]
    files = [SimpleNamespace(index=number, offset=offset) for number, offset in enumerate(offsets)]
    metainfo = SimpleNamespace(piece_length=torrent_piece, files=files)
    targets = {
        number: (number, SimpleNamespace(partial=SimpleNamespace(grid=grid))) for number, grid in enumerate(grids)
    }
    asker = Asker(grids, chance)
    translator = PieceTranslator(metainfo, targets, asker)
    availability = [1] * -(-len(torrent) // torrent_piece)
    gone = set()
    while asker.waiting:
        wanted = list(translator.choose(availability))
        piece = chance.choice(wanted)
        assert piece not in gone, "it was said that nobody would want it again"
        gone |= set(translator.take(piece, torrent[piece * torrent_piece : (piece + 1) * torrent_piece]))
    for (number, index), data in asker.brought.items():
        span = grids[number].span(index)
        assert data == contents[number][span.start : span.end]


def test_what_came_before_it_was_wanted_can_be_had_again():
    grid = PieceGrid(64, 32)
    metainfo = SimpleNamespace(piece_length=16, files=[SimpleNamespace(index=0, offset=0)])
    asker = Asker([grid], random.Random(0))
    translator = PieceTranslator(metainfo, {0: (0, SimpleNamespace(partial=SimpleNamespace(grid=grid)))}, asker)
    assert not translator.take(3, b"x" * 16), "nobody wanted it yet"
    translator.choose([1, 1, 1, 1])
    assert not translator.take(0, b"x" * 16), "half of a piece may be wanted anew"
    assert set(translator.take(1, b"x" * 16)) == {0, 1}
    assert set(translator.choose([1, 1, 1, 1])) == {2, 3}


def test_a_piece_counts_as_had_only_when_all_of_it_is():
    grid = PieceGrid(64, 64)
    metainfo = SimpleNamespace(piece_length=16, files=[SimpleNamespace(index=0, offset=0)])
    asker = Asker([grid], random.Random(0))
    translator = PieceTranslator(metainfo, {0: (0, SimpleNamespace(partial=SimpleNamespace(grid=grid)))}, asker)
    assert not translator.choose([1, 1, 0, 1])
    assert not translator.choose([])
    assert set(translator.choose([1, 1, 1, 1])) == {0, 1, 2, 3}
    translator.take(1, b"x" * 16)
    translator.advanced({0: 10, 1: 16})
    assert asker.told == {(0, 0): 26}
