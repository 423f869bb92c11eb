"""Which slot a prompt gets, and how much of it is there already."""

from __future__ import annotations

from engine.slots import LEAST_REUSED, WORTH_WAITING, Place, SlotPool


def fill(pool: SlotPool, tokens: list[int], release: bool = True) -> int:
    place = pool.acquire(tokens)
    pool.note(place.slot, place.kept, tokens[place.kept :])
    if release:
        pool.release(place.slot)
    return place.slot


FIRST, SECOND = list(range(100, 200)), list(range(300, 400))


def test_the_next_turn_of_a_chat_goes_on_in_its_slot() -> None:
    pool = SlotPool(3)
    fill(pool, SECOND), fill(pool, FIRST), fill(pool, SECOND[::-1])
    assert pool.acquire(FIRST + [7, 8]) == Place(1, 100)
    assert pool.acquire(SECOND[:90] + [7, 8]) == Place(0, 90)


def test_a_beginning_in_a_busy_slot_is_copied_to_the_slot_that_was_free_for_longest() -> None:
    pool = SlotPool(3)
    fill(pool, FIRST, release=False), fill(pool, SECOND), fill(pool, SECOND[::-1])
    assert pool.acquire(FIRST[:50] + [7] * 50) == Place(1, 50, source=0)
    pool.note(1, 50, [7] * 50)
    # The copy counts as well, and what lay in its slot is gone.
    assert pool.acquire(FIRST[:50] + [7] * 60) == Place(2, 100, source=1)
    assert pool.acquire(SECOND) is None


def test_a_slot_that_keeps_much_more_than_is_shared_is_left_as_it_is() -> None:
    pool = SlotPool(2)
    fill(pool, FIRST)
    fill(pool, SECOND)
    assert pool.acquire(SECOND[:40] + [7] * 9) == Place(0, 40, source=1)
    pool.release(0)
    assert pool.acquire(SECOND + [7]) == Place(1, 100)
    pool.note(1, 100, [7, 8])
    pool.release(1)
    assert pool.acquire(SECOND[:51] + [7] * 9) == Place(1, 51), "it keeps no more than twice as much"


def test_of_slots_that_share_as_much_the_one_that_keeps_least_is_overwritten() -> None:
    pool = SlotPool(2)
    fill(pool, FIRST, release=False)
    fill(pool, FIRST[:60] + [7] * 20)
    pool.release(0)
    assert pool.acquire(FIRST[:60] + [8] * 20) == Place(1, 60)


def test_the_oldest_slot_itself_is_used_in_place() -> None:
    pool = SlotPool(1)
    fill(pool, FIRST)
    assert pool.acquire(FIRST[:40] + [7] * 9) == Place(0, 40)


def test_slots_without_contents_go_first_and_the_lowest_of_them() -> None:
    pool = SlotPool(3)
    assert [fill(pool, FIRST), fill(pool, SECOND), fill(pool, SECOND[::-1])] == [0, 1, 2]
    pool.forget(fill(pool, [1] * 50))
    assert fill(pool, [2] * 50) == 1


def test_what_was_overwritten_or_forgotten_is_not_given_to_others() -> None:
    pool = SlotPool(2)
    slot = fill(pool, FIRST[:50], release=False)
    pool.note(slot, 30, [7])
    assert pool.acquire(FIRST) == Place(1, 30, source=0)
    pool.forget(0), pool.forget(1)
    pool.release(1)
    assert pool.acquire(FIRST) == Place(1)


def test_a_beginning_that_is_too_short_is_not_worth_it() -> None:
    pool = SlotPool(2)
    fill(pool, FIRST)
    assert pool.acquire(FIRST[: LEAST_REUSED - 1] + [7] * 50) == Place(1)
    pool.release(1)
    assert pool.acquire(FIRST[: LEAST_REUSED - 1]) == Place(1)
    pool.release(1)
    assert pool.acquire(FIRST[:LEAST_REUSED]) == Place(1, LEAST_REUSED, source=0)


def test_who_wants_what_another_just_computes_waits_for_it() -> None:
    pool = SlotPool(4)
    assert pool.acquire(FIRST) == Place(0)
    assert pool.acquire(FIRST + [7]) is None
    assert pool.acquire(FIRST[: WORTH_WAITING - 1] + [7] * 50) == Place(1), "so little is not worth it"
    pool.note(0, 0, FIRST[: 100 - WORTH_WAITING])
    assert pool.acquire(FIRST + [7]) is None
    pool.note(0, 100 - WORTH_WAITING, [FIRST[100 - WORTH_WAITING]])
    assert pool.acquire(FIRST + [7]) == Place(2, 100 - WORTH_WAITING + 1, source=0)
    # One whose owner left is not waited for.
    assert pool.acquire(SECOND) == Place(3)
    pool.release(2)
    assert pool.acquire(SECOND + [7]) is None
    pool.release(3)
    assert pool.acquire(SECOND + [7]) == Place(3)


def test_nothing_is_reused_when_that_is_turned_off() -> None:
    pool = SlotPool(2, reuse=False)
    fill(pool, FIRST)
    assert pool.acquire(FIRST) == Place(0)
    assert pool.acquire(FIRST) == Place(1)
    pool.release(1)
    pool.release(0)
    assert pool.acquire(FIRST) == Place(0)
