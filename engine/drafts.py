"""Guesses of what a sequence says next, taken from what it said before. No torch."""

from __future__ import annotations

from collections.abc import Sequence as Ordered

# Tokens that must have stood together before, for what followed them to be worth a guess.
MATCH = 3
FIRST_LENGTH = 2
LONGEST_PAUSE = 64


class PromptLookup:
    """What followed the last time that a sequence's latest tokens stood in it; asked less often the more it errs."""

    def __init__(self) -> None:
        self._behind: dict[tuple[int, ...], int] = {}  # where it goes on behind so many tokens
        self._seen = MATCH
        self._length = FIRST_LENGTH
        self._pause = 0
        self._resumes_at = 0

    def draft(self, tokens: Ordered[int], most: int) -> tuple[int, ...]:
        """Up to `most` tokens that may follow; none if nothing is known, or while guesses are not worth it."""
        for end in range(self._seen, len(tokens)):
            self._behind[tuple(tokens[end - MATCH : end])] = end
        self._seen = max(self._seen, len(tokens))
        if len(tokens) < self._resumes_at:
            return ()
        start = self._behind.get(tuple(tokens[-MATCH:]))
        if start is None:
            return ()
        period = len(tokens) - start  # what comes round sooner than a guess ends is taken to go on so
        return tuple(tokens[start + place % period] for place in range(min(self._length, most)))

    def judge(self, tokens: int, drafted: int, accepted: int) -> None:
        """Learn how many of the drafted tokens were right, now that the sequence has so many tokens."""
        if accepted == drafted:
            self._length = max(self._length, 2 * drafted)
        else:
            self._length = accepted + 1
        self._pause = 0 if accepted else min(LONGEST_PAUSE, 2 * self._pause or 2)
        self._resumes_at = tokens + self._pause
