"""The sampling functions against definitions written out by hand."""

from __future__ import annotations

import math
from collections import Counter

import torch

from engine.sampler import (
    _STRIDE,
    _mix,
    adjust,
    choose_tokens,
    draw,
    filtered_probabilities,
    finite_rows,
    token_logprobs,
)
from engine.sequence import SamplingParams, Sequence

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, 3.0, -2.0]])
WIDTH = LOGITS.shape[1]


def probabilities(**options) -> list[float]:
    return filtered_probabilities(LOGITS, [SamplingParams(**options)])[0].tolist()


def kept(**options) -> set[int]:
    return {token for token, p in enumerate(probabilities(**options)) if p > 0}


def test_temperature_scales_logits() -> None:
    expected = (LOGITS[0] / 0.5).softmax(-1)
    assert torch.allclose(torch.tensor(probabilities(temperature=0.5)), expected)


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    assert probabilities(temperature=1e-30) == [0.0, 0.0, 0.0, 0.0, 1.0, 0.0]


def test_top_k_keeps_the_k_likeliest() -> None:
    assert kept(top_k=1) == {4}
    assert kept(top_k=3) == {4, 0, 1}
    assert kept(top_k=99) == set(range(WIDTH))


def test_top_p_keeps_the_fewest_that_reach_the_share() -> None:
    p = LOGITS[0].softmax(-1)
    two = (p[4] + p[0]).item()
    assert kept(top_p=p[4].item() * 0.999) == {4}
    assert kept(top_p=two * 0.999) == {4, 0}
    assert kept(top_p=two * 1.001) == {4, 0, 1}
    assert kept(top_p=1e-9) == {4}
    assert kept(top_p=5e-324, top_k=1, temperature=100.0) == {4}, "a share that rounds to nothing"


def test_top_p_counts_the_share_of_what_top_k_left() -> None:
    p = LOGITS[0].softmax(-1)
    assert kept(top_k=2, top_p=0.99 * (p[4] / (p[4] + p[0])).item()) == {4}
    assert kept(top_k=2, top_p=0.99) == {4, 0}


def test_min_p_keeps_what_is_likely_beside_the_best() -> None:
    assert kept(min_p=math.exp(-1.5)) == {4, 0}
    assert kept(min_p=1.0) == {4}


def test_each_row_has_its_own_options() -> None:
    rows = LOGITS.expand(4, -1)
    options = [SamplingParams(top_k=1), SamplingParams(), SamplingParams(top_p=0.7), SamplingParams(min_p=0.2)]
    mixed = filtered_probabilities(rows, options)
    for row, option in zip(mixed, options, strict=True):
        assert torch.equal(row, filtered_probabilities(LOGITS, [option])[0])


def keys(count: int) -> torch.Tensor:
    return torch.randint(2**63 - 1, (count,), generator=torch.Generator().manual_seed(0))


def test_draws_follow_the_distribution() -> None:
    weights, count = torch.tensor([0.0, 1.0, 0.0, 3.0, 4.0, 0.0]) / 16, 80_000
    counts = Counter(draw(weights.expand(count, -1), keys(count)).tolist())
    assert set(counts) == {1, 3, 4}
    for token, share in ((1, 1 / 8), (3, 3 / 8), (4, 4 / 8)):
        assert abs(counts[token] - share * count) < 4 * (count * share * (1 - share)) ** 0.5


def test_consecutive_keys_draw_independently() -> None:
    weights, count = torch.full((16,), 1 / 16), 64_000
    tokens = draw(weights.expand(count, -1), torch.arange(count))
    assert (torch.bincount(tokens) - count / 16).abs().max() < 5 * (count / 16) ** 0.5
    repeats = (tokens[1:] == tokens[:-1]).float().mean().item()
    assert abs(repeats - 1 / 16) < 0.005


def test_a_draw_does_not_turn_on_the_last_bits_of_the_weights() -> None:
    logits = torch.randn(200, 32000, generator=torch.Generator().manual_seed(1))
    jitter = 1e-5 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    chosen = [draw(rows.softmax(-1), keys(200)) for rows in (logits, logits + jitter)]
    assert (chosen[0] != chosen[1]).sum() == 0


# Of these the random bits are all ones.
KEY, TOKEN = 208044, 50


def test_the_smallest_noise_is_above_zero() -> None:
    assert _mix(KEY + torch.tensor(TOKEN) * _STRIDE) >> 40 & 0xFFFFFF == 0xFFFFFF
    weights = torch.zeros(1, 96)
    weights[0, [3, 7]] = torch.tensor([0.9, 0.1])
    assert draw(weights, torch.tensor([KEY])).item() in (3, 7)
    weights[0, TOKEN] = 0.05
    assert draw(weights, torch.tensor([KEY])).item() == TOKEN


def test_greedy_and_drawn_rows_share_a_batch() -> None:
    sequences = [Sequence([1], SamplingParams(temperature=t, seed=3)) for t in (0.0, 1.0, 0.0)]
    tokens = choose_tokens(LOGITS.expand(3, -1), sequences)
    alone = choose_tokens(LOGITS, [Sequence([1], SamplingParams(temperature=1.0, seed=3))])
    assert tokens == [4, alone[0], 4]


def penalised(prompt: list[int], output: list[int], **options) -> torch.Tensor:
    sequence = Sequence(prompt, SamplingParams(**options))
    sequence.limit = 99
    for token in output:
        sequence.append(token)
    return adjust(LOGITS, [sequence])[0]


def test_repetition_penalty_covers_prompt_and_output_by_sign() -> None:
    got = penalised([4, 4], [3], repetition_penalty=2.0)
    assert got.tolist() == [2.0, 1.0, 0.0, -2.0, 1.5, -2.0]


def test_presence_and_frequency_penalties_cover_the_output_only() -> None:
    got = penalised([4], [0, 0, 1], presence_penalty=0.5, frequency_penalty=0.25)
    assert got.tolist() == [1.0, 0.25, 0.0, -1.0, 3.0, -2.0]


def test_logit_bias_is_added_and_the_input_is_left_alone() -> None:
    got = penalised([1], [], logit_bias={5: 100.0, 4: -1.5})
    assert got.tolist() == [2.0, 1.0, 0.0, -1.0, 1.5, 98.0]
    assert LOGITS[0].tolist() == [2.0, 1.0, 0.0, -1.0, 3.0, -2.0]


def test_logprobs_are_the_models_own_with_as_many_alternatives_as_asked() -> None:
    expected = LOGITS[0].log_softmax(-1)
    first, second = token_logprobs(LOGITS.expand(2, -1), [5, 4], [0, 2])
    assert (first.token, first.top) == (5, ())
    assert math.isclose(first.logprob, expected[5].item(), rel_tol=1e-6)
    assert [token for token, _ in second.top] == [4, 0]
    assert token_logprobs(LOGITS, [5], [20])[0].top[-1][0] == 5


def test_rows_that_are_not_finite_are_found() -> None:
    rows = torch.stack((LOGITS[0], LOGITS[0] * float("inf"), LOGITS[0].masked_fill(LOGITS[0] == 0, float("nan"))))
    assert finite_rows(rows) == [True, False, False]


def test_sampling_looks_at_no_value_before_the_tokens_are_there() -> None:
    """On torch's meta device there are no values, so that whatever waits for one fails."""
    options = [
        SamplingParams(temperature=1.0, top_k=4, top_p=0.9, min_p=0.1, repetition_penalty=1.1),
        SamplingParams(temperature=0.5, logit_bias={3: 2.0}, presence_penalty=0.5, seed=1),
    ]
    sequences = [Sequence([1, 2, 3], params) for params in options]
    sequences[1].append(5)
    logits_RV = adjust(torch.empty(2, WIDTH, device="meta"), sequences)
    tokens_R = draw(filtered_probabilities(logits_RV, options), torch.tensor([7, 8], device="meta"))
    assert tokens_R.device.type == "meta" and tokens_R.shape == (2,)
