"""Steps that are launched before the last one's tokens are known here: the same tokens, for whoever comes and goes."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from tiny_models import TINY, alone, engine_of, finish, limits, model_of, random_weights

from engine import engine as engine_module
from engine import slots
from engine.engine import Engine
from engine.sampler import Chosen
from engine.sequence import FinishReason, SamplingParams, Sequence

MODEL = model_of(TINY, random_weights(TINY, seed=11))
SCHEDULES = 200


class Counting(Chosen):
    """Tokens that are looked at only once the step behind theirs was launched."""

    engine: Engine
    launched = 0

    def wait(self) -> list[int]:
        assert self.engine._ahead is not None, "the step behind was not launched before the tokens were asked for"
        Counting.launched += 1
        return super().wait()


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    monkeypatch.setattr(engine_module, "Chosen", Counting)
    monkeypatch.setattr(Counting, "launched", 0)
    return Counting


def ahead_of(model: torch.nn.Module = MODEL, **choices: int) -> Engine:
    """An engine in static shapes, as on a GPU, where computing is only not captured."""
    engine = engine_of(model, limits(cuda_graphs=True, **choices))
    assert engine._runner.runs_ahead
    Counting.engine = engine
    return engine


def random_request(rng: random.Random, beginnings: list[list[int]]) -> tuple[list[int], SamplingParams]:
    prompt = rng.choice(beginnings)[: rng.choice((1, 5, 25, 40))] + [rng.randrange(TINY.vocab_size) for _ in range(3)]
    return prompt, SamplingParams(
        max_tokens=rng.randint(1, 20),
        temperature=rng.choice((0.0, 0.0, 1.0)),
        top_k=rng.choice((0, 10)),
        repetition_penalty=rng.choice((1.0, 1.0, 1.0, 1.0, 1.3)),
        logprobs=rng.choice((None, None, None, None, 2)),
        logit_bias=rng.choice(({}, {5: 2.0})),
        stop_ids=frozenset(rng.sample(range(TINY.vocab_size), 3)),
        seed=rng.randrange(1000),
    )


def test_random_schedules_give_everyone_the_tokens_that_it_gets_alone(
    monkeypatch: pytest.MonkeyPatch, counting: type[Counting]
) -> None:
    monkeypatch.setattr(slots, "WORTH_WAITING", 20)  # prompts are short here
    rng = random.Random(21)
    beginnings = [[rng.randrange(TINY.vocab_size) for _ in range(40)] for _ in range(3)]
    pool = [random_request(rng, beginnings) for _ in range(60)]
    expected = [alone(MODEL, *request) for request in pool]
    steps = cancelled = resumed = reused = 0
    for _ in range(SCHEDULES):
        count = rng.randint(1, 5)
        engine = ahead_of(slots=count, max_tokens_per_step=rng.choice((count, 8, 64)))
        arrivals = sorted((rng.randint(0, 25), index) for index in rng.choices(range(len(pool)), k=rng.randint(2, 6)))
        sequences: list[tuple[int, Sequence]] = []
        step = 0
        while arrivals or engine.busy:
            while arrivals and arrivals[0][0] <= step:
                index = arrivals.pop(0)[1]
                sequences.append((index, engine.add(*pool[index])))
            if sequences and rng.random() < 0.1:
                place = rng.randrange(len(sequences))
                index, sequence = sequences[place]
                going = not sequence.finished
                engine.cancel(sequence)
                if going and rng.random() < 0.5:  # one that was suspended comes back
                    sequences[place] = index, sequence.again()
                    engine.enqueue(sequences[place][1])
                    resumed += 1
            engine.step()
            assert engine.running + engine.slots.free == count
            step += 1
        steps += step
        for index, sequence in sequences:
            reused += sequence.cached > 0
            generated = sequence.tokens[sequence.prompt_length :]
            if sequence.finish_reason is FinishReason.CANCELLED:
                cancelled += 1
                assert generated == expected[index][: len(generated)]
            else:
                assert generated == expected[index]
    assert counting.launched > steps / 4
    assert min(cancelled, resumed, reused) > SCHEDULES / 10


def test_nothing_runs_ahead_of_tokens_that_change_what_follows(counting: type[Counting]) -> None:
    for options in ({"presence_penalty": 0.5}, {"repetition_penalty": 1.5}, {"logprobs": 1}):
        engine = ahead_of()
        finish(engine, engine.add([1, 2, 3], SamplingParams(max_tokens=6, temperature=0.0, **options)))
    assert counting.launched == 0
    engine = ahead_of()
    finish(engine, engine.add([1, 2, 3], SamplingParams(max_tokens=6, temperature=0.0)))
    assert counting.launched == 5, "all but the last, behind which nothing comes"


def test_a_sequence_fills_max_seq_len_and_no_position_more(counting: type[Counting]) -> None:
    engine = ahead_of(slots=2, max_seq_len=24)
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    pair = [engine.add([7] * 20, params), engine.add([9] * 5, params)]
    assert [finish(engine, each) for each in pair] == [
        alone(MODEL, each.tokens[: each.prompt_length], params, limits(max_seq_len=24)) for each in pair
    ]
    assert all(len(each.tokens) == 24 for each in pair) and counting.launched > 15


def test_who_comes_waits_for_the_launched_step_only(counting: type[Counting]) -> None:
    engine = ahead_of(slots=2)
    engine.add([1, 2, 3], SamplingParams(max_tokens=40, temperature=0.0))
    for _ in range(4):
        engine.step()
    assert engine._ahead is not None
    newcomer = engine.add([4, 5], SamplingParams(max_tokens=4, temperature=0.0))
    engine.step()
    assert newcomer.generated == 0 and engine._ahead is None
    engine.step()
    assert newcomer.generated == 1 and counting.launched > 3


def test_the_pace_learns_from_launched_steps_that_nothing_was_beside_the_tokens(
    counting: type[Counting], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, learnt = ahead_of(slots=2), []
    monkeypatch.setattr(engine._scheduler._pace, "learn", lambda *told: learnt.append((*told[:2], told[3])))
    params = SamplingParams(max_tokens=4, temperature=0.0)
    for each in [engine.add([1, 2, 3], params), engine.add([4, 5], params)]:
        finish(engine, each)
    assert learnt == [(0, 5, True)] + [(2, 0, True)] * 3 and counting.launched == 3


def test_a_launched_step_that_overflows_ends_its_own_sequence(counting: type[Counting]) -> None:
    weights = random_weights(TINY, seed=11)
    weights["tok_embeddings.weight"][13] = float("inf")
    engine = ahead_of(model_of(TINY, weights), slots=2)
    others = SamplingParams(max_tokens=12, temperature=0.0, logit_bias={13: -100.0})
    bad = engine.add([3, 1, 2], SamplingParams(max_tokens=9, temperature=0.0, logit_bias={13: 100.0}))
    good = engine.add([3, 2, 1], others)
    assert finish(engine, good) == alone(MODEL, [3, 2, 1], others)
    assert bad.finish_reason is FinishReason.ERROR and bad.tokens == [3, 1, 2, 13]
    assert "not finite at position 3" in bad.error and counting.launched > 8
    pair = [engine.add([8, 8, 8], others), engine.add([9] * 12, others)]
    assert [finish(engine, each) for each in pair] == [
        alone(MODEL, each.tokens[: each.prompt_length], others) for each in pair
    ]


def test_a_launched_step_that_overflows_for_nobody_spares_the_next_in_its_slot(counting: type[Counting]) -> None:
    weights = random_weights(TINY, seed=11)
    weights["tok_embeddings.weight"][13] = float("inf")
    engine = ahead_of(model_of(TINY, weights), slots=2)
    others = SamplingParams(max_tokens=12, temperature=0.0, logit_bias={13: -100.0})
    long = engine.add([9] * 30, SamplingParams(max_tokens=40, temperature=0.0, logit_bias={13: -100.0}))
    ends = SamplingParams(max_tokens=9, temperature=0.0, logit_bias={13: 100.0}, stop_ids=frozenset({13}))
    ended = engine.add([3, 1, 2, 4], ends)
    while not ended.finished:
        engine.step()
    assert ended.finish_reason is FinishReason.STOP and counting.launched
    after = engine.add([8, 8], others)
    assert finish(engine, after) == alone(MODEL, [8, 8], others) and after.finish_reason is FinishReason.LENGTH
    assert not long.finished


def test_the_likeliest_tokens_come_from_one_kernel_where_nobody_asks_for_more(counting: type[Counting]) -> None:
    """As `engine.gpu.choice` has it, which `test_gpu_block.py` tries."""

    def likeliest(logits_RV: torch.Tensor, otherwise: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows.append(len(logits_RV))
        tokens_R = logits_RV.argmax(-1)
        return tokens_R, torch.where(logits_RV.isfinite().all(-1), tokens_R, otherwise)

    plain = SamplingParams(max_tokens=12, temperature=0.0)
    biased = SamplingParams(max_tokens=12, temperature=0.0, logit_bias={13: -100.0})
    for others, used in ((plain, True), (biased, False), (SamplingParams(max_tokens=12, seed=4), False)):
        rows: list[int] = []
        engine = ahead_of(slots=2)
        engine._runner.likeliest = likeliest
        pair = [engine.add([3, 2, 1], plain), engine.add([8, 9], others)]
        for each, params in zip(pair, (plain, others), strict=True):
            assert finish(engine, each) == alone(MODEL, each.tokens[: each.prompt_length], params)
        assert (max(rows, default=0) == 2) == used and counting.launched
    answer = alone(MODEL, [3, 2, 1], plain)
    weights = random_weights(TINY, seed=11)
    weights["tok_embeddings.weight"][answer[2]] = float("nan")
    engine = ahead_of(model_of(TINY, weights), slots=1)
    engine._runner.likeliest = likeliest
    bad = engine.add([3, 2, 1], plain)
    assert finish(engine, bad) == answer[:3] and bad.finish_reason is FinishReason.ERROR


def test_a_capture_that_fails_while_running_ahead_costs_no_token(counting: type[Counting]) -> None:
    def fails(forward: Callable[[], None]) -> Callable[[], None]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine = ahead_of(slots=2)
    params = SamplingParams(max_tokens=8, temperature=0.0)
    brief = engine.add([1], SamplingParams(max_tokens=3, temperature=0.0))
    long = engine.add([1, 2, 3], params)
    finish(engine, brief)
    engine.step()
    assert not long.finished and counting.launched > 1
    engine._runner._graphs._capture = fails
    engine._runner._graphs._replays.clear()
    # It takes the slot in front of the other's and is behind it in the step of its prompt.
    new = engine.add([4, 5, 6, 7], params)
    assert [finish(engine, long), finish(engine, new)] == [
        alone(MODEL, [1, 2, 3], params),
        alone(MODEL, [4, 5, 6, 7], params),
    ]
    assert not engine._runner.runs_ahead


@pytest.mark.parametrize("longest", [1, 2, 64])
def test_a_rehearsal_leaves_everybody_the_tokens_that_it_gets_alone(longest: int) -> None:
    rng = random.Random(3)
    engine = ahead_of(slots=5, max_seq_len=longest)
    engine.rehearse()
    assert not engine.busy and engine.slots.free == 5 and engine.steps == 0
    if longest == 64:
        rows = {rows for rows, _, _ in engine._runner._graphs._replays}
        assert rows == {1, 2, 4, 5}
        for _ in range(20):
            prompt, params = random_request(rng, [[0] * 40])
            assert finish(engine, engine.add(prompt, params)) == alone(MODEL, prompt, params)
