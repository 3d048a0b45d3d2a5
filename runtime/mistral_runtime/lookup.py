"""Prompt lookup: guess how the text goes on from where it went the same way before.

Speculative decoding (Leviathan et al. 2023, arXiv 2211.17192) with the text itself as the draft model, after Saxena
2023, "Prompt Lookup Decoding". One step then computes the next token and checks the guess behind it, which costs
little more than the token alone where the weights' way from memory is what takes the time. Owns the guess and its
length; pure, and knows nothing of models or caches. Whether a guess was right is decided by `engine.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

LookupMode = Literal["auto", "on", "off"]

# At most this many guessed tokens per step: 16 rows are still bound by memory on a CPU, 32 are no longer.
MAX_DRAFT = 15
# Shorter matches are chance: after two tokens of English text the third is rarely the same as the last time.
MIN_MATCH = 3
_LONGEST_MATCH = 24  # where two candidates agree that far, the more recent one is as good
_MOST_CANDIDATES = 16  # a text of one repeated token has as many candidates as tokens


class PromptLookup:
    """An index of all token ids so far that finds the longest recent match of their end.

    As LZ77 compressors do (RFC 1951, section 4): the last MIN_MATCH tokens are the key to the latest place
    where they stood, and every place points to the one before it. Adding a token takes constant time and memory.
    """

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._ids: list[int] = []
        self._latest: dict[tuple[int, ...], int] = {}  # key to the index after its latest occurrence
        self._previous: list[int] = []  # at each index, the index after the occurrence before it; -1 for none
        for token in ids:
            self.append(token)

    def __len__(self) -> int:
        return len(self._ids)

    def append(self, token: int) -> None:
        """Add the token that came next."""
        # The place that the newest key points to is entered only now: then it has a continuation.
        end = len(self._ids)
        key = tuple(self._ids[-MIN_MATCH:])
        is_key = len(key) == MIN_MATCH
        self._previous.append(self._latest.get(key, -1) if is_key else -1)
        if is_key:
            self._latest[key] = end
        self._ids.append(token)

    def propose(self, limit: int) -> list[int]:
        """Return up to `limit` ids that followed the longest match of the end, the most recent of equals.

        A match that overlaps the end goes round: after "1 2 1 2 1 2" comes "1 2 1 2 …", as long as is asked for.
        """
        ids, end = self._ids, len(self._ids)
        place = self._latest.get(tuple(ids[-MIN_MATCH:]), -1) if limit > 0 else -1
        best, best_length = -1, 0
        for _ in range(_MOST_CANDIDATES):
            if place < 0 or best_length == _LONGEST_MATCH:
                break
            length = self._match_length(place, end)
            if length > best_length:
                best, best_length = place, length
            place = self._previous[place]
        if best < 0:
            return []
        period = end - best
        return [ids[best + i % period] for i in range(limit)]

    def _match_length(self, place: int, end: int) -> int:
        ids, length = self._ids, 0
        while length < min(place, _LONGEST_MATCH) and ids[place - 1 - length] == ids[end - 1 - length]:
            length += 1
        return length


class DraftPace:
    """How long the next guess may be, from how the guesses before it went.

    The length doubles when a whole guess was right and falls to what was right plus one otherwise.

    With "auto" a guess is paid for from a purse that keeps a bad run from costing much. It begins with 8 tokens, gains
    1/16 with every token of the answer and 1 with every token guessed rightly, loses 1 with every one guessed wrongly,
    and holds 32 at most. So wrong guesses never exceed right ones by more than 8 + tokens/16. Where memory is what
    takes the time, a guess costs a small part r of a step per token, and the loss is below (8 + tokens/16) · r steps as
    long as r ≤ 1/2. Where r is larger, the clock shows it: after 8 steps with guesses that together took longer than
    their tokens would have taken one by one, there are none for the rest of the answer.
    """

    _START = 8.0
    _PER_TOKEN = 1 / 16
    _MOST = 32.0
    _TRIAL_STEPS = 8

    def __init__(self, mode: LookupMode) -> None:
        self.drafted = 0
        self.accepted = 0
        self._mode = mode
        self._length = 4
        self._is_slower = False
        self._purse = self._START
        self._plain_steps, self._plain_seconds = 0, 0.0
        self._draft_steps, self._draft_seconds, self._draft_tokens = 0, 0.0, 0

    def limit(self) -> int:
        """Return how many tokens to guess now."""
        if self._mode == "on":
            return self._length
        return 0 if self._is_slower or self._mode == "off" else min(self._length, int(self._purse))

    def note(self, *, drafted: int, accepted: int, seconds: float) -> None:
        """Take in one step: tokens guessed, tokens guessed rightly, and how long it took."""
        # The step's own token comes on top of those guessed rightly.
        self._purse += self._PER_TOKEN * (accepted + 1) + accepted - (drafted - accepted)
        self._purse = min(self._purse, self._MOST)
        if not drafted:
            self._plain_steps += 1
            self._plain_seconds += seconds
            return
        self.drafted += drafted
        self.accepted += accepted
        # A guess cut short by the purse or by the answer's end says nothing against longer ones.
        self._length = min(max(self._length, 2 * drafted), MAX_DRAFT) if accepted == drafted else accepted + 1
        self._draft_steps += 1
        self._draft_seconds += seconds
        self._draft_tokens += accepted + 1
        if self._draft_steps >= self._TRIAL_STEPS and self._plain_steps:
            one_by_one = self._draft_tokens * self._plain_seconds / self._plain_steps
            self._is_slower = self._is_slower or self._draft_seconds > one_by_one
