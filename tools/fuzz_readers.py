"""The processes in which tools.fuzz has damaged checkpoints read, and what came of it."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import re
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch

from deploy.configuration import PROJECT
from engine.config import ConfigError
from formats import FormatError, open_source
from formats.vocabulary import read_vocabulary
from tokenizing import TokenizerError, load_tokenizer
from tools.fuzz_damage import Damage
from tools.fuzz_samples import Sample

# What checkpoint_converter.py says in one line; a tokenizer may say it by an error of its own as well.
REFUSALS = (FormatError, ConfigError)

TEXT = "Once upon a time, 12 größere Häuser\n<s> <|eot_id|> 火"


class FuzzError(Exception):
    """What keeps the tool from working at all."""


@dataclass(frozen=True)
class Limits:
    """What reading one tiny checkpoint may take; a wall clock alone is unfair on a busy machine."""

    cpu_s: float = 2.0
    wall_s: float = 20.0
    memory: int = 3 << 30


@dataclass(frozen=True)
class Outcome:
    """What came of reading one damaged checkpoint."""

    result: str
    what: str = ""
    place: str = ""
    details: str = ""

    @property
    def is_finding(self) -> bool:
        return self.result not in ("loaded", "refused")


@dataclass(frozen=True)
class Finding:
    """An outcome that must not be, and how it came about."""

    kind: str
    number: int
    sample: str
    words: str
    outcome: Outcome


def examine(kind: str, path: Path) -> Outcome:
    """Read everything of a checkpoint, or of a tokenizer, and say what came of it."""
    try:
        (_read_tokenizer if kind == "tokenizers" else _read_checkpoint)(path)
        return Outcome("loaded")
    except REFUSALS as error:
        if "\n" in str(error) or not str(error).strip():
            return _failure("error", error, "a refusal that is not in one line")
        return Outcome("refused", type(error).__name__, details=str(error))
    except BaseException as error:  # Rust's panics are no Exceptions
        full = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate" in str(error))
        return _failure("memory" if full else "error", error, type(error).__name__)


def _read_checkpoint(path: Path) -> None:
    with open_source(path, verify=False) as source:
        shapes = source.args.tensor_shapes()
        if sorted(source.names) != sorted(shapes):
            raise AssertionError("the names are not those of the model")
        for name in source.names:
            tensor = source.read(name)
            if tuple(tensor.shape) != tuple(shapes[name]):
                raise AssertionError(f"{name} has the shape {tuple(tensor.shape)}, not {shapes[name]}")
            tensor.sum()  # touches every byte, which may be the file's
        source.vocabulary()


def _read_tokenizer(path: Path) -> None:
    """By the converter and by the server, each of which may refuse what the other does not need."""
    refused = None
    try:
        read_vocabulary(path)
    except FormatError as error:
        refused = error
    try:
        tokenizer = load_tokenizer(path)
        tokenizer.decode(tokenizer.encode(TEXT, bos=True, eos=True))
        [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
    except TokenizerError as error:
        refused = refused or FormatError(str(error))
    if refused is not None:
        raise refused


def _failure(result: str, error: BaseException, what: str) -> Outcome:
    frames = [f'File "{frame.filename}", line {frame.lineno}' for frame in traceback.extract_tb(error.__traceback__)]
    text = "".join(traceback.format_exception(error))
    return Outcome(result, what, _project_place(reversed(frames)), text)


def _project_place(lines: Iterator[str] | list[str]) -> str:
    """The first of these places that is in the project's own code, and not in this file."""
    for line in lines:
        found = re.search(r'File "(.+?)", line (\d+)', line)
        if found and (path := Path(found[1])).is_relative_to(PROJECT) and path != Path(__file__).resolve():
            if ".venv" not in path.parts:
                return f"{path.relative_to(PROJECT)}:{found[2]}"
    return ""


def _serve(
    connection: Connection,
    log: Path,
    samples: list[tuple[str, Path]],
    limits: Limits,
    prepare: Callable[[], object] | None,
) -> None:
    """A worker: reads what it is told to until nobody tells it any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)  # libraries write there too
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for kind, path in samples:
        examine(kind, path)  # what is imported late is nobody's fault
    if prepare is not None:
        prepare()
    most = psutil.Process().memory_info().vms + limits.memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send(None)
    with contextlib.suppress(EOFError):
        while True:
            kind, path = connection.recv()
            before = time.process_time()
            outcome = examine(kind, path)
            connection.send((outcome, time.process_time() - before))


class Worker:
    """A process that reads damaged checkpoints, and its own copy of the samples, made of links."""

    def __init__(
        self, folder: Path, samples: list[Sample], limits: Limits, prepare: Callable[[], object] | None
    ) -> None:
        self._folder, self._limits = folder, limits
        self._folders = {id(sample): folder / str(index) for index, sample in enumerate(samples)}
        self._originals = folder.parent / "originals"
        for sample in samples:
            for name in sample.files:
                self._restore(sample, name)
        self._targets = [(sample.kind, self._folders[id(sample)] / sample.target) for sample in samples]
        self._prepare = prepare
        self._task: tuple[int, Sample, Damage] | None = None
        self._start()

    @property
    def is_idle(self) -> bool:
        return self._task is None

    def give(self, number: int, sample: Sample, done: Damage) -> None:
        """Damage the sample and have it read."""
        for name, content in done.files.items():
            path = self._folders[id(sample)] / name
            path.unlink()  # a link to the original
            if content is not None:
                path.write_bytes(content)
        self._task = (number, sample, done)
        self._cpu, self._started = self._cpu_time(), time.monotonic()
        self.connection.send((sample.kind, self._folders[id(sample)] / sample.target))

    def finding(self) -> Finding | None:
        """What came of the task; None while it runs."""
        outcome = self._outcome()
        if outcome is None:
            return None
        number, sample, done = self._task
        self._task = None
        for name in done.files:
            self._restore(sample, name)
        if not self._process.is_alive():
            self._start()
        return Finding(sample.kind, number, sample.name, done.words, outcome)

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        self._process.kill()
        self._process.join()

    def _outcome(self) -> Outcome | None:
        if self.connection.poll():
            try:
                outcome, cpu = self.connection.recv()
            except (EOFError, ConnectionError):
                self._process.join()
                code, lines = self._process.exitcode, self._said()
                self.close()
                status = signal.Signals(-code).name if code < 0 else f"exit status {code}"
                return Outcome("crash", status, _project_place(lines), "\n".join(lines[:40]))
            if cpu > self._limits.cpu_s and not outcome.is_finding:
                return Outcome("hang", "slow", outcome.place, f"{cpu:.1f} s of CPU time, then: {outcome}")
            return outcome
        wall, cpu = time.monotonic() - self._started, self._cpu_time() - self._cpu
        if cpu <= self._limits.cpu_s and wall <= self._limits.wall_s:
            return None
        os.kill(self._process.pid, signal.SIGUSR1)  # it says where it is
        time.sleep(0.2)
        lines = self._said()
        self.close()
        return Outcome("hang", "hang", _project_place(lines), f"{cpu:.1f} s of CPU time\n" + "\n".join(lines[:40]))

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["checkpoint_converter", "tokenizing", "psutil"])
        self._log = self._folder / "log"
        self.connection, theirs = context.Pipe()
        arguments = (theirs, self._log, self._targets, self._limits, self._prepare)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.connection.recv()
        except EOFError:
            raise FuzzError("a worker ended before its first task:\n" + "\n".join(self._said()[:40])) from None
        self._watched = psutil.Process(self._process.pid)

    def _cpu_time(self) -> float:
        try:
            times = self._watched.cpu_times()
        except psutil.Error:
            return 0.0
        return times.user + times.system

    def _said(self) -> list[str]:
        with contextlib.suppress(OSError):
            return self._log.read_text(errors="replace")[-20_000:].splitlines()
        return []

    def _restore(self, sample: Sample, name: str) -> None:
        path = self._folders[id(sample)] / name
        original = self._originals / self._folders[id(sample)].name / name
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(original, path)
