"""How much cache a server promises, and what it says when there is not enough."""

from __future__ import annotations

from typing import Any

import pytest

from mistral_runtime.errors import NotEnoughMemory
from mistral_runtime.serve.cache_budget import choose_cache_positions

PER_POSITION = 256


@pytest.mark.parametrize(
    "wanted, room, ignore_plan, expected",
    [
        (None, None, False, 800),  # nobody knows: as many as could ever be used
        (None, PER_POSITION * 10_000, False, 800),
        (None, PER_POSITION * 500, False, 450),  # a tenth is left
        (300, PER_POSITION * 500, False, 300),
        (450, PER_POSITION * 500, False, 450),
        (900, PER_POSITION * 500, True, 900),
        (None, -1, True, 1),
    ],
)
def test_the_budget(wanted: Any, room: Any, ignore_plan: bool, expected: int) -> None:
    found = choose_cache_positions(
        wanted=wanted, most=800, room_bytes=room, position_bytes=PER_POSITION, ignore_plan=ignore_plan
    )
    assert found == expected


@pytest.mark.parametrize("wanted, room", [(451, PER_POSITION * 500), (None, -5), (None, 0)])
def test_what_does_not_fit_is_refused_with_numbers(wanted: Any, room: int) -> None:
    with pytest.raises(NotEnoughMemory, match=f"positions of {PER_POSITION} bytes .* found room for") as refused:
        choose_cache_positions(wanted=wanted, most=800, room_bytes=room, position_bytes=PER_POSITION)
    assert "--cache-positions" in refused.value.hint
