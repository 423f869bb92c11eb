"""An output folder that appears whole or not at all: built beside its place, synced, then renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any, Self

# Pieces smaller than this are put together before they are written.
_SMALL = 1 << 20
_HASH_BLOCK = 1 << 20
LOCKED_WITHIN_S = 60.0  # after it was made


class OutputError(ValueError):
    """An output folder that cannot be written; the message says what to change."""


class OutputTaken(OutputError):
    """Another process put something in the output's place first."""


def in_background(work: Callable[[], object]) -> Future[None]:
    """Do the work in a thread that the interpreter does not wait for at its end.

    A signal may end the program when the thread already runs and nobody is there yet to stop it.
    """
    done: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, daemon=True).start()
    return done


class HashedFile:
    """A new file, hashed while it is written; complete and on disk when it is closed.

    A thread per algorithm follows the writer, reading back what the system still has in memory: so nobody waits for a
    hash but in the end, and whoever writes may use his memory again at once.
    """

    def __init__(self, path: Path, algorithms: tuple[str, ...] = ("sha256",)) -> None:
        self._file = open(path, "x+b", buffering=0)
        self._small = bytearray()
        self._written, self._ended = 0, False
        self._changed = threading.Condition()
        self._digests = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
        self.size = 0
        self._hashing = [in_background(partial(self._hash, digest)) for digest in self._digests.values()]

    def write(self, data: Any) -> int:
        """Append bytes."""
        view = memoryview(data).cast("B")
        self.size += len(view)
        if len(view) < _SMALL:
            self._small += view
            if len(self._small) >= _SMALL:
                self._write_small()
        else:
            self._write_small()
            self._write(view)
        return len(view)

    def tell(self) -> int:
        """How many bytes were written so far."""
        return self.size

    def flush(self) -> None:
        """Nothing: closing does it."""

    def digest(self, algorithm: str) -> str:
        """The hash of the file in hexadecimal; nothing can be written after it was asked for."""
        self._end()
        for each in self._hashing:
            each.result()
        return self._digests[algorithm].hexdigest()

    def entry(self) -> dict[str, Any]:
        """What a manifest says of the file; nothing can be written after it was asked for."""
        return {"size": self.size, "sha256": self.digest("sha256")}

    def close(self) -> None:
        """Wait until the file is hashed and on disk, and let go of it."""
        self._close(complete=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._close(complete=kind is None)

    def _close(self, complete: bool) -> None:
        if self._file.closed:
            return
        try:
            if complete:
                self._end()
                os.fsync(self._file.fileno())
                for each in self._hashing:
                    each.result()
        finally:
            with self._changed:
                self._written, self._ended = 0, True
                self._changed.notify_all()
            wait(self._hashing)
            self._file.close()

    def _end(self) -> None:
        """Let the hashing end where the file does."""
        self._write_small()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _write_small(self) -> None:
        if self._small:
            small, self._small = self._small, bytearray()
            self._write(memoryview(small))

    def _write(self, view: memoryview) -> None:
        while view:  # the system writes at most 2 GiB at once
            count = self._file.write(view)
            view = view[count:]
            with self._changed:
                self._written += count
                self._changed.notify_all()

    def _hash(self, digest: Any) -> None:
        """Follow the writer to the file's end, or until nothing of it is wanted any more."""
        buffer, done = memoryview(bytearray(_HASH_BLOCK)), 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda done=done: self._ended or self._written > done)
                left = self._written - done
            if left <= 0:
                return
            count = os.preadv(self._file.fileno(), [buffer[:left]], done)
            if not count:
                raise OSError(errno.EIO, "the file became shorter while it was written", self._file.name)
            digest.update(buffer[:count])
            done += count


@contextlib.contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """A new folder beside the target, locked while it is being filled, and removed unless it was put in place."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{target.parent}: cannot be made: {error.strerror}") from None
    _remove_stale(target)
    folder = _beside(target, "partial")
    try:
        folder.mkdir()
        lock = os.open(folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)  # who looks whether it is locked lets go at once
            yield folder
        finally:
            os.close(lock)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(folder: Path, target: Path, replace: bool = False) -> None:
    """Sync the finished folder and rename it to the target, in place of what is there if `replace`."""
    for path, _, _ in os.walk(folder):
        sync_folder(Path(path))
    aside = None
    if replace and target.exists():
        aside = _beside(target, "replaced")
        os.rename(target, aside)
    try:
        os.rename(folder, target)
    except BaseException as error:
        if aside is not None and not target.exists():
            os.rename(aside, target)
        if isinstance(error, OSError):
            kind = OutputTaken if error.errno in (errno.ENOTEMPTY, errno.EEXIST) else OutputError
            raise kind(f"{target}: cannot be put in place: {error.strerror}") from None
        raise
    sync_folder(target.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def put_file_in_place(file: Path, target: Path, manifest: Path, target_manifest: Path, replace: bool = False) -> None:
    """Rename the finished file to the target and its manifest to its place beside it.

    Whatever happens, no manifest stands beside a file that it does not describe.
    """
    try:
        if replace:
            target_manifest.unlink(missing_ok=True)
            os.replace(file, target)
        else:
            _rename_to_nothing(file, target)
            target_manifest.unlink(missing_ok=True)
        os.replace(manifest, target_manifest)
    except FileExistsError as error:
        raise OutputTaken(f"{target}: cannot be put in place: {error.strerror}") from None
    except OSError as error:
        raise OutputError(f"{target}: cannot be put in place: {error.strerror}") from None
    sync_folder(target.parent)


def _rename_to_nothing(file: Path, target: Path) -> None:
    """Rename unless something is there already, which a plain rename of a file would replace."""
    try:
        os.link(file, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        os.rename(file, target)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file and wait until it is on disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the folder's own entries are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(target: Path, what: str) -> Path:
    return target.parent / f".{target.name}.{what}-{os.getpid()}-{secrets.token_hex(4)}"


def _remove_stale(target: Path) -> None:
    """Remove what killed conversions to the same target left behind."""
    for path in target.parent.glob(glob.escape(f".{target.name}.") + "*"):
        left = re.fullmatch(r"(partial|replaced)-(\d{1,9})-[0-9a-f]{8}", path.name.removeprefix(f".{target.name}."))
        # A replaced output is only litter once its successor is in place.
        if left and _is_abandoned(path, int(left[2])) and (left[1] == "partial" or target.exists()):
            shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(folder: Path, pid: int) -> bool:
    """Whether nobody has locked it; its maker needs a moment for that, and has none where a file system has no locks.

    A process of that id proves nothing: in a container every conversion may be process 1.
    """
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return not _lives(pid) or time.time() - os.stat(lock).st_mtime > LOCKED_WITHIN_S
    except BlockingIOError:
        return False
    except OSError:
        return not _lives(pid)
    finally:
        os.close(lock)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
