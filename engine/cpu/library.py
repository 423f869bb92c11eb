"""The kernels as a shared library: compiled once for each version of their source, then kept."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = (
    "model.cpp", "sampling.h", "single.h", "chunk.h", "attention.h", "tiles.h", "linear.h", "whole.h", "packed.h",
    "vector.h", "threads.h",
)  # fmt: skip
# Sums must not depend on how a loop was compiled, so the compiler may not fuse multiplications and additions by itself.
FLAGS = ("-O3", "-std=c++20", "-ffp-contract=off", "-shared", "-fPIC", "-pthread")
COMPILERS = ("c++", "g++", "clang++")
COMPILED_WITHIN_S = 300
HASH_BYTES = 32  # of a SHA-256, which stands behind a library
NEEDED = ("avx2", "fma", "f16c")
# What vector.h calls WIDE, PAIRS and TILES, as /proc/cpuinfo spells it; each needs those before it.
WIDE = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")
PAIRS = ("avx512_bf16",)
TILES = ("amx_tile", "amx_int8", "amx_bf16")
MOST_HEADS_PER_KEY = 64  # query heads that share a key/value head, as attention.h has room for


class NoKernels(RuntimeError):
    """Why this machine cannot have the kernels."""


@functools.cache
def load() -> ctypes.CDLL:
    """The compiled kernels, or `NoKernels`."""
    there = _cpu_flags()
    missing = set(NEEDED) - there
    if missing:
        raise NoKernels(f"this CPU has no {', '.join(sorted(missing))}")
    folder = Path(__file__).parent
    flags = FLAGS + _instructions(there)
    digest = hashlib.sha256(" ".join(flags).encode())
    for name in SOURCES:
        digest.update((folder / name).read_bytes())
    name = f"kernels-{digest.hexdigest()[:16]}.so"
    with _cache_folder(name) as kept:
        cached = kept / name
        if not _is_whole(cached):
            _compile(folder / SOURCES[0], cached, flags)
        try:
            library = ctypes.CDLL(str(cached))
        except OSError as error:
            raise NoKernels(f"{cached}: {error}") from None
    library.model_new.restype = ctypes.c_void_p
    library.model_new.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    library.model_run.restype = None
    library.model_run.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    library.model_draw.restype = None
    library.model_draw.argtypes = (*[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, *[ctypes.c_void_p] * 2)
    library.model_delete.restype = None
    library.model_delete.argtypes = (ctypes.c_void_p,)
    return library


def _instructions(there: set[str]) -> tuple[str, ...]:
    """The compiler's flags for as much as this CPU has of what the kernels can use."""
    names = list(NEEDED)
    for more in (WIDE, PAIRS, TILES):
        if not there.issuperset(more):
            break
        names += more
    return tuple("-m" + (name.replace("_", "-") if name in TILES else name.replace("_", "")) for name in names)


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo") as lines:
            return next((set(line.split()) for line in lines if line.startswith("flags")), set())
    except OSError:
        return set()


def _is_whole(library: Path) -> bool:
    """Whether it ends with the hash of all before: one that a power cut has left half written would crash, not fail."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-HASH_BYTES]).digest() == content[-HASH_BYTES:]


@contextlib.contextmanager
def _cache_folder(name: str) -> Iterator[Path]:
    """A folder that nobody but this user can write to, since what lies in it is run; with the library, or writable."""
    own = _own_folder()
    if own is not None and (os.access(own, os.W_OK) or _is_whole(own / name)):
        yield own
    else:
        with tempfile.TemporaryDirectory(prefix="llama-on-torchserve-") as moment:  # what was loaded from it stays
            yield Path(moment)


def _own_folder() -> Path | None:
    try:
        folder = Path.home() / ".cache" / "llama-on-torchserve"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        private = found.st_uid == os.getuid() and not found.st_mode & 0o022
    except (OSError, RuntimeError):  # the latter where there is no home
        return None
    return folder if private else None


def _compile(source: Path, target: Path, flags: tuple[str, ...]) -> None:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NoKernels(f"no C++ compiler ({', '.join(COMPILERS)}) is installed")
    partial = target.with_suffix(f".{os.getpid()}")
    command = [compiler, *flags, str(source), "-o", str(partial)]
    log.info("compiling %s", source.name)
    try:
        status, said = _run(command)
        if status:
            raise NoKernels(f"{' '.join(command)} failed: {(said.strip() or 'no message').splitlines()[0]}")
        with open(partial, "r+b") as file:
            file.write(hashlib.sha256(file.read()).digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except subprocess.TimeoutExpired:
        raise NoKernels(f"{compiler} did not end within {COMPILED_WITHIN_S} s") from None
    except OSError as error:
        raise NoKernels(f"{compiler} could not be run, or its output not be kept: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def _run(command: list[str]) -> tuple[int, str]:
    """A compiler's status and messages; if it does not end in time, or we are interrupted, so do all its processes."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            _, said = process.communicate(timeout=COMPILED_WITHIN_S)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, said
