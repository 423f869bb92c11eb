"""The speed of the service: a real TorchServe over HTTP, under streams, arrivals at random, long prompts and chats."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
from collections.abc import Iterator
from collections.abc import Sequence as Ordered
from dataclasses import asdict, dataclass, replace
from typing import Any

from tools.bench_engine import WEIGHTS
from tools.bench_load import Ask, Load, Seen, Target, intrude, offer, summarize
from tools.bench_weights import Weights, answer_token, usual_tokens
from tools.own_server import MODEL_PATH, server

COMPLETIONS = f"{MODEL_PATH}/1.0/v1/completions"
LENGTH = 2048
LONG_PROMPT, STREAM_TOKENS = 512, 48  # of one that comes among streams, and of each of these
# A chat: the tokens of its first prompt, of its first answer, and of what is asked next.
HISTORY, ANSWERED, NEXT_TURN = 384, 16, 24


@dataclass(frozen=True)
class Shape:
    """What the clients of a service ask for, and how fast an answer has to be to count as good."""

    prompt: tuple[int, int] = (32, 96)
    output: tuple[int, int] = (16, 48)
    shared: int = 0
    first_token_limit_s: float = 5.0
    per_token_limit_s: float = 0.5

    def load(self, requests: int, rate: float | None = None) -> Load:
        """So many requests of this kind."""
        return Load(requests, self.prompt, self.output, self.shared, rate)


@contextlib.contextmanager
def torchserve(weights: Weights, kind: str, slots: int, threads: int, **choices: object) -> Iterator[Target]:
    """The service on the weights, for the time of a block."""
    dtype, quantization = WEIGHTS[kind]
    words = {
        "CHECKPOINT": weights.served(),
        "DEVICE": "cpu",
        "dtype": dtype,
        "quantization": quantization,
        "max_batch_size": slots,
        "max_seq_len": LENGTH,
        "threads": threads,
        "verify_checkpoint": "false",
        **choices,
    }
    with server(*(f"{word}={value}" for word, value in words.items())) as running:
        yield Target("TorchServe", running.port, COMPLETIONS, answer_token())


class ServiceBench:
    """Measures one server; every method gives rows or figures of its own."""

    def __init__(self, target: Target, shape: Shape) -> None:
        self.target, self.shape = target, shape
        self._tokens, self._random = usual_tokens(), random.Random(0)

    def warm_up(self, streams: int) -> None:
        """Load weights and, in Java, let what is busy be compiled."""
        self.streams(streams, (16, 16), (8, 8))

    def prompt(self, length: int) -> tuple[int, ...]:
        """A random prompt, unlike any before."""
        return tuple(self._random.choices(self._tokens, k=length))

    def streams(self, count: int, prompt: tuple[int, int], output: tuple[int, int]) -> dict[str, float]:
        """So many streams at once that all begin together; their figures."""
        asks = Load(count, prompt, output).draw(self._tokens, self._random.getrandbits(32))
        return self._figures(asyncio.run(offer(self.target, asks)))

    def closed(self, at_once: int, requests: int) -> dict[str, Any]:
        """Clients that ask again as soon as they were answered."""
        return {"streams": at_once} | self._offer(self.shape.load(requests), at_once)

    def open(self, rate: float, requests: int) -> dict[str, Any]:
        """Requests that arrive at random, whatever the server does."""
        return {"rate": rate} | self._offer(self.shape.load(requests, rate))

    def shared(self, at_once: int, prefix: int) -> dict[str, Any]:
        """The same clients, whose prompts all begin alike."""
        shape = replace(self.shape, shared=prefix)
        return {"streams": at_once, "shared": prefix} | self._offer(shape.load(at_once), at_once)

    def _offer(self, load: Load, at_once: int | None = None) -> dict[str, float]:
        asks = load.draw(self._tokens, self._random.getrandbits(32))
        return self._figures(asyncio.run(offer(self.target, asks, at_once)))

    def _figures(self, seen: Ordered[Seen]) -> dict[str, float]:
        return summarize(seen, self.shape.first_token_limit_s, self.shape.per_token_limit_s)

    def intrusion(self, streams: int) -> dict[str, float]:
        """What streams feel of a long prompt that comes among them."""
        running = [Ask(self.prompt(32), STREAM_TOKENS) for _ in range(streams)]
        felt = asyncio.run(intrude(self.target, running, Ask(self.prompt(LONG_PROMPT), 4)))
        return {"streams": streams, "prompt": LONG_PROMPT, "gap_in_steps": felt.steps} | asdict(felt)

    def second_turn(self, rounds: int = 3) -> dict[str, float]:
        """The first token of a chat's second turn beside that of a prompt as long which nobody sent before."""
        warm, cold = [], []
        for _ in range(rounds):
            first = self.prompt(HISTORY)
            self._first_token(first)
            answer = (self.target.token,) * ANSWERED
            warm.append(self._first_token(first + answer + self.prompt(NEXT_TURN)))
            cold.append(self._first_token(self.prompt(HISTORY + ANSWERED + NEXT_TURN)))
        return {
            "history": HISTORY + ANSWERED,
            "second_turn_ms": 1000 * statistics.median(warm),
            "cold_ms": 1000 * statistics.median(cold),
            "second_turn_vs_cold": statistics.median(cold) / statistics.median(warm),
        }

    def _first_token(self, prompt: tuple[int, ...]) -> float:
        (seen,) = asyncio.run(offer(self.target, [Ask(prompt, ANSWERED)]))
        return seen.first_token_s
