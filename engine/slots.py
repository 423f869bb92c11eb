"""Who owns which slot of the cache, and which tokens' keys and values each of them holds. No torch."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Ordered
from dataclasses import dataclass

# Fewer tokens are computed as soon as they are copied, and nearly all prompts of a model begin alike for a few.
LEAST_REUSED = 16
# So many more tokens are worth waiting for, when the same beginning is just being computed for somebody else.
WORTH_WAITING = 64


@dataclass(frozen=True, slots=True)
class Place:
    """A slot to own, how many of the wanted tokens are kept for it, and the slot to copy those from if not its own."""

    slot: int
    kept: int = 0
    source: int | None = None


class SlotPool:
    """The free slots, and what lies in all of them: a prompt goes on from the longest beginning that any slot keeps."""

    def __init__(self, slots: int, reuse: bool = True) -> None:
        self.slots = slots
        self._reuse = reuse
        self._free = set(range(slots))
        self._kept = [array("i") for _ in range(slots)]
        # What each owner came with, all of which will lie in its slot.
        self._coming = [array("i") for _ in range(slots)]
        # When a slot became free, counted in releases; 0 if nothing of use is in it.
        self._released = [0] * slots
        self._releases = 0

    @property
    def free(self) -> int:
        """How many slots nobody holds."""
        return len(self._free)

    def acquire(self, tokens: Ordered[int] = ()) -> Place | None:
        """A slot to own until it is released, with what is kept of the tokens.

        None when all are taken, or while another owner's slot is about to hold much more of the tokens. Of slots
        without contents the lowest goes first, so that busy ones stay next to one another.
        """
        if not self._free:
            return None
        oldest = min(self._free, key=lambda slot: (self._released[slot], slot))
        wanted = array("i", tokens if self._reuse else ())
        place = self._closest(wanted, oldest)
        soon = place.kept + WORTH_WAITING
        if len(wanted) >= soon and any(coming[:soon] == wanted[:soon] for coming in self._coming):
            return None
        self._coming[place.slot] = wanted
        source = place.slot if place.source is None else place.source
        self._kept[place.slot] = self._kept[source][: place.kept]
        self._free.remove(place.slot)
        return place

    def note(self, slot: int, start: int, tokens: Ordered[int]) -> None:
        """Remember that these tokens were computed in a slot, from position `start` on; what lay there is gone."""
        if self._reuse:
            kept = self._kept[slot]
            assert start <= len(kept), f"slot {slot} has a gap before position {start}"
            del kept[start:]
            kept.extend(tokens)

    def forget(self, slot: int) -> None:
        """Never give anything of a slot's contents to others."""
        del self._kept[slot][:]

    def release(self, slot: int) -> None:
        """Give a slot back; what it holds stays of use until its next owner overwrites it."""
        assert slot not in self._free, f"slot {slot} was released twice"
        self._free.add(slot)
        self._coming[slot] = array("i")
        self._releases += 1
        self._released[slot] = self._releases if self._kept[slot] else 0

    def _closest(self, wanted: array[int], oldest: int) -> Place:
        """Where to go on from: in place if that costs a free slot at most half of what it keeps, else by a copy."""
        if len(wanted) < LEAST_REUSED:
            return Place(oldest)
        longest, sources = LEAST_REUSED, []
        for slot, kept in enumerate(self._kept):
            if kept[:longest] != wanted[:longest]:
                continue
            shared = _shared(kept, wanted, longest)
            if shared > longest:
                longest, sources = shared, []
            if shared == longest:
                sources.append(slot)
        if not sources:
            return Place(oldest)
        free = [slot for slot in sources if slot in self._free and len(self._kept[slot]) <= 2 * longest]
        if free:
            return Place(min(free, key=lambda slot: (len(self._kept[slot]), self._released[slot])), longest)
        return Place(oldest, longest, None if oldest in sources else sources[0])


def _shared(one: array[int], other: array[int], least: int) -> int:
    """How many tokens two arrays have in common at their beginning, `least` of which are known to be.

    By halves, since a comparison of slices is one call, however long they are.
    """
    low, high = least, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
