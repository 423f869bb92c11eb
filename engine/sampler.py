"""From logits to tokens: pure functions over a batch whose every row has options of its own.

The order is that of the field: logit bias and penalties, temperature, top-k, top-p, min-p, draw. Log-probabilities
are the model's own, before any of it. Shapes: R rows, V vocabulary.

Logits may lie on a GPU: what is needed beside them is sent there without waiting, and nothing but results comes back.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ordered

import torch
from torch import Tensor

from engine.sequence import SamplingParams, Sequence, TokenLogprobs

NOT_FINITE = -1  # in the place of a token


# Each row's likeliest token, and once more with a number in the place of those whose row is not finite.
Likeliest = Callable[[Tensor, int], tuple[Tensor, Tensor]]


class Chosen:
    """Tokens that were drawn where the logits lie and are on their way here; they can be computed with meanwhile."""

    def __init__(self, logits_RV: Tensor, sequences: Ordered[Sequence], likeliest: Likeliest | None = None) -> None:
        """`likeliest` does what most sequences ask in one go."""
        if likeliest is not None and all(_asks_for_the_likeliest(sequence.params) for sequence in sequences):
            self.tokens_R, told_R = likeliest(logits_RV, NOT_FINITE)
        else:
            self.tokens_R = _choose(logits_RV, sequences)
            told_R = torch.where(_finite(logits_RV), self.tokens_R, NOT_FINITE)
        self._arrived = None
        if told_R.is_cuda:
            self._told_R = torch.empty(told_R.shape, dtype=told_R.dtype, pin_memory=True)
            self._told_R.copy_(told_R, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(told_R.device))
        else:
            self._told_R = told_R

    def wait(self) -> list[int]:
        """The tokens, or NOT_FINITE for a row that holds something else than numbers; later work is not waited for."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._told_R.tolist()


def choose_tokens(logits_RV: Tensor, sequences: Ordered[Sequence]) -> list[int]:
    """One token for each row, drawn as its sequence asks."""
    return _choose(logits_RV, sequences).tolist()


def _choose(logits_RV: Tensor, sequences: Ordered[Sequence]) -> Tensor:
    params = [sequence.params for sequence in sequences]
    logits_RV = adjust(logits_RV, sequences)
    tokens_R = logits_RV.argmax(-1)
    drawn = [row for row, options in enumerate(params) if options.temperature > 0.0]
    if drawn:
        options = [params[row] for row in drawn]
        rows = _some(drawn, logits_RV)
        weights = filtered_probabilities(logits_RV[rows], options)
        tokens_R[rows] = draw(weights, _beside(logits_RV, [sequences[row].draw() for row in drawn]))
    return tokens_R


def _asks_for_the_likeliest(params: SamplingParams) -> bool:
    return params.temperature == 0.0 and not params.has_penalties and not params.logit_bias


def adjust(logits_RV: Tensor, sequences: Ordered[Sequence]) -> Tensor:
    """Logits with each row's penalties and bias; rows without any stay as they are, and the input is kept."""
    rows = [row for row, s in enumerate(sequences) if s.params.has_penalties or s.params.logit_bias]
    if not rows:
        return logits_RV
    logits_RV = logits_RV.clone()
    for row in rows:
        _penalise(logits_RV[row], sequences[row])
        bias = sequences[row].params.logit_bias
        if bias:
            logits_RV[row, _beside(logits_RV, list(bias))] += _beside(logits_RV, list(bias.values()), logits_RV.dtype)
    return logits_RV


def _beside(logits: Tensor, values: Ordered[float], dtype: torch.dtype | None = None) -> Tensor:
    """The values on the logits' device, whose work is not waited for: their copy queues behind it."""
    return torch.tensor(values, dtype=dtype).to(logits.device, non_blocking=True)


def rows_of(values: Tensor, rows: list[int]) -> Tensor:
    """Some rows, in this order, without waiting for what computes them; all of them need no copy."""
    return values if rows == list(range(len(values))) else values[_beside(values, rows)]


def _some(rows: list[int], logits_RV: Tensor) -> Tensor | slice:
    """An index of some rows in rising order; all of them, the common case, need no copy."""
    return slice(None) if len(rows) == len(logits_RV) else _beside(logits_RV, rows)


def _penalise(logits_V: Tensor, sequence: Sequence) -> None:
    """Repetition over prompt and output (as in CTRL), presence and frequency over the output (as OpenAI has it)."""
    params, counts = sequence.params, sequence.output_counts
    if params.repetition_penalty != 1.0:
        ids = _beside(logits_V, sorted(sequence.prompt_ids | counts.keys()))
        seen = logits_V[ids]
        logits_V[ids] = torch.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
    if counts and (params.presence_penalty or params.frequency_penalty):
        ids, times = _beside(logits_V, list(counts)), _beside(logits_V, list(counts.values()), logits_V.dtype)
        logits_V[ids] -= params.presence_penalty + params.frequency_penalty * times


def filtered_probabilities(logits_RV: Tensor, params: Ordered[SamplingParams]) -> Tensor:
    """Probabilities after temperature, with the tokens that top-k, top-p or min-p exclude at zero; not renormalised."""

    def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return _beside(logits_RV, [getattr(p, name) for p in params], dtype)[:, None]

    # The largest logit becomes 0 first, so that a tiny temperature cannot overflow.
    scaled_RV = (logits_RV - logits_RV.amax(-1, keepdim=True)) / column("temperature").clamp_min(1e-6)
    probabilities_RV = scaled_RV.softmax(-1)
    cut = [row for row, p in enumerate(params) if p.top_k or p.top_p < 1.0]
    if cut:
        rows = _some(cut, logits_RV)
        probabilities_RV[rows] = _cut_tail(
            probabilities_RV[rows], column("top_k", torch.int64)[rows], column("top_p", torch.float64)[rows]
        )
    if any(p.min_p for p in params):
        floor = column("min_p") * probabilities_RV.amax(-1, keepdim=True)
        probabilities_RV = probabilities_RV.masked_fill(probabilities_RV < floor, 0.0)
    return probabilities_RV


def _cut_tail(probabilities_RV: Tensor, top_k_R1: Tensor, top_p_R1: Tensor) -> Tensor:
    """Keep the k likeliest, and of those the fewest that together reach the share p (the token that reaches it too)."""
    sorted_RV, order_RV = torch.sort(probabilities_RV, dim=-1, descending=True, stable=True)
    width = sorted_RV.shape[-1]
    ranks = torch.arange(width, device=sorted_RV.device)
    sorted_RV = sorted_RV.masked_fill(ranks >= torch.where(top_k_R1 > 0, top_k_R1, width), 0.0)
    before_RV = sorted_RV.double().cumsum(-1)
    target_R1 = top_p_R1 * before_RV[:, -1:]
    before_RV = before_RV - sorted_RV
    keep_RV = (before_RV < target_R1) | (top_p_R1 >= 1.0) | (ranks == 0)
    return torch.zeros_like(probabilities_RV).scatter(-1, order_RV, sorted_RV * keep_RV)


def draw(weights_RV: Tensor, keys_R: Tensor) -> Tensor:
    """The token whose weight, divided by exponential noise of its own, is largest: a draw in proportion to the weights.

    The noise follows from the row's key and the token's id alone. Weights that differ in their last bits, as they do
    in another batch, then give another token only if the two best are that close; inverting cumulative weights would
    let every boundary of a large vocabulary move a little.
    """
    ids_V = torch.arange(weights_RV.shape[-1], device=weights_RV.device)
    bits_RV = _mix(keys_R[:, None] + ids_V * _STRIDE) >> 40 & 0xFFFFFF
    # The largest would round to 1, whose logarithm is 0: then tokens of no weight at all would win.
    noise_RV = -((bits_RV.float() + 0.5) * 2.0**-24).clamp_max(1.0 - 2.0**-24).log()
    return (weights_RV / noise_RV).argmax(-1)


_STRIDE, _FIRST, _SECOND = (n - (1 << 64) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix(x: Tensor) -> Tensor:
    """Scramble 64-bit numbers (splitmix64's finaliser), in signed arithmetic that wraps."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _FIRST
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _SECOND
    return x ^ (x >> 31 & (1 << 33) - 1)


def token_logprobs(logits_RV: Tensor, tokens: Ordered[int], tops: Ordered[int]) -> list[TokenLogprobs]:
    """Each row's token and its likeliest alternatives under the model itself."""
    if not tokens:
        return []
    logprobs_RV = logits_RV.log_softmax(-1)
    chosen = logprobs_RV.gather(-1, _beside(logits_RV, tokens)[:, None])[:, 0].tolist()
    widest = min(max(tops), logits_RV.shape[-1])
    values, ids = logprobs_RV.topk(widest, -1)
    result = []
    for token, logprob, top, row_values, row_ids in zip(
        tokens, chosen, tops, values.tolist(), ids.tolist(), strict=True
    ):
        pairs = zip(row_ids[:top], row_values[:top], strict=True)
        result.append(TokenLogprobs(token, logprob, tuple(pairs)))
    return result


def finite_rows(logits_RV: Tensor) -> list[bool]:
    """Which rows hold numbers only: an overflow in half precision must end its own sequence and no other."""
    return _finite(logits_RV).tolist()


def _finite(logits_RV: Tensor) -> Tensor:
    return logits_RV.sum(-1).isfinite()
