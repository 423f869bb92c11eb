"""The engine's own speed, without HTTP: prompts, decode steps and their latencies on random weights of a real shape."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from engine.config import ConfigError, EngineConfig
from engine.cpu.runner import CpuRunner
from engine.engine import Engine
from engine.loader import Limits, choose_threads, fill_in, lay_out, memory_need, preflight
from engine.parallel import Launch, Ranks, choose_device
from engine.runner import Runner, leave_threads_to_kernels
from engine.sequence import SamplingParams, Sequence
from llama2 import ModelArgs
from tools.bench_machine import Machine
from tools.bench_report import PERCENTILES, percentile
from tools.random_checkpoint import SHAPES, VOCABULARY

# What the engine is told (dtype, quantization) for each kind of weights.
WEIGHTS = {
    "f32": ("float32", "none"),
    "bf16": ("bfloat16", "none"),
    "int8": ("bfloat16", "int8"),
    "int4": ("bfloat16", "int4"),
    "int4-128": ("bfloat16", "int4-128"),
    "fp8": ("bfloat16", "fp8"),
}
TOKENS_PER_STEP = 512
_NOISE = 1 << 22


@dataclass(frozen=True)
class Run:
    """A batch of equal prompts from their arrival to their last token, step by step."""

    batch: int
    prompt: int
    tokens: int
    first_token_s: tuple[float, ...]
    """Of every sequence, from the arrival of all."""
    decode_s: tuple[float, ...]
    """The steps in which every sequence got a token and no prompt was computed."""
    wall_s: float
    gaps_s: tuple[float, ...] = ()
    """On a GPU, from the end of each decode step's logits to the beginning of the next step."""

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second until the last of the first tokens."""
        return self.batch * self.prompt / max(self.first_token_s)

    @property
    def step_s(self) -> float:
        """The median decode step, which a busy neighbour moves least."""
        assert self.decode_s, "the whole batch was never decoding"
        return statistics.median(self.decode_s)

    @property
    def decode_rate(self) -> float:
        """Tokens per second of the median decode step."""
        return self.batch / self.step_s

    @property
    def mean_decode_rate(self) -> float:
        """Tokens per second over all decode steps, as others state it; a busy neighbour counts."""
        return self.batch * len(self.decode_s) / sum(self.decode_s)

    @property
    def throughput(self) -> float:
        """All generated tokens over the wall time, prompts included."""
        return self.batch * self.tokens / self.wall_s


def model_args(shape: str) -> ModelArgs:
    """A real model's shape by name."""
    return ModelArgs(**SHAPES[shape], vocab_size=VOCABULARY)


def costs(shape: str, weights: str, slots: int, length: int, device: str = "cpu") -> Costs:
    """Those of a kind of weights."""
    args = model_args(shape)
    return Costs(args, Limits.settle(settings(weights, slots, length, None), args, device))


def settings(
    weights: str, slots: int, length: int, threads: int | None, together: int = 0, **choices: object
) -> EngineConfig:
    """What the engine is started with for a kind of weights; `together` are tokens that fit into one step.

    A batch whose prompts fit into its first step decodes together from then on, however prompts share later steps.
    """
    dtype, quantization = WEIGHTS[weights]
    return EngineConfig(
        max_seq_len=length,
        max_batch_size=slots,
        max_tokens_per_step=max(TOKENS_PER_STEP, slots, together),
        dtype=dtype,
        quantization=quantization,
        threads=threads,
        verify_checkpoint=False,
        **choices,
    )


def random_engine(args: ModelArgs, config: EngineConfig) -> Engine:
    """An engine on random weights that were never in a file."""
    launch = Launch()
    device = choose_device(config.device, launch)
    torch.set_num_threads(config.threads or choose_threads(args, launch.local_size))
    limits = Limits.settle(config, args, device)
    ranks = Ranks(launch, device, args)
    preflight(args, limits, ranks, config.memory_fraction)
    model = lay_out(args, limits, ranks)
    noise = torch.randn(_NOISE, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(limits.dtype)

    def fill(module: nn.Module, prefix: str) -> None:
        module.to_empty(device=device)
        for tensor in module.state_dict().values():
            if tensor.dim() == 1:
                tensor.fill_(1.0)
                continue
            for part in tensor.view(-1).split(_NOISE):
                part.copy_(noise[: len(part)])

    if limits.native:
        runner = CpuRunner(model, limits, None, fill)
        leave_threads_to_kernels()
        return Engine(runner, limits, ranks, args.vocab_size)
    if limits.scheme is not None and not limits.packed:
        raise ConfigError(f"quantization is {config.quantization!r}; without kernels for it only 'none' is measured")
    return Engine(Runner(fill_in(model, limits, ranks, fill), limits, device, 1), limits, ranks, args.vocab_size)


@dataclass(frozen=True)
class Costs:
    """What a model's steps need at least of a machine, however they are computed."""

    args: ModelArgs
    limits: Limits

    @property
    def memory(self) -> int:
        """What one rank holds, in bytes."""
        return memory_need(self.args, self.limits, 1).total

    def bytes_per_step(self, batch: int, context: float) -> float:
        """What a decode step has to read: all matrices once, and the keys and values of every sequence."""
        args, size = self.args, self.limits.dtype.itemsize
        weights = memory_need(args, self.limits, 1).weights
        if not args.tie_embeddings:  # of the table only a row for each token
            weights -= args.vocab_size * args.dim * size
        return weights + batch * context * 2 * args.n_layers * args.n_kv_heads * args.head_dim * size

    def flops(self, tokens: int, before: float = 0) -> float:
        """Multiplications and additions of tokens behind others: every matrix for each, the last for one token only."""
        args = self.args
        shapes = (shape for name, shape in args.tensor_shapes().items() if name.startswith("layers."))
        matrices = sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)
        pairs = tokens * (before + tokens / 2)  # half of the square is masked
        attention = 4 * args.n_layers * args.n_heads * args.head_dim * pairs
        return 2 * matrices * tokens + attention + 2 * args.vocab_size * args.dim


class Marks:
    """When the steps of a runner began and ended on its GPU."""

    def __init__(self, runner: Runner) -> None:
        self._run, self._pairs = runner.run, []
        runner.run = self._marked

    def _marked(self, *arguments: Any) -> Any:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        logits = self._run(*arguments)
        end.record()
        self._pairs.append((begin, end))
        return logits

    def gaps(self, steps: int) -> tuple[float, ...]:
        """Seconds between each of the last steps and the one behind it."""
        torch.cuda.synchronize()
        last = self._pairs[len(self._pairs) - steps :]
        return tuple(end.elapsed_time(begin) / 1000 for (_, end), (begin, _) in pairwise(last))


class EngineBench:
    """Measures one engine; no two prompts of it are alike, so that none is found in a cache."""

    def __init__(self, engine: Engine, args: ModelArgs) -> None:
        self.engine, self.args, self.costs = engine, args, Costs(args, engine.limits)
        self._random = random.Random(0)
        self._marks = Marks(engine._runner) if engine.ranks.device.startswith("cuda") else None

    def prompt(self, length: int) -> list[int]:
        """A random prompt."""
        return [self._random.randrange(3, self.args.vocab_size) for _ in range(length)]

    def run(self, batch: int, prompt: int, tokens: int) -> Run:
        """Have a batch of prompts answered, all of which arrive at once."""
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        prompts = [self.prompt(prompt) for _ in range(batch)]
        started = time.perf_counter()
        sequences = [self.engine.add(each, params) for each in prompts]
        first: dict[int, float] = {}
        decode, before = [], started
        while self.engine.busy:
            decodes = len(sequences) == batch and all(_decodes(each) for each in sequences)
            outputs = self.engine.step()
            now = time.perf_counter()
            for output in outputs:
                first.setdefault(output.sequence.number, now - started)
            if decodes:
                decode.append(now - before)
            before = now
        wall = time.perf_counter() - started
        assert all(sequence.generated == tokens for sequence in sequences), "a sequence ended early"
        gaps = self._marks.gaps(len(decode)) if self._marks is not None else ()
        return Run(batch, prompt, tokens, tuple(first.values()), tuple(decode), wall, gaps)

    def warm_up(self) -> None:
        """Touch every weight once, as the first step of a process is slower than all others; a GPU compiles, too."""
        self.engine.rehearse() if self._marks is not None else self.run(1, 8, 3)

    def decode_row(self, run: Run, machine: Machine) -> dict[str, Any]:
        """The decode steps of a run as figures, each beside what the machine could do."""
        context = run.prompt + run.tokens - len(run.decode_s) / 2
        size = self.costs.bytes_per_step(run.batch, context)
        return {
            "batch": run.batch,
            "prompt": run.prompt,
            "context": context,
            "tokens": run.tokens,
            "tokens_per_s": run.decode_rate,
            "step_ms": 1000 * run.step_s,
            **{f"p{p}_ms": 1000 * percentile(run.decode_s, p) for p in PERCENTILES},
            "first_token_ms": 1000 * statistics.median(run.first_token_s),
            "throughput": run.throughput,
            "bytes_per_step": size,
            "bandwidth_share": size / run.step_s / machine.read_bytes_per_s,
            "flops_share": run.batch * self.costs.flops(1, context) / run.step_s / machine.flops,
            "gap_share": statistics.median(run.gaps_s) / run.step_s if run.gaps_s else None,
        }

    def prefill_row(self, run: Run, machine: Machine) -> dict[str, Any]:
        """The prompts of a run as figures."""
        seconds = max(run.first_token_s)
        return {
            "prompt": run.prompt,
            "tokens_per_s": run.prefill_rate,
            "first_token_ms": 1000 * seconds,
            "flops_share": run.batch * self.costs.flops(run.prompt) / seconds / machine.flops,
        }


def _decodes(sequence: Sequence) -> bool:
    return sequence.pending == 1 and sequence.generated > 0 and not sequence.finished
