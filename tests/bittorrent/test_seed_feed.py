"""What a node asks of whole seeds: what no other node has, little at a time; anything once the others are silent."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from mistral_fetch.bittorrent.seed_feed import LEAST_ASKED_BYTES, PATIENCE_SECONDS, SeedFeed

PIECE = 1 << 20
COUNT = 20


@dataclass
class FakeShared:
    lacking: set[int] = field(default_factory=lambda: set(range(COUNT)))
    elsewhere: list[int] = field(default_factory=list)
    under_way: dict[int, int] = field(default_factory=dict)
    added: list[int] = field(default_factory=list)

    def missing(self):
        return set(self.lacking)

    def availability(self):
        return self.elsewhere

    def received_bytes(self):
        return self.under_way

    def add(self, piece, data):
        self.added.append(piece)
        self.lacking.discard(piece)


@pytest.fixture
def node():
    shared, clock = FakeShared(), SimpleNamespace(now=0.0)
    files = SimpleNamespace(
        piece_length=PIECE,
        piece_count=COUNT,
        files_in_piece=lambda piece: [SimpleNamespace(index=0 if piece < COUNT - 1 else 1)],
    )
    feed = SeedFeed(shared, files, [0], clock=lambda: clock.now, chance=random.Random(1))
    return SimpleNamespace(shared=shared, clock=clock, feed=feed)


def test_one_piece_is_asked_for_and_the_next_when_it_is_nearly_there(node):
    [first] = node.feed.choose([])
    assert set(node.feed.choose([])) == {first}
    node.feed.advanced({first: PIECE - LEAST_ASKED_BYTES // 2})
    assert len(node.feed.choose([])) == 2
    assert len(node.feed.choose([])) == 2


def test_a_fast_seed_is_asked_for_more_at_once(node):
    for _ in range(6):
        node.feed.take(next(iter(node.feed.choose([]))), b"x" * PIECE)
        node.clock.now += 0.1
    for _ in range(10):
        asked = node.feed.choose([])
    assert len(asked) > 2


def test_what_another_node_has_or_is_coming_is_left_to_the_nodes(node):
    node.shared.elsewhere = [0 if piece in {3, 4, 5} else 1 for piece in range(COUNT)]
    node.shared.under_way = {4: 16384}
    asked = set()
    for _ in range(5):
        chosen = set(node.feed.choose([]))
        asked |= chosen
        for piece in chosen:
            node.feed.take(piece, b"")
    assert asked == {3, 5}


def test_when_the_nodes_are_silent_anything_is_asked_for(node):
    node.shared.elsewhere = [1] * COUNT
    assert not node.feed.choose([])
    node.clock.now = PATIENCE_SECONDS + 1
    assert node.feed.choose([])


def test_it_waits_again_once_they_delivered(node):
    node.shared.elsewhere = [1] * COUNT
    node.clock.now = PATIENCE_SECONDS + 1
    node.feed.nodes_delivered()
    assert not node.feed.choose([])


def test_pieces_of_unwanted_files_are_not_asked_for(node):
    node.shared.lacking = {COUNT - 1}
    node.clock.now = PATIENCE_SECONDS + 1
    assert not node.feed.choose([])


def test_what_came_is_added_and_not_asked_for_again(node):
    [first] = node.feed.choose([])
    assert list(node.feed.take(first, b"data")) == [first]
    assert node.shared.added == [first]
    node.shared.lacking.add(first)  # it is being checked
    assert first not in node.feed.choose([])


def test_with_a_new_session_all_that_is_missing_is_asked_for_again(node):
    [first] = node.feed.choose([])
    node.feed.take(first, b"lost on its way")
    node.shared.lacking = {first}
    assert not node.feed.choose([])
    node.feed.begin()
    assert set(node.feed.choose([])) == {first}


def test_two_nodes_choose_different_pieces():
    shared = FakeShared(lacking=set(range(COUNT)))
    files = SimpleNamespace(piece_length=PIECE, piece_count=COUNT, files_in_piece=lambda _: [SimpleNamespace(index=0)])
    first = [next(iter(SeedFeed(shared, files, [0], chance=random.Random(seed)).choose([]))) for seed in range(20)]
    assert len(set(first)) > 5
