"""A TorchServe of one's own for the time of a block, on free ports of this machine."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

from deploy import processes
from deploy.configuration import PORTS, PROJECT
from deploy.server import MODEL, Record
from engine.config import ConfigError

MODEL_PATH = f"/predictions/{MODEL}"


class Server:
    """A TorchServe of our own, with everything it writes in a temporary folder."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.build, self.port = folder, free_ports()
        command = [sys.executable, "-m", "tools.serve", "start", f"PORT={self.port}", f"BUILD={folder}", *words]
        with subprocess.Popen(
            command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as start:
            try:
                said, _ = start.communicate()
            except BaseException:
                start.terminate()  # it ends what it started
                start.wait()
                raise
        if start.returncode:
            raise ConfigError(f"the server did not start:\n{said}")
        self.mark = Record.read(folder / "serve").mark

    @property
    def ranks(self) -> list[psutil.Process]:
        """The processes that hold the model, rank 0 first."""
        workers = [each for each in self._matching("model_service_worker") if "LOCAL_RANK" in each.environ()]
        return sorted(workers, key=lambda each: int(each.environ()["LOCAL_RANK"]))

    @property
    def torchruns(self) -> list[psutil.Process]:
        """The frontend's child, which starts the ranks."""
        return [each for each in self._matching("torchrun") if each not in self.ranks]

    def _matching(self, word: str) -> list[psutil.Process]:
        found = []
        for process in processes.of_server(self.mark):
            with contextlib.suppress(psutil.Error):
                if any(word in part for part in process.cmdline()):
                    found.append(process)
        return found

    def metric(self, name: str) -> float:
        """One value of the metrics page, summed over its labels."""
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"http://127.0.0.1:{self.port + 2}/metrics") as page:
            lines = page.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))

    def stop(self) -> None:
        """End it; whatever of it is left is an error."""
        command = [sys.executable, "-m", "tools.serve", "stop", f"BUILD={self.build}"]
        subprocess.run(command, cwd=PROJECT, capture_output=True, check=True)
        left = processes.of_server(self.mark)
        assert not left, f"left behind: {left}"


@contextlib.contextmanager
def server(*words: str) -> Iterator[Server]:
    """A server for the time of a block."""
    with tempfile.TemporaryDirectory(prefix="llama-server-") as folder:
        running = Server(Path(folder), *words)
        try:
            yield running
        finally:
            running.stop()


def free_ports() -> int:
    """The first of neighbouring ports, as many as a server has, that nobody listens on."""
    while True:
        first = random.randrange(20000, 60000)
        if all(processes.port_is_free("127.0.0.1", first + offset) for offset in range(PORTS)):
            return first
