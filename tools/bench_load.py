"""Clients of a completion endpoint, whichever server has it: prompts that arrive, and when each token came back."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from typing import Any

from tools.bench_report import PERCENTILES, percentile
from tools.http_answers import BROKEN, posted, read_head, read_pieces

HUNG_S = 600.0
_RUNNING, _LOOK_S = 4, 0.002  # tokens of a stream that runs, and how often that is looked at
# Every token is this one's: random weights would else give pieces of characters, which servers hold back.
BIAS = 100


class LoadError(RuntimeError):
    """A server that did not answer as it must; the message says which and how."""


@dataclass(frozen=True)
class Target:
    """An OpenAI-like endpoint for completions on this machine; `token` is the id that every answer is made of."""

    name: str
    port: int
    path: str
    token: int
    extra: dict[str, Any] = field(default_factory=dict)

    def body(self, ask: Ask) -> dict[str, Any]:
        """What is sent for a request."""
        return {
            "prompt": list(ask.prompt),
            "max_tokens": ask.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logit_bias": {str(self.token): BIAS},
            "stream": True,
            **self.extra,
        }


@dataclass(frozen=True)
class Ask:
    """One request: token ids, how many more are wanted, and when it arrives (seconds after the first)."""

    prompt: tuple[int, ...]
    tokens: int
    at: float = 0.0


@dataclass
class Seen:
    """What a client saw of one request, by the clock of time.perf_counter."""

    started: float
    tokens: list[float] = field(default_factory=list)
    """When each came; several that came together have the same time."""
    status: int = 0
    ended: float = 0.0
    error: str = ""

    @property
    def first_token_s(self) -> float:
        """From sending the request to its first token."""
        return self.tokens[0] - self.started

    @property
    def gaps_s(self) -> list[float]:
        """Between one token and the next."""
        return [after - before for before, after in zip(self.tokens, self.tokens[1:], strict=False)]

    @property
    def per_token_s(self) -> float:
        """The mean of the gaps; 0 for a single token."""
        return (self.tokens[-1] - self.tokens[0]) / max(1, len(self.tokens) - 1)

    @property
    def whole_s(self) -> float:
        """From sending the request to the end of its answer."""
        return self.ended - self.started


@dataclass(frozen=True)
class Load:
    """Requests to draw: lengths are uniform between two numbers, and `shared` tokens stand before every prompt."""

    requests: int
    prompt: tuple[int, int]
    output: tuple[int, int]
    shared: int = 0
    rate: float | None = None
    """Arrivals per second, at random (Poisson); None: all at once, or as `at_once` lets them."""

    def draw(self, vocabulary: Ordered[int], seed: int) -> list[Ask]:
        """The requests; the same for the same seed."""
        rng, now, asks = random.Random(seed), 0.0, []
        shared = tuple(rng.choices(vocabulary, k=self.shared))
        for _ in range(self.requests):
            prompt = shared + tuple(rng.choices(vocabulary, k=rng.randint(*self.prompt)))
            asks.append(Ask(prompt, rng.randint(*self.output), now))
            now += rng.expovariate(self.rate) if self.rate is not None else 0.0
        return asks


async def ask(target: Target, wanted: Ask, seen: Seen | None = None) -> Seen:
    """Send one request and read its answer to the end; who watches what is seen of it gives that to be filled."""
    seen = seen or Seen(0.0)
    seen.started = time.perf_counter()
    try:
        async with asyncio.timeout(HUNG_S), posted(target.port, target.path, target.body(wanted)) as reader:
            await _read(reader, seen)
    except TimeoutError:
        seen.error = f"no end within {HUNG_S:.0f} s"
    except BROKEN as error:
        seen.error = str(error) or type(error).__name__
    finally:
        seen.ended = time.perf_counter()
    if not seen.error and (seen.status != 200 or len(seen.tokens) != wanted.tokens):
        seen.error = f"status {seen.status}, {len(seen.tokens)} of {wanted.tokens} tokens"
    return seen


async def _read(reader: asyncio.StreamReader, seen: Seen) -> None:
    """Note the time of every event that has text."""
    seen.status, headers = await read_head(reader)
    pieces, rest = read_pieces(reader, headers), b""
    if headers.get("transfer-encoding", "").lower() != "chunked":  # an error, whole
        whole = b"".join([piece async for piece in pieces])
        seen.error = f"status {seen.status}: {whole[:300].decode(errors='replace')}"
        return
    async for piece in pieces:
        events = (rest + piece).split(b"\n")
        now, rest = time.perf_counter(), events.pop()
        for event in events:
            if event.startswith(b"data: {"):
                seen.tokens += [now] * _has_text(json.loads(event[6:]), seen)


def _has_text(event: dict[str, Any], seen: Seen) -> bool:
    if "error" in event:
        seen.error = str(event["error"])[:300]
    return any(choice.get("text") for choice in event.get("choices", ()))


async def offer(target: Target, asks: Ordered[Ask], at_once: int | None = None) -> list[Seen]:
    """Send every request when it arrives, or as soon as fewer than `at_once` are on their way."""
    began, gate = time.perf_counter(), asyncio.Semaphore(at_once or len(asks))

    async def client(wanted: Ask) -> Seen:
        await asyncio.sleep(max(0.0, wanted.at - (time.perf_counter() - began)))
        async with gate:
            return await ask(target, wanted)

    seen = await asyncio.gather(*(client(wanted) for wanted in asks))
    if wrong := [each.error for each in seen if each.error]:
        raise LoadError(f"{target.name}: {len(wrong)} of {len(asks)} requests failed; the first: {wrong[0]}")
    return seen


def summarize(seen: Ordered[Seen], first_token_limit_s: float, per_token_limit_s: float) -> dict[str, float]:
    """The figures of a load; good are the requests within both limits."""
    wall = max(each.ended for each in seen) - min(each.started for each in seen)
    limits = first_token_limit_s, per_token_limit_s
    good = sum(each.first_token_s <= limits[0] and each.per_token_s <= limits[1] for each in seen)
    figures = {
        "requests": len(seen),
        "tokens_per_s": sum(len(each.tokens) for each in seen) / wall,
        "requests_per_s": len(seen) / wall,
        "goodput": good / wall,
        "good_share": good / len(seen),
    }
    gaps = [gap for each in seen for gap in each.gaps_s]
    measured = {
        "first_token": [each.first_token_s for each in seen],
        "gap": gaps or [0.0],
        "per_token": [each.per_token_s for each in seen],
        "whole": [each.whole_s for each in seen],
    }
    for name, values in measured.items():
        figures |= {f"{name}_p{p}_ms": 1000 * percentile(values, p) for p in PERCENTILES}
        figures[f"{name}_mean_ms"] = 1000 * statistics.mean(values)
    return figures | {"gap_max_ms": 1000 * max(gaps, default=0.0)}


@dataclass(frozen=True)
class Intrusion:
    """What running streams felt of a long prompt that came among them."""

    step_s: float
    """The median gap before it came, which is a decode step."""
    worst_s: float
    """The longest gap of any stream after it came."""
    first_token_s: float
    """Of the long prompt."""

    @property
    def steps(self) -> float:
        """The longest gap in decode steps."""
        return self.worst_s / self.step_s


async def intrude(target: Target, streams: Ordered[Ask], long: Ask) -> Intrusion:
    """Let streams run, then send a long prompt among them."""
    seen = [Seen(0.0) for _ in streams]
    running = [asyncio.create_task(ask(target, *each)) for each in zip(streams, seen, strict=True)]
    while any(len(each.tokens) < _RUNNING and not task.done() for each, task in zip(seen, running, strict=True)):
        await asyncio.sleep(_LOOK_S)
    came = time.perf_counter()
    intruder = await ask(target, long)
    await asyncio.gather(*running)
    if wrong := [each.error for each in (*seen, intruder) if each.error]:
        raise LoadError(f"{target.name}: {wrong[0]}")
    spans = [pair for each in seen for pair in zip(each.tokens, each.tokens[1:], strict=False)]
    latest = max(each.tokens[0] for each in seen)
    before = [end - start for start, end in spans if start >= latest and end <= came]
    after = [end - start for start, end in spans if end > came]
    if not before or not after:
        raise LoadError(f"{target.name}: no stream ran before and after the long prompt; give the streams more tokens")
    return Intrusion(statistics.median(before), max(after), intruder.first_token_s)
