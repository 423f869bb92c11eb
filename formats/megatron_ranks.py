"""Megatron's checkpoints of format `torch`: one pickled file per tensor and pipeline parallel rank."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats.megatron_layout import Arguments, field_of, is_no_weight
from formats.pickled import check_crcs, load_plain, plain_tensor
from formats.source import MOST_LAYERS, FormatError, byte_bar

RANK_FILE = "model_optim_rng.pt"
# Before version 2.0 the rows of Q, K and V were in another order.
LEAST_VERSION = 2.0

_MOST_NESTING = 8
# What else Megatron pickles beside the weights: enumerations in its arguments, states of random numbers and of 8-bit
# scales. None of it is needed, and none of it is loaded: an object that does nothing takes its place.
_UNNEEDED = re.compile(
    r"(megatron|transformer_engine|numpy)\..+"
    r"|_?io\.BytesIO|signal\.Signals|pathlib\.PosixPath|types\.SimpleNamespace|torch\._C\.Generator"
    r"|builtins\.getattr"  # how early releases of Python 3.11 pickle an enumeration's member
)


class Unneeded:
    """Stands where a pickle asks for a class or function that is not needed: it takes anything and does nothing."""

    def __new__(cls, *given: object) -> Unneeded:
        return super().__new__(cls)

    def __init__(self, *given: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def load_contents(path: Path) -> dict[str, Any]:
    """What a Megatron file holds: tensors backed by the file itself, plain Python values, and `Unneeded`."""

    def allowed() -> list[Any]:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        return [argparse.Namespace, *((Unneeded, name) for name in unsafe if _UNNEEDED.fullmatch(name))]

    return load_plain(
        path,
        "which no weights need; refused. If you trust the file, load it where it was written, keep 'args', "
        "'checkpoint_version' and 'model', and torch.save them anew",
        allowed,
    )


class RankFiles:
    """The ranks' files of one iteration: each field's parts, in the order of the tensor parallel ranks."""

    def __init__(self, folder: Path) -> None:
        self._grid = _grid(folder)
        self.files = [path for stage in self._grid for path in stage]
        self.shards = len(self.files)
        contents = [[load_contents(path) for path in stage] for stage in self._grid]
        self.arguments = [
            Arguments(path, content.get("args"))
            for paths, stage in zip(self._grid, contents, strict=True)
            for path, content in zip(paths, stage, strict=True)
        ]
        for path, content in zip(self.files, (each for stage in contents for each in stage), strict=True):
            _check_version(path, content.get("checkpoint_version", 0))
        self._check_sizes()
        self._parts: dict[tuple[str, int | None], list[tuple[Path, Tensor]]] = {}
        self.layers = 0
        for paths, chunks in self._chunks(contents):
            self._add_chunk(paths, chunks)

    def keys(self) -> set[tuple[str, int | None]]:
        """Every field that is there, and its layer."""
        return set(self._parts)

    def parts(self, key: tuple[str, int | None]) -> list[tuple[Path, Tensor]]:
        """A field's parts and their files."""
        return self._parts[key]

    def verify(self, progress: bool) -> None:
        """Check the CRC32 of every record."""
        with byte_bar(sum(path.stat().st_size for path in self.files), "verifying", progress) as bar:
            for path in self.files:
                check_crcs(path, bar.update)

    def close(self) -> None:
        """Let go of the files."""
        self._parts = {}

    def _check_sizes(self) -> None:
        """The arguments must speak of as many ranks as there are files."""
        for name, found in (
            ("tensor_model_parallel_size", len(self._grid[0])),
            ("pipeline_model_parallel_size", len(self._grid)),
        ):
            for arguments in self.arguments:
                stated = arguments.number(name)
                if stated is not None and stated != found:
                    raise FormatError(f"{arguments.path}: args.{name} is {stated}, but there are {found} such ranks")

    def _chunks(self, contents: list[list[dict[str, Any]]]) -> Iterator[tuple[list[Path], list[dict[str, Tensor]]]]:
        """The model's pieces from the first layers to the last, each as its tensor parallel ranks hold it."""
        first = contents[0][0]
        virtual = [f"model{number}" for number in range(MOST_LAYERS) if f"model{number}" in first]
        for key in virtual or ["model"]:
            for paths, stage in zip(self._grid, contents, strict=True):
                chunks = []
                for path, content in zip(paths, stage, strict=True):
                    if not isinstance(content.get(key), dict):
                        raise FormatError(f"{path}: {key!r} is missing or is no dict of parameters")
                    chunks.append(dict(_flat(path, content[key])))
                yield paths, chunks

    def _add_chunk(self, paths: list[Path], chunks: list[dict[str, Tensor]]) -> None:
        """File a piece's tensors; every rank must hold the same names, and layers counted from 0."""
        layers = set()
        for name in chunks[0]:
            for path, chunk in zip(paths[1:], chunks[1:], strict=True):
                if name not in chunk:
                    raise FormatError(f"{path}: {name} is missing, although {paths[0].parent.name} has it")
        for path, chunk in zip(paths, chunks, strict=True):
            for name in chunk:
                if name not in chunks[0]:
                    raise FormatError(f"{path}: {name} is not in {paths[0].parent.name}; every rank must have the same")
        for name in chunks[0]:
            place = field_of(name)
            if place is None:
                raise FormatError(f"{paths[0]}: parameter {name!r} does not belong to a Llama")
            field, layer = place
            if layer is not None:
                layers.add(layer)
                layer += self.layers
            if (field, layer) in self._parts:
                raise FormatError(f"{paths[0]}: {name} is there twice")
            self._parts[field, layer] = [(path, chunk[name]) for path, chunk in zip(paths, chunks, strict=True)]
        for number in range(len(layers)):
            if number not in layers:
                raise FormatError(f"{paths[0]}: layer {number} of this stage is missing")
        self.layers += len(layers)


def _grid(folder: Path) -> list[list[Path]]:
    """The ranks' files, by pipeline stage and then by tensor parallel rank; none may be missing."""
    found: dict[tuple[int, int], Path] = {}
    piped = None
    for path in sorted(folder.glob("mp_rank_*")):
        ranks = re.fullmatch(r"mp_rank_(\d{2,5})(?:_(\d{3,5}))?", path.name)
        if not ranks:
            raise FormatError(
                f"{path}: is no rank's folder; they are mp_rank_TT or mp_rank_TT_PPP "
                "(experts are not supported, nor is an optimizer of its own folder)"
            )
        if piped is not None and piped != (ranks[2] is not None):
            raise FormatError(f"{path}: some ranks' folders name a pipeline stage and some do not")
        piped = ranks[2] is not None
        found[int(ranks[2] or 0), int(ranks[1])] = path / RANK_FILE
    stages, size = 1 + max(stage for stage, _ in found), 1 + max(rank for _, rank in found)
    if stages * size > len(found):
        stage, rank = next((s, r) for s in range(stages) for r in range(size) if (s, r) not in found)
        name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if piped else "")
        raise FormatError(f"{folder / name}: missing, although there are {len(found)} ranks of {size}x{stages}")
    return [[found[stage, rank] for rank in range(size)] for stage in range(stages)]


def _check_version(path: Path, version: object) -> None:
    if isinstance(version, bool) or not isinstance(version, int | float) or not version >= LEAST_VERSION:
        raise FormatError(f"{path}: checkpoint_version is {version!r:.40}; {LEAST_VERSION} or later is needed")


def _flat(path: Path, model: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters by their dotted names, however they are nested."""
    if depth > _MOST_NESTING:
        raise FormatError(f"{path}: the model's dictionaries are nested too deep")
    for name, value in model.items():
        if not isinstance(name, str):
            raise FormatError(f"{path}: the key {name!r:.40} is no parameter name")
        if is_no_weight(name):
            continue
        if isinstance(value, dict):
            yield from _flat(path, value, f"{prefix}{name}.", depth + 1)
        else:
            yield prefix + name, plain_tensor(path, prefix + name, value)
