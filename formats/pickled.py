"""PyTorch's pickled tensor files (.pth, .bin): opened without running code, mapped not read, their CRCs checked.

And written tensor by tensor, which `torch.save` cannot.
"""

from __future__ import annotations

import io
import pickle
import re
import stat
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from formats.source import FLOAT_DTYPES, FormatError, first_line

_BLOCK = 4 << 20


_STORAGES = {torch.float32: "FloatStorage", torch.bfloat16: "BFloat16Storage", torch.float16: "HalfStorage"}


class TensorFileWriter:
    """A file as `torch.save` writes it, but of tensors that come one at a time.

    The shapes are told first, since the pickle comes before the data; then every tensor is written once, in any order.
    `contents` makes what the file holds from the tensors by name, or from what stands for them; by default just those.
    """

    def __init__(
        self,
        file: IO[bytes],
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        contents: Callable[[dict[str, Any]], Any] = dict,
    ) -> None:
        self._file = _Unfailing(file)
        self._archive = torch._C.PyTorchFileWriter(self._file)
        self._keys = {name: str(number) for number, name in enumerate(shapes)}
        tensors = {name: _StoredTensor(self._keys[name], dtype, shape) for name, shape in shapes.items()}
        pickled = _pickle_of(contents(tensors))
        self._write("data.pkl", pickled, len(pickled))
        self._write("byteorder", sys.byteorder, len(sys.byteorder))

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor's numbers, of the shape and dtype that were told."""
        # The writer wants a storage of just these bytes; this one borrows the tensor's memory.
        data = torch.from_numpy(tensor.contiguous().view(-1).view(torch.uint8).numpy()).untyped_storage()
        self._write(f"data/{self._keys[name]}", data, data.nbytes())

    def close(self) -> None:
        """Write the archive's directory, without which nothing can be read."""
        self._archive.write_end_of_file()
        self._file.check()

    def _write(self, record: str, data: Any, size: int) -> None:
        self._archive.write_record(record, data, size)
        self._file.check()


class _Unfailing:
    """A file whose errors wait until they are asked for: torch's writer ends the process if its last write fails."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._error: BaseException | None = None

    def write(self, data: Any) -> int:
        if self._error is None:
            try:
                return self._file.write(data)
            except BaseException as error:  # Ctrl-C too
                self._error = error
        return len(data)

    def check(self) -> None:
        if self._error is not None:
            raise self._error


class _StoredTensor:
    """Pickles as a tensor whose numbers are in the record of its key."""

    def __init__(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.shape, self.storage = shape, _Storage(key, dtype, torch.Size(shape).numel())

    def __reduce__(self) -> tuple[Any, ...]:
        strides = torch.empty(self.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, self.shape, strides, False, OrderedDict())


class _Storage:
    def __init__(self, key: str, dtype: torch.dtype, count: int) -> None:
        self.reference = ("storage", getattr(torch, _STORAGES[dtype]), key, "cpu", count)


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> tuple[Any, ...] | None:
        return value.reference if isinstance(value, _Storage) else None


def _pickle_of(value: object) -> bytes:
    made = io.BytesIO()
    _Pickler(made, protocol=2).dump(value)
    return made.getvalue()


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The file's tensors by name, backed by the file itself; anything but plain named float tensors is refused."""
    loaded = load_plain(path, "which is code and not data; refused")
    return {name: plain_tensor(path, name, value) for name, value in loaded.items()}


def load_plain(path: Path, refused: str, allowed: Callable[[], list[Any]] = list) -> dict[Any, Any]:
    """The dictionary that a file holds: plain values, and tensors backed by the file itself.

    `allowed` gives what the pickle may make beside (see `torch.serialization.safe_globals`); `refused` is said of what
    else it asks for.
    """
    records, claimed = _check_archive(path), 0

    def on_cpu(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        nonlocal claimed
        claimed += storage.nbytes()
        return storage

    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(allowed()):
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location=on_cpu, weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise FormatError(f"{path}: the pickle asks for {asked[1]}, {refused}") from None
        raise FormatError(f"{path}: no pickle of plain values: {_reason(error)}") from None
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror or first_line(error)}") from None
    except Exception as error:  # a broken pickle can fail in any way
        raise FormatError(f"{path}: cannot be loaded: {first_line(error)}") from None
    if not isinstance(loaded, dict):
        raise FormatError(f"{path}: holds a {type(loaded).__name__}, not values by name")
    if claimed != records:
        # Mapped storages are cut from the file by the sizes that the pickle claims.
        raise FormatError(f"{path}: its tensors claim {claimed} bytes, its records hold {records}")
    return loaded


def check_crcs(path: Path, advance: Callable[[int], object]) -> None:
    """Read every record of the file and compare it with the archive's CRC32, reporting bytes as they pass."""
    record = ""
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                record = info.filename
                with archive.open(info) as file:
                    while block := file.read(_BLOCK):
                        advance(len(block))
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror or first_line(error)}") from None
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError):
        raise FormatError(f"{path}: record {record!r} does not match its checksum: the file is corrupt") from None


def _check_archive(path: Path) -> int:
    """Look at the file from outside and return how many bytes of tensor data it holds."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise FormatError(f"{path}: is no regular file")
        if found.st_size == 0:
            raise FormatError(f"{path}: is empty")
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from None
    if start[:2] == b"\x80\x02":
        raise FormatError(
            f"{path}: is in PyTorch's old file format; re-save it: python -c \"import torch; "
            f"torch.save(torch.load('{path}', map_location='cpu', weights_only=True), '{path}')\""
        )
    if start != b"PK\x03\x04":
        raise FormatError(f"{path}: is no PyTorch checkpoint file")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError):
        raise FormatError(f"{path}: the archive's directory is unreadable: the file is cut short or corrupt") from None
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        raise FormatError(f"{path}: holds compressed or encrypted records, which PyTorch does not write")
    return sum(entry.file_size for entry in entries if re.search(r"/data/[^/]+$", entry.filename))


def plain_tensor(path: Path, name: object, value: object) -> Tensor:
    """A value of a file, which must be a dense tensor of floating-point numbers."""
    if not isinstance(name, str):
        raise FormatError(f"{path}: the key {name!r} is no tensor name")
    if isinstance(value, dict):
        raise FormatError(f"{path}: {name!r} holds a nested dict; a flat dict of tensors is needed")
    if type(value) not in (Tensor, nn.Parameter):
        raise FormatError(f"{path}: {name!r} is a {type(value).__name__}, not a plain tensor")
    if value.is_quantized:
        reason = "is quantized"
    elif value.layout != torch.strided:
        reason = f"is sparse ({str(value.layout).removeprefix('torch.')})"
    elif value.device.type != "cpu":
        reason = f"has no data (device {value.device.type})"
    elif value.dtype not in FLOAT_DTYPES:
        reason = f"is {str(value.dtype).removeprefix('torch.')}; float32, bfloat16 or float16 is needed"
    elif not _is_dense(value):
        reason = "is an expanded or overlapping view, not a stored tensor"
    else:
        return value.detach()
    raise FormatError(f"{path}: {name!r} {reason}")


def _is_dense(tensor: Tensor) -> bool:
    """Whether no two elements share memory, as with any tensor that was really stored."""
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return False
            extent = stride * size
    return True


def _reason(error: BaseException) -> str:
    """The last sentence of torch's long message, which has the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if "WeightsUnpickler error" in line or "Unsupported" in line]
    return (causes or lines or [type(error).__name__])[-1]
