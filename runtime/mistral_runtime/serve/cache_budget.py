"""How many positions the caches of a serving process may hold together."""

from __future__ import annotations

from mistral_runtime.errors import NotEnoughMemory

# What is left to everything else that grows: activations, prompts under way, the allocator's own losses.
_SHARE = 0.9


def choose_cache_positions(
    *,
    wanted: int | None,
    most: int,
    room_bytes: int | None,
    position_bytes: int,
    ignore_plan: bool = False,
) -> int:
    """Return the number asked for, or as many as fit, up to what all sequences together could ever use.

    Args:
        most: What that is.
        position_bytes: What one takes.
        room_bytes: Memory that is free beside weights and workspace; None where nobody knows.

    Raises:
        NotEnoughMemory: What was asked for does not fit, or not even one useful sequence does.
    """
    fitting = most if room_bytes is None else max(0, int(room_bytes * _SHARE) // position_bytes)
    count = min(most, fitting) if wanted is None else wanted
    if ignore_plan:
        return max(count, 1)
    if count < 1 or count > fitting:
        raise NotEnoughMemory(
            "the cache does not fit into memory",
            detail=f"expected room for {max(count, 1)} positions of {position_bytes} bytes beside the weights, "
            f"found room for {fitting}",
            hint="lower --cache-positions, free some memory, or add --ignore-memory-plan",
        )
    return count
