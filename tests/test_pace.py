"""What a step may take beside running sequences, on machines whose clocks are made up."""

from __future__ import annotations

import random

import pytest

from engine.pace import FIRST, LEAST, Pace
from engine.scheduler import Scheduler
from engine.sequence import SamplingParams, Sequence
from engine.slots import SlotPool

MOST = 512
# Seconds of a step: for reading the weights, and for every token. Like a CPU, a GPU, and something slow.
MACHINES = pytest.mark.parametrize(("base", "each"), [(0.05, 0.014), (0.01, 0.00003), (0.001, 0.1)])


class Machine:
    """Steps of a pace, of which some take longer than they should."""

    def __init__(self, pace: Pace, base: float, each: float, hiccups: float = 0.0) -> None:
        self.pace, self.base, self.each = pace, base, each
        self.hiccups, self.random = hiccups, random.Random(3)

    def step(self, running: int, wanted: int) -> int:
        """Do one step with as much of what is wanted as is allowed."""
        further = min(wanted, self.pace.allowance(running, MOST - running))
        seconds = self.plain(running) + self.each * further
        slow = self.random.random() < self.hiccups
        self.pace.learn(running, further, seconds * (5 if slow else self.random.uniform(1.0, 1.1)))
        return further

    def plain(self, running: int) -> float:
        return self.base + self.each * running

    def stretch(self, running: int, further: int) -> float:
        return 1 + self.each * further / self.plain(running)


@MACHINES
@pytest.mark.parametrize("hiccups", [0.0, 0.1])
@pytest.mark.parametrize("running", [1, 8, 32])
def test_a_step_takes_no_more_than_three_times_as_long_for_a_prompt(
    base: float, each: float, hiccups: float, running: int
) -> None:
    machine = Machine(Pace(), base, each, hiccups)
    machine.step(0, 100)
    for _ in range(5):
        machine.step(running, 0)
    for _ in range(20):
        taken = [machine.step(running, MOST) for _ in range(10)]
        assert all(further == LEAST or machine.stretch(running, further) <= 3 for further in taken if further)
        for _ in range(3):
            machine.step(running, 0)
    if not hiccups and each < 0.1:
        assert machine.stretch(running, taken[-1] + 1) > 1.7 or taken[-1] > MOST - 50, (
            "it is not more careful than need be"
        )


@MACHINES
def test_a_prompt_gets_on_whatever_was_measured(base: float, each: float) -> None:
    machine = Machine(Pace(), base, each, hiccups=0.4)
    for running in (1, 2, 5, 30):
        taken = [machine.step(running, MOST) for _ in range(200)]
        # Two steps without for each number of running sequences, and then one of sixty-four.
        assert taken.count(0) <= 2 + 200 / 64 + 1
        assert all(further >= LEAST for further in taken if further)


def test_without_running_sequences_a_step_takes_all() -> None:
    assert Pace().allowance(0, MOST) == MOST
    assert Pace(8).allowance(0, MOST) == MOST


def test_a_fixed_number_is_kept_to() -> None:
    pace = Pace(20)
    for _ in range(10):
        pace.learn(1, 20, 100.0)
    assert (pace.allowance(1, MOST), pace.allowance(1, 7)) == (20, 7)


def test_what_is_not_known_yet_is_measured_first_and_then_tried_with_few() -> None:
    pace = Pace()
    assert pace.allowance(4, MOST) == 0
    pace.learn(4, 0, 1.0)
    assert pace.allowance(4, MOST) == 0, "one step may have been a hiccup"
    pace.learn(4, 0, 1.0)
    assert pace.allowance(4, MOST) == pace.allowance(5, MOST) == FIRST
    assert pace.allowance(8, MOST) == 0
    pace.learn(4, 16, 1.0 + 16 * 0.001)
    assert pace.allowance(4, MOST) == 32, "it grows step by step"
    pace.learn(4, 1, 1.001)
    assert pace.allowance(4, MOST) == 32, "a prompt's short end says nothing against many"


def test_what_a_step_takes_without_prompts_is_the_lower_median_for_the_nearest_number() -> None:
    pace = Pace()
    for running, seconds in ((4, 1.0), (4, 3.0), (5, 9.0), (5, 9.0)):
        pace.learn(running, 0, seconds)
    pace.learn(4, 10, 2.0)
    assert pace.allowance(4, MOST) == 10


def test_what_a_step_takes_without_prompts_is_measured_anew_after_every_64_with_some() -> None:
    machine = Machine(Pace(), 0.05, 0.014)
    taken = [machine.step(1, MOST) > 0 for _ in range(2 + 65 + 65)]
    assert taken == [False] * 2 + ([True] * 64 + [False]) * 2


def test_a_step_that_nothing_waited_for_is_counted_with_the_next() -> None:
    pace = Pace()
    for _ in range(2):
        pace.learn(1, 0, 1.0)
    pace.learn(0, 500, 0.001, finished=False)
    pace.learn(0, 100, 59.999)
    assert pace.allowance(1, MOST) == 10


def test_running_sequences_decode_in_steps_that_are_kept_free_of_prompts() -> None:
    pace = Pace()
    s = Scheduler(SlotPool(2), 64, pace)
    for length in (3, 40):
        sequence = Sequence(list(range(length)), SamplingParams())
        sequence.limit = 1000
        s.add(sequence)
        sizes = []
        for _ in range(6):
            plan, sequences = s.next()
            sizes.append([len(segment.tokens) for segment in plan.segments])
            for segment, each in zip(plan.segments, sequences, strict=True):
                each.computed += len(segment.tokens)
                if not each.pending:
                    each.append(0)
            s.took(0.1 * sum(map(sum, sizes[-1:])))
    assert sizes == [[1, LEAST]] * 6


def test_a_crowd_that_waits_for_first_tokens_goes_before_the_few_that_run_until_it_has_them() -> None:
    # The third step computes what is left of the crowd's last prompt; who comes after it waits until it was measured
    # what a step without a prompt takes, as anybody does.
    for pace, taken in ((Pace(), [63, 17, 0]), (Pace(10), [10, 10, 10])):
        s = Scheduler(SlotPool(5), 64, pace)

        def come(length: int, s: Scheduler = s) -> Sequence:
            sequence = Sequence(list(range(length)), SamplingParams())
            sequence.limit = 1000
            s.add(sequence)
            return sequence

        come(3)
        got = []
        for comes in ((), (40, 40), (), (20,)):
            for length in comes:
                come(length)
            plan, sequences = s.next()
            got.append(sum(len(segment.tokens) for segment in plan.segments if len(segment.tokens) > 1))
            for segment, each in zip(plan.segments, sequences, strict=True):
                each.computed += len(segment.tokens)
                if not each.pending:
                    each.append(0)
        assert got == [3, *taken]


def test_the_pace_is_told_what_a_step_had_beside_those_that_it_spared_and_whether_anything_waited_for_it() -> None:
    pace, told = Pace(), []
    pace.learn = lambda *learnt: told.append(learnt)
    s = Scheduler(SlotPool(4), 16, pace)
    for lengths in ((3,), (20, 20), (), ()):
        for length in lengths:
            sequence = Sequence(list(range(length)), SamplingParams())
            sequence.limit = 1000
            s.add(sequence)
        plan, sequences = s.next()
        for segment, each in zip(plan.segments, sequences, strict=True):
            each.computed += len(segment.tokens)
            if not each.pending:
                each.append(0)
        s.took(1.0)
    # A crowd's prompts are computed first, and who runs beside it is not spared.
    assert told == [(0, further, 1.0, True) for further in (3, 16, 16, 12)]
    alone, told[:] = Scheduler(SlotPool(1), 16, pace), []
    alone.add(Sequence(list(range(20)), SamplingParams()))
    alone.next()
    alone.took(1.0)
    assert told == [(0, 16, 1.0, False)], "without logits nothing waits for a GPU"
