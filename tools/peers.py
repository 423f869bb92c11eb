"""Set up llama.cpp, to compare the project with it, under build/peers and apart from the project's environment.

python -m tools.peers setup     fetch its sources from PyPI and compile them for this machine; what is there is kept
python -m tools.peers where     print where its programs are
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Self

from command_line import Parser
from deploy.configuration import PROJECT

PEERS = PROJECT / "build" / "peers"

# This source distribution holds the whole of llama.cpp as of 1 October 2026, its programs included.
PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
INSIDE = f"llama_cpp_python-{VERSION}/vendor/llama.cpp"
BUILD_TOOLS = ("cmake==4.4.4", "ninja==1.13.2")
PROGRAMS = (
    "llama-quantize",
    "llama-bench",
    "llama-batched-bench",
    "llama-server",
)
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    # GCC 12 thinks that only eight bytes of AMX's configuration are read, and leaves out storing the others: without
    # these flags quantized files end in an illegal instruction on CPUs with AMX.
    "CMAKE_CXX_FLAGS": "-fno-dse -fno-tree-dse",
    "GGML_NATIVE": "ON",
    "GGML_CCACHE": "OFF",
    "LLAMA_ALL_WARNINGS": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_NUMBER": "0",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
}
SPACE_NEEDED = 1 << 30
LOADING_TAKES_S = 120.0


class PeerError(RuntimeError):
    """Something that the peer needs is missing; the message says what, and how to get it."""


def sources(folder: Path = PEERS) -> Path:
    """The folder of llama.cpp's sources, which holds its converter scripts."""
    return folder / f"llama.cpp-{VERSION}" / "source"


def programs(folder: Path = PEERS) -> dict[str, Path]:
    """llama.cpp's programs by name; an error if they are not set up."""
    paths = _program_paths(folder)
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing:
        raise PeerError(f"{folder}: no {', '.join(missing)}; run: python -m tools.peers setup")
    return paths


def _program_paths(folder: Path) -> dict[str, Path]:
    return {name: sources(folder).parent / "build" / "bin" / name for name in PROGRAMS}


class LlamaServer:
    """llama.cpp's server with one model, on a free port of this machine, for the time of a block.

    Every sequence may have `context` tokens; `options` are more of the program's flags.
    """

    def __init__(
        self, program: Path, model: Path, *options: str, slots: int = 8, context: int = 1024, threads: int = 1
    ) -> None:
        self.slots, self.port = slots, _free_port()
        self._log = tempfile.TemporaryFile()
        where = ["--model", str(model), "--host", "127.0.0.1", "--port", str(self.port), "--offline"]
        sizes = ["--parallel", str(slots), "--ctx-size", str(slots * context), "--no-kv-unified"]
        threading = ["--threads", str(threads), "--threads-batch", str(threads), "--cache-ram", "0"]
        command = [str(program), *where, *sizes, *threading, *options]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)

    def __enter__(self) -> Self:
        try:
            self._wait()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON answer to a POST; an error if the server refuses."""
        status, answer = self._request("POST", path, json.dumps(body).encode())
        if status != 200:
            raise PeerError(f"llama-server refused {path} ({status}): {answer[:500].decode(errors='replace')}")
        return json.loads(answer)

    def _request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _wait(self) -> None:
        until = time.monotonic() + LOADING_TAKES_S
        while time.monotonic() < until:
            if self._process.poll() is not None:
                self._log.seek(0)
                last = self._log.read().decode(errors="replace").strip().splitlines()[-8:]
                raise PeerError("llama-server ended at once:\n" + "\n".join(last))
            try:
                if self._request("GET", "/health")[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise PeerError(f"llama-server was not ready within {LOADING_TAKES_S:.0f} s")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def setup(folder: Path = PEERS, jobs: int | None = None) -> dict[str, Path]:
    """Fetch and compile whatever is not there yet; returns the programs."""
    if not all(path.is_file() for path in _program_paths(folder).values()):
        compiler = find_compiler(os.environ)
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(folder)
        tools = _build_tools(folder)
        _fetch(folder)
        _compile(folder, tools, compiler, jobs or os.cpu_count() or 1)
    return programs(folder)


def find_compiler(environment: Mapping[str, str]) -> str:
    """The C++ compiler that CMake will take."""
    named = environment.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        if shutil.which(name.split()[0], path=environment.get("PATH", os.defpath)):
            return name
    raise PeerError(
        f"CXX names {named!r}, which was not found"
        if named
        else "no C++ compiler was found: install one (Debian: apt-get install g++), or name it in CXX"
    )


def _check_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < SPACE_NEEDED:
        raise PeerError(f"{folder}: {free / 1e9:.1f} GB are free, {SPACE_NEEDED / 1e9:.1f} GB are needed")


def _build_tools(folder: Path) -> Path:
    """The folder of CMake and Ninja, in an environment of their own."""
    environment = folder / "venv"
    python = environment / "bin" / "python"
    if not python.exists():
        _say(f"making {environment}")
        _run("an environment for the build tools could not be made", sys.executable, "-m", "venv", environment)
    _pip(python, "install", *BUILD_TOOLS)  # needs no network when they are there
    return python.parent


def _fetch(folder: Path) -> None:
    target = sources(folder)
    if target.is_dir():
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as temporary:
        _say(f"fetching {PACKAGE} {VERSION} (77 MB)")
        wanted = Path(temporary) / "requirements.txt"
        wanted.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n")
        python = folder / "venv" / "bin" / "python"
        _pip(python, "download", "--no-deps", "--no-binary", PACKAGE, "--dest", temporary, "--requirement", wanted)
        (archive,) = Path(temporary).glob("*.tar.gz")
        unpack(archive, INSIDE, Path(temporary) / "source")
        target.parent.mkdir(exist_ok=True)
        (Path(temporary) / "source").rename(target)


def unpack(archive: Path, inside: str, target: Path) -> None:
    """The files of one folder inside a tar archive, unpacked as `target`."""
    top, found = PurePosixPath(inside), False
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if not path.is_relative_to(top) or not member.isfile():
                continue
            if ".." in path.parts:
                raise PeerError(f"{archive.name}: {member.name} would lie outside its folder")
            place = target / path.relative_to(top)
            place.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as packed, open(place, "wb") as file:
                shutil.copyfileobj(packed, file)
            place.chmod(0o755 if member.mode & 0o100 else 0o644)
            found = True
    if not found:
        raise PeerError(f"{archive.name}: holds no {inside}")


def _compile(folder: Path, tools: Path, compiler: str, jobs: int) -> None:
    source = sources(folder)
    build = source.parent / "build"
    _say(f"compiling llama.cpp with {compiler} (about 12 minutes on two cores; it goes on where it was interrupted)")
    settings = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    ninja = [f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}", "-G", "Ninja"]
    log = build.with_name("configure.log")
    with open(log, "w") as output:
        _run(f"CMake failed; see {log}", tools / "cmake", "-S", source, "-B", build, *ninja, *settings, output=output)
    _run("the compiler failed; see above", tools / "ninja", "-C", build, f"-j{jobs}", *PROGRAMS)


def _pip(python: Path, *words: str | Path) -> None:
    what = "pip failed; see above (the first time it needs a network and PyPI)"
    _run(what, python, "-m", "pip", "--quiet", "--disable-pip-version-check", *words)


def _run(failure: str, *command: str | Path, output=None) -> None:
    try:
        # Everything but the result goes to stderr.
        subprocess.run(command, check=True, stdout=output or sys.stderr, stderr=output)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PeerError(f"{failure} ({error})" if isinstance(error, OSError) else failure) from None


def _say(what: str) -> None:
    print(f"peers: {what}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(prog="peers", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("setup", "where"))
    parser.add_argument("--folder", type=Path, default=PEERS, metavar="DIR", help="default: build/peers")
    parser.add_argument("--jobs", type=int, metavar="N", help="compile N files at once (default: one per core)")
    flags = parser.parse_args(argv)
    if flags.jobs is not None and flags.jobs < 1:
        parser.error(f"--jobs is {flags.jobs}; it must be at least 1")
    try:
        folder = flags.folder.resolve()
        found = setup(folder, flags.jobs) if flags.what == "setup" else programs(folder)
    except PeerError as error:
        print(f"peers: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    for name, path in found.items():
        print(f"{name:20} {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
