"""How many further tokens a step may take beside the running sequences' own, learnt from what steps took."""

from __future__ import annotations

from collections import deque

# A step with further tokens may take this many times as long as one without: between two tokens of a stream then
# passes the time of two, and of three if its further tokens take twice as long as was estimated.
STRETCH = 2.0
# What a step always may take, so that prompts get on whatever was measured.
LEAST = 4
# Where nothing was measured yet, and from where allowances grow, at most twofold from step to step.
FIRST = 16
_STEPS = 9
# After so many steps with further tokens one goes without, as what the others take changes with their lengths.
_STALE_AFTER = 64


class Pace:
    """Told how long each step took, it says how much more the next one may do; alone, prompts know no bound."""

    def __init__(self, fixed: int | None = None) -> None:
        self._fixed = fixed
        # By the number of running sequences, the times of the latest steps that had nothing else.
        self._plain: dict[int, deque[float]] = {}
        # Of the latest steps with further tokens, how many, and the time that they took in addition.
        self._further: deque[tuple[int, float]] = deque(maxlen=_STEPS)
        self._since_plain = 0
        self._before = FIRST
        self._unfinished: tuple[int, float] = (0, 0.0)

    def lets_prompts_first(self, running: int, coming: int) -> bool:
        """Whether several wait for their first token, and no fewer than for their next, who then need not be spared."""
        return self._fixed is None and coming > 1 and coming >= running

    def allowance(self, running: int, most: int) -> int:
        """How many further tokens, at most `most`, a step with so many running sequences may have.

        None at all where a step without any is needed, to know what that takes; it has to be learnt then.
        """
        if not running:
            return most
        if self._fixed is not None:
            return min(most, self._fixed)
        plain = self._plain_time(running)
        if plain is None or self._since_plain >= _STALE_AFTER:
            return 0
        wanted = FIRST
        if self._further:
            tokens, seconds = (sum(column) for column in zip(*self._further, strict=True))
            wanted = int(min((STRETCH - 1) * plain * tokens / max(seconds, 1e-9), 2 * self._before))
        return min(most, max(LEAST, wanted))

    def learn(self, running: int, further: int, seconds: float, finished: bool = True) -> None:
        """Take what a step took; one that is not `finished` may still be computing and is counted with the next."""
        further, seconds = further + self._unfinished[0], seconds + self._unfinished[1]
        self._unfinished = (0, 0.0) if finished else (further, seconds)
        if not finished:
            return
        if not further:
            self._plain.setdefault(running, deque(maxlen=_STEPS)).append(seconds)
            self._since_plain = 0
            return
        plain = self._plain_time(running) if running else 0.0
        if plain is None:
            return
        if running:
            self._since_plain += 1
            self._before = max(FIRST, further)
        self._further.append((further, max(0.0, seconds - plain)))

    def _plain_time(self, running: int) -> float | None:
        """The lower median for about so many running sequences; a single time may be a hiccup and is not enough."""
        known = [
            count for count, times in self._plain.items() if len(times) > 1 and abs(count - running) * 4 <= running
        ]
        if not known:
            return None
        times = sorted(self._plain[min(known, key=lambda count: abs(count - running))])
        return times[(len(times) - 1) // 2]
