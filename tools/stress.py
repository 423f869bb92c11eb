"""Put a real server under stress and say what became of every request.

python -m tools.stress leave       1,000 requests, a third of the clients leaving at random
python -m tools.stress overload    ten times more requests than slots and queue
python -m tools.stress kill        kill -9 of each rank, of torchrun and of the frontend's child, while streams run
python -m tools.stress overhead    tokens per second and time to first token through HTTP, against the engine alone

Each starts servers of its own on free ports and ends them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from command_line import Parser, interrupts
from engine.config import ConfigError
from tools.http_answers import BROKEN, posted, read_head, read_pieces
from tools.own_server import MODEL_PATH, Server, server

HUNG_S = 60.0
MEMORY_EVERY = 50  # requests
STORY = {"prompt": "Once upon a time", "ignore_eos": True, "temperature": 0.8, "seed": 1}


@contextlib.contextmanager
def scaled_model() -> Iterator[Path]:
    """The demo model scaled to a step of about 10 ms for 8: its vocabulary, 512 wide, 16 layers, random weights."""
    from checkpoint_converter import convert
    from tools.random_checkpoint import write_random_checkpoint

    with tempfile.TemporaryDirectory(prefix="llama-scaled-") as folder:
        write_random_checkpoint(Path(folder) / "meta", "50M", dtype=torch.float32, vocab_size=768)
        yield convert(Path(folder) / "meta", Path(folder) / "dcp", max_seq_len=512, progress=False)


@dataclass
class Answer:
    """What a client saw of one request."""

    status: int = 0
    complete: bool = False
    left: bool = False
    hung: bool = False
    request_id: str = ""
    text: bytes = b""
    started: float = 0.0
    first: float = 0.0
    ended: float = 0.0

    @property
    def outcome(self) -> str:
        """The status, or what went wrong."""
        if self.left or self.hung:
            return "left" if self.left else "hung"
        return f"{self.status}{'' if self.complete else ' broken'}"


async def post(port: int, body: dict, leave_after: float | None = None) -> Answer:
    """One request; with `leave_after` the client hangs up then."""
    answer = Answer(started=time.perf_counter())
    try:
        async with (
            asyncio.timeout(HUNG_S if leave_after is None else leave_after),
            posted(port, MODEL_PATH, body) as reader,
        ):
            answer.status, headers = await read_head(reader)
            answer.request_id = headers.get("x-request-id", "")
            async for piece in read_pieces(reader, headers):
                answer.text += piece
                answer.first = answer.first or time.perf_counter()
            answer.complete = True
    except TimeoutError:
        answer.left, answer.hung = leave_after is not None, leave_after is None
    except BROKEN:
        pass  # the answer stays incomplete
    finally:
        answer.ended = time.perf_counter()
    return answer


def leave(flags: argparse.Namespace) -> bool:
    """Clients that leave must not leak slots, sessions or memory."""
    slots, rng = 8, random.Random(flags.seed)
    with server(f"TP={flags.tp}", f"max_batch_size={slots}", "max_waiting=64") as running:
        memory: list[tuple[int, int]] = []
        outcomes: Counter[str] = Counter()

        async def client(gate: asyncio.Semaphore, number: int) -> None:
            async with gate:
                goes = rng.random() < 1 / 3
                body = {**STORY, "max_new_tokens": rng.randint(1, 200), "stream": rng.random() < 0.5}
                answer = await post(running.port, body, rng.uniform(0.0, 0.4) if goes else None)
                outcomes[answer.outcome] += 1
                if answer.hung:
                    print(f"hung: request {answer.request_id} {body} {answer.text[-200:]!r}")
                if number % MEMORY_EVERY == MEMORY_EVERY - 1:
                    memory.append((number + 1, sum(each.memory_info().rss for each in running.ranks)))

        async def all_clients() -> None:
            gate = asyncio.Semaphore(24)
            await asyncio.gather(*(client(gate, number) for number in range(flags.requests)))

        asyncio.run(all_clients())
        time.sleep(3)
        asyncio.run(post(running.port, {**STORY, "max_new_tokens": 1, "stream": False}))  # one more: tells the gauges
        time.sleep(1)
        used = running.metric("llama_requests_running"), running.metric("llama_requests_waiting")
        at, early = [pair for pair in memory if pair[0] <= 300][-1]
        late = statistics.mean(rss for number, rss in memory if number > flags.requests - 200)
        print(f"requests {sum(outcomes.values())}: {dict(outcomes)}")
        print(f"running, waiting at the end: {used}")
        print(
            f"resident memory of the ranks: {early / 2**20:.1f} MiB at request {at}, {late / 2**20:.1f} MiB at the end"
        )

        async def as_many_as_slots() -> list[Answer]:
            return await asyncio.gather(*(post(running.port, {**STORY, "max_new_tokens": 60}) for _ in range(slots)))

        full = asyncio.run(as_many_as_slots())
        together = all(answer.complete and answer.first < min(each.ended for each in full) for answer in full)
        print(f"all {slots} slots serve at the same time: {together}")
        broken = sum(count for outcome, count in outcomes.items() if outcome not in ("left", "200"))
        return broken == 0 and used == (0, 0) and together and late < early * 1.02


def overload(flags: argparse.Namespace) -> bool:
    """Every request ends in 200 or 429, and the accepted ones are as fast as without the crowd."""
    slots, queue = 8, 16
    body = {**STORY, "max_new_tokens": 60, "stream": False}
    with (
        scaled_model() as checkpoint,
        server(
            f"TP={flags.tp}", f"CHECKPOINT={checkpoint}", f"max_batch_size={slots}", f"max_waiting={queue}"
        ) as running,
    ):

        async def crowd(count: int) -> list[Answer]:
            return await asyncio.gather(*(post(running.port, body) for _ in range(count)))

        async def steady(clients: int, seconds: float) -> float:
            """Tokens per second of clients that ask again and again; a refused one waits as Retry-After says."""
            ends, done = time.perf_counter() + seconds, Counter()

            async def client() -> None:
                while time.perf_counter() < ends:
                    answer = await post(running.port, body)
                    done[answer.status] += 1
                    if answer.status != 200:
                        await asyncio.sleep(1.0)

            began = time.perf_counter()
            await asyncio.gather(*(client() for _ in range(clients)))
            assert set(done) <= {200, 429}, done
            return 60 * done[200] / (time.perf_counter() - began)

        asyncio.run(crowd(slots))
        answers = asyncio.run(crowd(10 * (slots + queue)))
        outcomes = Counter(answer.outcome for answer in answers)
        print(f"{10 * (slots + queue)} requests at once: {dict(outcomes)}")
        pairs = []
        for _ in range(flags.rounds):
            peak = asyncio.run(steady(slots + queue, 12))
            pairs.append((asyncio.run(steady(10 * (slots + queue), 12)), peak))
        ratio = statistics.median(crowded / peak for crowded, peak in pairs)
        print("tokens/s crowded, at peak: " + ", ".join(f"{a:.0f} / {b:.0f}" for a, b in pairs))
        print(f"throughput under tenfold load: {ratio:.3f} of the peak (median of {flags.rounds})")
        return set(outcomes) <= {"200", "429"} and ratio >= 0.95


def kill(flags: argparse.Namespace) -> bool:
    """Whoever dies, every client sees an end, the model comes back by itself, and nothing is left behind."""
    good = True
    with server("TP=2", "max_batch_size=8") as running:
        for round_ in range(flags.rounds):
            for victim in ("rank 0", "rank 1", "torchrun"):
                cut, ends, back, orphans, restarts = asyncio.run(_kill_once(running, victim))
                fine = ends < 2 and back < 15 and not orphans and restarts == 1
                good &= fine
                print(
                    f"{round_ + 1}: kill -9 {victim}: {cut} of 8 streams cut, last after {ends:.2f} s, answers again "
                    f"after {back:.2f} s, orphans {len(orphans)}, restarts {restarts}{'' if fine else '  <-- wrong'}",
                    flush=True,
                )
    return good


async def _kill_once(running: Server, victim: str) -> tuple[int, float, float, list[int], int]:
    before = {each.pid for each in (*running.ranks, *running.torchruns)}
    loads = _loads(running)
    streams = [
        asyncio.create_task(post(running.port, {**STORY, "max_new_tokens": 400, "stream": bool(number % 4)}))
        for number in range(8)
    ]
    await asyncio.sleep(0.4)
    target = running.torchruns[0] if victim == "torchrun" else running.ranks[int(victim[-1])]
    os.kill(target.pid, signal.SIGKILL)
    killed = time.perf_counter()
    answers = await asyncio.wait_for(asyncio.gather(*streams), 60)
    ends = max(answer.ended for answer in answers) - killed
    while True:
        answer = await post(running.port, {**STORY, "max_new_tokens": 2, "stream": False}, 5.0)
        if answer.status == 200 and answer.complete:
            break
        if time.perf_counter() - killed > 120:
            raise SystemExit("stress: the model did not come back within 120 s")
        await asyncio.sleep(0.1)
    back = time.perf_counter() - killed
    await asyncio.sleep(1.0)
    orphans = [pid for pid in before if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
    cut = sum(not answer.complete or b"error" in answer.text for answer in answers)
    return cut, ends, back, orphans, _loads(running) - loads


def _loads(running: Server) -> int:
    """How often rank 0 became ready, by its log."""
    logs = running.build / "serve" / "logs"
    return sum(path.read_text(errors="replace").count("llama ready: rank 0 ") for path in logs.glob("model_log.log*"))


def overhead(flags: argparse.Namespace) -> bool:
    """What HTTP takes of the engine's own throughput, and adds to the time to first token of one more request.

    One thread for the engine in both cases: on two cores the frontend and the clients need the other.
    """
    from engine.config import EngineConfig
    from engine.sequence import SamplingParams
    from generate import LLM, Request

    tokens, good, rng = 96, True, random.Random(flags.seed)
    drawn = {"temperature": 0.8, "top_p": 0.9, "seed": 1, "ignore_eos": True}
    body = {"prompt": STORY["prompt"], **drawn}
    with scaled_model() as checkpoint, server(f"CHECKPOINT={checkpoint}", "max_batch_size=40", "threads=1") as running:
        llm = LLM(checkpoint, EngineConfig(max_batch_size=40, threads=1))
        prompt = llm.tokenizer.encode(STORY["prompt"], bos=True, eos=False)

        async def streams(count: int) -> list[Answer]:
            return await asyncio.gather(*(post(running.port, {**body, "max_new_tokens": tokens}) for _ in range(count)))

        def rate_through_http(count: int) -> float:
            began = time.perf_counter()
            answers = asyncio.run(streams(count))
            assert all(answer.complete and answer.status == 200 for answer in answers)
            return count * tokens / (time.perf_counter() - began)

        def rate_of_the_engine(count: int) -> float:
            llm.generate([Request(prompt=STORY["prompt"], params=SamplingParams(max_tokens=tokens, **drawn))] * count)
            return llm.metrics.throughput

        async def first_tokens_through_http(count: int) -> list[float]:
            """Of requests that come one after the other, at any moment, while all others run."""
            others = [
                asyncio.create_task(post(running.port, {**body, "max_new_tokens": 400}, 60)) for _ in range(count)
            ]
            await asyncio.sleep(0.5)
            times = []
            while len(times) < 10 and not any(other.done() for other in others):
                await asyncio.sleep(rng.uniform(0, 0.03))
                answer = await post(running.port, {**body, "max_new_tokens": 1})
                times.append(answer.first - answer.started)
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await asyncio.sleep(0.5)
            return times

        def first_tokens_of_the_engine(count: int) -> list[float]:
            """The same on the engine: whoever comes during a step joins the next one."""
            engine = llm.engine
            others = [engine.add(prompt, SamplingParams(max_tokens=400, **drawn)) for _ in range(count)]
            engine.step()
            times = []
            for _ in range(10):
                began = time.perf_counter()
                engine.step()
                arrived = began + rng.random() * (time.perf_counter() - began)
                engine.add(prompt, SamplingParams(max_tokens=1, **drawn))
                engine.step()
                times.append(time.perf_counter() - arrived)
            for other in others:
                engine.cancel(other)
            engine.step()
            return times

        for count in (8, 32, 32, 32):  # Java compiles what it finds busy, on the cores that are measured
            rate_through_http(count)
        rate_of_the_engine(8)
        for count in (1, 8, 32):
            rates = [(rate_through_http(count), rate_of_the_engine(count)) for _ in range(flags.rounds)]
            through_http, of_the_engine = [], []
            for _ in range(flags.rounds):
                through_http += asyncio.run(first_tokens_through_http(count - 1))
                of_the_engine += first_tokens_of_the_engine(count - 1)
            share = statistics.median(http / engine for http, engine in rates)
            added = 1000 * (statistics.median(through_http) - statistics.median(of_the_engine))
            step = 1000 * count / statistics.median(engine for _, engine in rates)
            print(
                f"{count} streams: {share:.3f} of the engine's tokens/s (a step of {step:.1f} ms); time to first token "
                f"of one more beside {count - 1}: + {added:.1f} ms (medians of {flags.rounds})",
                flush=True,
            )
            good &= count == 1 or (share >= 0.9 and added <= 10)
    return good


def main(argv: list[str] | None = None) -> int:
    """Run one kind of stress; the status tells whether all was as it should be."""
    parser = Parser(prog="stress", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["leave", "overload", "kill", "overhead"])
    parser.add_argument("--requests", type=int, default=1000, help="of leave (default: 1000)")
    parser.add_argument("--rounds", type=int, default=5, help="of overload, kill and overhead (default: 5)")
    parser.add_argument("--tp", type=int, default=1, help="ranks (default: 1; kill always takes 2)")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(argv)
    if flags.rounds < 1 or flags.tp < 1 or flags.requests < MEMORY_EVERY:
        parser.error(f"--rounds and --tp are at least 1, --requests at least {MEMORY_EVERY}")
    kinds = {"leave": leave, "overload": overload, "kill": kill, "overhead": overhead}
    try:
        with interrupts():
            good = kinds[flags.kind](flags)
    except ConfigError as error:
        print(f"stress: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print("as it should be" if good else "NOT as it should be")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
