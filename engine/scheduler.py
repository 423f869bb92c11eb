"""Which tokens of which sequences the next step computes. Ordered lists and arithmetic, no torch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from engine.pace import Pace
from engine.sequence import Sequence
from engine.slots import Place

# Rows of prompts whose logits one step may ask for: logits are as wide as the vocabulary, so they need a bound.
MAX_PROMPT_LOGIT_ROWS = 128


class Capacity(Protocol):
    """What the scheduler asks of the cache."""

    @property
    def free(self) -> int: ...

    def acquire(self, tokens: Ordered[int]) -> Place | None: ...

    def forget(self, slot: int) -> None: ...

    def release(self, slot: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of one sequence's tokens, from position `start` on; its last `logits` rows want their logits.

    Behind the sequence's own tokens may come guesses of the next ones, and those rows tell whether they are right.
    """

    slot: int
    start: int
    tokens: tuple[int, ...]
    logits: int


@dataclass(frozen=True, slots=True)
class Copy:
    """The first `tokens` positions of one slot, to be put into another."""

    source: int
    target: int
    tokens: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What every rank computes next: single tokens first, by slot, then chunks.

    Before that every rank clears the slots of `scrub`, each from a position on, then makes the copies, in order.
    """

    segments: tuple[Segment, ...]
    scrub: tuple[tuple[int, int], ...] = ()
    copies: tuple[Copy, ...] = ()

    def to_numbers(self) -> list[int]:
        """The plan as whole numbers, to travel between ranks."""
        numbers = [len(self.segments), len(self.scrub), len(self.copies)]
        for slot, start in self.scrub:
            numbers += (slot, start)
        for copy in self.copies:
            numbers += (copy.source, copy.target, copy.tokens)
        for segment in self.segments:
            numbers += (segment.slot, segment.start, len(segment.tokens), segment.logits, *segment.tokens)
        return numbers

    @classmethod
    def from_numbers(cls, numbers: Ordered[int]) -> StepPlan:
        """The plan that `to_numbers` gave; anything behind its end is ignored."""
        count, scrubs, copied = numbers[:3]
        at, segments = 3 + 2 * scrubs + 3 * copied, []
        scrub = tuple((numbers[place], numbers[place + 1]) for place in range(3, 3 + 2 * scrubs, 2))
        copies = tuple(Copy(*numbers[place : place + 3]) for place in range(3 + 2 * scrubs, at, 3))
        for _ in range(count):
            slot, start, length, logits = numbers[at : at + 4]
            at += 4
            segments.append(Segment(slot, start, tuple(numbers[at : at + length]), logits))
            at += length
        return cls(tuple(segments), scrub, copies)

    @staticmethod
    def most_numbers(max_batch_size: int, max_tokens_per_step: int) -> int:
        """How many numbers the largest plan takes."""
        return 3 + (2 + 3 + 4) * max_batch_size + max_tokens_per_step


class Scheduler:
    """Admits sequences in order of arrival; every running one decodes in each step, prompts fill what is left.

    What prompts leave is for drafts: guesses of up to `draft_tokens` further tokens of a running sequence.
    """

    def __init__(
        self,
        capacity: Capacity,
        max_tokens_per_step: int,
        pace: Pace | None = None,
        draft_tokens: int = 0,
        clears_unfinished: bool = False,
    ) -> None:
        """`clears_unfinished`: nothing stays of a prompt that was not computed to its end, where they are looked at."""
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._capacity = capacity
        self._max_tokens = max_tokens_per_step
        self._pace = pace or Pace(max_tokens_per_step)
        self._draft_tokens = draft_tokens
        self._clears_unfinished = clears_unfinished
        self._last: tuple[int, int, bool] = (0, 0, True)
        self._crowd: Sequence | None = None  # the last of those whose prompts go before everything else
        self._scrub: dict[int, int] = {}  # slots and from where on; a plan has room for each slot once
        self._copies: list[Copy] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind all that came before."""
        self.waiting.append(sequence)

    def next(self) -> tuple[StepPlan, list[Sequence]] | None:
        """The next step and the sequence of each of its segments; None when nothing waits or runs."""
        self.reap()
        rows = MAX_PROMPT_LOGIT_ROWS
        singles = sorted((s for s in self.running if s.pending == 1), key=lambda s: s.slot)
        chosen: list[tuple[Sequence, Segment]] = []
        prompts = [sequence for sequence in self.running if sequence.pending > 1]
        spared = 0 if self._crowded(len(singles), prompts) else len(singles)
        budget = self._pace.allowance(spared, self._max_tokens - len(singles))
        most, least = budget, min(2, budget)
        for sequence in prompts + list(self.waiting):
            if budget < max(1, least) or (sequence.wants_prompt_logprobs and rows < 2):
                break
            if sequence.slot is None and not self._admit():
                break
            length = self._cut(sequence.pending, budget)
            if sequence.wants_prompt_logprobs:
                length = self._cut(sequence.pending, min(budget, rows))
            if length == 2 and sequence.pending == 3 and most > 2:
                break  # the third would be on its own; the next step may have room for all
            if sequence.wants_prompt_logprobs:
                rows -= length
            chosen.append((sequence, self._segment(sequence, length)))
            budget -= length
        for sequence in singles:
            draft = self._draft(sequence, min(budget, rows))
            budget, rows = budget - len(draft), rows - len(draft)
            chosen.append((sequence, self._segment(sequence, 1, draft)))
        if not chosen:
            return None
        scrub, self._scrub = tuple(self._scrub.items()), {}
        copies, self._copies = tuple(self._copies), []
        # A one-token prompt is a single too, and the cache wants those in front, by slot.
        chosen.sort(key=lambda pair: (len(pair[1].tokens) > 1, pair[1].slot))
        plan = StepPlan(tuple(segment for _, segment in chosen), scrub, copies)
        further = sum(len(segment.tokens) for segment in plan.segments) - spared
        # Without logits nothing waits for a GPU.
        self._last = (spared, further, any(segment.logits for segment in plan.segments))
        return plan, [sequence for sequence, _ in chosen]

    def only(self, sequences: Ordered[Sequence]) -> bool:
        """Whether the next step is for these alone, a token each, whatever this one draws."""
        joins = self.waiting and self._capacity.free
        return len(self.running) == len(sequences) and not joins and not self._draft_tokens

    def went_on(self, running: int) -> None:
        """Take note of a step that was not planned here, of so many sequences' next tokens."""
        self._last = (running, 0, True)

    def took(self, seconds: float) -> None:
        """Say how long the last step took, from its plan to its tokens."""
        running, further, finished = self._last
        self._pace.learn(running, further, seconds, finished)

    def reap(self) -> None:
        """Free the slots of all sequences that ended."""
        for sequence in self.running:
            if sequence.finished:
                if self._clears_unfinished and sequence.computed < sequence.prompt_length:
                    self.clear(sequence.slot)
                self._capacity.release(sequence.slot)
                sequence.slot = None
        # Not by whether they finished: another thread may have cancelled one since.
        self.running = [sequence for sequence in self.running if sequence.slot is not None]
        if any(sequence.finished for sequence in self.waiting):
            self.waiting = deque(sequence for sequence in self.waiting if not sequence.finished)

    def scrub(self, slot: int, start: int = 0) -> None:
        """Have a slot cleared before the next step: what is not finite in it could leak into what comes there."""
        self._scrub[slot] = min(start, self._scrub.get(slot, start))

    def clear(self, slot: int) -> None:
        """Leave nothing of what a slot holds to others."""
        self.scrub(slot)
        self._capacity.forget(slot)

    def _crowded(self, running: int, prompts: list[Sequence]) -> bool:
        """Whether prompts go first: from when a crowd waits for first tokens until the last of it has its own.

        Those of it who have theirs would else be spared, and hold up the others, with whom they came.
        """
        coming = prompts + list(islice(self.waiting, self._capacity.free))
        if self._pace.lets_prompts_first(running, len(coming)):
            self._crowd = coming[-1]
        return any(sequence is self._crowd for sequence in coming)

    def _admit(self) -> bool:
        sequence = self.waiting[0]
        # Logits are not kept, so something is always left to compute, and not a single token (see `_cut`); who wants
        # the prompt's logits needs all of it.
        place = self._capacity.acquire(() if sequence.wants_prompt_logprobs else sequence.tokens[:-2])
        if place is None:
            return False
        self.waiting.popleft()
        if place.source is not None:
            self._copies.append(Copy(place.source, place.slot, place.kept))
        sequence.slot, sequence.computed = place.slot, place.kept
        if sequence.admitted_at is None:  # what one that was suspended finds again is its own
            sequence.cached = place.kept
        sequence.admitted_at = time.monotonic()
        self.running.append(sequence)
        return True

    @staticmethod
    def _cut(pending: int, most: int) -> int:
        """The length of a prompt's next piece, which leaves no token on its own.

        The CPU's kernels sum a single token's attention in another order; all longer pieces give the same bits.
        """
        return most - 1 if pending == most + 1 and most > 2 else min(pending, most)

    def _draft(self, sequence: Sequence, most: int) -> tuple[int, ...]:
        """Guesses of what follows a running sequence's last token, of which one more is drawn than is guessed right."""
        most = min(self._draft_tokens, most, sequence.limit - len(sequence.tokens) - 1)
        return sequence.lookup.draft(sequence.tokens, most) if most > 0 and sequence.generated else ()

    @staticmethod
    def _segment(sequence: Sequence, length: int, draft: tuple[int, ...] = ()) -> Segment:
        start = sequence.computed
        tokens = tuple(sequence.tokens[start : start + length]) + draft
        if sequence.wants_prompt_logprobs:
            logits = length
        else:
            logits = 1 + len(draft) if start + length == len(sequence.tokens) else 0
        return Segment(sequence.slot, start, tokens, logits)
