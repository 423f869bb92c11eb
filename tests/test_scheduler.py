"""The plan of each step, without a model."""

from __future__ import annotations

from engine.scheduler import MAX_PROMPT_LOGIT_ROWS, Copy, Scheduler, Segment, StepPlan
from engine.sequence import FinishReason, SamplingParams, Sequence
from engine.slots import SlotPool


def scheduler(slots: int = 3, budget: int = 8) -> Scheduler:
    return Scheduler(SlotPool(slots), budget)


def add(scheduler: Scheduler, length: int, **options) -> Sequence:
    sequence = Sequence(list(range(length)), SamplingParams(**options))
    sequence.limit = 1000
    scheduler.add(sequence)
    return sequence


def step(scheduler: Scheduler) -> list[tuple[int, int, int, int]]:
    """(slot, start, tokens, logits) of each segment; every sequence advances as if it had been computed."""
    planned = scheduler.next()
    if planned is None:
        return []
    plan, sequences = planned
    for segment, sequence in zip(plan.segments, sequences, strict=True):
        assert segment.slot == sequence.slot
        sequence.computed += len(segment.tokens)
        if not sequence.pending:
            sequence.append(0)
    return [(segment.slot, segment.start, len(segment.tokens), segment.logits) for segment in plan.segments]


def test_a_prompt_goes_in_chunks_and_asks_for_logits_at_its_end() -> None:
    s = scheduler(budget=8)
    add(s, 20)
    assert [step(s) for _ in range(4)] == [[(0, 0, 8, 0)], [(0, 8, 8, 0)], [(0, 16, 4, 1)], [(0, 20, 1, 1)]]


def test_no_piece_of_a_prompt_is_a_single_token() -> None:
    s = scheduler(budget=8)
    add(s, 17)
    assert [step(s) for _ in range(3)] == [[(0, 0, 8, 0)], [(0, 8, 7, 0)], [(0, 15, 2, 1)]]


def test_three_tokens_wait_rather_than_leave_the_last_one_on_its_own() -> None:
    s = scheduler(budget=8)
    add(s, 6)
    add(s, 3)
    assert [step(s) for _ in range(2)] == [[(0, 0, 6, 1)], [(0, 6, 1, 1), (1, 0, 3, 1)]]
    s = scheduler(budget=4 * MAX_PROMPT_LOGIT_ROWS)
    rows = MAX_PROMPT_LOGIT_ROWS - 2
    add(s, rows, prompt_logprobs=0)
    add(s, 3, prompt_logprobs=0)
    assert [step(s) for _ in range(2)] == [[(0, 0, rows, rows)], [(0, rows, 1, 1), (1, 0, 3, 3)]]


def test_where_there_is_never_room_for_three_they_do_not_wait() -> None:
    s = scheduler(budget=2)
    add(s, 3)
    assert [step(s) for _ in range(2)] == [[(0, 0, 2, 0)], [(0, 2, 1, 1)]]


def test_nothing_is_guessed_before_a_prompt_is_computed() -> None:
    s = Scheduler(SlotPool(1), 2, draft_tokens=4)
    add(s, 3, prompt_logprobs=0).lookup.draft = lambda tokens, most: (7,) * most
    assert [step(s) for _ in range(3)] == [[(0, 0, 2, 2)], [(0, 2, 1, 1)], [(0, 3, 2, 2)]]


def test_running_sequences_decode_in_every_step_beside_a_long_prompt() -> None:
    s = scheduler(budget=8)
    add(s, 2)
    add(s, 3)
    step(s)
    add(s, 30)
    for at in range(3):
        assert step(s) == [(0, 2 + at, 1, 1), (1, 3 + at, 1, 1), (2, 6 * at, 6, 0)]


def test_nobody_overtakes_while_slots_or_budget_are_short() -> None:
    s = scheduler(slots=2, budget=8)
    first, second, third = add(s, 6), add(s, 6), add(s, 1)
    assert step(s) == [(0, 0, 6, 1), (1, 0, 2, 0)]
    assert list(s.waiting) == [third]
    assert step(s) == [(0, 6, 1, 1), (1, 2, 4, 1)]
    first.finish_reason = FinishReason.STOP
    assert step(s) == [(0, 0, 1, 1), (1, 6, 1, 1)]
    assert s.running == [second, third]


def test_guesses_take_what_prompts_leave_and_go_no_further_than_the_limit() -> None:
    s = Scheduler(SlotPool(3), 12, draft_tokens=4)
    first, second = add(s, 3), add(s, 3)
    step(s)
    for sequence in (first, second):
        sequence.lookup.draft = lambda tokens, most: (7,) * most
    # The tokens behind the sequence's own are guesses, and each row of them wants its logits.
    assert [(len(each.tokens), each.logits) for each in s.next()[0].segments] == [(5, 5), (5, 5)]
    third = add(s, 8)
    assert sorted((len(each.tokens), each.logits) for each in s.next()[0].segments) == [(1, 1), (3, 3), (8, 1)]
    third.finish_reason = FinishReason.STOP
    first.limit, second.limit = len(first.tokens) + 1, len(second.tokens) + 2
    assert [(len(each.tokens), each.logits) for each in s.next()[0].segments] == [(1, 1), (2, 2)]


def test_rows_of_guesses_in_one_step_are_bounded() -> None:
    s = Scheduler(SlotPool(20), 1000, draft_tokens=30)
    sequences = [add(s, 2) for _ in range(20)]
    step(s)
    for sequence in sequences:
        sequence.lookup.draft = lambda tokens, most: (7,) * most
    plan, _ = s.next()
    assert sum(each.logits for each in plan.segments) == 20 + MAX_PROMPT_LOGIT_ROWS


def test_nothing_to_do_is_no_plan() -> None:
    s = scheduler()
    assert s.next() is None
    add(s, 3).finish_reason = FinishReason.CANCELLED
    assert s.next() is None
    assert not s.waiting


def test_single_tokens_stand_in_front_by_slot() -> None:
    s = scheduler(slots=4, budget=20)
    sequences = [add(s, 2) for _ in range(4)]
    step(s)
    sequences[0].finish_reason = FinishReason.STOP
    add(s, 5)
    step(s)
    sequences[2].finish_reason = FinishReason.STOP
    add(s, 1)
    assert step(s) == [(0, 5, 1, 1), (1, 3, 1, 1), (2, 0, 1, 1), (3, 3, 1, 1)]


def test_rows_of_prompt_logits_in_one_step_are_bounded() -> None:
    s = scheduler(slots=3, budget=4 * MAX_PROMPT_LOGIT_ROWS)
    add(s, MAX_PROMPT_LOGIT_ROWS - 10, prompt_logprobs=0)
    add(s, 50, prompt_logprobs=0)
    rows = MAX_PROMPT_LOGIT_ROWS - 10
    assert step(s) == [(0, 0, rows, rows), (1, 0, 10, 10)]
    assert step(s) == [(0, rows, 1, 1), (1, 10, 40, 40)]


def test_a_prompt_goes_on_from_what_another_slot_keeps() -> None:
    pool = SlotPool(4)
    s = Scheduler(pool, 64)
    first = add(s, 40)
    step(s)
    pool.note(0, 0, first.tokens[:40])
    second, same, third = add(s, 60), add(s, 40), add(s, 40, prompt_logprobs=0)
    plan, _ = s.next()
    assert plan.copies == (Copy(0, 1, 40), Copy(0, 2, 38)) and (second.computed, second.cached) == (40, 40)
    assert [(segment.slot, segment.start) for segment in plan.segments] == [(0, 40), (1, 40), (2, 38), (3, 0)]
    assert same.cached == 38, "a single token would be summed in another order"
    assert third.cached == 0, "all rows of a prompt are needed for its log-probabilities"
    assert s.next()[0].copies == ()


def test_a_plan_travels_as_numbers() -> None:
    plan = StepPlan(
        (Segment(3, 7, (5,), 1), Segment(0, 0, (1, 2, 3), 0), Segment(2, 4, (9, 9), 2)),
        ((1, 0), (3, 9)),
        (Copy(0, 2, 4), Copy(2, 3, 1)),
    )
    numbers = plan.to_numbers()
    assert StepPlan.from_numbers(numbers + [0] * 9) == plan


def test_a_slot_is_cleared_once_and_from_the_first_position_that_was_asked() -> None:
    s = scheduler()
    for slot, start in ((1, 5), (1, 0), (1, 9), (0, 3)):
        s.scrub(slot, start)
    add(s, 2)
    assert s.next()[0].scrub == ((1, 0), (0, 3)) and s.next()[0].scrub == ()


def test_the_largest_plan_fits_its_buffer() -> None:
    slots, budget = 3, 8
    plan = StepPlan(
        (Segment(0, 0, (1,), 1), Segment(1, 0, (1,), 1), Segment(2, 0, (1,) * (budget - 2), 1)),
        tuple((slot, 0) for slot in range(slots)),
        (Copy(0, 1, 9),) * slots,
    )
    assert len(plan.to_numbers()) <= StepPlan.most_numbers(slots, budget)
