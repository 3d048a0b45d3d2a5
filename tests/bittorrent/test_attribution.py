"""Who is proven a liar, who is only suspected, and who gets another turn."""

from __future__ import annotations

import pytest

from mistral_fetch.bittorrent.attribution import Attribution


@pytest.fixture
def two_peers():
    attribution = Attribution(lambda _piece: 4)
    attribution.peer_connected("a:1")
    attribution.peer_connected("b:2")
    return attribution


def test_the_only_peer_ever_seen_sent_the_wrong_piece():
    attribution = Attribution(lambda _piece: 4)
    attribution.peer_connected("a:1")
    assert not attribution.needs_blocks
    assert attribution.piece_failed(7) == "a:1"
    assert attribution.proven == {"a:1": 7}
    assert attribution.piece_failed(8) is None, "no news"


def test_a_failed_piece_all_from_one_peer_is_proof(two_peers):
    assert two_peers.needs_blocks
    for block in range(4):
        two_peers.block_received(3, block, "b:2")
    assert two_peers.piece_failed(3) == "b:2"
    assert not two_peers.banned("b:2")


def test_a_shared_piece_proves_nothing(two_peers):
    for block in range(4):
        two_peers.block_received(3, block, "b:2" if block else "a:1")
    assert two_peers.piece_failed(3) is None
    assert two_peers.proven == {}


def test_a_piece_begun_before_blocks_were_noted_proves_nothing(two_peers):
    for block in (2, 3, 3, 2):
        two_peers.block_received(3, block, "b:2")
    assert two_peers.piece_failed(3) is None


def test_blocks_of_an_earlier_attempt_are_forgotten(two_peers):
    for block in range(4):
        two_peers.block_received(3, block, "a:1")
    two_peers.piece_passed(3)
    for block in range(4):
        two_peers.block_received(3, block, "b:2")
    assert two_peers.piece_failed(3) == "b:2"


def test_banned_without_proof_gets_one_more_turn(two_peers):
    assert two_peers.banned("a:1")
    assert two_peers.banned("b:2")
    assert two_peers.begin_trial() == "a:1"
    assert two_peers.begin_trial() == "b:2"
    assert two_peers.begin_trial() is None


def test_a_suspect_proven_a_liar_gets_no_turn(two_peers):
    two_peers.banned("a:1")
    for block in range(4):
        two_peers.block_received(3, block, "a:1")
    assert two_peers.piece_failed(3) == "a:1"
    assert two_peers.begin_trial() is None
