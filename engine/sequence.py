"""One request inside the engine: how it wants its tokens drawn, and how far it has come. Token ids only."""

from __future__ import annotations

import copy
import itertools
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from engine.config import RequestError
from engine.drafts import PromptLookup

MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_SEED = 2**63 - 1
MAX_TOP_K = 2**31 - 1


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are drawn; temperature 0 is greedy."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 0)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _whole("top_k", self.top_k, 0, MAX_TOP_K)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 10.0)  # less could make logits overflow
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError("logit_bias must map token ids to numbers", "logit_bias")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(f"logit_bias has {len(self.logit_bias)} entries; at most {MAX_LOGIT_BIAS}", "logit_bias")
        for token, bias in self.logit_bias.items():
            _whole("logit_bias token id", token, 0, param="logit_bias")
            _number(f"logit_bias[{token}]", bias, -100.0, 100.0, param="logit_bias")
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {self.ignore_eos!r}; it must be true or false", "ignore_eos")
        if self.seed is not None:
            _whole("seed", self.seed, -MAX_SEED, MAX_SEED)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 0, MAX_TOP_LOGPROBS)

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens seen so far change the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _whole(name: str, value: object, least: int, most: int | None = None, param: str | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise RequestError(f"{name} is {value!r}; it must be a whole number, {limits}", param or name)


def _number(name: str, value: object, least: float, most: float, above: bool = False, param: str | None = None) -> None:
    good = not isinstance(value, bool) and isinstance(value, int | float) and least <= value <= most
    if not good or (above and value == least):
        limits = f"above {least:g}, at most {most:g}" if above else f"from {least:g} to {most:g}"
        raise RequestError(f"{name} is {value!r}; it must be a finite number {limits}", param or name)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token's log-probability under the model itself, and the likeliest tokens in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


_numbers = itertools.count()


class Sequence:
    """A prompt and what was generated after it; owns the arithmetic of its own progress."""

    def __init__(self, prompt: list[int], params: SamplingParams, eos_ids: frozenset[int] = frozenset()) -> None:
        self.number = next(_numbers)
        self.params = params
        self.tokens = list(prompt)
        self.prompt_length = len(prompt)
        self.computed = 0  # tokens whose keys and values are in the cache
        self.cached = 0  # tokens of the prompt that were in the cache before it came
        self.lookup = PromptLookup()
        self.drafted = self.accepted = 0  # tokens that were guessed, and those of them that were then drawn
        self.slot: int | None = None
        self.admitted_at: float | None = None  # by the monotonic clock
        self.limit = 0  # tokens at which it ends with LENGTH; set on admission to the engine
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.stop_ids = params.stop_ids if params.ignore_eos else params.stop_ids | eos_ids
        self.prompt_ids = frozenset(prompt) if params.repetition_penalty != 1.0 else frozenset()
        self.output_counts: Counter[int] = Counter()
        # One generator per request, so that its draws do not depend on who shares the batch.
        # As text, because Random takes -1 and 1 for the same seed.
        self._random = random.Random(None if params.seed is None else str(params.seed))

    @property
    def generated(self) -> int:
        """How many tokens were generated."""
        return len(self.tokens) - self.prompt_length

    @property
    def pending(self) -> int:
        """How many known tokens are not yet in the cache."""
        return len(self.tokens) - self.computed

    @property
    def finished(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self.finish_reason is not None

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether rows of the prompt that are still to be computed need their logits."""
        return self.params.prompt_logprobs is not None and self.computed < self.prompt_length

    def again(self) -> Sequence:
        """A copy that has all tokens of this one and none of them computed; this one must not go on."""
        other = copy.copy(self)
        other.number, other.tokens, other.computed, other.slot = next(_numbers), list(self.tokens), 0, None
        other.finish_reason, other.prompt_logprobs = None, []
        return other

    def draw(self) -> int:
        """The next key of this request's own random stream, 63 bits."""
        return self._random.getrandbits(63)

    def append(self, token: int) -> None:
        """Take a generated token and see whether it is the last."""
        self.tokens.append(token)
        if self.params.has_penalties:
            self.output_counts[token] += 1
        if token in self.stop_ids:
            self.finish_reason = FinishReason.STOP
        elif len(self.tokens) >= self.limit:
            self.finish_reason = FinishReason.LENGTH
