"""The kernels as a shared library: compiled once for each version of their source, then kept."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shutil
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
    with _cache_folder() as kept:
        cached = kept / f"kernels-{digest.hexdigest()[:16]}.so"
        if not cached.is_file():
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


@contextlib.contextmanager
def _cache_folder() -> Iterator[Path]:
    """A folder that only this user can write to, since what lies in it is run."""
    own = _own_folder()
    if own is not None:
        yield own
    else:
        with tempfile.TemporaryDirectory(prefix="llama-on-torchserve-") as moment:  # what was loaded from it stays
            yield Path(moment)


def _own_folder() -> Path | None:
    try:
        folder = Path.home() / ".cache" / "llama-on-torchserve"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        private = found.st_uid == os.getuid() and not found.st_mode & 0o022 and os.access(folder, os.W_OK)
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
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if ended.returncode:
            raise NoKernels(f"{' '.join(command)} failed: {(ended.stderr.strip() or 'no message').splitlines()[0]}")
        os.replace(partial, target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernels(f"{compiler} could not be run: {error}") from None
    finally:
        partial.unlink(missing_ok=True)
