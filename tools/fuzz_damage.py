"""What tools.fuzz does to a sample: bytes, JSON and records changed, always in the same way for the same seed."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import struct
import warnings
import zipfile
from typing import Any, NamedTuple

from engine.checkpoint import MANIFEST
from tools.fuzz_samples import Sample, with_entry

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


class Damage(NamedTuple):
    """What a mutation makes of a sample: new contents (None: the file is gone), and the mutation in words."""

    files: dict[str, bytes | None]
    words: str


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
        files[MANIFEST] = with_entry(sample.files[MANIFEST], name, content)
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
