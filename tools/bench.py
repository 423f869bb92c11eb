"""Measure how fast this machine answers, and beside each figure what the machine could do at best.

python -m tools.bench --quick      decode steps and a prompt of 512 tokens, in a minute or two
python -m tools.bench engine       steps against batch and context, prompts against length
python -m tools.bench service      a TorchServe of its own over HTTP: streams, arrivals at random, long prompts, chats
python -m tools.bench              both; about half an hour

Weights are random and of a real model's shape. The machine's own bandwidth and FLOP/s are measured in the same run.
The figures go to build/bench as JSON, CSV and pictures. tools.bench_peers measures others beside it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ordered
from dataclasses import asdict
from pathlib import Path
from typing import Any

from command_line import Parser, interrupts
from deploy.configuration import PROJECT
from engine.config import DEVICES, KERNELS, ConfigError
from engine.parallel import Launch, choose_device
from tools.bench_engine import WEIGHTS, EngineBench, costs, model_args, random_engine, settings
from tools.bench_load import LoadError
from tools.bench_machine import Machine, measure_gpu, measure_machine
from tools.bench_report import ENGINE, SERVICE, NoPictures, draw, write_csv, write_json
from tools.bench_service import LENGTH, ServiceBench, Shape, torchserve
from tools.bench_weights import FOLDER, Weights
from tools.random_checkpoint import SHAPES

QUICK_PROMPT, QUICK_TOKENS = 32, 16
QUICK_BATCHES = (1, 8, 16)
QUICK_LONG_PROMPT = 512
BATCHES, PROMPT, TOKENS = (1, 2, 4, 8, 16, 32), 64, 32
CONTEXTS, CONTEXT_TOKENS = (128, 256, 512, 1024, 2048, 4096), 9
STREAMS = (1, 2, 4, 8, 16)
# Shares of the requests that the server could just take if they came evenly.
LOADS = (0.3, 0.6, 0.9)

Row = dict[str, Any]


def bench_engine(flags: argparse.Namespace, machine: Machine) -> Row:
    """Each kind of weights alone in memory, row by row."""
    args, rows = model_args(flags.shape), []
    batches = flags.batch or (QUICK_BATCHES if flags.quick else BATCHES)
    contexts = [QUICK_LONG_PROMPT] if flags.quick else flags.context
    length = max(*contexts, PROMPT) + max(TOKENS, CONTEXT_TOKENS)
    together = max(batches) * (QUICK_PROMPT if flags.quick else PROMPT)
    print(ENGINE.head(), flush=True)
    for weights in flags.weights:
        choices = {"device": flags.device, "kernels": flags.kernels, "cuda_graphs": flags.cuda_graphs}
        config = settings(weights, max(batches), length, flags.threads, together, **choices)
        engine = random_engine(args, config)
        bench = EngineBench(engine, args)
        bench.warm_up()
        for row in _quick_rows(bench, batches, machine) if flags.quick else _rows(bench, batches, contexts, machine):
            rows.append({"weights": weights} | row)
            print(ENGINE.line(rows[-1]), flush=True)
        gpus = 1 if engine.ranks.device.startswith("cuda") else 0
        del engine, bench  # two sets of weights at once may be too many
    return {"engine": rows, "gpus": gpus}


def _quick_rows(bench: EngineBench, batches: Ordered[int], machine: Machine) -> Iterator[Row]:
    for batch in batches:
        yield {"scan": "batch"} | bench.decode_row(bench.run(batch, QUICK_PROMPT, QUICK_TOKENS), machine)
    yield {"scan": "prompt"} | bench.prefill_row(bench.run(1, QUICK_LONG_PROMPT, 1), machine)


def _rows(bench: EngineBench, batches: Ordered[int], contexts: Ordered[int], machine: Machine) -> Iterator[Row]:
    for batch in batches:
        yield {"scan": "batch"} | bench.decode_row(bench.run(batch, PROMPT, TOKENS), machine)
    for context in contexts:
        run = bench.run(1, context, CONTEXT_TOKENS)
        yield {"scan": "prompt"} | bench.prefill_row(run, machine)
        yield {"scan": "context"} | bench.decode_row(run, machine)


def bench_service(flags: argparse.Namespace, machine: Machine) -> Row:
    """One TorchServe with one kind of weights: clients in step, arrivals at random, a shared prefix, guests, chats."""
    weights, rows = Weights(flags.shape), []
    most, shape = max(flags.streams), Shape(first_token_limit_s=flags.ttft_limit, per_token_limit_s=flags.tpot_limit)
    slots = max(most, 2)  # a stream and a guest
    device = choose_device(flags.device, Launch())
    choices = {"DEVICE": device.partition(":")[0], "cuda_graphs": str(flags.cuda_graphs).lower()}
    with torchserve(weights, flags.served, slots, flags.threads, **choices) as target:
        bench = ServiceBench(target, shape)
        bench.warm_up(most)
        print(f"TorchServe, {flags.served}, {slots} slots\n{SERVICE.head()}", flush=True)
        least = costs(flags.shape, flags.served, slots, LENGTH, device)
        for row in _service_rows(bench, flags):
            if "streams" in row:  # as if all streams were in every step
                size = least.bytes_per_step(row["streams"], sum(shape.prompt) / 2 + row.get("shared", 0))
                row["bandwidth_share"] = size * row["tokens_per_s"] / row["streams"] / machine.read_bytes_per_s
            rows.append(row)
            print(SERVICE.line(row), flush=True)
        intrusion, chat = bench.intrusion(min(8, slots - 1)), bench.second_turn()
    print(
        f"a prompt of {intrusion['prompt']} among {intrusion['streams']} streams: longest gap "
        f"{intrusion['gap_in_steps']:.1f} decode steps, its first token after {intrusion['first_token_s']:.2f} s\n"
        f"second turn of a chat of {chat['history']} tokens: first token after {chat['second_turn_ms']:.0f} ms, "
        f"cold {chat['cold_ms']:.0f} ms: {chat['second_turn_vs_cold']:.2f} times as fast"
    )
    return {"service": rows, "served": flags.served, "limits": asdict(shape), "intrusion": intrusion, "chat": chat}


def _service_rows(bench: ServiceBench, flags: argparse.Namespace) -> Iterator[Row]:
    most = 0.0
    for streams in flags.streams:
        row = {"load": f"{streams} stream{'s' if streams > 1 else ''}", "kind": "closed"} | bench.closed(
            streams, max(streams, flags.requests // 2)
        )
        most = max(most, row["requests_per_s"])
        yield row
    rates = flags.rate or [round(share * most, 3) for share in LOADS]
    for rate in rates:
        yield {"load": f"Poisson, {rate:g}/s", "kind": "open"} | bench.open(rate, flags.requests)
    streams = max(flags.streams)
    yield {"load": f"{streams} at once, 256 shared", "kind": "shared"} | bench.shared(streams, 256)


def pictures(results: Row) -> Iterator[Path]:
    """Draw what was measured; the files."""
    rows, shape = results.get("engine", []), results["flags"]["shape"]

    def picture(name: str, rows: list[Row], *what: Any, **how: Any) -> Iterator[Path]:
        if len(rows) > 1:
            draw(FOLDER / f"{name}.png", *what[:1], rows, *what[1:], **how)
            yield FOLDER / f"{name}.png"

    batch, step = ("batch", "sequences at once"), ("step_ms", "ms per decode step")
    by_batch = [row for row in rows if row["scan"] == "batch"]
    by_context = [row for row in rows if row["scan"] == "context"]
    by_prompt = [row for row in rows if row["scan"] == "prompt"]
    how = {"by": "weights", "logarithmic": True}
    yield from picture("throughput", by_batch, f"{shape}: decode", batch, ("tokens_per_s", "tokens/s"), **how)
    yield from picture("step-batch", by_batch, f"{shape}: a decode step", batch, step, **how)
    context = ("context", "tokens in the cache")
    yield from picture("step-context", by_context, f"{shape}: a decode step of one sequence", context, step, **how)
    prompt, rate = ("prompt", "tokens of the prompt"), ("tokens_per_s", "tokens/s")
    yield from picture("prompt", by_prompt, f"{shape}: prompts", prompt, rate, **how)
    arrivals = [row for row in results.get("service", []) if row["kind"] == "open"]
    lines = [
        {"rate": row["rate"], "ms": row[key], "what": label}
        for key, label in (
            ("first_token_p50_ms", "first token, p50"),
            ("first_token_p99_ms", "first token, p99"),
            ("gap_p99_ms", "gap between tokens, p99"),
        )
        for row in arrivals
    ]
    load = ("rate", "requests per second")
    yield from picture("latency-load", lines, f"{shape}: latency over HTTP", load, ("ms", "ms"), by="what")
    closed = [row for row in results.get("service", []) if row["kind"] == "closed"]
    streams = ("streams", "streams at once")
    yield from picture("service", closed, f"{shape}: over HTTP", streams, rate, logarithmic=True)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    flags = _parse(argv)
    with interrupts():
        return _run(flags)


def _run(flags: argparse.Namespace) -> int:
    try:
        device = choose_device(flags.device, Launch())
        machine = measure_machine(flags.threads) if device == "cpu" else measure_gpu(device, flags.threads)
        print(f"{machine}\n", flush=True)
        results: Row = {"machine": asdict(machine), "flags": vars(flags)}
        parts = {"engine": bench_engine, "service": bench_service}
        for name in ["engine"] if flags.quick else flags.parts or parts:
            results |= parts[name](flags, machine)
    except (ConfigError, LoadError) as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    written = [FOLDER / ("quick.json" if flags.quick else "bench.json")]
    write_json(written[0], results)
    if not flags.quick:
        if by_batch := [row for row in results.get("engine", []) if row["scan"] == "batch"]:
            written.append(FOLDER / "bench.csv")
            write_csv(written[-1], flags.shape, by_batch, results["gpus"])
        try:
            written += pictures(results)
        except NoPictures as reason:
            print(reason, file=sys.stderr)
    print(f"\nwritten to {FOLDER.relative_to(PROJECT)}: {', '.join(path.name for path in written)}")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="engine, service (default: both)")
    parser.add_argument("--quick", action="store_true", help="few figures of the engine only")
    add_common(parser)
    parser.add_argument("--batch", type=numbers, metavar="N[,N]", help="sequences at once (default: 1,2,4,8,16,32)")
    parser.add_argument("--context", type=numbers, default=list(CONTEXTS), metavar="N[,N]", help="prompts' lengths")
    parser.add_argument("--kernels", choices=KERNELS, default="auto", help="the engine's setting (default: auto)")
    parser.add_argument(
        "--device", choices=DEVICES, default="auto", help="of the engine (default: a GPU if there is one)"
    )
    parser.add_argument("--no-cuda-graphs", dest="cuda_graphs", action="store_false", help="a GPU's steps as they come")
    parser.add_argument("--served", choices=list(WEIGHTS), default="bf16", help="what serves (default: %(default)s)")
    parser.add_argument("--streams", type=numbers, default=list(STREAMS), metavar="N[,N]", help="clients at once")
    parser.add_argument("--rate", type=_rates, metavar="R[,R]", help="requests per second (default: by what it takes)")
    parser.add_argument("--requests", type=int, default=24, metavar="N", help="at each rate (default: %(default)s)")
    parser.add_argument("--ttft-limit", type=float, default=5.0, metavar="S", help="first token of a good answer, s")
    parser.add_argument("--tpot-limit", type=float, default=0.5, metavar="S", help="each further token, s")
    flags = parser.parse_args(argv)
    if unknown := set(flags.parts) - {"engine", "service"}:
        parser.error(f"{min(unknown)!r} is no part; allowed: engine, service")
    if flags.quick and "service" in flags.parts:
        parser.error("--quick measures the engine only; leave service out, or --quick")
    if flags.requests < 1:
        parser.error(f"--requests is {flags.requests}; it must be at least 1")
    check_threads(parser, flags)
    return flags


def add_common(parser: Parser) -> None:
    """The flags that tools.bench_peers has too."""
    parser.add_argument("--shape", choices=list(SHAPES), default="1.1B", help="model size (default: %(default)s)")
    parser.add_argument(
        "--weights",
        type=_words,
        default=["bf16", "int8", "int4"],
        metavar="KIND[,KIND]",
        help=f"of {', '.join(WEIGHTS)} (default: bf16,int8,int4)",
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cores, metavar="N", help="(default: one per core, %(default)s)")


def check_threads(parser: Parser, flags: argparse.Namespace) -> None:
    """Refuse more threads than cores, which only wait for one another."""
    cores = len(os.sched_getaffinity(0))
    if not 1 <= flags.threads <= cores:
        parser.error(f"--threads is {flags.threads}; this machine allows 1 to {cores}")


def _words(text: str) -> list[str]:
    words = text.split(",")
    if unknown := [word for word in words if word not in WEIGHTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(WEIGHTS)}")
    return words


def numbers(text: str) -> list[int]:
    """A list of whole numbers with commas between."""
    return _list(text, int, "whole numbers of at least 1, such as 1,8,16")


def _rates(text: str) -> list[float]:
    return _list(text, float, "numbers above 0, such as 0.5,1")


def _list(text: str, kind: Callable[[str], Any], what: str) -> list[Any]:
    try:
        found = [kind(word) for word in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of {what}")
    return found


if __name__ == "__main__":
    sys.exit(main())
