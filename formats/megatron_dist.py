"""Megatron's format `torch_dist`: PyTorch's DCP, where a parameter of all layers is one tensor."""

from __future__ import annotations

import io
import math
import re
import stat
import sys
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from engine.checkpoint import DataUnpickler, tiles
from formats.megatron_layout import Arguments, field_of, is_no_weight
from formats.megatron_ranks import Unneeded, load_contents
from formats.source import FLOAT_DTYPES, MOST_LAYERS, FormatError, byte_bar, first_line, read_json, shape_text

COMMON, CONFIG, METADATA = "common.pt", "metadata.json", ".metadata"

_LARGEST_METADATA = 256 << 20
_MOST_BLOCKS = 4096  # of one layer's parameter
# What the model's own parameters begin with; all others are the optimizer's and other state.
_MODEL = ("embedding.", "decoder.", "output_layer.")


@dataclass(frozen=True)
class _Block:
    """A piece of one layer's parameter: its place in that, and where it lies, maybe with other layers'."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    stored: tuple[int, ...]
    layer: int | None
    path: Path
    start: int
    length: int


class StoredTensor:
    """One parameter of one layer, in its blocks; a slice of rows reads just the blocks that have some."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.blocks: list[_Block] = []

    def __getitem__(self, rows: slice) -> Tensor:
        first, last, _ = rows.indices(self.shape[0])
        made = torch.empty((last - first, *self.shape[1:]), dtype=self.dtype)
        for block in self.blocks:
            start, *columns = (slice(o, o + s) for o, s in zip(block.offsets, block.sizes, strict=True))
            low, high = max(first, start.start), min(last, start.stop)
            if low < high:
                part = self._load(block)[low - start.start : high - start.start]
                made[(slice(low - first, high - first), *columns)] = part
        return made

    def is_whole(self) -> bool:
        """Whether the blocks cover the shape exactly."""
        return tiles(self.blocks, self.shape)

    def _load(self, block: _Block) -> Tensor:
        stored = _read_block(block)
        if tuple(stored.shape) != block.stored or stored.dtype != self.dtype:
            raise FormatError(f"{block.path}: holds another tensor at byte {block.start} than {METADATA} says")
        return stored if block.layer is None else stored[block.layer]


class DistributedFiles:
    """The distributed checkpoint of one iteration; every parameter is whole, whatever ranks wrote it."""

    shards = None

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        backend = read_json(folder / CONFIG).get("sharded_backend")
        if backend != "torch_dist":
            raise FormatError(
                f"{folder / CONFIG}: sharded_backend is {backend!r}; only 'torch_dist' can be read: "
                "let Megatron load the checkpoint and save it with --ckpt-format torch_dist"
            )
        self.arguments = [Arguments(folder / COMMON, load_contents(folder / COMMON).get("args"))]
        self._tensors: dict[tuple[str, int | None], StoredTensor] = {}
        metadata = _read_metadata(folder / METADATA)
        try:
            for name, stored in metadata.state_dict_metadata.items():
                plain = name.removeprefix("module.")
                if plain.startswith(_MODEL) and not is_no_weight(plain.partition("/")[0]):
                    self._add(name, plain, stored, metadata.storage_data)
        except FormatError:
            raise
        except Exception as error:  # the right classes, filled with the wrong things
            raise FormatError(f"{folder / METADATA}: no valid metadata: {first_line(error)}") from None
        for (field, layer), tensor in self._tensors.items():
            if not tensor.is_whole():
                what = field if layer is None else f"{field} of layer {layer}"
                raise FormatError(
                    f"{folder / METADATA}: the blocks of {what} do not add up to {shape_text(tensor.shape)}"
                )
        data = sorted({path for path, _, _ in self._places()})
        self.files = [folder / METADATA, folder / CONFIG, folder / COMMON, *data]
        if sum(length for _, _, length in self._places()) > sum(path.stat().st_size for path in data):
            raise FormatError(f"{folder / METADATA}: the blocks claim more bytes than their files have")
        self.layers = len({layer for _, layer in self._tensors if layer is not None})

    def keys(self) -> set[tuple[str, int | None]]:
        """Every field that is there, and its layer."""
        return set(self._tensors)

    def parts(self, key: tuple[str, int | None]) -> list[tuple[Path, StoredTensor]]:
        """The field, in one part."""
        return [(self._folder / METADATA, self._tensors[key])]

    def verify(self, progress: bool) -> None:
        """Check the CRC32 of every record of every block."""
        places = self._places()
        with byte_bar(sum(length for _, _, length in places), "verifying", progress) as bar:
            for block in places.values():
                _read_block(block)
                bar.update(block.length)

    def close(self) -> None:
        """Let go of the files."""
        self._tensors = {}

    def _places(self) -> dict[tuple[Path, int, int], _Block]:
        """Every place in a file where a block lies; a block of several layers is counted once."""
        blocks = (block for tensor in self._tensors.values() for block in tensor.blocks)
        return {(block.path, block.start, block.length): block for block in blocks}

    def _add(self, name: str, plain: str, stored: Any, places: Any) -> None:
        """File a tensor's blocks by field and layer.

        All layers may be stacked in one tensor, a layer's number being its first index; and a gated layer's gates and
        ups may be two tensors.
        """
        path, half = self._folder / METADATA, None
        if plain.endswith((".mlp.linear_fc1.weight_w", ".mlp.linear_fc1.weight_v")):
            plain, half = plain[:-2], plain[-1]
        stacked = re.match(r"decoder\.layers\.(?!\d)", plain) is not None
        found = field_of(plain.replace("decoder.layers.", "decoder.layers.0.", 1) if stacked else plain)
        if found is None or type(stored) is not TensorStorageMetadata:
            raise FormatError(f"{path}: parameter {name!r} does not belong to a Llama")
        field, layer = found
        shape, dtype = tuple(stored.size), stored.properties.dtype
        if dtype not in FLOAT_DTYPES:
            raise FormatError(f"{path}: {name} is {dtype}; float32, bfloat16 or float16 is needed")
        inner = shape[1:] if stacked else shape
        if len(inner) not in (1, 2) or (stacked and not 1 <= shape[0] <= MOST_LAYERS):
            raise FormatError(f"{path}: {name} is {shape_text(shape)}")
        whole = (2 * inner[0], *inner[1:]) if half else inner
        for each in range(shape[0]) if stacked else [layer]:
            tensor = self._tensors.setdefault((field, each), StoredTensor(whole, dtype))
            if (tensor.shape, tensor.dtype) != (whole, dtype):
                raise FormatError(f"{path}: {name} is {shape_text(shape)} of {dtype}, unlike what belongs to it")
        for chunk in stored.chunks:
            offsets, sizes = self._checked_chunk(name, chunk, shape)
            place = self._checked_place(name, places[MetadataIndex(name, offsets)], math.prod(sizes) * dtype.itemsize)
            own = list(offsets[1:] if stacked else offsets)
            own[0] += inner[0] if half == "v" else 0
            for number in range(sizes[0]) if stacked else [None]:
                blocks = self._tensors[field, layer if number is None else offsets[0] + number].blocks
                if len(blocks) == _MOST_BLOCKS:
                    raise FormatError(f"{path}: {name} is in more than {_MOST_BLOCKS} blocks")
                blocks.append(_Block(tuple(own), sizes[1:] if stacked else sizes, sizes, number, *place))

    def _checked_chunk(self, name: str, chunk: Any, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A block's offsets and sizes, which lie inside the tensor."""
        offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        if not len(offsets) == len(sizes) == len(shape) or any(
            type(o) is not int or type(s) is not int or o < 0 or s < 1 or o + s > n
            for o, s, n in zip(offsets, sizes, shape, strict=True)
        ):
            raise FormatError(f"{self._folder / METADATA}: a block of {name} lies outside {shape_text(shape)}")
        return offsets, sizes

    def _checked_place(self, name: str, place: Any, least: int) -> tuple[Path, int, int]:
        """The file, start and length of a block, which lies inside a file of the folder and is large enough."""
        where = self._folder / METADATA
        if type(place.relative_path) is not str or not re.fullmatch(r"\w[\w.-]*", place.relative_path):
            raise FormatError(f"{where}: {name} is said to be in {place.relative_path!r:.80}, which is no file name")
        if getattr(place, "transform_descriptors", None):
            raise FormatError(f"{where}: {name} is stored transformed, which is not supported")
        path, start, length = self._folder / place.relative_path, place.offset, place.length
        try:
            found = path.stat()
        except OSError as error:
            raise FormatError(f"{path}: {error.strerror}") from None
        if not stat.S_ISREG(found.st_mode) or not 0 <= start <= start + length <= found.st_size:
            raise FormatError(f"{path}: {name} lies outside the file (cut short?)")
        if length < least:
            raise FormatError(f"{where}: {name} has a block of {least} bytes in {length}")
        return path, start, length


def _read_block(block: _Block) -> Tensor:
    """The one tensor of what `torch.save` wrote, its CRC32 checked.

    `torch.load` would trust the sizes that a pickle in memory claims, and read past the end of what is there.
    """
    try:
        with open(block.path, "rb") as file:
            file.seek(block.start)
            content = file.read(block.length)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
                raise FormatError("compressed records")
            tensor = _TensorUnpickler(io.BytesIO(archive.read(records["data.pkl"]))).load()
            if "byteorder" in records and archive.read(records["byteorder"]) != sys.byteorder.encode():
                raise FormatError("another machine's order of bytes")
            if type(tensor) is not _Tensor:
                raise FormatError("no tensor")
            return tensor.of(archive.read(records[f"data/{tensor.storage.key}"]))
    except OSError as error:
        raise FormatError(f"{block.path}: {error.strerror or first_line(error)}") from None
    except Exception as error:  # a broken record can fail in any way
        raise FormatError(f"{block.path}: the block at byte {block.start} is corrupt: {first_line(error)}") from None


class _Storage(NamedTuple):
    """The record that a pickled tensor's numbers are in."""

    kind: Any
    dtype: Any
    key: Any
    location: Any
    count: Any


class _Tensor:
    """A pickled tensor without its numbers; made by what the pickle says of it."""

    def __init__(self, storage: _Storage, offset: int, size: Any, stride: Any, *rest: Any) -> None:
        self.storage, self._offset, self._size, self._stride = storage, offset, tuple(size), tuple(stride)

    def of(self, data: bytes) -> Tensor:
        """The tensor over its record."""
        tensor = torch.frombuffer(bytearray(data), dtype=self.storage.dtype).view(self._size)
        if self._offset != 0 or tensor.stride() != self._stride:
            raise FormatError("a view of a tensor")
        return tensor


class _TensorUnpickler(DataUnpickler):
    """Reads the pickle of one plain tensor."""

    _MADE = {
        ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
        ("collections", "OrderedDict"): OrderedDict,
        ("torch", "FloatStorage"): torch.float32,
        ("torch", "BFloat16Storage"): torch.bfloat16,
        ("torch", "HalfStorage"): torch.float16,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._MADE:
            raise FormatError(f"the pickle asks for {module}.{name}, which no tensor needs; refused")
        return self._MADE[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        return _Storage(*pid)


class _Properties:
    """DCP's properties of a tensor, of which only the dtype matters."""

    dtype: torch.dtype | None = None

    def __setstate__(self, state: Any) -> None:
        self.dtype = state[0]


class _MetadataUnpickler(DataUnpickler):
    """Reads DCP's metadata, which is a pickle: few classes are made, the known others left out, the rest refused."""

    _DCP = "torch.distributed.checkpoint"
    _MADE = {
        (f"{_DCP}.metadata", "Metadata"),
        (f"{_DCP}.metadata", "TensorStorageMetadata"),
        (f"{_DCP}.metadata", "ChunkStorageMetadata"),
        (f"{_DCP}.metadata", "MetadataIndex"),
        (f"{_DCP}.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        *(("torch", str(dtype).removeprefix("torch.")) for dtype in FLOAT_DTYPES),
    }
    # Plans and properties that no reader needs, Megatron's notes, and how enumerations and paths are pickled.
    _UNNEEDED = re.compile(
        r"(torch\.distributed|megatron|nvidia_resiliency_ext)\..+"
        r"|torch\.\w+|torch\.serialization\._get_layout|pathlib\.\w+|builtins\.getattr"
    )

    def find_class(self, module: str, name: str) -> Any:
        if name == "TensorProperties" and module.startswith("torch.distributed."):
            return _Properties
        if (module, name) in self._MADE:
            return super().find_class(module, name)
        if self._UNNEEDED.fullmatch(f"{module}.{name}"):
            return Unneeded
        raise FormatError(f"the pickle asks for {module}.{name}, which no metadata needs; refused")


def _read_metadata(path: Path) -> Metadata:
    try:
        if path.stat().st_size > _LARGEST_METADATA:
            raise FormatError(f"{path}: {path.stat().st_size} bytes are too many for this file")
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from None
    except FormatError as error:
        raise error if str(error).startswith(str(path)) else FormatError(f"{path}: {error}") from None
    except Exception as error:  # a broken pickle can fail in any way
        raise FormatError(f"{path}: no valid DCP metadata: {first_line(error)}") from None
    if type(metadata) is not Metadata:
        raise FormatError(f"{path}: no DCP metadata but {type(metadata).__name__}")
    return metadata
