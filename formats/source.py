"""What every checkpoint format gives the converter: tensors by their canonical (Meta) names, one at a time."""

from __future__ import annotations

import json
import math
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor
from tqdm import tqdm

from engine.checkpoint import TOKENIZERS
from llama2 import ModelArgs

if TYPE_CHECKING:
    from formats.vocabulary import Vocabulary

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# A config that asks for billions of layers must not fill the memory with their names.
MOST_LAYERS = 10_000

# What belongs to a tokenizer's file, where it is there: all that `read_vocabulary` looks at.
TOKENIZER_SETTINGS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)

_LARGEST_JSON = 64 << 20


class FormatError(ValueError):
    """A checkpoint file that cannot be used; the message names the file and the reason."""


class Source(ABC):
    """One checkpoint on disk: opened and checked when made, its tensors read one by one.

    `names` are those of `args.tensor_shapes()`; `read` gives them with Q and K rotating neighbouring pairs.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    needs: ClassVar[str]

    args: ModelArgs
    dtype: torch.dtype
    """The dtype that the checkpoint is stored in: of most of its numbers, if they differ."""
    mixed_dtypes: bool = False
    files: list[Path]
    """Every file that the conversion depends on, but for the tokenizer."""
    tokenizer_path: Path | None
    """The tokenizer's own file, `tokenizer.model` or `tokenizer.json`; None where there is none."""
    shards: int | None = None
    """How many model-parallel shards the format was written for, where it has such."""
    context_length: int | None = None
    """How many positions the model was made for, where the format says it; `args.max_seq_len` is what to serve."""

    @classmethod
    @abstractmethod
    def recognizes(cls, folder: Path) -> bool:
        """Whether the folder looks like this format, by its files' names alone."""

    @property
    def names(self) -> list[str]:
        """The canonical names, in the order in which they are best read."""
        return list(self.args.tensor_shapes())

    @property
    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's own file, and what belongs to it beside."""
        if self.tokenizer_path is None:
            return []
        beside = (self.tokenizer_path.with_name(name) for name in TOKENIZER_SETTINGS)
        return [self.tokenizer_path, *(p for p in beside if p.is_file() and p != self.tokenizer_path)]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One whole tensor by its canonical name; it may be backed by the file itself, so do not write to it."""

    def vocabulary(self) -> Vocabulary | None:
        """The tokenizer apart from any file format; None where there is none."""
        # Reading a vocabulary needs this module's errors.
        from formats.vocabulary import read_vocabulary

        return read_vocabulary(self.tokenizer_path) if self.tokenizer_path is not None else None

    def verify(self, progress: bool = False) -> None:  # noqa: B027 - most formats carry no checksums
        """Check the checksums that the format carries, if it does."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def find_tokenizer(folder: Path, given: Path | None) -> Path | None:
    """The tokenizer's file: the given one, or the one beside the weights, or one folder above (as Meta has it)."""
    if given is not None:
        found = [given / name for name in TOKENIZERS if (given / name).is_file()] if given.is_dir() else [given]
        if not found or not found[0].is_file():
            raise FormatError(f"{given}: no such tokenizer file")
        return found[0]
    places = (folder / "tokenizer.model", folder / "tokenizer.json", folder / "original" / "tokenizer.model")
    return next((path for path in (*places, folder.parent / "tokenizer.model") if path.is_file()), None)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a `FormatError` that says what is wrong with it."""
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise FormatError(f"{path}: {path.stat().st_size} bytes are too many for this file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path}: no valid JSON: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: a JSON object is needed, not {type(value).__name__}")
    return value


def model_args(path: Path, **settings: Any) -> ModelArgs:
    """`ModelArgs`, whose complaint names the file that the settings came from."""
    layers = settings.get("n_layers")
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise FormatError(f"{path}: {layers} layers are too many; no Llama has more than {MOST_LAYERS}")
    try:
        return ModelArgs(**settings)
    except (ValueError, TypeError, OverflowError) as error:
        raise FormatError(f"{path}: {first_line(error)}") from None


def count_dtypes(stored: Mapping[str, torch.dtype], args: ModelArgs) -> Counter[torch.dtype]:
    """How many of the checkpoint's numbers have which dtype."""
    numbers: Counter[torch.dtype] = Counter()
    for name, shape in args.tensor_shapes().items():
        numbers[stored[name]] += math.prod(shape)
    return numbers


def byte_bar(total: int, description: str, progress: bool) -> tqdm:
    """A progress bar over bytes on stderr: none for short work, and few lines where stderr is a log."""
    return tqdm(
        total=total,
        desc=description,
        unit="B",
        unit_scale=True,
        delay=1,
        mininterval=0.2 if sys.stderr.isatty() else 10,
        disable=not progress,
    )


def first_line(error: BaseException) -> str:
    """An error in one line, for a message that has room for one."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shape_text(shape: tuple[int, ...] | torch.Size) -> str:
    """A shape as people write it: 32000x4096."""
    return "x".join(map(str, shape)) or "a single number"
