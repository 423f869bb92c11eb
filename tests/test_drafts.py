"""Guesses from what a sequence said before."""

from __future__ import annotations

from engine.drafts import FIRST_LENGTH, LONGEST_PAUSE, PromptLookup


def test_what_followed_the_latest_tokens_before_is_guessed() -> None:
    lookup = PromptLookup()
    assert lookup.draft([1, 2, 3, 4, 5, 6, 1, 2, 3], 8) == (4, 5)[:FIRST_LENGTH]
    assert lookup.draft([1, 2, 3, 4, 5, 6, 1, 2, 3], 1) == (4,)
    assert lookup.draft([1, 2, 3, 4, 5, 6, 1, 2, 3, 9, 1, 2, 3], 8) == (9, 1), "the last time counts"
    assert lookup.draft([1, 2, 3, 4, 5, 6, 1, 2, 3, 9, 1, 2, 3, 7], 8) == ()


def test_a_sequence_too_short_to_repeat_itself_is_not_guessed() -> None:
    lookup, tokens = PromptLookup(), []
    for _ in range(3):
        tokens.append(5)
        assert lookup.draft(tokens, 8) == ()
    assert lookup.draft([5] * 4, 8) == (5, 5)


def test_guesses_grow_with_success_and_shrink_with_failure() -> None:
    lookup, tokens = PromptLookup(), [1, 2, 3, 4] * 30
    assert len(lookup.draft(tokens, 16)) == FIRST_LENGTH
    lookup.judge(120, 2, 2)
    lookup.judge(120, 4, 4)
    assert lookup.draft(tokens, 16) == (1, 2, 3, 4) * 2, "it goes round and round"
    lookup.judge(120, 1, 1)
    assert len(lookup.draft(tokens, 16)) == 8, "a guess that there was little room for says nothing against long ones"
    lookup.judge(120, 8, 1)
    assert len(lookup.draft(tokens, 16)) == 2


def test_who_is_always_wrong_is_asked_ever_less_often() -> None:
    lookup, tokens, asked = PromptLookup(), [1, 1, 1, 1], []
    for _ in range(1000):
        guess = lookup.draft(tokens, 8)
        tokens.append(1)
        if guess:
            asked.append(len(guess))
            lookup.judge(len(tokens), len(guess), 0)
    assert asked[0] == FIRST_LENGTH
    assert set(asked[1:]) == {1} and len(asked) < 8 + 1000 / LONGEST_PAUSE


def test_what_was_said_is_looked_at_once_however_long_it_grows() -> None:
    class Read(list):
        times = 0

        def __getitem__(self, place: int | slice) -> object:
            Read.times += 1
            return super().__getitem__(place)

    lookup, tokens = PromptLookup(), Read(range(500))
    for token in range(500):
        tokens.append(1000 + token)
        assert lookup.draft(tokens, 8) == ()
    assert Read.times <= 500 + 2 * 500
