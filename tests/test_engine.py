"""Continuous batching: whatever else is in the batch, a sequence gets what it gets alone."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from tiny_models import TINY, alone, engine_of, finish, limits, model_of, random_weights

from engine import slots
from engine.config import RequestError
from engine.drafts import PromptLookup
from engine.engine import Engine
from engine.scheduler import StepPlan
from engine.sequence import FinishReason, SamplingParams, Sequence

MODEL = model_of(TINY, random_weights(TINY, seed=11))
SCHEDULES = 500


def random_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(TINY.vocab_size) for _ in range(count)]


def random_request(rng: random.Random, beginnings: list[list[int]]) -> tuple[list[int], SamplingParams]:
    prompt = random_tokens(rng, rng.choice((1, 2, 5, 17, 30)))
    if rng.random() < 0.7:
        prompt = rng.choice(beginnings)[: rng.choice((20, 25, 40))] + random_tokens(rng, rng.choice((0, 1, 8)))
    greedy = rng.random() < 0.5
    params = SamplingParams(
        max_tokens=rng.randint(1, 12),
        temperature=0.0 if greedy else rng.choice((0.5, 1.0, 1.5)),
        top_p=rng.choice((1.0, 0.8)),
        top_k=rng.choice((0, 0, 10)),
        min_p=rng.choice((0.0, 0.05)),
        repetition_penalty=rng.choice((1.0, 1.2)),
        presence_penalty=rng.choice((0.0, 0.5)),
        stop_ids=frozenset(rng.sample(range(TINY.vocab_size), 2)),
        seed=rng.randrange(1000),
    )
    return prompt, params


class Oracle(PromptLookup):
    """Guesses that are right most of the time."""

    def __init__(self, tokens: list[int], seed: int) -> None:
        super().__init__()
        self.tokens, self.random = tokens, random.Random(seed)

    def draft(self, tokens: list[int], most: int) -> tuple[int, ...]:
        right = self.tokens[len(tokens) : len(tokens) + most]
        return tuple(token if self.random.random() < 0.8 else token ^ 1 for token in right)


KERNELS = pytest.mark.parametrize(
    "choices",
    [
        {},
        {"cuda_graphs": True},
        {"cuda_graphs": True, "ragged": True},
        {"native": True},
        *({"native": True, "quantization": scheme} for scheme in ("int8", "int4")),
    ],
    ids=["torch", "torch in static shapes", "torch, ragged", "native", "native int8", "native int4"],
)


@KERNELS
def test_500_random_schedules_give_every_survivor_what_it_gets_alone(
    choices: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "WORTH_WAITING", 20)  # prompts are short here
    schedules = SCHEDULES if choices in ({}, {"native": True}) else SCHEDULES // 5
    rng = random.Random(12)
    beginnings = [random_tokens(rng, 40) for _ in range(3)]
    pool = [random_request(rng, beginnings) for _ in range(60)]
    expected = [alone(MODEL, prompt, params, limits(**choices)) for prompt, params in pool]
    survivors = cancelled = reused = drafted = accepted = 0
    for _ in range(schedules):
        count = rng.randint(1, 5)
        budget = rng.choice((count, 8, 16, 64))
        beside = rng.choice((None, 1, 3, budget))
        chosen = limits(slots=count, max_tokens_per_step=budget, prefill_beside_decode=beside, **choices)
        chosen = dataclasses.replace(chosen, draft_tokens=rng.choice((0, 1, 3, 8)))
        engine = engine_of(MODEL, chosen)
        arrivals = sorted((rng.randint(0, 12), index) for index in rng.choices(range(len(pool)), k=rng.randint(2, 7)))
        sequences, step = [], 0
        while arrivals or engine.busy:
            while arrivals and arrivals[0][0] <= step:
                index = arrivals.pop(0)[1]
                sequences.append((index, engine.add(*pool[index])))
                if rng.random() < 0.5:
                    sequences[-1][1].lookup = Oracle(pool[index][0] + expected[index], len(sequences))
            if sequences and rng.random() < 0.05:
                engine.cancel(rng.choice(sequences)[1])
            engine.step()
            assert engine.running + engine.slots.free == count
            step += 1
        assert engine.slots.free == count
        for index, sequence in sequences:
            reused += sequence.cached > 0
            drafted += sequence.drafted
            accepted += sequence.accepted
            generated = sequence.tokens[sequence.prompt_length :]
            if sequence.finish_reason is FinishReason.CANCELLED:
                cancelled += 1
                assert generated == expected[index][: len(generated)]
            else:
                survivors += 1
                assert generated == expected[index]
    assert survivors > 3 * schedules and cancelled > schedules / 5 and reused > schedules / 2
    assert drafted - accepted > schedules / 5 and accepted > schedules, "guesses of both kinds"


@KERNELS
def test_a_chats_next_turn_and_a_common_beginning_are_computed_once(choices: dict) -> None:
    rng = random.Random(2)
    chosen = limits(slots=3, **choices)
    engine, params = engine_of(MODEL, chosen), SamplingParams(max_tokens=4, temperature=0.0)
    first = engine.add(random_tokens(rng, 30), params)
    answer = finish(engine, first)
    prompts = [first.tokens + random_tokens(rng, 5), first.tokens[:25] + random_tokens(rng, 9)]
    turn, other = (engine.add(prompt, params) for prompt in prompts)
    unshared = engine.add(prompts[0], SamplingParams(max_tokens=4, temperature=0.0, prompt_logprobs=0))
    found = [finish(engine, sequence) for sequence in (turn, other, unshared)]
    # The last token of an answer is drawn and not computed.
    assert (first.cached, turn.cached, other.cached, unshared.cached) == (0, 30 + len(answer) - 1, 25, 0)
    assert found == [alone(MODEL, prompt, params, chosen) for prompt in (*prompts, prompts[0])]
    switched_off = engine_of(MODEL, limits(prefix_reuse=False, **choices))
    again = [switched_off.add(first.tokens[:30], params) for _ in range(2)]
    assert [finish(switched_off, sequence) for sequence in again] == [answer, answer]
    assert [sequence.cached for sequence in again] == [0, 0]


@KERNELS
def test_guessed_tokens_change_nothing_that_is_put_out(choices: dict) -> None:
    bias = {3: 4.0, 9: -100.0}
    options = [
        SamplingParams(max_tokens=25, temperature=temperature, logprobs=3, seed=4, **more)
        for temperature in (0.0, 0.9)
        for more in ({}, {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.3}, {"top_k": 8})
    ]
    options += [SamplingParams(max_tokens=25, logit_bias=bias, stop_ids=frozenset({3}), logprobs=0, seed=2)]
    found: list[list] = []
    for draft_tokens in (0, 6):
        engine = engine_of(MODEL, limits(draft_tokens=draft_tokens, max_tokens_per_step=24, **choices))
        sequences = [engine.add([1, 2, 3, 4] * 3, params) for params in options]
        outputs: dict[int, list] = {sequence.number: [] for sequence in sequences}
        if draft_tokens:
            for sequence, plain in zip(sequences, found, strict=True):
                sequence.lookup = Oracle(sequence.tokens + [token for token, *_ in plain], 7)
        while engine.busy:
            before = [sequence.generated for sequence in sequences]
            for output in engine.step():
                outputs[output.sequence.number].append((output.token, output.finish_reason, output.logprobs))
            grown = [sequence.generated - count for sequence, count in zip(sequences, before, strict=True)]
            assert max(grown) <= 1 + draft_tokens
        if not draft_tokens:
            found = [outputs[sequence.number] for sequence in sequences]
    assert sum(sequence.accepted for sequence in sequences) > 30
    for plain, sequence in zip(found, sequences, strict=True):
        guessed = outputs[sequence.number]
        assert [each[:2] for each in guessed] == [each[:2] for each in plain]
        assert [token for token, *_ in guessed] == sequence.tokens[sequence.prompt_length :]
        for ours, theirs in zip(guessed, plain, strict=True):
            assert ours[2].logprob == pytest.approx(theirs[2].logprob, abs=1e-3)
            assert [token for token, _ in ours[2].top] == [token for token, _ in theirs[2].top]


@KERNELS
def test_a_wrong_guess_whose_numbers_are_not_finite_harms_nobody(choices: dict) -> None:
    weights = random_weights(TINY, seed=11)
    weights["tok_embeddings.weight"][13] = float("inf")
    chosen = limits(slots=2, draft_tokens=4, **choices)
    engine = engine_of(model_of(TINY, weights), chosen)
    params = SamplingParams(max_tokens=12, temperature=0.0, logit_bias={13: -100.0})
    prompts = [[3, 2, 1], list(range(20, 30))]
    sequences = [engine.add(prompt, params) for prompt in prompts]
    for sequence in sequences:
        sequence.lookup = Oracle([13 ^ 1] * 64, 5)  # it errs into the token that overflows
    found = [finish(engine, sequence) for sequence in sequences]
    assert found == [alone(MODEL, prompt, params, limits(**choices)) for prompt in prompts]
    assert all(sequence.drafted > sequence.accepted for sequence in sequences)


@pytest.mark.parametrize("meanwhile", [False, True])
@KERNELS
def test_a_wrong_guess_that_overflows_in_a_sequences_last_step_leaves_nothing_to_others(
    choices: dict, meanwhile: bool
) -> None:
    weights = random_weights(TINY, seed=11)
    weights["tok_embeddings.weight"][13] = float("inf")
    params = SamplingParams(max_tokens=20, temperature=0.0, logit_bias={13: -100.0})

    def engine_after() -> tuple[Engine, Sequence]:
        engine = engine_of(model_of(TINY, weights), limits(slots=2, max_tokens_per_step=64, draft_tokens=4, **choices))
        ended = engine.add(list(range(20, 40)), params)
        engine.step()
        ended.lookup.draft = lambda tokens, most: (13,)
        run = engine._runner.run

        def run_and_cancel(plan: StepPlan) -> torch.Tensor:
            engine.cancel(ended)  # as another thread may, while the step runs
            return run(plan)

        engine._runner.run = run_and_cancel if meanwhile else run
        engine.step()
        engine._runner.run = run
        engine.cancel(ended)
        return engine, ended

    engine, ended = engine_after()
    # The longer one takes the slot that nobody used, so what lies behind the other's tokens is masked but multiplied.
    pair = [engine.add([9] * 30, params), engine.add([8, 8], params)]
    assert [finish(engine, sequence) for sequence in pair] == [
        alone(MODEL, sequence.tokens[: sequence.prompt_length], params, limits(**choices)) for sequence in pair
    ]
    engine, ended = engine_after()
    bad = engine.add([*ended.tokens[:21], 13, 5, 6], params)
    assert finish(engine, bad) == [] and "not finite" in bad.error, "the guess was not computed for good"


def test_a_lookup_is_told_how_many_of_its_guesses_were_right() -> None:
    prompt, params = [1, 2, 3, 4], SamplingParams(max_tokens=40, temperature=0.0)
    engine = engine_of(MODEL, limits(draft_tokens=5))
    sequence, told = engine.add(prompt, params), []
    sequence.lookup = Oracle(prompt + alone(MODEL, prompt, params), 7)
    sequence.lookup.judge = lambda tokens, drafted, accepted: told.append((drafted, accepted))
    finish(engine, sequence)
    assert [sum(column) for column in zip(*told, strict=True)] == [sequence.drafted, sequence.accepted]
    assert any(accepted < drafted for drafted, accepted in told) and sequence.accepted > 10


def test_of_many_answers_to_one_prompt_only_the_first_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "WORTH_WAITING", 20)
    prompt, params = list(range(1, 41)), SamplingParams(max_tokens=5, temperature=0.0)
    engine = engine_of(MODEL, limits(slots=4, max_tokens_per_step=16))
    sequences = [engine.add(prompt, params) for _ in range(4)]
    assert [finish(engine, sequence) for sequence in sequences] == [alone(MODEL, prompt, params)] * 4
    assert [sequence.cached > 20 for sequence in sequences] == [False, True, True, True]
    other = [engine.add(prompt[::-1], params) for _ in range(2)]
    engine.step()
    engine.cancel(other[0])
    assert finish(engine, other[1]) == alone(MODEL, prompt[::-1], params), "nobody waits for one that left"


@KERNELS
def test_what_a_cancelled_sequence_computed_is_of_use_to_the_next(choices: dict) -> None:
    prompt, params = list(range(1, 41)), SamplingParams(max_tokens=5, temperature=0.0)
    engine = engine_of(MODEL, limits(slots=2, max_tokens_per_step=24, **choices))
    cancelled = engine.add(prompt, params)
    engine.step()
    engine.cancel(cancelled)
    sequence = engine.add(prompt, params)
    assert finish(engine, sequence) == alone(MODEL, prompt, params, limits(**choices))
    # PyTorch's masked attention must not meet there what nobody saw to be finite.
    assert sequence.cached == (0 if engine._runner.reads_behind else 24)
    assert (sequence.slot, engine.slots.free) == (None, 2)


def test_admission_follows_the_order_of_arrival() -> None:
    engine = engine_of(MODEL, limits(slots=2, max_tokens_per_step=8))
    sequences = [engine.add([index + 1] * (12 - index), SamplingParams(max_tokens=3)) for index in range(6)]
    first_tokens = []
    while engine.busy:
        for output in engine.step():
            if output.sequence.generated == 1:
                first_tokens.append(output.sequence)
    assert first_tokens == sequences


def test_cancelling_frees_the_slot_within_one_step() -> None:
    engine = engine_of(MODEL, limits(slots=1))
    running = engine.add([1, 2, 3], SamplingParams(max_tokens=50))
    waiting = engine.add([4, 5], SamplingParams(max_tokens=50))
    last = engine.add([6], SamplingParams(max_tokens=50))
    engine.step()
    engine.cancel(running)
    engine.cancel(waiting)
    outputs = engine.step()
    assert [output.sequence for output in outputs] == [last]
    assert (running.finish_reason, waiting.finish_reason) == (FinishReason.CANCELLED, FinishReason.CANCELLED)
    assert (running.slot, waiting.slot, last.slot) == (None, None, 0)


def test_a_sequence_cancelled_in_the_middle_of_its_prompt_leaves_no_trace() -> None:
    prompt, params = list(range(1, 31)), SamplingParams(max_tokens=5, temperature=0.0)
    engine = engine_of(MODEL, limits(slots=1, max_tokens_per_step=8))
    first = engine.add(prompt[::-1], params)
    engine.step()
    engine.cancel(first)
    assert finish(engine, engine.add(prompt, params)) == alone(MODEL, prompt, params)


def test_a_sequence_that_fills_max_seq_len_ends_with_length() -> None:
    engine = engine_of(MODEL, limits(max_seq_len=20))
    sequence = engine.add([1] * 15, SamplingParams(temperature=0.0))
    assert len(finish(engine, sequence)) == 5
    assert sequence.finish_reason is FinishReason.LENGTH
    capped = engine.add([1] * 15, SamplingParams(max_tokens=99, temperature=0.0))
    assert len(finish(engine, capped)) == 5
    longest = engine.add([1] * 19, SamplingParams(temperature=0.0))
    assert len(finish(engine, longest)) == 1


def test_a_stop_id_ends_a_sequence_and_is_its_last_token() -> None:
    tokens = alone(MODEL, [7, 8, 9], SamplingParams(max_tokens=10, temperature=0.0))
    stop = tokens[4]
    engine = engine_of(MODEL)
    sequence = engine.add([7, 8, 9], SamplingParams(max_tokens=10, temperature=0.0), frozenset({stop}))
    assert finish(engine, sequence) == tokens[: tokens.index(stop) + 1]
    assert sequence.finish_reason is FinishReason.STOP
    unstopped = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
    assert finish(engine, engine.add([7, 8, 9], unstopped, frozenset({stop}))) == tokens


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    def tokens(seed: int | None) -> list[int]:
        return alone(MODEL, [3, 1, 4], SamplingParams(max_tokens=30, seed=seed))

    assert tokens(5) == tokens(5)
    assert len({tuple(tokens(seed)) for seed in (5, -5, 6, None)}) == 4


def test_prompt_logprobs_are_those_of_the_model_in_chunks_and_beside_others() -> None:
    prompt = torch.randint(TINY.vocab_size, (50,), generator=torch.Generator().manual_seed(1)).tolist()
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=3, logprobs=2)
    engine = engine_of(MODEL, limits(max_tokens_per_step=16))
    engine.add([5] * 9, SamplingParams(max_tokens=20, temperature=0.0))
    sequence = engine.add(prompt, params)
    logprobs = None
    while not sequence.finished:
        for output in engine.step():
            if output.sequence is sequence:
                logprobs = output.logprobs
    reference = engine_of(MODEL, limits(max_tokens_per_step=64))
    whole = reference.add(prompt, params)
    finish(reference, whole)
    assert [entry.token for entry in sequence.prompt_logprobs] == prompt[1:]
    for ours, theirs in zip(sequence.prompt_logprobs, whole.prompt_logprobs, strict=True):
        assert abs(ours.logprob - theirs.logprob) < 1e-5
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
        assert len(ours.top) == 3 and ours.top[0][1] >= ours.top[1][1] >= ours.top[2][1]
    assert logprobs.token == sequence.tokens[-1] == logprobs.top[0][0] and len(logprobs.top) == 2


def test_scoring_a_prompt_generates_nothing() -> None:
    engine = engine_of(MODEL, limits(max_seq_len=20))
    sequence = engine.add([1, 2, 3] * 6 + [4, 5], SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert finish(engine, sequence) == []
    assert sequence.finish_reason is FinishReason.LENGTH
    assert len(sequence.prompt_logprobs) == 19


@KERNELS
def test_numbers_that_are_not_finite_end_their_own_sequence_and_spare_the_next_in_its_slot(choices: dict) -> None:
    weights = random_weights(TINY, seed=11)
    weights["tok_embeddings.weight"][13] = float("inf")
    model = model_of(TINY, weights)
    engine = engine_of(model, limits(slots=2, **choices))
    bad = engine.add([1, 2, 3, 4, 5, 6, 7, 13], SamplingParams(max_tokens=4))
    good = engine.add([3, 2, 1], SamplingParams(max_tokens=8, temperature=0.0, logit_bias={13: -100.0}))
    assert finish(engine, good) == alone(MODEL, [3, 2, 1], good.params, limits(**choices))
    assert bad.finish_reason is FinishReason.ERROR and "not finite at position" in bad.error
    params = SamplingParams(max_tokens=8, temperature=0.0, logit_bias={13: -100.0})
    assert finish(engine, again := engine.add(bad.tokens, bad.params)) == [] and again.cached == 0
    # The second is longer, so what lies behind the first one's tokens in its slot is masked but still multiplied.
    pair = [engine.add([8, 8, 8], params), engine.add([9] * 12, params)]
    assert [finish(engine, sequence) for sequence in pair] == [
        alone(MODEL, sequence.tokens[: sequence.prompt_length], params, limits(**choices)) for sequence in pair
    ]


@KERNELS
def test_one_that_is_cancelled_in_the_step_that_overflows_spares_the_next_in_its_slot(choices: dict) -> None:
    weights = random_weights(TINY, seed=11)
    weights["tok_embeddings.weight"][13] = float("inf")
    engine = engine_of(model_of(TINY, weights), limits(slots=2, **choices))
    bad = engine.add([1, 2, 3, 4, 5, 6, 7, 13], SamplingParams(max_tokens=4))
    run = engine._runner.run

    def run_and_cancel(plan: StepPlan) -> torch.Tensor:
        engine.cancel(bad)
        return run(plan)

    engine._runner.run = run_and_cancel
    engine.step()
    engine._runner.run = run
    assert bad.finish_reason is FinishReason.CANCELLED
    params = SamplingParams(max_tokens=8, temperature=0.0, logit_bias={13: -100.0})
    # The longer one takes the slot that nobody used, so what lies behind the other's tokens is masked but multiplied.
    pair = [engine.add([9] * 12, params), engine.add([8, 8, 8], params)]
    assert [finish(engine, sequence) for sequence in pair] == [
        alone(MODEL, sequence.tokens[: sequence.prompt_length], params, limits(**choices)) for sequence in pair
    ]


@KERNELS
def test_one_that_is_cancelled_in_the_middle_of_a_prompt_that_overflows_spares_the_next(choices: dict) -> None:
    weights = random_weights(TINY, seed=11)
    weights["tok_embeddings.weight"][13] = float("inf")
    engine = engine_of(model_of(TINY, weights), limits(slots=2, max_tokens_per_step=8, **choices))
    params = SamplingParams(max_tokens=40, temperature=0.0, logit_bias={13: -100.0})
    long = engine.add([9] * 12, params)
    while not long.generated:
        engine.step()
    bad = engine.add([1, 2, 13, 4, *range(20, 50)], SamplingParams(max_tokens=4))
    engine.step()
    engine.cancel(bad)
    brief = engine.add([8, 8], SamplingParams(max_tokens=8, temperature=0.0, logit_bias={13: -100.0}))
    assert finish(engine, brief) == alone(MODEL, [8, 8], brief.params, limits(**choices))


def test_a_cancellation_while_slots_are_freed_loses_none() -> None:
    engine = engine_of(MODEL, limits(slots=2))
    first, second = (engine.add([token, 2, 3], SamplingParams(max_tokens=30)) for token in (1, 4))
    engine.step()
    release = engine.slots.release

    def release_and_cancel(slot: int) -> None:
        engine.cancel(first)  # as another thread may, just here
        release(slot)

    engine.slots.release = release_and_cancel
    engine.cancel(second)
    engine.step()
    engine.step()
    assert (engine.running, engine.slots.free) == (0, 2)


def test_a_heartbeat_is_heard_and_nothing_is_computed_for_it() -> None:
    said: list[torch.Tensor] = []

    class Others:
        several = leads = True

        def broadcast(self, plan: torch.Tensor) -> None:
            said.append(plan.clone())

        def close(self) -> None:
            pass

    class Leader:
        def broadcast(self, plan: torch.Tensor) -> None:
            plan.copy_(said.pop(0))

    leader, follower = engine_of(MODEL), engine_of(MODEL)
    leader.ranks, follower.ranks, follower._runner = Others(), Leader(), None
    leader.heartbeat()
    leader.close()
    assert len(said) == 2
    follower.follow()
    assert not said


@pytest.mark.parametrize("fails", [False, True])
def test_a_leader_that_fails_within_a_step_does_not_wait_for_those_that_compute_it(fails: bool) -> None:
    said = []

    class Others:
        several = leads = True

        def broadcast(self, plan: torch.Tensor) -> None:
            said.append(plan[0].item())

        def close(self) -> None:
            said.append("closed")

    def fail(plan: StepPlan) -> torch.Tensor:
        raise RuntimeError("out of memory")

    engine = engine_of(MODEL)
    engine.ranks = Others()
    engine.add([1, 2], SamplingParams(max_tokens=2))
    engine.step()
    if fails:
        engine._runner.run = fail
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.step()
    engine.close()
    assert said == ([1, 1, "closed"] if fails else [1, -1, "closed"])


@pytest.mark.parametrize(
    ("prompt", "params", "message", "param"),
    [
        ([], {}, "the prompt is empty", "prompt"),
        ([1] * 64, {}, "has 64 tokens; with max_seq_len 64 at most 63 fit", "prompt"),
        ([1] * 65, {"max_tokens": 0}, "has 65 tokens; with max_seq_len 64 at most 64 fit", "prompt"),
        ([1, 64], {}, "token id 64; ids are 0 to 63", "prompt"),
        ([-1], {}, "token id -1; ids are 0 to 63", "prompt"),
        ([1.0], {}, "token id 1.0; ids are 0 to 63", "prompt"),
        ([True], {}, "token id True", "prompt"),
        (["a"], {}, "token id 'a'", "prompt"),
        ([1], {"logit_bias": {64: 1.0}}, "logit_bias has token id 64", "logit_bias"),
        ([1], {"stop_ids": frozenset({70})}, "stop_ids has token id 70", "stop_ids"),
    ],
)
def test_what_can_never_be_served_is_refused_at_once(prompt: list, params: dict, message: str, param: str) -> None:
    engine = engine_of(MODEL)
    with pytest.raises(RequestError, match=message) as caught:
        engine.add(prompt, SamplingParams(**params))
    assert (caught.value.param, caught.value.status) == (param, 400)
    assert not engine.busy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be a finite number from 0 to 100"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": 0}, "top_p is 0; it must be a finite number above 0, at most 1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_k": 2**31}, "top_k is 2147483648"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty is 1e-40; it must be a finite number from 0.01 to 10"),
        ({"ignore_eos": "no"}, "ignore_eos is 'no'; it must be true or false"),
        ({"logit_bias": [1]}, "logit_bias must map token ids to numbers"),
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty is inf"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"logprobs": 21}, "logprobs is 21; it must be a whole number, from 0 to 20"),
        ({"logit_bias": {1: 101}}, r"logit_bias\[1\] is 101"),
        ({"logit_bias": dict.fromkeys(range(301), 0.0)}, "logit_bias has 301 entries; at most 300"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
    ],
)
def test_options_out_of_range_are_refused_with_the_range(options: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**options)
