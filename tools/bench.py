"""Measure how fast this machine answers, and beside each figure what the machine could do at best.

python -m tools.bench --quick      decode steps and a prompt of 512 tokens, in a minute or two

Weights are random and of a real model's shape. The machine's own bandwidth and FLOP/s are measured in the same run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ordered
from dataclasses import asdict
from typing import Any

from engine.config import KERNELS, ConfigError
from tools.bench_engine import WEIGHTS, EngineBench, model_args, random_engine, settings
from tools.bench_machine import PROJECT, Machine, measure_machine
from tools.bench_report import DECODE, write_json
from tools.random_checkpoint import SHAPES

FOLDER = PROJECT / "build" / "bench"
QUICK_PROMPT, QUICK_TOKENS = 32, 16
QUICK_BATCHES = (1, 8, 16)
LONG_PROMPT = 512


def quick(flags: argparse.Namespace, machine: Machine) -> dict[str, Any]:
    """Each kind of weights alone in memory: decode steps by batch, and one long prompt."""
    args, rows = model_args(flags.shape), []
    batches = flags.batch or QUICK_BATCHES
    length = max(LONG_PROMPT, QUICK_PROMPT + QUICK_TOKENS) + 1
    print(DECODE.head(), flush=True)
    for weights in flags.weights:
        bench = EngineBench(
            random_engine(args, settings(weights, max(batches), length, flags.threads, flags.kernels)), args
        )
        bench.warm_up()
        for row in _quick_rows(bench, batches, machine):
            rows.append({"weights": weights} | row)
            print(DECODE.line(rows[-1]), flush=True)
        del bench  # two sets of weights at once may be too many
    return {"shape": flags.shape, "engine": rows}


def _quick_rows(bench: EngineBench, batches: Ordered[int], machine: Machine) -> Iterator[dict[str, Any]]:
    for batch in batches:
        yield bench.decode_row(bench.run(batch, QUICK_PROMPT, QUICK_TOKENS), machine)
    yield bench.prefill_row(bench.run(1, LONG_PROMPT, 1), machine)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    flags = _parse(argv)
    try:
        machine = measure_machine(flags.threads)
        print(f"{machine}\n", flush=True)
        results = {"machine": asdict(machine), "flags": vars(flags)} | quick(flags, machine)
    except ConfigError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    path = FOLDER / "quick.json"
    write_json(path, results)
    print(f"\n{path.relative_to(PROJECT)} holds these figures and more")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="the engine only, few figures")
    parser.add_argument("--shape", choices=list(SHAPES), default="1.1B", help="model size (default: %(default)s)")
    parser.add_argument(
        "--weights",
        type=_words(list(WEIGHTS)),
        default=["bf16", "int8", "int4"],
        metavar="KIND[,KIND]",
        help=f"of {', '.join(WEIGHTS)} (default: bf16,int8,int4)",
    )
    parser.add_argument("--batch", type=_numbers, metavar="N[,N]", help="sequences at once (default: 1,8,16)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cores, metavar="N", help="(default: one per core, %(default)s)")
    parser.add_argument("--kernels", choices=KERNELS, default="auto", help="the engine's setting (default: auto)")
    flags = parser.parse_args(argv)
    if not 1 <= flags.threads <= cores:
        parser.error(f"--threads is {flags.threads}; this machine allows 1 to {cores}")
    return flags


def _words(allowed: list[str]) -> Callable[[str], list[str]]:
    """A parser of words with commas between."""

    def parsed(text: str) -> list[str]:
        words = text.split(",")
        if unknown := [word for word in words if word not in allowed]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(allowed)}")
        return words

    return parsed


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers of at least 1, such as 1,8,16")
    return numbers


if __name__ == "__main__":
    sys.exit(main())
