"""Decode in static shapes against the ordinary way: the same logits, the same cache, whatever a step looks like."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Callable

import pytest
import torch
from tiny_models import TINY, finish, limits, model_of, random_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import ragged_cache
from engine.decode_graphs import LEAST_CONTEXT, Capture, bucket
from engine.engine import Engine
from engine.loader import Limits, memory_need
from engine.parallel import Launch, Ranks
from engine.runner import Runner
from engine.scheduler import Copy, Segment, StepPlan
from engine.sequence import SamplingParams
from llama2 import Transformer

MODEL = model_of(TINY, random_weights(TINY, seed=11))
SLOTS, LENGTH = 13, 600
CHOSEN = limits(slots=SLOTS, max_seq_len=LENGTH, max_tokens_per_step=LENGTH)
RAGGED = dataclasses.replace(CHOSEN, ragged=True)
CACHES = pytest.mark.parametrize("chosen", [CHOSEN, RAGGED], ids=["padded context", "ragged"])


class Tape(TorchDispatchMode):
    """A graph for the CPU: what was called, on which memory; played again it asks nothing of Python."""

    def __init__(self, forward: Callable[[], None]) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        with self:
            forward()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self.calls.append((function, arguments, options or {}, result))
        return result

    def __call__(self) -> None:
        for function, arguments, options, results in self.calls:
            again = function(*arguments, **options)
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Counted:
    """A capture that counts what it was asked for."""

    def __init__(self, capture: Capture) -> None:
        self.captured, self.capture = 0, capture

    def __call__(self, forward: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        return self.capture(forward)


def pair(capture: Capture, chosen: Limits = CHOSEN) -> tuple[Runner, Runner]:
    return Runner(MODEL, CHOSEN, "cpu", 1), Runner(MODEL, chosen, "cpu", 1, capture)


def agree(ordinary: Runner, static: Runner, plan: StepPlan) -> None:
    """Run a plan on both and compare all there is."""
    expected, found = ordinary.run(plan), static.run(plan)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5
    for name in ("keys_LBKTH", "values_LBKTH"):
        kept = getattr(static.cache, name)[..., :LENGTH, :]  # the position behind is for padded rows
        assert (kept - getattr(ordinary.cache, name)).abs().max() < 1e-5


def singles(rng: random.Random, lengths: dict[int, int]) -> tuple[Segment, ...]:
    """The next token of some slots, which have so many already."""
    return tuple(Segment(slot, lengths[slot], (rng.randrange(TINY.vocab_size),), 1) for slot in sorted(lengths))


@CACHES
@pytest.mark.parametrize("capture", [lambda forward: forward, Tape], ids=["computed anew", "replayed"])
def test_random_plans_give_the_logits_and_the_cache_of_the_ordinary_way(capture: Capture, chosen: Limits) -> None:
    rng = random.Random(3)
    counted = Counted(capture)
    ordinary, static = pair(counted, chosen)
    held: dict[int, int] = {}
    decoded = 0
    for step in range(400):
        scrub, copies = (), ()
        if held and rng.random() < 0.1:
            slot = rng.choice(list(held))
            scrub = ((slot, rng.randrange(held[slot] + 1)),)
            held[slot] = scrub[0][1]
        if held and rng.random() < 0.1:
            source, target = rng.choice(list(held)), rng.randrange(SLOTS)
            if source != target:
                held[target] = rng.randint(0, held[source])
                copies = (Copy(source, target, held[target]),)
        if step % 8 == 0:  # somebody's prompt, which is computed as ever, beside whoever decodes
            slot, count = rng.randrange(SLOTS), rng.choice((2, 3, 250, 254, 509, 590))
            others = {each: length for each, length in held.items() if each != slot and length < LENGTH}
            tokens = tuple(rng.randrange(TINY.vocab_size) for _ in range(count))
            held[slot] = count
            plan = StepPlan((*singles(rng, others), Segment(slot, 0, tokens, 1)), scrub, copies)
        else:
            able = [slot for slot, length in held.items() if length < LENGTH]
            others = {slot: held[slot] for slot in rng.sample(able, rng.randint(1, len(able)))}
            plan = StepPlan(singles(rng, others), scrub, copies)
            decoded += 1
        agree(ordinary, static, plan)
        for slot in others:
            held[slot] += 1
    captured = {(rows, context) for rows, context, _ in static._graphs._replays}
    assert {rows for rows, _ in captured} == {1, 2, 4, 8, SLOTS}
    assert {context for _, context in captured} == ({LENGTH} if chosen.ragged else {LEAST_CONTEXT, 512, LENGTH})
    assert {in_place for *_, in_place in static._graphs._replays} == ({False} if chosen.ragged else {True, False})
    assert counted.captured == len(static._graphs._replays) < decoded / 2, "each once, and used again"


def test_a_sequence_goes_on_over_the_edge_of_a_context_bucket() -> None:
    rng = random.Random(5)
    ordinary, static = pair(Tape)
    for slot, count in ((4, LEAST_CONTEXT - 2), (5, 20)):
        tokens = tuple(rng.randrange(TINY.vocab_size) for _ in range(count))
        agree(ordinary, static, StepPlan((Segment(slot, 0, tokens, 1),)))
    for step in range(5):
        agree(ordinary, static, StepPlan(singles(rng, {4: LEAST_CONTEXT - 2 + step, 5: 20 + step})))
    assert {context for _, context, _ in static._graphs._replays} == {LEAST_CONTEXT, 512}


def test_slots_next_to_one_another_are_read_where_they_lie_and_scattered_ones_brought_together() -> None:
    rng = random.Random(9)
    ordinary, static = pair(Tape)
    for name in ("keys_LBKTH", "values_LBKTH"):
        getattr(static.cache, name)[..., :LENGTH, :] = getattr(ordinary.cache, name).normal_()
    expected = {(0,): (1, True), (1,): (2, True), (2,): (1, False), (12,): (1, False), (0, 3): (4, True)}
    expected |= {(0, 4): (2, False), (2, 3, 5): (8, True), (1, 12): (2, False), tuple(range(8, 13)): (SLOTS, True)}
    for slots, rows in expected.items():
        plan = StepPlan(singles(rng, dict.fromkeys(slots, 9)))
        assert static._graphs._rows(plan.segments) == rows, slots
        agree(ordinary, static, plan)  # of as many rows as before, maybe, but read in another way


@CACHES
def test_padded_rows_leave_every_slot_as_it_is(chosen: Limits) -> None:
    rng = random.Random(6)
    _, static = pair(Tape, chosen)
    for cache in (static.cache.keys_LBKTH, static.cache.values_LBKTH):
        cache.normal_()
    for slots in ((12,), (0, 2, 3), (4, 5, 6, 7, 9), (3, 11)):
        before = static.cache.keys_LBKTH[..., :LENGTH, :].clone()
        static.run(StepPlan(singles(rng, dict.fromkeys(slots, 7))))
        changed = (static.cache.keys_LBKTH[..., :LENGTH, :] != before).any(-1).any(2).any(0).nonzero().tolist()
        assert changed == [[slot, 7] for slot in slots]


@CACHES
def test_numbers_that_are_not_finite_stay_in_their_own_row(chosen: Limits) -> None:
    ordinary, static = pair(Tape, chosen)
    for runner in (ordinary, static):
        for cache in (runner.cache.keys_LBKTH, runner.cache.values_LBKTH):
            cache[:, 2].fill_(float("nan"))  # a slot whose sequence failed; it is cleared before its next user
    for slots in ((0, 1, 3), (1, 9)):
        plan = StepPlan(singles(random.Random(1), dict.fromkeys(slots, 4)))
        found = static.run(plan)
        assert found.isfinite().all() and (found - ordinary.run(plan)).abs().max() < 1e-5
    failing = static.run(StepPlan(singles(random.Random(1), {0: 5, 1: 5, 2: 5, 3: 5})))
    assert failing.isfinite().all(-1).tolist() == [True, True, False, True]


def test_steps_with_prompts_or_guesses_or_without_logits_are_computed_as_ever() -> None:
    counted = Counted(Tape)
    _, static = pair(counted)
    for segments in (
        [Segment(0, 0, (1, 2), 1)],
        [Segment(0, 2, (3,), 1), Segment(1, 0, (4, 5), 1)],
        [Segment(0, 3, (4, 5, 6), 3)],
        [Segment(0, 6, (7,), 0)],
    ):
        static.run(StepPlan(tuple(segments)))
    assert counted.captured == 0
    static.run(StepPlan((Segment(0, 7, (8,), 1),)))
    assert counted.captured == 1


def test_a_capture_that_fails_is_said_once_and_the_ordinary_way_takes_over(caplog: pytest.LogCaptureFixture) -> None:
    allowed = 2

    def fails_at_the_third(forward: Callable[[], None]) -> Callable[[], None]:
        nonlocal allowed
        allowed -= 1
        forward()  # the warm-up has written keys and values before it fails
        if allowed < 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward

    rng = random.Random(7)
    ordinary, static = pair(fails_at_the_third)
    with caplog.at_level(logging.WARNING, "engine"):
        for step, slots in enumerate(((0,), (0, 1), (0,), (0, 1, 2, 3), (0,), (0, 1, 2, 3, 4, 5))):
            agree(ordinary, static, StepPlan(singles(rng, dict.fromkeys(slots, step))))
    assert [record.getMessage() for record in caplog.records] == [
        "no CUDA graphs from here on, so decode is slower: capturing one failed: CUDA out of memory"
    ]
    assert not static._graphs._replays, "what the others hold is of no more use"


@CACHES
def test_what_is_captured_makes_every_tensor_on_the_device_and_looks_at_no_value(
    chosen: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On torch's meta device there are no values: whatever reads one fails, as it would while capturing."""
    monkeypatch.setattr(ragged_cache, "varlen_attn", torch.nn.attention.varlen.varlen_attn)
    with torch.device("meta"):
        model = Transformer(TINY)
    model.set_rope(torch.device("meta"))

    def strict(forward: Callable[[], None]) -> Callable[[], None]:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "tensor", None)  # makes a tensor of the host's numbers
            forward()
        return forward

    for slots in ((0, 1, 3), (1, 9)):
        runner = Runner(model, chosen, "meta", 1, strict)
        assert runner.run(StepPlan(singles(random.Random(1), dict.fromkeys(slots, 300)))).shape == (len(slots), 64)


def test_buckets_are_powers_of_two_within_the_limits() -> None:
    assert [bucket(size, 1, 13) for size in (1, 2, 3, 4, 5, 8, 9, 13)] == [1, 2, 4, 4, 8, 8, 13, 13]
    assert [bucket(size, 256, 600) for size in (1, 256, 257, 512, 513, 600)] == [256, 256, 512, 512, 600, 600]
    assert bucket(3, 256, 100) == 100


def test_the_preflight_counts_what_graphs_hold_on_one_rank_only() -> None:
    def need(cuda_graphs: bool, ranks: int) -> tuple[int, int]:
        found = memory_need(TINY, Limits(64, 8, 16, torch.float32, cuda_graphs=cuda_graphs), ranks)
        return found.cache, found.working

    assert need(True, 2) == need(False, 2)
    position = 2 * TINY.n_layers * TINY.n_kv_heads * TINY.head_dim * 4
    assert need(True, 1)[0] - need(False, 1)[0] == 8 * position
    assert need(True, 1)[1] > need(False, 1)[1] + 8 * TINY.vocab_size * 12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; capture itself cannot be tried without one")
def test_graphs_on_a_gpu_give_the_tokens_of_the_ordinary_way() -> None:
    model = model_of(TINY, random_weights(TINY, seed=11)).to("cuda")
    model.set_rope(torch.device("cuda"))
    rng = random.Random(8)
    prompts = [[rng.randrange(TINY.vocab_size) for _ in range(count)] for count in (3, 250, 40, 500, 8)]
    found = []
    for graphs in (False, True):
        chosen = limits(slots=3, max_seq_len=LENGTH, max_tokens_per_step=64, cuda_graphs=graphs)
        runner = Runner(model, chosen, "cuda:0", 1)
        engine = Engine(runner, chosen, Ranks(Launch(), "cuda:0", TINY), TINY.vocab_size)
        params = SamplingParams(max_tokens=30, temperature=0.0)
        sequences = [engine.add(prompt, params) for prompt in prompts]
        found.append([finish(engine, sequence) for sequence in sequences])
        if graphs:
            assert runner._graphs._replays and not runner._graphs.failed
    assert found[0] == found[1]
