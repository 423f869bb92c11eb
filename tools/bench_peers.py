"""Measure llama.cpp and Hugging Face transformers beside this project: the same weights, shapes and threads, in turns.

python -m tools.bench_peers      about half an hour; --rounds 1 for a first look

llama.cpp is fetched and compiled once, apart from the project's environment, which takes 10 minutes more.
In each round everyone is measured in turn, figure by figure, so that what else the machine does meets all alike;
figures are medians. The ratios (above 1: this project is faster) go to build/bench/ratios.json, everything to
build/bench/peers.json. What was not measured is null.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from tqdm import tqdm

from command_line import Parser, interrupts
from deploy.configuration import PROJECT
from engine.config import ConfigError
from engine.loader import available_memory
from tools import peers
from tools.bench import add_common, check_threads
from tools.bench_engine import EngineBench, Run, costs, model_args, random_engine, settings
from tools.bench_hf import DTYPES, NAME, Transformers, TransformersError
from tools.bench_llamacpp import LlamaCpp
from tools.bench_load import LoadError, Target
from tools.bench_machine import Machine, measure_machine
from tools.bench_report import Table, write_json
from tools.bench_service import LENGTH, ServiceBench, Shape, torchserve
from tools.bench_weights import FOLDER, GGUF_TYPES, Weights, answer_token

PARTS = ("llamacpp", "hf", "http")
BATCHES, PROMPT, TOKENS, LONG_PROMPT = (1, 8, 16), 64, 32, 512
HF_BATCH = 8
HF_TAKES_S = 600.0  # if its prompts would take longer, it is left out
STREAMS, STREAM_PROMPT, STREAM_TOKENS = 16, 64, 128
KINDS = ("bf16", "int8", "int4")
RATIOS = (
    *(f"decode_b{batch}_{kind}_vs_llamacpp" for batch in BATCHES for kind in KINDS),
    *(f"prefill{LONG_PROMPT}_{kind}_vs_llamacpp" for kind in KINDS),
    f"decode_b{HF_BATCH}_bf16_vs_hf",
    f"http{STREAMS}_vs_engine",
    f"http{STREAMS}_vs_llama_server",
    "decode_b1_bf16_bandwidth_share",
)
TABLE = Table(
    ("what", "what", "22"), ("who", "who", "22"), ("median", "median", "9.2f"), ("of each round", "each", "s")
)

Rates = dict[str, dict[str, list[float]]]


class Visitor:
    """Our engine, which is gone while others are measured if the machine's memory does not hold both."""

    def __init__(self, make: Callable[[], EngineBench], stays: bool) -> None:
        self._make, self._stays = make, stays
        self._bench: EngineBench | None = None

    def run(self, batch: int, prompt: int, tokens: int) -> Run:
        """What `EngineBench.run` does."""
        if self._bench is None:
            self._bench = self._make()
        return self._bench.run(batch, prompt, tokens)

    def make_room(self) -> None:
        """Give the memory back, if others need it."""
        if not self._stays:
            self._bench = None
            gc.collect()


class Comparison:
    """What everyone reached in each round, by what was measured: tokens per second, unless the name says otherwise."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags, self.weights = flags, Weights(flags.shape)
        self.args = model_args(flags.shape)
        self.rates: Rates = defaultdict(lambda: defaultdict(list))
        self.notes: dict[str, Any] = {}

    def add(self, what: str, who: str, value: float) -> None:
        """Keep one figure of one round."""
        self.rates[what][who].append(value)

    def ratio(self, what: str, ours: str, theirs: str) -> float | None:
        """The median over the rounds of ours over theirs; None if either was not measured."""
        found = self.rates.get(what, {})
        pairs = list(zip(found.get(ours, ()), found.get(theirs, ()), strict=False))
        return statistics.median(one / other for one, other in pairs) if pairs else None

    def engines(self, machine: Machine) -> None:
        """Prompts and decode steps of the engine, llama.cpp and transformers."""
        flags = self.flags
        with contextlib.ExitStack() as stack:
            cpp = {}
            if "llamacpp" in flags.parts:
                programs = peers.setup()
                cpp = {kind: LlamaCpp(programs, self.weights.gguf(kind), flags.threads) for kind in flags.weights}
            hf = self._transformers(stack, machine) if "hf" in flags.parts and "bf16" in flags.weights else []
            for kind, each in tqdm(cpp.items(), desc="trying llama.cpp's flags", unit="file"):
                each.choose_flags(BATCHES, PROMPT, TOKENS, LONG_PROMPT)
                self.notes[f"llama.cpp, {kind}"] = {
                    "type": GGUF_TYPES[kind],
                    "flash attention, decode": each.decode_flags,
                    "flash attention, prompt": each.prefill_flags,
                }
            ours = self._visitors(cpp)
            for _ in tqdm(range(flags.rounds), desc="engines", unit="round"):
                for kind, bench in ours.items():
                    self._round(kind, bench, cpp.get(kind), hf if kind == "bf16" else [])

    def _visitors(self, cpp: dict[str, LlamaCpp]) -> dict[str, Visitor]:
        """Our engines, each of which comes when it is first asked for."""
        slots, length = max(BATCHES), LONG_PROMPT + TOKENS
        kinds = self.flags.weights
        needed = sum(costs(self.flags.shape, kind, slots, length).memory for kind in kinds)
        # llama.cpp may hold a file twice: as it is, and repacked.
        theirs = max((2 * self.weights.gguf(kind).stat().st_size for kind in cpp), default=0)
        stays = needed + theirs < available_memory("cpu")
        if not stays:
            print("bench: engines come and go, as memory does not hold all at once", file=sys.stderr, flush=True)
        make = {kind: partial(self._engine, kind, slots, length, slots * PROMPT) for kind in kinds}
        return {kind: Visitor(make[kind], stays) for kind in kinds}

    def _engine(self, kind: str, slots: int, length: int, together: int = 0) -> EngineBench:
        config = settings(kind, slots, length, self.flags.threads, together, device="cpu")
        bench = EngineBench(random_engine(self.args, config), self.args)
        bench.warm_up()
        return bench

    def _transformers(self, stack: contextlib.ExitStack, machine: Machine) -> list[Transformers]:
        """As it comes and compiled, those of both that work; the first run of each is for its compiler.

        In bfloat16 as the engine, or where PyTorch is too slow at that in float32, which then is what its users choose.
        """
        programs = (False, True) if self.flags.compile else (False,)
        reasons = []
        for dtype, kind in DTYPES.items():
            one = costs(self.flags.shape, kind, HF_BATCH, PROMPT + TOKENS)
            rate, needed = machine.product_flops[dtype], len(programs) * one.memory
            takes_s, there = HF_BATCH * one.flops(PROMPT) / rate, available_memory("cpu")
            if takes_s > HF_TAKES_S:
                why = f"PyTorch computes {dtype} at {rate / 1e9:.2g} GFLOP/s on this CPU, so that {HF_BATCH} prompts "
                reasons.append(why + f"of {PROMPT} tokens alone would take {takes_s / 60:.0f} minutes")
            elif needed > there:
                reasons.append(f"{dtype} needs {needed / 2**30:.1f} GiB of memory, {there / 2**30:.1f} are available")
            else:
                break
        if reasons:
            left_out = len(reasons) == len(DTYPES)
            said = ("is left out: " if left_out else f"has the same weights in {dtype}: ") + "; ".join(reasons)
            print(f"bench: {NAME} {said}", file=sys.stderr, flush=True)
            self.notes[NAME] = said
            if left_out:
                return []
        found = []
        for compiled in programs:
            program = stack.enter_context(Transformers(self.flags.shape, self.flags.threads, compiled, dtype))
            print(f"bench: starting {program.name}", file=sys.stderr, flush=True)
            try:
                program.run(HF_BATCH, PROMPT, TOKENS)
                found.append(program)
            except TransformersError as error:
                self.notes[program.name] = str(error)
        return found

    def _round(self, kind: str, ours: Visitor, cpp: LlamaCpp | None, hf: list[Transformers]) -> None:
        for batch in BATCHES:
            run = ours.run(batch, PROMPT, TOKENS)
            rate = run.mean_decode_rate
            if cpp is not None:  # between two of ours, as the memory's speed changes while this runs
                ours.make_room()
                self.add(f"decode b{batch} {kind}", "llama.cpp", cpp.decode([batch], PROMPT, TOKENS)[batch])
                rate = statistics.mean((rate, ours.run(batch, PROMPT, TOKENS).mean_decode_rate))
            self.add(f"decode b{batch} {kind}", "engine", rate)
            if batch == 1 and kind == "bf16":  # at once, as the bandwidth is shared with whatever else runs
                machine = measure_machine(self.flags.threads, rounds=3)
                size = costs(self.flags.shape, kind, 1, PROMPT + TOKENS).bytes_per_step(1, PROMPT + TOKENS / 2)
                self.add("share of bandwidth", "engine", size / run.step_s / machine.read_bytes_per_s)
            if batch == HF_BATCH:
                for program in hf:
                    steps = program.run(batch, PROMPT, TOKENS)["decode_s"]
                    self.add(f"decode b{batch} {kind}", program.name, batch / statistics.mean(steps))
        self.add(f"prefill{LONG_PROMPT} {kind}", "engine", ours.run(1, LONG_PROMPT, 1).prefill_rate)
        ours.make_room()
        if cpp is not None:
            self.add(f"prefill{LONG_PROMPT} {kind}", "llama.cpp", cpp.prefill(LONG_PROMPT))

    def services(self) -> None:
        """The same clients on TorchServe and on llama.cpp's server, and the engine alone; bf16."""
        flags, kind = self.flags, flags_kind(self.flags)
        slots, length = STREAMS, STREAM_PROMPT + STREAM_TOKENS
        with contextlib.ExitStack() as stack:
            targets = [stack.enter_context(torchserve(self.weights, kind, slots, flags.threads))]
            if "llamacpp" in flags.parts:
                targets.append(stack.enter_context(self._llama_server(kind, slots)))
            benches = [ServiceBench(target, Shape()) for target in targets]
            engine = self._engine(kind, slots, length)
            for bench in benches:
                bench.warm_up(STREAMS)
            for _ in tqdm(range(flags.rounds), desc="services", unit="round"):
                run = engine.run(STREAMS, STREAM_PROMPT, STREAM_TOKENS)
                self.add(f"{STREAMS} streams", "engine", run.throughput)
                for bench in benches:
                    figures = bench.streams(STREAMS, (STREAM_PROMPT,) * 2, (STREAM_TOKENS,) * 2)
                    self.add(f"{STREAMS} streams", bench.target.name, figures["tokens_per_s"])
                    self.add("gap p99, ms", bench.target.name, figures["gap_p99_ms"])
                    self.add("first token p50, ms", bench.target.name, figures["first_token_p50_ms"])
                    felt = bench.intrusion(HF_BATCH)
                    self.add("gap by a prompt, steps", bench.target.name, felt["gap_in_steps"])
                    self.add("second turn vs cold", bench.target.name, bench.second_turn(1)["second_turn_vs_cold"])

    @contextlib.contextmanager
    def _llama_server(self, kind: str, slots: int) -> Iterator[Target]:
        note = self.notes.get(f"llama.cpp, {kind}", {})
        options = ("--flash-attn", note.get("flash attention, decode", "on"))
        program, threads = peers.programs()["llama-server"], self.flags.threads
        model, context = self.weights.gguf(kind), LENGTH // 2
        with peers.LlamaServer(program, model, *options, slots=slots, context=context, threads=threads) as server:
            yield Target("llama-server", server.port, "/v1/completions", answer_token())

    def ratios(self) -> dict[str, float | None]:
        """The figures that a change is judged by; above 1 this project is faster."""
        found: dict[str, float | None] = {}
        for kind in KINDS:
            for what in (*(f"decode_b{batch}" for batch in BATCHES), f"prefill{LONG_PROMPT}"):
                found[f"{what}_{kind}_vs_llamacpp"] = self.ratio(
                    f"{what.replace('_', ' ')} {kind}", "engine", "llama.cpp"
                )
        decode = f"decode b{HF_BATCH} bf16"
        best = [
            ratio
            for who in self.rates.get(decode, {})
            if who.startswith(NAME) and (ratio := self.ratio(decode, "engine", who)) is not None
        ]
        found[f"decode_b{HF_BATCH}_bf16_vs_hf"] = min(best, default=None)
        streams = f"{STREAMS} streams"
        found[f"http{STREAMS}_vs_engine"] = self.ratio(streams, "TorchServe", "engine")
        found[f"http{STREAMS}_vs_llama_server"] = self.ratio(streams, "TorchServe", "llama-server")
        shares = self.rates.get("share of bandwidth", {}).get("engine")
        found["decode_b1_bf16_bandwidth_share"] = statistics.median(shares) if shares else None
        return {name: found[name] for name in RATIOS}

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every figure, for the table."""
        for what, by_whom in self.rates.items():
            for who, values in by_whom.items():
                each = " ".join(f"{value:.2f}" for value in values)
                yield {"what": what, "who": who, "median": statistics.median(values), "each": each}


def flags_kind(flags: argparse.Namespace) -> str:
    """What the services are compared with: bf16, unless only others are asked for."""
    return "bf16" if "bf16" in flags.weights else flags.weights[0]


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    flags, status = _parse(argv), 0
    comparison, machine = Comparison(flags), None
    try:
        with interrupts():
            machine = measure_machine(flags.threads)
            print(f"{machine}\n", flush=True)
            comparison.engines(machine)
            if "http" in flags.parts:
                comparison.services()
    except (ConfigError, LoadError, TransformersError, peers.PeerError) as error:
        print(f"bench_peers: error: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    if comparison.rates:  # also after an error: it took long to get that far
        _tell(comparison)
        _write(comparison, machine)
    return status


def _tell(comparison: Comparison) -> None:
    print(TABLE.head())
    for row in comparison.rows():
        print(TABLE.line(row))
    for name, note in comparison.notes.items():
        said = ", ".join(f"{key} {value}" for key, value in note.items()) if isinstance(note, dict) else note
        print(f"{name}: {said}")
    print()
    for name, value in comparison.ratios().items():
        print(f"{name:34} {'-' if value is None else f'{value:.3f}'}")


def _write(comparison: Comparison, machine: Machine) -> None:
    ratios = comparison.ratios()
    everything = {"machine": asdict(machine), "flags": vars(comparison.flags), "rates": comparison.rates}
    write_json(FOLDER / "peers.json", everything | {"notes": comparison.notes, "ratios": ratios})
    write_json(FOLDER / "ratios.json", ratios)
    print(f"\nwritten to {FOLDER.relative_to(PROJECT)}: peers.json, ratios.json")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="bench_peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    add_common(parser)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    flags = parser.parse_args(argv)
    if unknown := set(flags.parts) - set(PARTS):
        parser.error(f"{min(unknown)!r} is no part; allowed: {', '.join(PARTS)}")
    if unknown := [kind for kind in flags.weights if kind not in KINDS]:
        parser.error(f"--weights names {unknown[0]}, for which the peers have nothing; allowed: {', '.join(KINDS)}")
    if flags.rounds < 1:
        parser.error(f"--rounds is {flags.rounds}; it must be at least 1")
    check_threads(parser, flags)
    flags.parts = flags.parts or list(PARTS)
    return flags


if __name__ == "__main__":
    sys.exit(main())
