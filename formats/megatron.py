"""Megatron-LM's checkpoints: a tracker file, and an iteration in Megatron's `torch` or `torch_dist` format."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from formats.megatron_dist import COMMON, CONFIG, METADATA, DistributedFiles
from formats.megatron_layout import (
    EMBEDDING,
    OUTPUT,
    SPLIT_DIMENSIONS,
    TRACKER,
    Arguments,
    field_shape,
    place_of,
    split_qkv,
)
from formats.megatron_ranks import RankFiles
from formats.source import FormatError, Source, count_dtypes, find_tokenizer, shape_text
from llama2 import ModelArgs


class MegatronSource(Source):
    """The latest iteration of a Megatron run, its tensor and pipeline parallel ranks put together."""

    name: ClassVar[str] = "megatron"
    title: ClassVar[str] = "Megatron"
    needs: ClassVar[str] = f"{TRACKER} and what it names"

    def __init__(self, folder: Path, tokenizer_path: Path | None = None) -> None:
        iteration = _iteration(folder)
        distributed = (iteration / CONFIG).exists() or not _has_ranks(iteration)
        self._files = DistributedFiles(iteration) if distributed else RankFiles(iteration)
        self.files = [*([] if iteration == folder else [folder / TRACKER]), *self._files.files]
        self.shards = self._files.shards
        self.tokenizer_path = find_tokenizer(folder, tokenizer_path)
        first = self._files.arguments[0]
        self.args = self._model_args(first)
        self.context_length = first.number("max_position_embeddings")
        self._interleaved = first.flag("rotary_interleaved")
        numbers = count_dtypes(self._check_tensors(), self.args)
        self.dtype, self.mixed_dtypes = numbers.most_common(1)[0][0], len(numbers) > 1

    @classmethod
    def recognizes(cls, folder: Path) -> bool:
        return (folder / TRACKER).exists() or _is_iteration(folder)

    def read(self, name: str) -> Tensor:
        place = place_of(name)
        parts = [part for _, part in self._files.parts(place.key)]
        if place.field == "qkv":
            return split_qkv([part[:] for part in parts], place.part, self.args, self._interleaved)
        if place.field == "fc1":  # each rank's gates, then its ups
            half = parts[0].shape[0] // 2
            parts = [part[:half] if place.part == "gate" else part[half:] for part in parts]
        else:
            parts = [part[:] for part in parts]
        dimension = SPLIT_DIMENSIONS[place.field]
        if dimension is None:
            self._check_same(place.key, parts)
            return parts[0]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts, dimension)
        if place.field == EMBEDDING:
            self._check_tied(parts)
        return tensor[: self.args.vocab_size] if place.field in (EMBEDDING, OUTPUT) else tensor

    def verify(self, progress: bool = False) -> None:
        self._files.verify(progress)

    def close(self) -> None:
        self._files.close()

    def _model_args(self, first: Arguments) -> ModelArgs:
        """The architecture, which every rank must have been saved with."""
        if (EMBEDDING, None) not in self._files.keys():
            raise FormatError(f"{first.path}: the embedding is missing")
        parts = [part for _, part in self._files.parts((EMBEDDING, None))]
        rows = sum(part.shape[0] for part in parts)
        args = first.model_args(first.vocabulary(rows, self._count_tokens))
        for other in self._files.arguments[1:]:
            if other.model_args(args.vocab_size) != args:
                raise FormatError(f"{other.path}: args are of another model than {first.path.parent.name}'s")
        return args

    def _count_tokens(self) -> int | None:
        vocabulary = self.vocabulary()
        return None if vocabulary is None else len(vocabulary.tokens)

    def _check_tensors(self) -> dict[str, torch.dtype]:
        """Compare names, shapes and dtypes with the model of the arguments, and return the dtypes."""
        path, keys = self._files.arguments[0].path, self._files.keys()
        if self._files.layers != self.args.n_layers:
            raise FormatError(f"{path}: args.num_layers is {self.args.n_layers}, but {self._files.layers} are stored")
        dtypes, checked = {}, set()
        for name in self.names:
            place = place_of(name)
            if place.key not in keys:
                raise FormatError(f"{path}: {_field_text(place.key)} is missing")
            if place.key not in checked:
                self._check_parts(place.key)
                checked.add(place.key)
            dtypes[name] = self._files.parts(place.key)[0][1].dtype
        if self.args.tie_embeddings and (OUTPUT, None) in keys:  # the last stage's copy of the embedding
            self._check_parts((OUTPUT, None))
        return dtypes

    def _check_parts(self, key: tuple[str, int | None]) -> None:
        """Every rank must hold its share of the field, in one dtype."""
        parts, field = self._files.parts(key), key[0]
        shape, dimension = list(field_shape(self.args, field)), SPLIT_DIMENSIONS[field]
        if field in (EMBEDDING, OUTPUT):  # padded, so that each rank has as many rows
            shape[0] = max(shape[0], sum(part.shape[0] for _, part in self._files.parts((EMBEDDING, None))))
        if dimension is not None:
            if shape[dimension] % len(parts):
                path = parts[0][0]
                raise FormatError(f"{path}: {_field_text(key)} of {shape_text(tuple(shape))} has {len(parts)} shards")
            shape[dimension] //= len(parts)
        for path, part in parts:
            if tuple(part.shape) != tuple(shape):
                raise FormatError(
                    f"{path}: {_field_text(key)} is {shape_text(tuple(part.shape))}, but the arguments mean "
                    f"{shape_text(tuple(shape))} (shard of {len(parts)})"
                )
            if part.dtype != parts[0][1].dtype:
                raise FormatError(f"{path}: {_field_text(key)} is {part.dtype}, but {parts[0][1].dtype} elsewhere")

    def _check_same(self, key: tuple[str, int | None], parts: list[Tensor]) -> None:
        for (path, _), part in zip(self._files.parts(key), parts, strict=True):
            if not torch.equal(part, parts[0]):
                first = self._files.parts(key)[0][0].parent.name
                raise FormatError(f"{path}: {_field_text(key)} differs from {first}'s; every rank must hold the same")

    def _check_tied(self, embedding: list[Tensor]) -> None:
        """The last pipeline stage's copy of a tied embedding must be one."""
        if self.args.tie_embeddings and (OUTPUT, None) in self._files.keys():
            for (path, part), tied in zip(self._files.parts((OUTPUT, None)), embedding, strict=True):
                if not torch.equal(part[:], tied):
                    raise FormatError(f"{path}: the output layer differs from the embedding that it is tied to")


def _field_text(key: tuple[str, int | None]) -> str:
    return key[0] if key[1] is None else f"{key[0]} of layer {key[1]}"


def _has_ranks(folder: Path) -> bool:
    return next(folder.glob("mp_rank_*"), None) is not None


def _is_iteration(folder: Path) -> bool:
    return _has_ranks(folder) or (folder / COMMON).exists()


def _iteration(folder: Path) -> Path:
    """The folder of the latest iteration, or the given one if it is an iteration itself."""
    tracker = folder / TRACKER
    iteration = folder
    if tracker.exists():
        try:
            with open(tracker, encoding="utf-8") as file:
                text = file.read(64).strip()
        except (OSError, ValueError) as error:
            raise FormatError(f"{tracker}: {getattr(error, 'strerror', None) or 'no text'}") from None
        if text != "release" and not re.fullmatch(r"[0-9]{1,12}", text):
            raise FormatError(f"{tracker}: says {text!r}; an iteration's number or 'release' is needed")
        iteration = folder / (text if text == "release" else f"iter_{int(text):07d}")
        if not iteration.is_dir():
            raise FormatError(f"{iteration}: missing, although {TRACKER} names it")
    if not _is_iteration(iteration):
        if (iteration / METADATA).exists():
            raise FormatError(
                f"{iteration}: is in format torch_dcp or fsdp_dtensor, which is not read: "
                "let Megatron load it and save it with --ckpt-format torch_dist"
            )
        raise FormatError(f"{iteration}: neither mp_rank_00 nor {COMMON} is there")
    return iteration
