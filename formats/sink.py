"""What every output format does: write a source's tensors, settings and tokenizer into one new folder."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from formats.source import FLOAT_DTYPES, FormatError, Source
from formats.vocabulary import Vocabulary


def whole_number(text: str) -> int:
    """A command line's whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) < 1:
        raise ValueError(f"{text!r} is no whole number of at least 1")
    return int(text)


def byte_size(text: str) -> int:
    """A command line's size of a file: 500MB, 5GB or plain bytes."""
    given = re.fullmatch(r"(\d{1,12})(KB|MB|GB|TB|)", text.upper(), re.ASCII)
    size = int(given[1]) * 1000 ** ("", "KB", "MB", "GB", "TB").index(given[2]) if given else 0
    if not 0 < size < 1 << 62:
        raise ValueError(f"{text!r} is no size; write it as 500MB or 5GB")
    return size


@dataclass(frozen=True)
class Option:
    """A setting that belongs to one output format: `--name` on the command line, a keyword of its sink.

    `parse` makes the value from the command line's text, or raises a ValueError that says what is allowed.
    """

    name: str
    help: str
    parse: Callable[[str], Any] = whole_number
    metavar: str | None = "N"
    choices: tuple[Any, ...] | None = None


class Sink(ABC):
    """One output format, made for one source; making it checks the settings and writes nothing.

    A subclass with options takes them as keywords, None where not given, and puts what it settles on into
    `settings`: equal settings of an equal source must give equal files, since that is how a finished conversion
    is recognized. A setting that does not fit the model is a `FormatError` that says what would fit.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    options: ClassVar[tuple[Option, ...]] = ()

    def __init__(self, source: Source, dtype: torch.dtype | None = None) -> None:
        if dtype is not None and dtype not in FLOAT_DTYPES:
            allowed = ", ".join(map(dtype_name, FLOAT_DTYPES))
            raise FormatError(f"dtype is {dtype_name(dtype)}; allowed for {self.title}: {allowed}")
        self.source, self.args = source, source.args
        self.dtype = dtype or source.dtype
        self.settings: dict[str, Any] = {}

    @abstractmethod
    def write(self, folder: Path, advance: Callable[[int], object]) -> dict[str, dict[str, Any]]:
        """Write everything into an empty folder, holding about one tensor in memory.

        `advance` is told the bytes of tensors as they are written. Returns `{"size": ..., "sha256": ...}` of those
        files that were hashed on the way (see `formats.output.HashedFile`), by their path in the folder; the
        converter hashes the others. A failed write is left as it is: the caller removes the folder.
        """

    def tensor_bytes(self) -> int:
        """What `advance` will be told in sum."""
        return self.args.parameter_count() * self.dtype.itemsize

    @abstractmethod
    def size_bound(self) -> int:
        """The bytes that the folder will need on disk, and a little more; what cannot be written is an error here."""

    @property
    def stored_as(self) -> str:
        """How the numbers are stored, for people: a dtype's name, or what the format calls it."""
        return dtype_name(self.dtype)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The source's tokenizer; every output has one."""
        vocabulary = self.source.vocabulary()
        if vocabulary is None:
            raise FormatError(
                "no tokenizer.model or tokenizer.json beside the checkpoint; name one with --tokenizer_path"
            )
        return vocabulary

    def tokenizer_model(self) -> bytes:
        """The tokenizer as a `tokenizer.model`, SentencePiece's or tiktoken's."""
        made = self.vocabulary
        return made.sentencepiece() if made.kind == "sentencepiece" else made.tiktoken()

    def context_length(self) -> int:
        """How many positions the model was made for: as the source says, else as the Llamas of its kind."""
        if self.source.context_length is not None:
            return self.source.context_length
        if self.args.rope_scaling is not None:
            return 131072
        return 8192 if self.args.rope_theta >= 500000.0 else 4096


def cast(name: str, tensor: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The tensor in another dtype, in the memory of `out` if given; what float16 cannot hold is an error."""
    made = tensor.to(dtype) if out is None else out.copy_(tensor)
    if dtype == torch.float16 and tensor.dtype != dtype and not made.isfinite().all() and tensor.isfinite().all():
        raise FormatError(f"{name} has numbers that float16 cannot hold; choose bfloat16 or float32")
    return made


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as people write it: bfloat16."""
    return str(dtype).removeprefix("torch.")
