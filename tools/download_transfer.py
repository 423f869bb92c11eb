"""Bring files into a folder: continued where they stopped, no longer than was announced, checked by their hash."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from formats.source import byte_bar
from tools.download_http import Client, DownloadError, Hiccup, Stopped, announced, content_range

if TYPE_CHECKING:
    from hashlib import _Hash

AT_ONCE = 4
# One request asks for no more than this: servers of files refuse to send the very large ones in one piece.
WINDOW = 8 << 30

_BLOCK = 1 << 20
# What the other files may take to end when one failed; no more, since a connection may be stalled.
_LAST_WORDS = 2.0


@dataclass(frozen=True)
class RemoteFile:
    """A file to bring: its plain name here, and what its publisher says of it.

    `algorithm` is "sha256", "md5" or "git" (as git hashes a blob), or empty where no hash was published.
    """

    name: str
    url: str
    size: int
    algorithm: str = ""
    digest: str = ""


def bring_all(client: Client, files: list[RemoteFile], folder: Path) -> None:
    """Bring the files, some at a time and the small ones first, since they show early whether all is well."""
    ahead, lock = deque(sorted(files, key=lambda file: file.size)), threading.Lock()
    done: list[RemoteFile] = []
    ended = threading.Semaphore(0)
    errors: list[BaseException] = []
    with byte_bar(sum(file.size for file in files), "downloading", progress=True) as bar:

        def advance(count: int) -> None:
            with lock:
                bar.update(count)

        def following() -> RemoteFile | None:
            with lock:
                return ahead.popleft() if ahead else None

        def work() -> None:
            try:
                while file := following():
                    bring(client, file, folder, advance)
                    done.append(file)
                    bar.set_postfix_str(f"{len(done)} of {len(files)} files", refresh=False)
            except Stopped:
                pass
            except BaseException as error:  # raised below, whatever it is
                errors.append(error)
                client.stop.set()
            finally:
                ended.release()

        # Daemons, so that a stalled connection cannot delay the end; their files can be continued at any byte.
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(AT_ONCE, len(files)))]
        # Not by joining them: a join that Ctrl-C interrupts takes its thread for ended (bpo-45274).
        running = len(threads)
        try:
            for thread in threads:
                thread.start()
            while running and not client.stop.is_set():
                running -= ended.acquire(timeout=0.1)
        finally:
            client.stop.set()
            deadline = time.monotonic() + _LAST_WORDS
            while running and time.monotonic() < deadline:
                running -= ended.acquire(timeout=0.1)
    if errors:
        raise errors[0]


def bring(client: Client, file: RemoteFile, folder: Path, advance: Callable[[int], object]) -> None:
    """Make `folder/name` complete and right; what an earlier run left of it is kept if its hash can be checked."""
    try:
        # Never through a link, which could lead anywhere.
        descriptor = os.open(folder / file.name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        with os.fdopen(descriptor, "r+b") as output:
            part = _Part(file, output, advance)
            kept = part.take_up()
            if not kept:
                part.restart()
            _fill(client, part)
            if not part.is_right() and kept:
                client.note(f"{file.name}: what an earlier run left does not fit; starting it over")
                part.restart()
                _fill(client, part)
            if not part.is_right():
                part.restart()
                raise DownloadError(
                    f"{file.name}: the content does not match its published hash ({file.algorithm}) and was thrown "
                    "away; run the same command again, and if it stays so, tell the publisher"
                )
            output.flush()
            os.fsync(output.fileno())
    except OSError as error:
        raise DownloadError(f"{folder / file.name}: cannot be written: {error.strerror or error}") from None


def is_right(path: Path, file: RemoteFile, advance: Callable[[int], object]) -> bool:
    """Whether a file on disk is the published one."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    with open(path, "rb") as there:
        part = _Part(file, there, advance)
        part.take_up()
        return part.is_right()


class _Part:
    """A file on its way: what is there of it, with the hash of that."""

    def __init__(self, file: RemoteFile, output: BinaryIO, advance: Callable[[int], object]) -> None:
        self.file, self.position = file, 0
        self._output, self._advance, self._hash = output, advance, _new_hash(file)

    def take_up(self) -> bool:
        """Whether something that an earlier run left is kept, which needs a hash that will tell if that was right."""
        if self.file.algorithm:
            while chunk := self._output.read(_BLOCK):
                self._count(chunk)
        return self.position > 0

    def append(self, chunk: bytes) -> None:
        """Add bytes that arrived."""
        if self.position + len(chunk) > self.file.size:
            raise DownloadError(f"{self.file.name}: the server sends more than the {self.file.size} bytes it announced")
        self._output.write(chunk)
        self._count(chunk)

    def restart(self) -> None:
        """Forget what is there."""
        self._output.seek(0)
        self._output.truncate()
        self._advance(-self.position)
        self.position, self._hash = 0, _new_hash(self.file)

    def is_right(self) -> bool:
        """Whether the content has the published hash, or none was published."""
        return not self.file.algorithm or self._hash.hexdigest() == self.file.digest

    def _count(self, chunk: bytes) -> None:
        self._hash.update(chunk)
        self.position += len(chunk)
        self._advance(len(chunk))


def _fill(client: Client, part: _Part) -> None:
    """Bring all that is missing, through any number of broken connections as long as each brings something new."""
    failures, furthest = 0, part.position
    while part.position < part.file.size:
        try:
            _fill_window(client, part)
        except Hiccup as hiccup:
            failures = failures + 1 if part.position <= furthest else 1
            furthest = max(furthest, part.position)
            client.wait(part.file.name, hiccup, failures)


def _fill_window(client: Client, part: _Part) -> None:
    """One request: the rest of the file, or as much of it as a request may ask for."""
    file, first = part.file, part.position
    end = min(first + WINDOW, file.size)
    with client.get(file.name, file.url, None if end - first == file.size else (first, end - 1)) as response:
        length = announced(file.name, response)
        if length not in (None, file.size):
            raise DownloadError(f"{file.name}: the server sends a file of {length} bytes, but announced {file.size}")
        if response.status_code == 200 and first:
            part.restart()  # a server that knows no ranges
        elif response.status_code == 206 and content_range(file.name, response)[0] != first:
            raise DownloadError(f"{file.name}: the server sent another part of the file than it was asked for")
        for chunk in client.chunks(file.name, response):
            part.append(chunk)
    if part.position < end:
        raise Hiccup("the connection ended early")


def _new_hash(file: RemoteFile) -> _Hash:
    if file.algorithm == "git":
        return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    return hashlib.new(file.algorithm or "md5", usedforsecurity=False)
