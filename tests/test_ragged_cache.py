"""The cache for `varlen_attn` against the ordinary one; see conftest.py for where attention is computed."""

from __future__ import annotations

import dataclasses
import logging
import random

import attention
import pytest
import torch
from tiny_models import TINY, engine_of, finish, limits, model_of, random_weights

from engine import loader, ragged_cache
from engine.config import EngineConfig
from engine.gpu import NotOnThisGpu
from engine.loader import Limits
from engine.ragged_cache import check_ragged_attention
from engine.runner import Runner
from engine.scheduler import Copy, Segment, StepPlan
from engine.sequence import SamplingParams
from llama2 import ModelArgs

SLOTS, LENGTH = 5, 64
CHOSEN = limits(slots=SLOTS, max_seq_len=LENGTH, max_tokens_per_step=4 * LENGTH)
MODELS = {
    "groups of two": TINY,
    "a head of its own each": dataclasses.replace(TINY, n_kv_heads=4),
    "one for all": dataclasses.replace(TINY, n_kv_heads=1),
}


@pytest.mark.parametrize("args", MODELS.values(), ids=MODELS)
def test_random_plans_give_the_logits_and_the_cache_of_the_ordinary_way(args: ModelArgs) -> None:
    rng = random.Random(4)
    model = model_of(args, random_weights(args, seed=2))
    ordinary, ragged = (Runner(model, dataclasses.replace(CHOSEN, ragged=each), "cpu", 1) for each in (False, True))
    held = dict.fromkeys(range(SLOTS), 0)
    kinds = {"single": 0, "prompt": 0, "later chunk": 0}
    for _ in range(150):
        scrub, copies = (), ()
        if rng.random() < 0.1:
            slot = rng.randrange(SLOTS)
            held[slot] = rng.randrange(held[slot] + 1)
            scrub = ((slot, held[slot]),)
        if rng.random() < 0.1:
            source, target = rng.sample(range(SLOTS), 2)
            held[target] = rng.randint(0, held[source])
            copies = (Copy(source, target, held[target]),)
        singles, chunks = [], []
        for slot in rng.sample(range(SLOTS), rng.randint(1, SLOTS)):
            if held[slot] > LENGTH - 20:
                held[slot] = 0
            start, count = held[slot], 1 if rng.random() < 0.5 else rng.randint(2, 20)
            tokens = tuple(rng.randrange(args.vocab_size) for _ in range(count))
            (singles if count == 1 else chunks).append(Segment(slot, start, tokens, rng.randint(1, count)))
            kinds["single" if count == 1 else "later chunk" if start else "prompt"] += 1
            held[slot] += count
        plan = StepPlan((*sorted(singles, key=lambda segment: segment.slot), *chunks), scrub, copies)
        expected, found = ordinary.run(plan), ragged.run(plan)
        assert (found - expected).abs().max() < 1e-5
        for name in ("keys_LBKTH", "values_LBKTH"):
            assert (getattr(ragged.cache, name) - getattr(ordinary.cache, name)).abs().max() < 1e-5
    assert min(kinds.values()) > 20, kinds


def test_numbers_that_are_not_finite_stay_in_their_own_slot() -> None:
    model = model_of(TINY, random_weights(TINY, seed=2))
    runner = Runner(model, dataclasses.replace(CHOSEN, ragged=True), "cpu", 1)
    runner.cache.keys_LBKTH[:, 1].fill_(torch.nan)
    runner.cache.values_LBKTH[:, 1].fill_(torch.nan)
    segments = (Segment(0, 7, (1,), 1), Segment(1, 7, (1,), 1), Segment(2, 63, (1,), 1))
    assert runner.run(StepPlan(segments)).isfinite().all(-1).tolist() == [True, False, True]


def test_whole_answers_are_those_of_the_ordinary_way() -> None:
    model = model_of(TINY, random_weights(TINY, seed=11))
    rng = random.Random(8)
    prompts = [[rng.randrange(TINY.vocab_size) for _ in range(count)] for count in (3, 30, 17, 40, 8)]
    found = []
    for chosen in (limits(slots=3), limits(slots=3, ragged=True), limits(slots=3, ragged=True, cuda_graphs=True)):
        engine = engine_of(model, chosen)
        sequences = [engine.add(prompt, SamplingParams(max_tokens=20, temperature=0.0)) for prompt in prompts]
        found.append([finish(engine, sequence) for sequence in sequences])
    assert found[0] == found[1] == found[2]


def _with(change: str):
    """`varlen_attn` with a fault in it."""

    def faulty(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options):
        if change == "a key too few":
            options["seqused_k"] = (options["seqused_k"] - 1).clamp(min=1)
        if change == "another's slot":
            cu_seq_k = cu_seq_k.flip(0).roll(-1)
        if change == "not a number":
            return torch.full_like(query, torch.nan)
        return attention.varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options)

    return faulty


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("a key too few", "came out wrong in a test"),
        ("another's slot", "came out wrong in a test"),
        ("not a number", "came out wrong in a test"),
    ],
)
@pytest.mark.parametrize("heads", [1, 4])
def test_the_check_at_the_start_finds_what_does_not_work(
    heads: int, change: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_ragged_attention("cpu", torch.bfloat16, heads, 1, 64)
    monkeypatch.setattr(ragged_cache, "varlen_attn", _with(change))
    with pytest.raises(NotOnThisGpu, match=reason):
        check_ragged_attention("cpu", torch.bfloat16, heads, 1, 64)


def test_a_gpu_without_it_is_told_so_once_and_served_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "engine")  # which a command line before may have changed
    asked = []

    def check(*arguments: object) -> None:
        asked.append(arguments)
        if len(asked) == 2:
            raise NotOnThisGpu("it came out wrong in a test")

    monkeypatch.setattr(loader, "check_ragged_attention", check)
    monkeypatch.setattr(loader, "choose_fused", lambda *_: False)
    settled = [
        Limits.settle(EngineConfig(dtype="bfloat16", kernels=kernels), TINY, "cuda:0").ragged
        for kernels in ("auto", "auto", "torch")
    ]
    assert settled == [True, False, False]
    assert asked == [("cuda:0", torch.bfloat16, 2, 1, 8)] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "attention reads more than it needs, because PyTorch's varlen_attn cannot be used: it came out wrong in a test"
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: PyTorch has varlen_attn for GPUs only")
def test_a_gpu_has_it() -> None:
    check_ragged_attention("cuda:0", torch.bfloat16, 4, 1, 64)
    check_ragged_attention("cuda:0", torch.bfloat16, 1, 1, 128)
