"""Damage tiny checkpoints in thousands of ways and read each one: it loads, or is refused by name in one line.

python -m tools.fuzz [--mutations N] [--formats meta,hf,gguf,megatron,dcp,tokenizers] [--seed S] [--seconds LIMIT]

Anything else is a finding: another exception, a crash, more than 2 s of CPU time, gigabytes of memory. It is printed
with what makes it happen again, and the exit status is 1.
"""

from __future__ import annotations

import base64
import contextlib
import faulthandler
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed.checkpoint as dcp
from tqdm import tqdm

from checkpoint_converter import convert
from command_line import Parser
from engine.checkpoint import MANIFEST
from engine.config import ConfigError
from formats import FormatError, open_source
from formats.vocabulary import read_vocabulary
from llama2 import ModelArgs
from tokenizing import TokenizerError, load_tokenizer

PROJECT = Path(__file__).resolve().parent.parent
DEMO_TOKENIZER = PROJECT / "demo" / "model" / "tokenizer.model"
KINDS = ("meta", "hf", "gguf", "megatron", "dcp", "tokenizers")
OUTCOMES = ("loaded", "refused", "error", "crash", "hang", "memory")
# What checkpoint_converter.py says in one line; a tokenizer may say it by an error of its own as well.
REFUSALS = (FormatError, ConfigError)

ARGS = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=768, ffn_hidden_dim=64)
TEXT = "Once upon a time, 12 größere Häuser\n<s> <|eot_id|> 火"
# Written in place of a value that JSON's own encoder would not write.
RAW = "@raw@"
ODD_TEXTS = (
    "",
    "x",
    "0",
    "-1",
    "\0",
    "\n",
    "../x",
    "/etc/passwd",
    ".",
    "\ud800",
    "\u2581",
    "<s>",
    "é" * 1000,
    "a" * 100_000,
)
ODD_NUMBERS = (0, -1, 1, 2, 3, 1 << 15, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, 1 << 64)
ODD_FLOATS = (0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"), float("-inf"))
ODD_RAW = (
    *("1" + "0" * digits for digits in (30, 400, 5000)),
    *("[" * depth + "]" * depth for depth in (40, 900, 20_000)),
    *('{"a":' * depth + "1" + "}" * depth for depth in (40, 900, 20_000)),
    "1e999",
    "{}",
    "[]",
    '{"a": 1, "a": 2}',
    "[" + "0," * 100_000 + "0]",
)


class FuzzError(Exception):
    """What keeps the tool from working at all."""


@dataclass(frozen=True)
class Limits:
    """What reading one tiny checkpoint may take; a wall clock alone is unfair on a busy machine."""

    cpu_s: float = 2.0
    wall_s: float = 20.0
    memory: int = 3 << 30


@dataclass(frozen=True)
class Sample:
    """An undamaged checkpoint or tokenizer: its files by their paths in its folder, and what of it is opened."""

    kind: str
    name: str
    files: dict[str, bytes]
    target: str = "."


class Damage(NamedTuple):
    """What a mutation makes of a sample: new contents (None: the file is gone), and the mutation in words."""

    files: dict[str, bytes | None]
    words: str


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


# Samples


def make_samples(folder: Path) -> list[Sample]:
    """One or a few of every kind, made by the project's own converter."""
    first = _write_meta(folder / "first", DEMO_TOKENIZER)
    third = _write_meta(folder / "third", _write_ranks(folder / "ranks"), tied=True)
    made: list[Sample] = []

    def add(kind: str, name: str, made_at: Path, target: str = ".") -> None:
        files = _contents(made_at, manifest=kind == "dcp")
        for path in [path for path in files if Path(path).name == ".metadata"]:
            files[path] = _without_origin(files[path])
            if MANIFEST in files:
                files[MANIFEST] = _with_entry(files[MANIFEST], path, files[path])
        made.append(Sample(kind, name, files, target))

    def converted(given: Path, name: str, to: str, file: str = "", **options: Any) -> Path:
        return convert(given, folder / name / file, to=to, progress=False, **options)

    add("meta", "two shards", converted(first, "meta2", "meta", shards=2))
    add("meta", "Llama 3", converted(third, "meta3", "meta", shards=2))
    hf = converted(third, "hf3", "hf")
    add("hf", "safetensors", converted(first, "hf", "hf", max_file_size=60_000))
    add("hf", "Llama 3", hf)
    add("hf", "bin", _as_bin(converted(first, "bin", "hf"), count=2))
    for name, given, kind in (("F32", first, "F32"), ("Q8_0", first, "Q8_0"), ("Llama 3", third, "Q8_0")):
        (folder / name).mkdir()
        path = converted(given, name, "gguf", "model.gguf", type=kind.lower())
        add("gguf", name, path.parent, path.name)
    add("megatron", "two ranks", converted(first, "megatron2", "megatron", tensor_parallel=2))
    add("megatron", "four ranks", converted(first, "megatron4", "megatron", tensor_parallel=2, pipeline_parallel=2))
    add("megatron", "torch_dist", _as_distributed(converted(first, "distributed", "megatron")))
    add("dcp", "Llama 2", converted(first, "dcp2", "dcp"))
    add("dcp", "Llama 3", converted(third, "dcp3", "dcp"))
    for name, path in (("SentencePiece", DEMO_TOKENIZER), ("tiktoken", folder / "ranks")):
        made.append(Sample("tokenizers", name, {"tokenizer.model": path.read_bytes()}, "tokenizer.model"))
    for name, given in (("tokenizer.json", hf), ("Llama 2's tokenizer.json", converted(first, "hf2", "hf"))):
        files = {file: content for file, content in _contents(given).items() if file.endswith((".json", ".jinja"))}
        files.pop("config.json")
        made.append(Sample("tokenizers", name, files, "tokenizer.json"))
    return made


def _write_meta(folder: Path, tokenizer: Path, tied: bool = False) -> Path:
    """A random model as Meta would publish it, in one shard."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).half() for name, shape in ARGS.tensor_shapes().items()}
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "norm_eps": 1e-5}
    params |= {"ffn_dim_multiplier": 0.75}
    if tied:
        tensors["output.weight"] = tensors["tok_embeddings.weight"]
        params |= {"use_scaled_rope": True, "rope_theta": 500000.0}
    torch.save(tensors, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(params))
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    for path in folder.iterdir():
        os.utime(path, (0, 0))  # the same seed is to damage the same manifest
    return folder


def _write_ranks(path: Path) -> Path:
    """A tiktoken file like Llama 3's: all bytes, and some words of them."""
    words = [bytes([byte]) for byte in range(256)] + [b"he", b"hel", b"lo", b"hello", b"in", b"on", b"12"]
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(word), rank) for rank, word in enumerate(words)))
    return path


def _as_bin(folder: Path, count: int) -> Path:
    """A Hugging Face folder, its weights in the older form."""
    from safetensors.torch import load_file

    tensors, weight_map = load_file(folder / "model.safetensors"), {}
    for number in range(count):
        name = f"pytorch_model-{number + 1:05d}-of-{count:05d}.bin"
        part = {key: tensors[key] for key in sorted(tensors)[number::count]}
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return folder


def _as_distributed(folder: Path) -> Path:
    """A Megatron folder of one rank, in the format `torch_dist`."""
    [path] = folder.glob("**/mp_rank_00/*.pt")
    content = torch.load(path, weights_only=False)  # our own
    iteration = path.parent.parent
    shutil.rmtree(path.parent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = {name: value for name, value in content["model"].items() if isinstance(value, torch.Tensor)}
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(iteration), no_dist=True)
    torch.save({"args": content["args"]}, iteration / "common.pt")
    (iteration / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    return folder


def _without_origin(metadata: bytes) -> bytes:
    """DCP's metadata without where and when it was made, which the same seed is not to depend on."""
    content = pickle.loads(metadata)  # our own
    content.storage_meta = None
    return pickle.dumps(content)


def _with_entry(manifest: bytes, name: str, new: bytes) -> bytes:
    """The manifest, a file's content being another one now."""
    content = json.loads(manifest)
    content["files"][name] = {"size": len(new), "sha256": hashlib.sha256(new).hexdigest()}
    return json.dumps(content, indent=2).encode()


def _contents(folder: Path, manifest: bool = False) -> dict[str, bytes]:
    """A folder's files; the converter's manifest only if its reader looks at it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in paths
        if manifest or not path.name.endswith("manifest.json")
    }


# Mutations


def damage(samples: list[Sample], kind: str, number: int, seed: int) -> tuple[Sample, Damage]:
    """Mutation `number` of a kind: always the same for the same seed."""
    rng = random.Random(f"{seed} {kind} {number}")
    own = [sample for sample in samples if sample.kind == kind]
    sample = own[number % len(own)]
    if rng.random() < 0.06:
        return sample, _mixed_up(rng, sample, samples)
    name = rng.choice(sorted(sample.files))
    content, words = _mutated(rng, name, sample.files[name])
    files: dict[str, bytes | None] = {name: content}
    if kind == "dcp" and name != MANIFEST and len(content) != len(sample.files[name]) and rng.random() < 0.8:
        files[MANIFEST] = _with_entry(sample.files[MANIFEST], name, content)
    return sample, Damage(files, f"{name}: {words}")


def _mixed_up(rng: random.Random, sample: Sample, samples: list[Sample]) -> Damage:
    """Whole files that are gone, empty, or another's."""
    name, other = rng.choice(sorted(sample.files)), rng.choice(sorted(sample.files))
    stranger = rng.choice(samples)
    strange = rng.choice(sorted(stranger.files))
    return rng.choice(
        (
            Damage({name: None}, f"{name}: removed"),
            Damage({name: b""}, f"{name}: emptied"),
            Damage({name: rng.randbytes(rng.choice((1, 8, 100, 10_000)))}, f"{name}: noise instead"),
            Damage({name: bytes(rng.choice((1, 8, 100, 10_000)))}, f"{name}: zeros instead"),
            Damage({name: sample.files[other]}, f"{name}: what is in {other}"),
            Damage({name: sample.files[other], other: sample.files[name]}, f"{name} and {other}: exchanged"),
            Damage({name: stranger.files[strange]}, f"{name}: {strange} of {stranger.kind}, {stranger.name}"),
        )
    )


def _mutated(rng: random.Random, name: str, content: bytes) -> tuple[bytes, str]:
    """A mutation of the file's own structure, where it has one that is known here, or one of its bytes."""
    if name.endswith(".json") and rng.random() < 0.8:
        return _json_mutated(rng, content)
    if name.endswith(".safetensors") and rng.random() < 0.6:
        (length,) = struct.unpack("<Q", content[:8])
        header, words = _json_mutated(rng, content[8 : 8 + length])
        return struct.pack("<Q", len(header)) + header + content[8 + length :], f"header: {words}"
    if content.startswith(b"PK\3\4") and rng.random() < 0.5:
        with contextlib.suppress(zipfile.BadZipFile):
            return _record_mutated(rng, content)
    return _bytes_mutated(rng, content)


def _bytes_mutated(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    mutations = (_flip, _overwrite, _truncate, _insert, _delete, _duplicate, _integer, _integer, _integer, _digits)
    words = []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        content, done = rng.choice(mutations)(rng, bytearray(content))
        words.append(done)
    return content, "; ".join(words)


def _place(rng: random.Random, content: bytes | bytearray) -> int:
    """An offset: anywhere, or where headers and directories are."""
    size = len(content)
    window = rng.choice((16, 64, 512, 4096, size, size))
    start = rng.choice((0, 0, size - window)) if window < size else 0
    return start + rng.randrange(max(1, min(window, size)))


def _length(rng: random.Random) -> int:
    return rng.choice((1, 1, 2, 4, 8, 64, 1024, rng.randrange(1, 8192)))


def _flip(rng: random.Random, content: bytearray) -> tuple[bytes, str]:
    place, bit = _place(rng, content), rng.randrange(8)
    if place < len(content):
        content[place] ^= 1 << bit
    return bytes(content), f"bit {bit} of byte {place} flipped"


def _overwrite(rng: random.Random, content: bytearray) -> tuple[bytes, str]:
    place, length = _place(rng, content), _length(rng)
    new = rng.choice((rng.randbytes(length), bytes(length), b"\xff" * length))[: max(0, len(content) - place)]
    content[place : place + len(new)] = new
    return bytes(content), f"{len(new)} bytes at {place} overwritten with {new[:8].hex()}..."


def _truncate(rng: random.Random, content: bytearray) -> tuple[bytes, str]:
    place = _place(rng, content)
    return bytes(content[:place]), f"cut off at {place}"


def _insert(rng: random.Random, content: bytearray) -> tuple[bytes, str]:
    place, length = _place(rng, content), _length(rng)
    new = rng.choice((rng.randbytes(length), bytes(length)))
    return bytes(content[:place] + new + content[place:]), f"{length} bytes inserted at {place}"


def _delete(rng: random.Random, content: bytearray) -> tuple[bytes, str]:
    place, length = _place(rng, content), _length(rng)
    return bytes(content[:place] + content[place + length :]), f"{length} bytes at {place} deleted"


def _duplicate(rng: random.Random, content: bytearray) -> tuple[bytes, str]:
    place, length, to = _place(rng, content), _length(rng), _place(rng, content)
    part = content[place : place + length]
    return bytes(content[:to] + part + content[to:]), f"{length} bytes at {place} repeated at {to}"


def _integer(rng: random.Random, content: bytearray) -> tuple[bytes, str]:
    width = rng.choice((4, 8))
    place = min(_place(rng, content), max(0, len(content) - width))
    place -= place % rng.choice((1, 4, 8))
    there = int.from_bytes(content[place : place + width], "little")
    value = rng.choice((*ODD_NUMBERS, len(content), there + 1, there - 1, there * 2, there << 32, rng.getrandbits(64)))
    content[place : place + width] = (value % (1 << 8 * width)).to_bytes(width, rng.choice(("little", "little", "big")))
    return bytes(content), f"{width} bytes at {place} are {value}"


def _digits(rng: random.Random, content: bytearray) -> tuple[bytes, str]:
    """A number that stands in a text, changed."""
    start = _place(rng, content)
    found = re.search(rb"\d+", content[start : start + 4096])
    if found is None:
        return _flip(rng, content)
    new = str(rng.choice((*ODD_NUMBERS, int(found[0][:18]) + 1, int(found[0][:18]) - 1))).encode()
    place = start + found.start()
    return bytes(content[:place] + new + content[start + found.end() :]), f"the number at {place} is {new.decode()}"


def _record_mutated(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """A zip archive whose checksums are right for what was mutated."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    pickles = [index for index, (name, _) in enumerate(records) if name.endswith(".pkl")]
    at = rng.choice(pickles) if pickles and rng.random() < 0.8 else rng.randrange(len(records))
    name, before = records[at]
    way = rng.random()
    if way < 0.9:
        after, words = _bytes_mutated(rng, before)
        records[at] = (name, after)
    elif way < 0.95:
        words = "removed"
        del records[at]
    else:
        words = "there twice"
        records.append(records[at])
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that is there twice
        for each, data in records:
            archive.writestr(zipfile.ZipInfo(each), data)
    return made.getvalue(), f"record {name}: {words}"


def _json_mutated(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    try:
        root = {"": json.loads(content)}
    except ValueError:
        return _bytes_mutated(rng, content)
    words, raw = [], ""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path, holder, key = _somewhere(rng, root)
        way = rng.random()
        if way < 0.15 and path:
            del holder[key]
            words.append(f"{path} removed")
        elif way < 0.25 and isinstance(holder, dict) and path:
            new = rng.choice((*ODD_TEXTS, str(key) + "s", str(key).upper(), str(key)[:-1]))
            holder[new] = holder.pop(key)
            words.append(f"{path} called {new[:20]!r}")
        elif way < 0.35 and isinstance(holder[key], dict | list):
            added = rng.choice((*ODD_TEXTS, *ODD_NUMBERS, None, {}, []))
            if isinstance(holder[key], dict):
                holder[key][rng.choice(ODD_TEXTS)] = added
            else:
                holder[key] += [added] * rng.choice((1, 1, 10))
            words.append(f"{path} has {str(added)[:20]!r} more")
        elif way < 0.45:
            _, other, other_key = _somewhere(rng, root)
            holder[key] = json.loads(json.dumps(other[other_key]))
            words.append(f"{path} is what is at {other_key!r:.40}")
        elif way < 0.6 and type(holder[key]) in (int, float):
            number = holder[key]
            holder[key] = rng.choice((number + 1, number - 1, -number, number * 2, number * 10**9, float(number)))
            words.append(f"{path} is {holder[key]}")
        elif way < 0.75 and RAW not in json.dumps(root):
            holder[key], raw = RAW, rng.choice(ODD_RAW)
            words.append(f"{path} is {raw[:12]}... of {len(raw)} characters")
        else:
            holder[key] = rng.choice(
                (rng.choice(ODD_TEXTS), rng.choice(ODD_NUMBERS), rng.choice(ODD_FLOATS), None, True)
            )
            words.append(f"{path} is {str(holder[key])[:20]!r}")
    return json.dumps(root.get("")).replace(f'"{RAW}"', raw or "0").encode(), "; ".join(words)


def _somewhere(rng: random.Random, root: dict[str, Any]) -> tuple[str, Any, Any]:
    """A place in a tree, near the root more often than not: its path, what holds it and under which key."""
    path, holder, key = "", root, next(iter(root), "")
    root.setdefault(key, None)
    while isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.85:
        holder = holder[key]
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        path += f"[{key!r:.40}]"
    return path, holder, key


# Reading, in a process of its own


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


# The session


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
        sys.exit(main())
    except FuzzError as error:
        sys.exit(f"fuzz: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
