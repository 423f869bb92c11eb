"""What this machine can do at best: how fast it reads memory and multiplies matrices, and with what versions."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from deploy.configuration import PROJECT
from engine.cpu.arena import Arena
from engine.cpu.library import COMPILERS

PACKAGES = ("torch", "numpy", "transformers", "torchserve")
# Many times the last-level cache of any machine, so that all of it comes from memory.
READ_BYTES, GPU_READ_BYTES = 1 << 30, 1 << 32
PRODUCT_SIDE, GPU_PRODUCT_SIDE = 2048, 8192
SLOW_S = 5.0  # what takes longer is measured on smaller matrices
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Eight independent sums of a 64-byte line each, from one place or from eight at once: a core has more reads in flight
# where the memory is read in several places. Distances that are a power of two would put them in each other's way.
_READ_LOOP = """
#include <cstdint>
#include <thread>
#include <vector>
typedef uint64_t Line __attribute__((vector_size(64), aligned(64)));
constexpr int64_t APART = 1044;  // lines
static uint64_t read_places(const Line *at, const Line *end, int64_t run) {
    Line sums[8] = {};
    for (; at + 8 * run <= end; at += 8 * run)
        for (int64_t line = 0; line < run; line++)
            for (int place = 0; place < 8; place++) sums[place] += at[place * run + line];
    for (; at < end; at++) sums[0] += *at;
    uint64_t total = 0;
    for (int place = 0; place < 8; place++)
        for (int word = 0; word < 8; word++) total += sums[place][word];
    return total;
}
extern "C" uint64_t read_all(const void *data, int64_t bytes, int threads, int places) {
    const Line *lines = static_cast<const Line *>(data);
    int64_t each = bytes / 64 / threads;
    std::vector<uint64_t> totals(threads);
    std::vector<std::thread> workers;
    for (int number = 0; number < threads; number++)
        workers.emplace_back([=, &totals] {
            totals[number] = read_places(lines + number * each, lines + (number + 1) * each, places == 1 ? 1 : APART);
        });
    for (auto &worker : workers) worker.join();
    uint64_t total = 0;
    for (uint64_t part : totals) total += part;
    return total;
}
"""


@dataclass(frozen=True)
class Machine:
    """The best of this machine, and what ran on it when that was measured."""

    name: str
    """Of its CPU, or of the GPU that is measured."""
    cores: int
    threads: int
    read_bytes_per_s: float
    read_ways: dict[str, float]
    """Bytes per second by each way of reading; the fastest counts."""
    product_flops: dict[str, float]
    """FLOP/s of torch's matrix product by dtype."""
    load_average: tuple[float, float, float]
    versions: dict[str, str]
    commit: str

    @property
    def flops(self) -> float:
        """The FLOP/s of the faster dtype: not every CPU computes bfloat16 faster than float32."""
        return max(self.product_flops.values())

    def __str__(self) -> str:
        ways = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in self.read_ways.items())
        products = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in self.product_flops.items())
        return (
            f"{self.name}, {self.cores} cores, {self.threads} threads, load average {self.load_average[0]:.2f}\n"
            f"read bandwidth {self.read_bytes_per_s / 1e9:.1f} GB/s ({ways}); matrix product GFLOP/s: {products}\n"
            + ", ".join(f"{name} {version}" for name, version in self.versions.items())
            + f"; commit {self.commit}"
        )


def measure_machine(threads: int, rounds: int = 5, read_bytes: int = READ_BYTES, side: int = PRODUCT_SIDE) -> Machine:
    """The best of some rounds, with as many threads as the engine has."""
    load = os.getloadavg()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ways = {name: max(rates) for name, rates in _read_rates(threads, rounds, read_bytes).items()}
        products = {name: _product_rate(dtype, rounds, side) for name, dtype in DTYPES.items()}
    finally:
        torch.set_num_threads(before)
    cores = len(os.sched_getaffinity(0))
    return Machine(cpu_name(), cores, threads, max(ways.values()), ways, products, load, versions(), commit_of(PROJECT))


def measure_gpu(
    device: str, threads: int, rounds: int = 5, read_bytes: int = GPU_READ_BYTES, side: int = GPU_PRODUCT_SIDE
) -> Machine:
    """The best of some rounds of a GPU: sums of its memory, copies of it (which read and write), and products."""
    load = os.getloadavg()
    numbers = torch.ones(read_bytes // 4, device=device)
    moves: dict[str, Callable[[], object]] = {
        "sum": numbers.sum,
        "copy": lambda: numbers[: len(numbers) // 2].copy_(numbers[len(numbers) // 2 :]),
    }
    ways = {name: read_bytes / min(_seconds(move, device) for _ in range(rounds + 1)) for name, move in moves.items()}
    products = {name: _product_rate(dtype, rounds, side, device) for name, dtype in DTYPES.items()}
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name()
    cores = len(os.sched_getaffinity(0))
    return Machine(name, cores, threads, max(ways.values()), ways, products, load, versions(), commit_of(PROJECT))


def _read_rates(threads: int, rounds: int, size: int) -> dict[str, list[float]]:
    numbers = Arena().take((size // 8,), torch.int64).fill_(1)  # where weights lie too
    ways: dict[str, Callable[[], object]] = {"torch": lambda: numbers.view(torch.float32).max()}
    loop = _compiled_loop()
    if loop is not None:
        ways["C++"] = lambda: loop(numbers.data_ptr(), numbers.nbytes, threads, 1)
        ways["C++, eight places"] = lambda: loop(numbers.data_ptr(), numbers.nbytes, threads, 8)
    return {name: [numbers.nbytes / _seconds(read) for _ in range(rounds)] for name, read in ways.items()}


def _product_rate(dtype: torch.dtype, rounds: int, side: int, device: str = "cpu") -> float:
    """The best rate of products of ever larger matrices, up to `side`, while they do not take too long.

    Some CPUs have no instructions for a dtype, and a large product takes them half a minute. A small one may only have
    waited for its threads.
    """
    best = 0.0
    for size in (side // 8, side // 4, side // 2, side):
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        left @ right
        took = min(_seconds(lambda left=left, right=right: left @ right, device) for _ in range(rounds))
        best = max(best, 2 * size**3 / took)
        if took * 2**3 > SLOW_S:
            break
    return best


def _seconds(work: Callable[[], object], device: str = "cpu") -> float:
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def _compiled_loop() -> Callable[[int, int, int, int], int] | None:
    """A plain loop over memory, from one or eight places at once; None without a compiler."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory(prefix="llama-bench-") as folder:
        source, library = Path(folder) / "read.cpp", Path(folder) / "read.so"
        source.write_text(_READ_LOOP)
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", "-pthread", str(source), "-o", str(library)]
        if subprocess.run(command, capture_output=True).returncode:
            return None
        function = ctypes.CDLL(str(library)).read_all
    function.restype = ctypes.c_uint64
    function.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int)
    return function


def cpu_name() -> str:
    """What the CPU calls itself."""
    try:
        with open("/proc/cpuinfo") as lines:
            named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        named = ""
    return named or platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter to speed."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def commit_of(folder: Path) -> str:
    """The commit that is measured, with a plus if files differ from it."""
    try:
        said = [
            subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said[0] + ("+" if said[1] else "")
