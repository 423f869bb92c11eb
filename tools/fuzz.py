"""Damage tiny checkpoints in thousands of ways and read each one: it loads, or is refused by name in one line.

python -m tools.fuzz [--mutations N] [--formats meta,hf,gguf,megatron,dcp,tokenizers] [--seed S] [--seconds LIMIT]

Anything else is a finding: another exception, a crash, more than 2 s of CPU time, gigabytes of memory. It is printed
with what makes it happen again, and the exit status is 1.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

from tqdm import tqdm

from command_line import Parser, end_with
from tools.fuzz_damage import damage
from tools.fuzz_readers import Finding, FuzzError, Limits, Worker, examine
from tools.fuzz_samples import make_samples

KINDS = ("meta", "hf", "gguf", "megatron", "dcp", "tokenizers")
OUTCOMES = ("loaded", "refused", "error", "crash", "hang", "memory")


@dataclass
class Report:
    """What came of all mutations; of each distinct finding the first, and how often it was seen."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    findings: dict[tuple[str, ...], Finding] = field(default_factory=dict)
    seen: Counter[tuple[str, ...]] = field(default_factory=Counter)

    def add(self, finding: Finding) -> bool:
        """Count an outcome; True if it is a finding that was not seen before."""
        outcome = finding.outcome
        self.counts.setdefault(finding.kind, Counter())[outcome.result] += 1
        if not outcome.is_finding:
            return False
        key = (finding.kind, outcome.result, outcome.what, outcome.place)
        self.seen[key] += 1
        return self.findings.setdefault(key, finding) is finding

    def table(self) -> str:
        """The outcomes per format."""
        lines = ["".join(f"{title:>11}" for title in ("", *OUTCOMES, "all"))]
        for kind in filter(self.counts.get, KINDS):
            counts = self.counts[kind]
            numbers = [counts[outcome] for outcome in OUTCOMES]
            lines.append(f"{kind:>11}" + "".join(f"{number:>11,}" for number in (*numbers, sum(numbers))))
        return "\n".join(lines)


def fuzz(
    mutations: int = 10_000,
    kinds: tuple[str, ...] = KINDS,
    seed: int = 0,
    seconds: float | None = None,
    only: int | None = None,
    limits: Limits | None = None,
    workers: int = 2,
    prepare: Callable[[], object] | None = None,
    say: Callable[[Finding], object] = lambda finding: None,
    progress: bool = False,
) -> Report:
    """Read `mutations` of every kind, or mutation `only`; `prepare` runs in each worker, `say` is told new findings."""
    report = Report()
    numbers = range(mutations) if only is None else [only]
    cases = ((kind, number) for number in numbers for kind in kinds)
    with tempfile.TemporaryDirectory(prefix="llama-fuzz-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        (folder / "made").mkdir()
        samples = make_samples(folder / "made")
        for index, sample in enumerate(samples):
            for file, content in sample.files.items():
                path = folder / "originals" / str(index) / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            whole = examine(sample.kind, folder / "originals" / str(index) / sample.target)
            if whole.result != "loaded":
                raise FuzzError(f"{sample.kind}, {sample.name}: the undamaged one is {whole.result}: {whole.details}")
        bar = stack.enter_context(tqdm(total=len(numbers) * len(kinds), unit="mutation", disable=not progress))
        pool: list[Worker] = []
        for number in range(min(workers, len(numbers) * len(kinds))):
            pool.append(Worker(folder / f"worker{number}", samples, limits or Limits(), prepare))
            stack.callback(pool[-1].close)
        waiting, end = True, time.monotonic() + seconds if seconds is not None else None
        while waiting or not all(worker.is_idle for worker in pool):
            for worker in pool:
                if worker.is_idle and waiting:
                    case = None if end is not None and time.monotonic() > end else next(cases, None)
                    if case is None:
                        waiting = False
                        break
                    worker.give(case[1], *damage(samples, *case, seed))
            busy = [worker for worker in pool if not worker.is_idle]
            wait([worker.connection for worker in busy], timeout=0.1)
            for worker in busy:
                finding = worker.finding()
                if finding is not None:
                    bar.update()
                    if report.add(finding):
                        say(finding)
    return report


def described(finding: Finding, seed: int, details: bool = False) -> str:
    """A finding for people: what, where, after which mutation, and how to see it again."""
    outcome = finding.outcome
    lines = [line for line in outcome.details.splitlines() if line.strip()]
    last = lines[-1] if outcome.result in ("error", "memory") and lines else ""
    return "\n".join(
        (
            f"FINDING {finding.kind}: {outcome.result}: {outcome.what} at {outcome.place or 'no place in the project'}",
            *([f"  {last[:300]}"] if last else []),
            f"  {finding.sample}: {finding.words}",
            f"  again: python -m tools.fuzz --formats {finding.kind} --seed {seed} --only {finding.number}",
            *([outcome.details] if details else []),
        )
    )


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(prog="fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=10_000, metavar="N", help="per format (default: %(default)s)")
    parser.add_argument("--formats", default=",".join(KINDS), metavar="LIST", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="for other mutations (default: %(default)s)")
    parser.add_argument("--seconds", type=float, metavar="LIMIT", help="stop after so long")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one mutation of each format, with all details")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="(default: %(default)s)")
    options = parser.parse_args(argv)
    kinds = tuple(dict.fromkeys(name.strip() for name in options.formats.split(",")))
    if unknown := [name for name in kinds if name not in KINDS]:
        parser.error(f"--formats names {unknown[0]!r}; allowed: {', '.join(KINDS)}")
    if options.mutations < 1 or options.workers < 1:
        parser.error("--mutations and --workers are at least 1")

    def say(finding: Finding) -> None:
        tqdm.write(described(finding, options.seed, details=options.only is not None), file=sys.stdout)

    report = fuzz(
        options.mutations,
        kinds,
        options.seed,
        options.seconds,
        options.only,
        workers=options.workers,
        say=say,
        progress=True,
    )
    print(report.table())
    if not report.findings:
        return 0
    print(f"\n{len(report.findings)} distinct findings:")
    for key, count in report.seen.most_common():
        print(f"{count:>6} x {' '.join(key)} (--only {report.findings[key].number})")
    return 1


if __name__ == "__main__":
    try:
        end_with(main)
    except FuzzError as error:
        sys.exit(f"fuzz: error: {error}")
