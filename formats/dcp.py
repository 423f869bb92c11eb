"""DCP, the format that the server loads: written by one process, without a process group, block by block."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import queue
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from engine.checkpoint import (
    DCP_METADATA,
    MANIFEST,
    MODEL_ARGS,
    CheckpointError,
    check_hashes,
    open_checkpoint,
    read_tensors,
)
from formats.output import HashedFile
from formats.sink import Option, Sink, cast
from formats.source import FormatError, Source, byte_bar, find_tokenizer, shape_text

# A tensor is stored in up to BLOCKS blocks along the dimension that tensor parallelism splits, so that a rank
# reads its share of the file and not the whole tensor; a block smaller than this is not worth its overhead.
BLOCKS = 8
SMALLEST_BLOCK = 1 << 20
SPLIT_ALONG_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")

# Several files let a reader hash them side by side.
LARGEST_FILE = 4 << 30
# Zip headers, padding and pickle of one block, with room to spare.
BLOCK_OVERHEAD = 4096
# Has the chat template.
TOKENIZER_CONFIG = "tokenizer_config.json"


class DCPSource(Source):
    """A converted folder."""

    name: ClassVar[str] = "dcp"
    title: ClassVar[str] = "DCP"
    needs: ClassVar[str] = f"{MANIFEST}, {MODEL_ARGS} and {DCP_METADATA}"

    def __init__(self, folder: Path, tokenizer_path: Path | None = None) -> None:
        try:
            self._checkpoint = open_checkpoint(folder, verify=False)
        except CheckpointError as error:
            raise FormatError(str(error)) from None
        self._files = self._checkpoint.manifest["files"]
        self.args, self.dtype = self._checkpoint.args, self._checkpoint.dtype
        self.files = [folder / MANIFEST, *(folder / name for name in self._files)]
        self.tokenizer_path = self._checkpoint.tokenizer_path
        if tokenizer_path is not None:
            self.tokenizer_path = find_tokenizer(folder, tokenizer_path)
        length = self._checkpoint.manifest.get("context_length")
        self.context_length = length if type(length) is int and length > 0 else None

    @classmethod
    def recognizes(cls, folder: Path) -> bool:
        return (folder / MODEL_ARGS).exists()

    def read(self, name: str) -> Tensor:
        tensor = torch.empty(self.args.tensor_shapes()[name], dtype=self.dtype)
        try:
            read_tensors(self._checkpoint, {name: tensor})
        except CheckpointError as error:
            raise FormatError(str(error)) from None
        return tensor

    def verify(self, progress: bool = False) -> None:
        """Compare every file with its hash in the manifest."""
        folder = self._checkpoint.folder
        with byte_bar(sum(entry["size"] for entry in self._files.values()), "verifying", progress) as bar:
            try:
                check_hashes(folder, self._files, bar.update)
            except CheckpointError as error:
                raise FormatError(str(error)) from None

    def close(self) -> None:
        pass


class DCPSink(Sink):
    """Tensors in blocks that any number of ranks can share, `model_args.json` and the tokenizer's own file."""

    name: ClassVar[str] = "dcp"
    title: ClassVar[str] = "DCP"
    options: ClassVar[tuple[Option, ...]] = (
        Option("max_seq_len", "longest sequence to serve (default: 2048, or as IN says up to 4096)"),
        Option("max_batch_size", "sequences to serve at once (default: 8)"),
    )

    def __init__(
        self,
        source: Source,
        dtype: torch.dtype | None = None,
        max_seq_len: int | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__(source, dtype)
        limits = {"max_seq_len": max_seq_len, "max_batch_size": max_batch_size}
        try:
            self.args = dataclasses.replace(self.args, **{name: n for name, n in limits.items() if n is not None})
        except ValueError as error:
            raise FormatError(str(error)) from None

    def size_bound(self) -> int:
        self.vocabulary.served()
        blocks = len(self.args.tensor_shapes()) * BLOCKS + 1
        return self.tensor_bytes() + blocks * BLOCK_OVERHEAD + sum(map(len, self._tokenizer_files().values()))

    def write(self, folder: Path, advance: Callable[[int], object]) -> dict[str, dict[str, Any]]:
        files = _HashingFileSystem()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist is what we want
            try:
                writer, planner = _Writer(folder, files), _Planner(self.source, self.dtype, advance)
                dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
            except CheckpointException as error:
                raise _cause(next(iter(error.failures.values()))[0]) from None
        model_args = (json.dumps(dataclasses.asdict(self.args), indent=2) + "\n").encode()
        for name, content in (self._tokenizer_files() | {MODEL_ARGS: model_args}).items():
            with HashedFile(folder / name) as file:
                file.write(content)
            files.written[name] = file.entry()
        return files.written

    def _tokenizer_files(self) -> dict[str, bytes]:
        """What the server needs, and whatever else the source says of its tokenizer, for other formats."""
        beside = {path.name: path.read_bytes() for path in self.source.tokenizer_files[1:]}
        if not beside and self.vocabulary.chat_template is not None:
            with contextlib.suppress(FormatError):  # not every tokenizer can be written so
                beside = {TOKENIZER_CONFIG: self.vocabulary.huggingface()[TOKENIZER_CONFIG]}
        return beside | self.vocabulary.served_files()


def _cause(error: BaseException | None) -> BaseException:
    """What really went wrong: DCP wraps every exception, even Ctrl-C, and torch.save hides a full disk."""
    link = error
    while link is not None:
        if isinstance(link, OSError | MemoryError | FormatError) or not isinstance(link, Exception):
            return link
        link = link.__context__
    return error


class _Planner(dcp.DefaultSavePlanner):
    """Plans from shapes alone, and makes each block when the writer asks for it."""

    def __init__(self, source: Source, dtype: torch.dtype, advance: Callable[[int], object]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._source, self._dtype, self._advance = source, dtype, advance
        self._name, self._tensor = "", torch.empty(0)
        self._buffers: dict[int, Tensor] = {}

    def create_local_plan(self) -> SavePlan:
        shapes = self._source.args.tensor_shapes()
        self.plan = SavePlan(
            [
                WriteItem(
                    index=MetadataIndex(name, block.offsets),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(block, TensorProperties(dtype=self._dtype), torch.Size(shapes[name])),
                )
                for name in self._source.names
                for block in _blocks(name, shapes[name], self._dtype)
            ]
        )
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        name, block = write_item.index.fqn, write_item.tensor_data.chunk
        if name != self._name:
            self._tensor = torch.empty(0)  # before the next one is read
            self._name, self._tensor = name, self._source.read(name)
            if self._tensor.shape != write_item.tensor_data.size:
                given, wanted = shape_text(self._tensor.shape), shape_text(write_item.tensor_data.size)
                raise FormatError(f"{name} is {given}, not {wanted}")
        part = self._tensor[tuple(slice(o, o + s) for o, s in zip(block.offsets, block.sizes, strict=True))]
        # The writer keeps every tensor it was given until its file is complete, but needs it no longer than until it
        # asks for the next; so blocks of one size share their memory.
        count = part.numel()
        if count not in self._buffers:
            self._buffers[count] = torch.empty(count, dtype=self._dtype)
        made = cast(name, part, self._dtype, self._buffers[count].view(part.shape))
        self._advance(made.nbytes)
        return made


class _HashingFileSystem(FileSystem):
    """DCP's access to files, which notes the size and hash of each as it is written."""

    def __init__(self) -> None:
        self.written: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        with HashedFile(Path(path)) as file:
            yield file
        self.written[Path(path).name] = file.entry()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class _Writer(dcp.FileSystemWriter):
    """DCP's writer with a size limit for files, and metadata that depends on the tensors alone."""

    def __init__(self, folder: Path, files: _HashingFileSystem) -> None:
        # No copying ahead, and one thread: either would hold many tensors at once. The files sync themselves.
        super().__init__(folder, sync_files=False, thread_count=1, per_thread_copy_ahead=0)
        self.fs = files

    def storage_meta(self) -> None:
        """Nothing: it would put this machine's path and a random id into the checkpoint."""

    def write_data(self, plan: SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future:
        files: queue.Queue = queue.Queue()
        for number, items in enumerate(_files(plan.items)):
            name = f"{plan.storage_data.prefix}{number}{DEFAULT_SUFFIX}"
            files.put((self.fs.concat_path(self.path, name), name, items))
        return self._write_data(planner, files)


def _files(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    """The items in order, cut where a file would grow over the limit."""
    ends = itertools.accumulate(
        item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize for item in items
    )
    numbered = zip((end // LARGEST_FILE for end in ends), items, strict=True)
    for _, group in itertools.groupby(numbered, key=lambda pair: pair[0]):
        yield [item for _, item in group]


def _blocks(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[ChunkStorageMetadata]:
    dimension = 1 if name.endswith(SPLIT_ALONG_COLUMNS) else 0
    count = min(BLOCKS, max(1, torch.Size(shape).numel() * dtype.itemsize // SMALLEST_BLOCK)) if len(shape) > 1 else 1
    step = -(-shape[dimension] // count)
    blocks = []
    for start in range(0, shape[dimension], step):
        offsets, sizes = [0] * len(shape), list(shape)
        offsets[dimension], sizes[dimension] = start, min(step, shape[dimension] - start)
        blocks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
    return blocks
