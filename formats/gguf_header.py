"""GGUF's layout: a reader of headers that believes nothing in them, and a writer."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from formats.source import FormatError, shape_text

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"

# Llama 3's vocabulary makes a header of 8 MB, with half a million strings and numbers in its arrays.
_LARGEST_HEADER = 64 << 20
_MOST_ITEMS = 2 << 20
_MOST_FIELDS = 4096
_MOST_TENSORS = 1 << 16
_MOST_DIMENSIONS = 4
_LONGEST_NAME = 255
_LARGEST_ALIGNMENT = 1 << 16

_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "<u1",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its file, and as what; the shape has rows first, unlike the file's."""

    path: Path
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Its bytes in the file."""
        return stored_size(self.type, self.shape)


@dataclass(frozen=True)
class Header:
    """What a file says of itself: plain Python values by key, and its tensors."""

    fields: dict[str, Any]
    tensors: dict[str, StoredTensor]


def stored_size(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    """The bytes of a tensor, whose rows must be whole blocks."""
    numbers, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // numbers * size


def padded(size: int, alignment: int = ALIGNMENT) -> int:
    """The size up to where the next tensor may begin."""
    return -(-size // alignment) * alignment


def read_header(path: Path) -> Header:
    """The header of the file, every count, length, type and offset in it checked before it is used."""
    try:
        if not path.is_file():
            raise FormatError(f"{path}: is no regular file" if path.exists() else f"{path}: missing")
        with open(path, "rb") as file:
            return _Reader(path, file, path.stat().st_size).header()
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from None


class _Reader:
    """Goes through a header once, from front to back."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size = path, file, size
        self._position = self._items = 0

    def header(self) -> Header:
        if self._size < 4 or self._take(4, "the magic number") != MAGIC:
            raise self._error("is no GGUF file: it does not begin with 'GGUF'")
        version = self._number(4, "the version")
        if version not in VERSIONS:
            if version & 0xFFFF == 0:
                raise self._error("is a big-endian GGUF file; only little-endian ones are read")
            raise self._error(f"is GGUF version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} are read")
        tensors = self._count("the number of tensors", _MOST_TENSORS)
        fields = self._fields(self._count("the number of fields", _MOST_FIELDS))
        return Header(fields, self._tensors(tensors, fields))

    def _fields(self, count: int) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for number in range(count):
            key = self._name(f"the key of field {number}")
            if key in fields:
                raise self._error(f"field {key!r} is there twice")
            fields[key] = self._value(key, self._value_type(key))
        return fields

    def _value_type(self, key: str) -> GGUFValueType:
        number = self._number(4, f"the type of {key!r}")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self._error(f"field {key!r} is of type {number}, which GGUF does not have") from None

    def _value(self, key: str, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self._string(repr(key))
        if kind != GGUFValueType.ARRAY:
            return self._numbers(key, kind, 1)[0]
        kind = self._value_type(key)
        if kind == GGUFValueType.ARRAY:
            raise self._error(f"field {key!r} is an array of arrays, which no Llama needs")
        count = self._count(f"the length of {key!r}", _MOST_ITEMS - self._items)
        self._items += count
        if kind == GGUFValueType.STRING:
            what = repr(key)
            return [self._string(what) for _ in range(count)]
        return self._numbers(key, kind, count)

    def _numbers(self, key: str, kind: GGUFValueType, count: int) -> list[Any]:
        dtype = np.dtype(_SCALARS[kind])
        values = np.frombuffer(self._take(count * dtype.itemsize, repr(key)), dtype).tolist()
        if kind != GGUFValueType.BOOL:
            return values
        if any(value > 1 for value in values):
            raise self._error(f"field {key!r} is neither true nor false")
        return list(map(bool, values))

    def _tensors(self, count: int, fields: Mapping[str, Any]) -> dict[str, StoredTensor]:
        alignment = fields.get(ALIGNMENT_KEY, ALIGNMENT)
        # A power of two has one bit.
        if type(alignment) is not int or not 1 <= alignment <= _LARGEST_ALIGNMENT or alignment.bit_count() != 1:
            raise self._error(
                f"{ALIGNMENT_KEY} is {alignment!r:.80}; a power of two up to {_LARGEST_ALIGNMENT} is needed"
            )
        found: dict[str, StoredTensor] = {}
        for number in range(count):
            name = self._name(f"the name of tensor {number}")
            if name in found:
                raise self._error(f"tensor {name!r} is there twice")
            found[name] = self._tensor(name, alignment)
        start = padded(self._position, alignment)
        placed = {
            name: StoredTensor(self._path, tensor.type, tensor.shape, start + tensor.offset)
            for name, tensor in found.items()
        }
        self._check_places(placed)
        return placed

    def _tensor(self, name: str, alignment: int) -> StoredTensor:
        dimensions = self._number(4, f"the dimensions of {name!r}")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self._error(f"tensor {name!r} has {dimensions} dimensions; 1 to {_MOST_DIMENSIONS} are allowed")
        shape = tuple(self._number(8, f"the shape of {name!r}") for _ in range(dimensions))[::-1]
        number = self._number(4, f"the type of {name!r}")
        offset = self._number(8, f"the offset of {name!r}")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise self._error(f"tensor {name!r} is of type {number}, which is not known") from None
        if 0 in shape:
            raise self._error(f"tensor {name!r} is empty ({shape_text(shape)})")
        block = GGML_QUANT_SIZES[kind][0]
        if shape[-1] % block:
            raise self._error(
                f"tensor {name!r} is {kind.name}, whose blocks have {block} numbers, but a row has {shape[-1]}"
            )
        if offset % alignment:
            raise self._error(f"tensor {name!r} lies at offset {offset}, which is no multiple of {alignment}")
        return StoredTensor(self._path, kind, shape, offset)

    def _check_places(self, tensors: Mapping[str, StoredTensor]) -> None:
        """Every tensor must lie inside the file, and none on another."""
        end, before = 0, ""
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
            if tensor.offset + tensor.size > self._size:
                raise self._error(
                    f"tensor {name!r} ({shape_text(tensor.shape)}, {tensor.type.name}) ends at byte "
                    f"{tensor.offset + tensor.size}, but the file has {self._size} (cut short?)"
                )
            if tensor.offset < end:
                raise self._error(f"tensors {before!r} and {name!r} overlap")
            end, before = tensor.offset + tensor.size, name

    def _name(self, what: str) -> str:
        return self._text(self._count(f"the length of {what}", _LONGEST_NAME), what)

    def _string(self, what: str) -> str:
        return self._text(self._number(8, what), what)

    def _text(self, size: int, what: str) -> str:
        data = self._take(size, what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self._error(f"{what} is no UTF-8") from None

    def _count(self, what: str, most: int) -> int:
        count = self._number(8, what)
        if count > most:
            raise self._error(f"{what} is {count}; at most {most} are allowed")
        return count

    def _number(self, size: int, what: str) -> int:
        return int.from_bytes(self._take(size, what), "little")

    def _take(self, count: int, what: str) -> bytes:
        if self._position + count > self._size:
            left = self._size - self._position
            raise self._error(f"ends within its header: {what} needs {count} bytes, {left} are left (cut short?)")
        if self._position + count > _LARGEST_HEADER:
            raise self._error(f"{what} makes a header of more than {_LARGEST_HEADER} bytes, which is refused")
        data = self._file.read(count)
        if len(data) < count:
            raise self._error("was cut short while it was read")
        self._position += count
        return data

    def _error(self, reason: str) -> FormatError:
        return FormatError(f"{self._path}: {reason}")


def header_bytes(
    fields: Mapping[str, Any], tensors: Mapping[str, tuple[GGMLQuantizationType, tuple[int, ...]]]
) -> bytes:
    """The header of a version 3 file whose tensors follow each other, up to where the first one begins.

    Whole numbers are stored with 32 bits, in arrays with a sign, and floats with 32, as llama.cpp expects them.
    """
    # An empty array has no type.
    kept = {key: value for key, value in fields.items() if not isinstance(value, list | tuple) or value}
    infos, offset = [], 0
    for name, (kind, shape) in tensors.items():
        infos.append(_packed_string(name) + struct.pack("<I", len(shape)))
        infos.append(struct.pack(f"<{len(shape)}QIQ", *reversed(shape), kind, offset))
        offset += padded(stored_size(kind, shape))
    header = b"".join(
        (
            MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(kept)),
            *(_packed_string(key) + _packed_value(value) for key, value in kept.items()),
            *infos,
        )
    )
    return header.ljust(padded(len(header)), b"\0")


def _packed_value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", GGUFValueType.BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", GGUFValueType.UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", GGUFValueType.FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", GGUFValueType.STRING) + _packed_string(value)
    head = struct.pack("<I", GGUFValueType.ARRAY)
    if isinstance(value[0], str):
        return head + struct.pack("<IQ", GGUFValueType.STRING, len(value)) + b"".join(map(_packed_string, value))
    kind = GGUFValueType.FLOAT32 if isinstance(value[0], float) else GGUFValueType.INT32
    return head + struct.pack("<IQ", kind, len(value)) + np.array(value, _SCALARS[kind]).tobytes()


def _packed_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
