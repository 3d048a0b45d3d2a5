"""Byte ranges and the piece grid, against the obvious model: sets of byte positions."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_fetch.spans import PieceGrid, Span, merge, subtract, total_length


def bytes_of(*spans: Span) -> set[int]:
    return {position for span in spans for position in range(span.start, span.end)}


SPANS = st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda ends: Span(min(ends), max(ends)))
SPAN_LISTS = st.lists(SPANS, max_size=8)


@pytest.mark.parametrize("start,end", [(-1, 0), (1, 0), (-2, -1)])
def test_a_span_never_runs_backwards_or_below_zero(start: int, end: int) -> None:
    with pytest.raises(ValueError, match="not a span"):
        Span(start, end)


def test_span_length_and_text() -> None:
    assert Span(2, 9).length == 7
    assert str(Span(2, 9)) == "[2, 9)"
    assert Span(5, 5).length == 0


@pytest.mark.parametrize(
    "spans,merged",
    [
        ([], []),
        ([Span(3, 3)], []),
        ([Span(0, 2), Span(2, 4)], [Span(0, 4)]),
        ([Span(2, 4), Span(0, 1)], [Span(0, 1), Span(2, 4)]),
        ([Span(0, 9), Span(2, 3)], [Span(0, 9)]),
        ([Span(0, 5), Span(3, 8), Span(8, 9)], [Span(0, 9)]),
    ],
)
def test_merge(spans: list[Span], merged: list[Span]) -> None:
    assert merge(spans) == merged


@given(SPAN_LISTS)
def test_merged_spans_hold_the_same_bytes_sorted_apart_and_never_empty(spans: list[Span]) -> None:
    merged = merge(spans)
    assert bytes_of(*merged) == bytes_of(*spans)
    assert all(span.length for span in merged)
    assert all(one.end < two.start for one, two in pairwise(merged))
    assert merge(merged) == merged
    assert total_length(spans) == len(bytes_of(*spans))


@pytest.mark.parametrize(
    "whole,taken,rest",
    [
        (Span(0, 10), [], [Span(0, 10)]),
        (Span(0, 10), [Span(2, 9)], [Span(0, 2), Span(9, 10)]),
        (Span(0, 10), [Span(0, 10)], []),
        (Span(5, 10), [Span(0, 6), Span(9, 20)], [Span(6, 9)]),
        (Span(5, 10), [Span(0, 5), Span(10, 20)], [Span(5, 10)]),
        (Span(5, 5), [], []),
    ],
)
def test_subtract(whole: Span, taken: list[Span], rest: list[Span]) -> None:
    assert subtract(whole, taken) == rest


@given(SPANS, SPAN_LISTS)
def test_what_is_left_and_what_is_taken_make_the_whole(whole: Span, taken: list[Span]) -> None:
    rest = subtract(whole, taken)
    assert bytes_of(*rest) == bytes_of(whole) - bytes_of(*taken)
    assert rest == merge(rest)


@pytest.mark.parametrize("size,length", [(-1, 4), (10, 0), (10, -4)])
def test_a_grid_needs_a_size_and_a_piece_length(size: int, length: int) -> None:
    with pytest.raises(ValueError, match="not a grid"):
        PieceGrid(size, length)


@pytest.mark.parametrize(
    "size,length,spans",
    [
        (0, 4, []),
        (3, 4, [Span(0, 3)]),
        (4, 4, [Span(0, 4)]),
        (5, 4, [Span(0, 4), Span(4, 5)]),
        (10, 4, [Span(0, 4), Span(4, 8), Span(8, 10)]),
    ],
)
def test_grid_pieces(size: int, length: int, spans: list[Span]) -> None:
    grid = PieceGrid(size, length)
    assert list(grid.spans()) == spans
    assert grid.count == len(spans)


@given(st.integers(0, 100), st.integers(1, 20))
def test_pieces_tile_the_file(size: int, length: int) -> None:
    spans = list(PieceGrid(size, length).spans())
    assert merge(spans) == ([Span(0, size)] if size else [])
    assert sum(span.length for span in spans) == size
    assert all(span.length == length for span in spans[:-1])


@given(st.integers(0, 100), st.integers(1, 20), st.integers(-3, 130))
def test_a_piece_outside_the_file_is_an_index_error(size: int, length: int, index: int) -> None:
    grid = PieceGrid(size, length)
    if 0 <= index < grid.count:
        assert grid.span(index) == list(grid.spans())[index]
    else:
        with pytest.raises(IndexError, match=f"of {grid.count}"):
            grid.span(index)


def test_the_example_of_the_module() -> None:
    assert PieceGrid(10, 4).whole_pieces([Span(2, 9)]) == [1]
    assert PieceGrid(10, 4).whole_pieces([Span(2, 10)]) == [1, 2]


@given(st.integers(0, 60), st.integers(1, 13), SPAN_LISTS)
def test_whole_pieces_are_those_with_every_byte_present(size: int, length: int, present: list[Span]) -> None:
    grid = PieceGrid(size, length)
    held = bytes_of(*present)
    expected = [index for index in range(grid.count) if bytes_of(grid.span(index)) <= held]
    assert grid.whole_pieces(present) == expected


def test_arithmetic_holds_at_the_size_of_real_models() -> None:
    grid = PieceGrid(14_483_464_192, 4 << 20)
    assert grid.count == 3454
    last = grid.span(3453)
    assert last.end == 14_483_464_192
    assert last.length == 14_483_464_192 - 3453 * (4 << 20)
    assert subtract(Span(0, grid.size), [Span(0, last.start)]) == [last]
