"""GGUF, the single file of llama.cpp: any of its quantized kinds in, the simple ones out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from gguf.constants import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGMLQuantizationType, LlamaFileType
from gguf.utility import size_label
from torch import Tensor

from formats.gguf_blocks import PLAIN, READABLE, WRITABLE, read_stored, stored_blocks
from formats.gguf_header import (
    ALIGNMENT,
    ALIGNMENT_KEY,
    Header,
    StoredTensor,
    header_bytes,
    padded,
    read_header,
    stored_size,
)
from formats.gguf_model import (
    ARCHITECTURE,
    EMBEDDING,
    OUTPUT,
    ROPE_FACTORS,
    args_from_fields,
    context_length,
    fields_from_args,
    gguf_name,
    rope_factors,
    rope_scaling,
)
from formats.output import HashedFile
from formats.sink import Option, Sink, dtype_name
from formats.source import FormatError, Source, count_dtypes, find_tokenizer, shape_text
from formats.vocabulary import Vocabulary
from llama2 import RopeScaling

SUFFIX = ".gguf"
MODEL = "model.gguf"
_TOKENS = "tokenizer.ggml.tokens"
# What a quantized tensor is stored as where nobody chooses: its numbers are a float16 times a few bits.
QUANTIZED_DTYPE = torch.float16
_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")
_PLAIN_TYPES = {dtype: kind.name.lower() for kind, dtype in PLAIN.items()}
_FILE_TYPES = {
    kind: LlamaFileType.ALL_F32 if kind == "f32" else LlamaFileType[f"MOSTLY_{kind.upper()}"] for kind in WRITABLE
}


class GGUFSource(Source):
    """A Llama of llama.cpp, dequantized tensor by tensor; its Q and K are in Meta's order already."""

    name: ClassVar[str] = "gguf"
    title: ClassVar[str] = "GGUF"
    needs: ClassVar[str] = "one .gguf file, or all parts of one"

    def __init__(self, path: Path, tokenizer_path: Path | None = None) -> None:
        self.files = _model_files(path)
        self._path = self.files[0]
        header = _read_headers(self.files)
        self._fields, self._tensors = header.fields, header.tensors
        # A missing embedding is told with all other tensors.
        rows = self._tensors[EMBEDDING].shape[0] if EMBEDDING in self._tensors else 1
        self.args = args_from_fields(self._path, self._fields, rows, tied=OUTPUT not in self._tensors)
        self._check_tensors()
        self.context_length = context_length(self._path, self._fields)
        stored = {name: PLAIN.get(self._stored(name).type, QUANTIZED_DTYPE) for name in self.names}
        self.dtype = count_dtypes(stored, self.args).most_common(1)[0][0]
        # Vectors are float32 in every GGUF file.
        shapes = self.args.tensor_shapes()
        self.mixed_dtypes = len({dtype for name, dtype in stored.items() if len(shapes[name]) > 1}) > 1
        embedded = tokenizer_path is None and _TOKENS in self._fields
        self.tokenizer_path = None if embedded else find_tokenizer(self._path.parent, tokenizer_path)
        self._open = {file: open(file, "rb", buffering=0) for file in self.files}
        try:
            self.args = dataclasses.replace(self.args, rope_scaling=self._rope_scaling())
        except BaseException:
            self.close()
            raise

    @classmethod
    def recognizes(cls, folder: Path) -> bool:
        if not folder.is_dir():
            return folder.suffix.lower() == SUFFIX
        return next(folder.glob(f"*{SUFFIX}"), None) is not None

    def read(self, name: str) -> Tensor:
        return self._read(gguf_name(name))

    def vocabulary(self) -> Vocabulary | None:
        if self.tokenizer_path is not None:
            return super().vocabulary()
        if _TOKENS not in self._fields:
            return None
        fields = {key: value for key, value in self._fields.items() if key.startswith("tokenizer.")}
        return Vocabulary.from_gguf(fields, str(self._path))

    def close(self) -> None:
        for file in self._open.values():
            file.close()

    def _stored(self, name: str) -> StoredTensor:
        return self._tensors[gguf_name(name)]

    def _read(self, theirs: str) -> Tensor:
        stored = self._tensors[theirs]
        return read_stored(self._open[stored.path], stored, theirs)

    def _rope_scaling(self) -> RopeScaling | None:
        if ROPE_FACTORS not in self._tensors:
            return None
        return rope_scaling(self._path, self._read(ROPE_FACTORS).float(), self.args)

    def _check_tensors(self) -> None:
        """Compare names, shapes and types with the model of the metadata."""
        shapes = {gguf_name(name): shape for name, shape in self.args.tensor_shapes().items()}
        if ROPE_FACTORS in self._tensors:
            shapes[ROPE_FACTORS] = (self.args.head_dim // 2,)
        for name, shape in shapes.items():
            if name not in self._tensors:
                raise FormatError(f"{self._path}: tensor {name} is missing")
            if self._tensors[name].shape != shape:
                found = shape_text(self._tensors[name].shape)
                raise FormatError(f"{self._path}: {name} is {found}, but the metadata mean {shape_text(shape)}")
        for name, stored in self._tensors.items():
            if name not in shapes:
                why = " (biases are not supported)" if name.endswith(".bias") else ""
                raise FormatError(f"{stored.path}: tensor {name!r} does not belong to the model of the metadata{why}")
            if stored.type not in READABLE:
                allowed = ", ".join(kind.name for kind in READABLE)
                raise FormatError(f"{stored.path}: {name} is {stored.type.name}; {allowed} can be converted")


def _model_files(path: Path) -> list[Path]:
    """The file and all its other parts, in order; in a folder, those of the one model that is there."""
    found = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
    # Parts are told by their first.
    models = sorted({_parts(file)[0] for file in found})
    if not models:
        raise FormatError(f"{path}: no {SUFFIX} file is there")
    if len(models) > 1:
        names = ", ".join(model.name for model in models[:5])
        raise FormatError(f"{path}: {len(models)} models are there; name one of them: {names}")
    files = _parts(models[0])
    for file in files:
        if not file.exists():
            raise FormatError(f"{file}: missing, although it is one of {len(files)} parts")
    return files


def _parts(file: Path) -> list[Path]:
    """All parts of the model that the file is one of, by its name."""
    name = _PART.fullmatch(file.name)
    if not name or not 1 <= int(name[2]) <= int(name[3]):
        return [file]
    return [file.with_name(f"{name[1]}-{number:05d}-of-{name[3]}{SUFFIX}") for number in range(1, int(name[3]) + 1)]


def _read_headers(files: list[Path]) -> Header:
    """The first file's metadata and the tensors of all; each must say which part it is."""
    headers = [read_header(file) for file in files]
    tensors: dict[str, StoredTensor] = {}
    for number, (file, header) in enumerate(zip(files, headers, strict=True)):
        said = header.fields.get("split.no", 0), header.fields.get("split.count", 0) or 1
        if said != (number, len(files)):
            says = " of ".join(f"{each!r:.80}" for each in said)
            raise FormatError(f"{file}: should be part {number} of {len(files)} (counted from 0), but says {says}")
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise FormatError(f"{file}: {name!r} is in {tensors[name].path.name} too")
            tensors[name] = tensor
    return Header(headers[0].fields, tensors)


def stored_type(text: str) -> str:
    """The kind of numbers that a new file shall have, by its name in either case."""
    kind = text.lower()
    if kind not in WRITABLE:
        known = any(f"{name}_".startswith(f"MOSTLY_{text.upper()}_") for name in LlamaFileType.__members__)
        hint = f"; llama.cpp's llama-quantize makes {kind} from f16, bf16 or f32" if known else ""
        raise ValueError(f"type is {text!r}; {', '.join(WRITABLE)} can be written{hint}")
    return kind


class GGUFSink(Sink):
    """A file like those of llama.cpp's own converter: matrices of the chosen type, vectors in float32."""

    name: ClassVar[str] = "gguf"
    title: ClassVar[str] = "GGUF"
    options: ClassVar[tuple[Option, ...]] = (
        Option("type", f"what to store matrices as: {', '.join(WRITABLE)} (default: IN's dtype)", stored_type, "TYPE"),
    )

    def __init__(self, source: Source, dtype: torch.dtype | None = None, type: str | None = None) -> None:
        super().__init__(source, dtype)
        if type is not None and dtype is not None:
            raise FormatError(f"type {type} and dtype {dtype_name(dtype)} are given; one of them decides")
        try:
            self._type = stored_type(_PLAIN_TYPES[self.dtype] if type is None else type)
        except ValueError as error:
            raise FormatError(str(error)) from None
        self.settings = {"type": self._type}
        self._canonical = {gguf_name(name): name for name in source.names}
        shapes = {theirs: self.args.tensor_shapes()[name] for theirs, name in self._canonical.items()}
        if self.args.rope_scaling is not None:
            shapes = {ROPE_FACTORS: (self.args.head_dim // 2,)} | shapes
        self._tensors = {name: (self._kind(shape), shape) for name, shape in shapes.items()}

    @property
    def stored_as(self) -> str:
        kinds = [kind for kind, shape in self._tensors.values() if len(shape) > 1]
        others = len(kinds) - kinds.count(WRITABLE[self._type])
        if not others:
            return self._type
        return f"{self._type} ({others} of {len(kinds)} matrices in f16, since their rows are no whole blocks)"

    def tensor_bytes(self) -> int:
        return sum(stored_size(*tensor) for tensor in self._tensors.values())

    def size_bound(self) -> int:
        return len(self._header) + sum(padded(stored_size(*tensor)) for tensor in self._tensors.values())

    def write(self, folder: Path, advance: Callable[[int], object]) -> dict[str, dict[str, Any]]:
        with HashedFile(folder / MODEL) as file:
            file.write(self._header)
            for name in self._tensors:
                self._write_tensor(file, name, advance)
        return {MODEL: file.entry()}

    def _write_tensor(self, file: HashedFile, name: str, advance: Callable[[int], object]) -> None:
        kind, shape = self._tensors[name]
        tensor = rope_factors(self.args) if name == ROPE_FACTORS else self.source.read(self._canonical[name])
        if tensor.shape != shape:
            raise FormatError(f"{name} is {shape_text(tensor.shape)}, not {shape_text(shape)}")
        for block in stored_blocks(tensor, kind, name):
            file.write(block)
            advance(block.nbytes)
        file.write(bytes(padded(file.size) - file.size))

    def _kind(self, shape: tuple[int, ...]) -> GGMLQuantizationType:
        """As llama.cpp's converter does it: vectors exact, and half precision where blocks do not fit a row."""
        if len(shape) == 1:
            return GGMLQuantizationType.F32
        kind = WRITABLE[self._type]
        return GGMLQuantizationType.F16 if shape[-1] % GGML_QUANT_SIZES[kind][0] else kind

    @cached_property
    def _header(self) -> bytes:
        size = size_label(self.args.parameter_count(), 0, 0, 0)
        fields = {
            "general.architecture": ARCHITECTURE,
            "general.type": "model",
            "general.name": f"Llama {size}",
            "general.size_label": size,
            "general.file_type": int(_FILE_TYPES[self._type]),
            "general.quantization_version": GGML_QUANT_VERSION,
            ALIGNMENT_KEY: ALIGNMENT,
        }
        fields |= fields_from_args(self.args, self.context_length())
        return header_bytes(fields | self.vocabulary.gguf_fields(self.args.vocab_size), self._tensors)
