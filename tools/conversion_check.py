"""Measure what conversions take of memory and time, on a random checkpoint of a real model's size.

python -m tools.conversion_check --shape 7B

Beside each conversion, in the same run, a plain copy of its input is timed on the same disk, written through to it as
the converter's output is, and neither finds anything in the page cache. A conversion's speed is the bytes that it reads
and writes in a second, its share what that is of the copy's. Where the share is small, the seconds of CPU tell whether
the disk bounds it, or cores that are too few or busy. Memory is a process's own, as in tools/memory_check.py.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from command_line import Parser, end_with
from tools.memory_check import CONVERSION_LIMIT, Usage, measure
from tools.random_checkpoint import SHAPES, write_random_checkpoint

SHARE = 0.5
PATHS = ("meta-gguf", "meta-hf", "hf-dcp")
_BLOCK = 8 << 20


def drop(folder: Path) -> None:
    """Write what is in a folder to disk and let go of its pages."""
    for path in filter(Path.is_file, folder.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(size_of(each) for each in path.iterdir())


def copy(folder: Path, target: Path) -> tuple[float, float]:
    """Seconds, and those of CPU, to copy a folder's files until they are on disk; the copy is removed again."""
    drop(folder)
    target.mkdir()
    buffer, began, cpu = memoryview(bytearray(_BLOCK)), time.monotonic(), time.process_time()
    for path in filter(Path.is_file, folder.iterdir()):
        with open(path, "rb", buffering=0) as source, open(target / path.name, "wb", buffering=0) as made:
            while count := source.readinto(buffer):
                made.write(buffer[:count])
            os.fsync(made.fileno())
    took = time.monotonic() - began, time.process_time() - cpu
    shutil.rmtree(target)
    return took


def told(name: str, source: Path, made: Path, usage: Usage, copied: tuple[float, float]) -> bool:
    """Print a conversion's figures; whether they are within the limits."""
    read, written = size_of(source), size_of(made)
    speed, plain = (read + written) / usage.seconds, 2 * read / copied[0]
    fits = usage.anonymous <= CONVERSION_LIMIT and speed >= SHARE * plain
    print(
        f"{name}: {usage}; {read / 1e9:.1f} GB in, {written / 1e9:.1f} GB out, {speed / 1e6:.0f} MB/s; "
        f"a copy: {copied[0]:.1f} s ({copied[1]:.1f} s of CPU), {plain / 1e6:.0f} MB/s; "
        f"share {speed / plain:.2f}{'' if fits else '  <-- OVER'}",
        flush=True,
    )
    return fits


def check(folder: Path, shape: str, paths: list[str]) -> bool:
    """Convert along each path, input and output alone on the disk but for the other inputs."""
    good = True
    for path in paths:
        form, to = path.split("-")
        source = folder / form
        if not source.exists():
            write_random_checkpoint(source, shape, form)
        copied = copy(source, folder / "copy")
        made = folder / ("made.gguf" if to == "gguf" else f"made-{to}")
        drop(source)
        options = ["--type", "q8_0"] if to == "gguf" else []
        command = [sys.executable, "checkpoint_converter.py", str(source), str(made), "--to", to, *options]
        good &= told(path, source, made, measure(command), copied)
        shutil.rmtree(made) if made.is_dir() else made.unlink()
        if not any(other.startswith(f"{form}-") for other in paths[paths.index(path) + 1 :]):
            shutil.rmtree(source)
    return good


def main(argv: list[str] | None = None) -> int:
    """The command line; returns 1 if a limit was exceeded."""
    parser = Parser(prog="conversion_check", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="7B", help="model size (default: %(default)s)")
    parser.add_argument("--path", choices=PATHS, action="append", help="one of them, or several (default: all)")
    parser.add_argument("--dir", type=Path, help="where to put up to twice the model's size (default: a temporary)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="conversion_check-") as folder:
        good = check(Path(folder), options.shape, options.path or list(PATHS))
    print(f"{options.shape}: {'within' if good else 'OVER'} the limits")
    return 0 if good else 1


if __name__ == "__main__":
    end_with(main)
