"""Measure what conversion and loading take of memory, on a random checkpoint of a real model's size.

python -m tools.memory_check --shape 7B

Memory is a process's own (RssAnon): pages of mapped files are the page cache's and can be dropped at any time.
The limits are those for 7B and more; Python and torch alone take 0.2 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from command_line import Parser, end_with
from deploy.configuration import PROJECT
from engine.checkpoint import open_checkpoint
from engine.config import EngineConfig
from engine.loader import Limits
from engine.parallel import Launch, Ranks
from engine.runner import load_runner
from tools.random_checkpoint import SHAPES, VOCABULARY, write_random_checkpoint

CONVERSION_LIMIT = 2e9
LOADING_LIMIT = 1.1
_EVERY_S = 0.02


@dataclass
class Usage:
    """What one command took."""

    seconds: float
    cpu_seconds: float
    anonymous: int
    resident: int

    def __str__(self) -> str:
        own, all_ = self.anonymous / 1e9, self.resident / 1e9
        memory = f"peak {own:.2f} GB of its own memory ({all_:.2f} GB with mapped files)"
        return f"{self.seconds:.1f} s ({self.cpu_seconds:.1f} s of CPU), {memory}"


def measure(command: list[str]) -> Usage:
    """Run a command and watch its memory until it ends."""
    started, before, peaks = time.monotonic(), _cpu_of_children(), {"RssAnon": 0, "VmHWM": 0}
    with subprocess.Popen(command, cwd=PROJECT) as process:
        try:
            while process.poll() is None:
                try:
                    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                except OSError:
                    break
                for line in lines:
                    name, _, value = line.partition(":")
                    if name in peaks:
                        peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
                time.sleep(_EVERY_S)
        except BaseException:
            process.terminate()  # leaving the block waits for it
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Usage(time.monotonic() - started, _cpu_of_children() - before, peaks["RssAnon"], peaks["VmHWM"])


def _cpu_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def load(folder: Path) -> None:
    """Load a converted checkpoint in bfloat16, as a server on one rank does."""
    checkpoint = open_checkpoint(folder, verify=False)
    config = EngineConfig(dtype="bfloat16", max_seq_len=16, max_batch_size=1, max_tokens_per_step=16)
    limits = Limits.settle(config, checkpoint.args, "cpu")
    load_runner(checkpoint, limits, Ranks(Launch(), "cpu", checkpoint.args))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns 1 if a limit was exceeded."""
    parser = Parser(prog="memory_check", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="7B", help="model size (default: %(default)s)")
    parser.add_argument("--format", choices=("meta", "hf"), default="meta", help="layout (default: %(default)s)")
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="number of files (default: %(default)s)")
    parser.add_argument(
        "--dir", type=Path, help="where to put the files, twice the model's size (default: a temporary)"
    )
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.load:
        load(options.load)
        return 0
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="memory_check-") as folder:
        return _check(Path(folder), options.shape, options.format, options.shards)


def _check(folder: Path, shape: str, form: str, shards: int) -> int:
    write_random_checkpoint(folder / "source", shape, form, shards)
    convert = [sys.executable, "checkpoint_converter.py", str(folder / "source"), str(folder / "converted")]
    converting = measure(convert)
    print(f"convert: {converting}")
    manifest = json.loads((folder / "converted" / "manifest.json").read_text())
    weights = manifest["parameters"] * torch.bfloat16.itemsize
    loading = measure([sys.executable, "-m", "tools.memory_check", "--load", str(folder / "converted")])
    print(f"load:    {loading}, {loading.anonymous / weights:.3f} times the weights ({weights / 1e9:.2f} GB)")
    fits = converting.anonymous <= CONVERSION_LIMIT and loading.anonymous <= LOADING_LIMIT * weights
    print(f"{shape} (vocabulary {VOCABULARY}, {form}, {shards} file(s)): {'within' if fits else 'OVER'} the limits")
    return 0 if fits else 1


if __name__ == "__main__":
    end_with(main)
