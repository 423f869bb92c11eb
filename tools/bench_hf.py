"""Hugging Face transformers on random weights: a program that answers each line of JSON with the times of one run.

echo '{"batch": 8, "prompt": 64, "tokens": 16}' | python -m tools.bench_hf --shape 1.1B --threads 2

tools.bench_peers starts it beside the engine. With --compiled a decode step is compiled by torch.compile, over a static
cache; the first run of each batch size then takes minutes. With --dtype float32 it has the same weights, widened: that
is how it is run where PyTorch's products in bfloat16 are slow.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, Self

import torch
from torch import Tensor

from command_line import Parser
from deploy.configuration import PROJECT
from tools.bench_engine import model_args
from tools.random_checkpoint import SHAPES

NAME = "transformers"
DTYPES = {"bfloat16": "bf16", "float32": "f32"}  # and what tools.bench calls their weights


class TransformersError(RuntimeError):
    """The program ended; the message says with what."""


class Transformers:
    """The program of this file as a process of its own, for the time of a block."""

    def __init__(self, shape: str, threads: int, compiled: bool = False, dtype: str = "bfloat16") -> None:
        self.name = NAME + (f", {dtype}" if dtype != "bfloat16" else "") + (", compiled" if compiled else "")
        command = [sys.executable, "-m", "tools.bench_hf", "--shape", shape, "--threads", str(threads)]
        command += ["--dtype", dtype]
        command += ["--compiled"] if compiled else []
        # Only its answers are of interest: warnings of its libraries would stand among the figures.
        self._said = tempfile.TemporaryFile()
        # What is compiled is not kept: a process that is ended while it writes would spoil it for the next one.
        self._compiled = tempfile.TemporaryDirectory(prefix="llama-compiled-")
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": self._compiled.name}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._said}
        # A group of its own, because torch.compile has processes too.
        self._process = subprocess.Popen(
            command, cwd=PROJECT, env=environment, text=True, start_new_session=True, **pipes
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._said.close()
        self._compiled.cleanup()

    def run(self, batch: int, prompt: int, tokens: int) -> dict[str, Any]:
        """The times of one run: `first_token_s` and the list `decode_s`."""
        try:
            self._process.stdin.write(json.dumps({"batch": batch, "prompt": prompt, "tokens": tokens}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except OSError:
            answer = ""
        if not answer:
            self._process.wait()
            self._said.seek(0)
            lines = self._said.read().decode(errors="replace").strip().splitlines()
            raise TransformersError(f"{self.name} ended: {lines[-1] if lines else 'nothing was said'}")
        return json.loads(answer)


def make_model(shape: str, dtype: str = "bfloat16") -> torch.nn.Module:
    """A model of the given shape, whose weights are bfloat16's whatever it computes in."""
    from transformers import LlamaConfig, LlamaForCausalLM

    args = model_args(shape)
    config = LlamaConfig(
        hidden_size=args.dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        intermediate_size=args.ffn_hidden_dim,
        vocab_size=args.vocab_size,
        max_position_embeddings=args.max_seq_len,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).to(getattr(torch, dtype)).eval()


class Generation:
    """Greedy generation, timed; what `generate` does beside the model's own steps is left out."""

    def __init__(self, model: torch.nn.Module, compiled: bool) -> None:
        self._model, self._compiled = model, compiled
        # It had another name in earlier releases of transformers 5.
        named = inspect.signature(type(model).forward).parameters
        self._cache_name = "cache" if "cache" in named else "past_key_values"
        self._step = torch.compile(self._decode, dynamic=False) if compiled else self._decode

    def _decode(self, ids_BS: Tensor, cache: Any) -> Tensor:
        """The next token of every sequence."""
        known = {self._cache_name: cache}
        return self._model(ids_BS, use_cache=True, logits_to_keep=1, **known).logits[:, -1].argmax(-1, keepdim=True)

    @torch.inference_mode()
    def run(self, batch: int, prompt: int, tokens: int) -> dict[str, Any]:
        """Answer equal prompts and time each step."""
        from transformers import DynamicCache, StaticCache

        config = self._model.config
        # The same length for every run, so that a compiled step serves all of them.
        length = -(-(prompt + tokens) // 128) * 128
        cache = StaticCache(config=config, max_cache_len=length) if self._compiled else DynamicCache(config=config)
        ids = torch.randint(3, config.vocab_size, (batch, prompt))
        started = time.perf_counter()
        token = self._decode(ids, cache)
        before = time.perf_counter()
        first, decode = before - started, []
        for _ in range(tokens - 1):
            token = self._step(token, cache)
            now = time.perf_counter()
            decode.append(now - before)
            before = now
        return {"first_token_s": first, "decode_s": decode}


def main(argv: list[str] | None = None) -> int:
    """Read lines until there are no more."""
    parser = Parser(prog="bench_hf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="1.1B", help="model size (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--compiled", action="store_true", help="compile the decode step")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="(default: %(default)s)")
    flags = parser.parse_args(argv)
    torch.set_num_threads(flags.threads)
    generation = Generation(make_model(flags.shape, flags.dtype), flags.compiled)
    for line in sys.stdin:
        print(json.dumps(generation.run(**json.loads(line))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
