"""llama.cpp's own benchmark programs on our weights, with whichever of its flags are the fastest here."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence as Ordered
from pathlib import Path
from typing import Any

from tools import peers

# Attention in one pass or in three: which is faster depends on the machine, so both are tried.
FLASH_ATTENTION = ("on", "off")
PROGRAM_TAKES_S = 900


class LlamaCpp:
    """One GGUF file, measured by a fresh process each time, as the programs are made for."""

    def __init__(self, programs: dict[str, Path], model: Path, threads: int) -> None:
        self._programs, self._model, self._threads = programs, model, threads
        self.decode_flags = self.prefill_flags = FLASH_ATTENTION[0]

    def choose_flags(self, batches: Ordered[int], prompt: int, tokens: int, long: int) -> None:
        """Try flash attention on and off, and keep what is faster: for decode steps and for prompts."""
        decode, prefill = {}, {}
        for choice in FLASH_ATTENTION:
            self.decode_flags = self.prefill_flags = choice
            decode[choice] = self.decode([max(batches)], prompt, tokens)[max(batches)]
            prefill[choice] = self.prefill(long)
        self.decode_flags, self.prefill_flags = (max(rates, key=rates.get) for rates in (decode, prefill))

    def decode(self, batches: Ordered[int], prompt: int, tokens: int) -> dict[int, float]:
        """Tokens per second of decode steps by the number of sequences, each behind a prompt."""
        # The prompt is computed once and copied: its time is not part of what is measured.
        sizes = ["-npp", str(prompt), "-ntg", str(tokens), "-npl", ",".join(map(str, batches)), "-pps"]
        sizes += ["-c", str(max(batches) * (prompt + tokens)), "-b", "2048", "-ub", "512"]
        flags = ["-tb", str(self._threads), "-fa", self.decode_flags, "--output-format", "jsonl"]
        rates = {row["pl"]: row["speed_tg"] for row in self._run("llama-batched-bench", *sizes, *flags)}
        if missing := set(batches) - rates.keys():
            raise peers.PeerError(f"llama-batched-bench gave no figure for a batch of {min(missing)}")
        return rates

    def prefill(self, prompt: int) -> float:
        """Tokens per second of a prompt."""
        flags = ["-p", str(prompt), "-n", "0", "-r", "1", "-fa", self.prefill_flags, "-o", "jsonl"]
        rows = self._run("llama-bench", *flags)
        if not rows:
            raise peers.PeerError("llama-bench gave no figure")
        return rows[0]["avg_ts"]

    def _run(self, name: str, *flags: str) -> list[dict[str, Any]]:
        command = [str(self._programs[name]), "-m", str(self._model), "-t", str(self._threads), *flags]
        try:
            ended = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PROGRAM_TAKES_S
            )
        except subprocess.TimeoutExpired:
            raise peers.PeerError(f"{name} did not end within {PROGRAM_TAKES_S} s") from None
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or ["nothing was said"])[-1]
            raise peers.PeerError(f"{name} failed: {last}")
        return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
