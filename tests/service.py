"""A real TorchServe for tests: its own build folder and free ports, started and stopped as a user would, traceless.

A test file takes part with `pytest_plugins = ("service",)` and `pytestmark = SHARED`: then one server of each kind
serves all files. (Fixtures that are imported instead would start one server for every file.)
PYTEST_DONT_REWRITE: those files import names from here before pytest makes a plugin of it.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import requests

from deploy import processes
from deploy.configuration import PORTS
from deploy.server import MODEL, Record, is_frontend
from generate import LLM, Completion, Request

PROJECT = Path(__file__).resolve().parent.parent
START_S, STOP_S = 180.0, 90.0
TIMEOUT_S = 30.0  # of any request that says nothing else; a hang shall fail a test, not stall it

SLOTS, WAITING = 16, 48
SEQ_LEN = 4096
# What one request may ask for at most, and all that this server may hold: it fills slots and queue by itself.
PROMPTS, CHOICES = 8, 8
assert PROMPTS * CHOICES == SLOTS + WAITING

LENGTH = 160  # tokens that all questions are answered within
LIMITS = (f"MAX_BATCH_SIZE={SLOTS}", f"MAX_WAITING={WAITING}", f"MAX_SEQ_LEN={SEQ_LEN}", "DEVICE=cpu")

SECRET_NAME, SECRET = "SERVICE_TEST_SECRET_KEY", "what-no-worker-shall-inherit"

# All servers of a test run on one of its processes, so that there is one of each kind.
SHARED = pytest.mark.xdist_group("service")


@dataclass(frozen=True)
class Service:
    """A running server."""

    build: Path
    port: int
    record: Record

    @property
    def url(self) -> str:
        """The model's own endpoint."""
        return f"{self.record.url}/predictions/{MODEL}"

    @property
    def api(self) -> str:
        """What stands in front of v1/... and v2/..."""
        return f"{self.url}/1.0"

    @property
    def headers(self) -> dict[str, str]:
        """The authorisation, where the server asks for one."""
        key = self.key
        return {} if key is None else {"Authorization": f"Bearer {key}"}

    @property
    def key(self) -> str | None:
        """The key for requests, where the server asks for one."""
        return self.record.key(self.build / "serve", "inference")

    def request(self, method: str, path: str = "", body: Any = None, **options: Any) -> requests.Response:
        """One request on a connection of its own, to an endpoint of the model or, with a leading /, of TorchServe."""
        url = self.record.url + path if path.startswith("/") else f"{self.api}/{path}" if path else self.url
        headers = self.headers | options.pop("headers", {})
        with requests.Session() as session:
            session.trust_env = False  # a proxy has no business on this machine
            content = {"data": body} if isinstance(body, bytes | None) else {"json": body}
            answer = session.request(method, url, headers=headers, **{"timeout": TIMEOUT_S, **content, **options})
        if "charset" not in answer.headers.get("content-type", ""):
            answer.encoding = "utf-8"
        return answer

    def post(self, body: Any, path: str = "", **options: Any) -> requests.Response:
        """A POST of JSON, or of bytes as they are."""
        return self.request("POST", path, body, **options)

    def openai(self, **options: Any) -> openai.OpenAI:
        """The official client; without retries, so that every refusal is seen."""
        return openai.OpenAI(**self._client_options(options))

    def async_openai(self, **options: Any) -> openai.AsyncOpenAI:
        """The same, asynchronous."""
        return openai.AsyncOpenAI(**self._client_options(options))

    def _client_options(self, options: dict[str, Any]) -> dict[str, Any]:
        base = {"base_url": f"{self.api}/v1", "api_key": self.key or "unused", "max_retries": 0, "timeout": TIMEOUT_S}
        return base | options

    def processes(self) -> list[psutil.Process]:
        """All processes of this server."""
        return processes.of_server(self.record.mark)

    def workers(self) -> list[psutil.Process]:
        """Those that the frontend started: torchrun and the ranks."""
        return [each for each in self.processes() if not is_frontend(each)]

    def metrics(self) -> dict[str, float]:
        """The values at /metrics, by name and, where there are labels beside the model's, by those."""
        with requests.Session() as session:
            session.trust_env = False
            lines = session.get(f"http://127.0.0.1:{self.port + 2}/metrics", timeout=TIMEOUT_S).text.splitlines()
        found = (re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line) for line in lines if not line.startswith("#"))
        values = {}
        for match in filter(None, found):
            labels = re.findall(r'(\w+)="([^"]*)"', match[2] or "")
            more = [value for name, value in labels if name not in ("ModelName", "Hostname")]
            values[" ".join([match[1], *more])] = float(match[3])
        return values

    def log(self, name: str = "*.log") -> str:
        """What the logs say by now."""
        files = sorted((self.build / "serve" / "logs").glob(name))
        return "\n".join(file.read_text(errors="replace") for file in files)

    def fill(self, **options: Any) -> dict[str, Any]:
        """A body that takes every slot and the whole queue, for longer than any test waits."""
        prompts = [f"Once upon a time {number}" for number in range(PROMPTS)]
        endless = {"ignore_eos": True, "max_new_tokens": SEQ_LEN, "temperature": 1.0}
        return {"prompt": prompts, "n": CHOICES, **endless, **options}

    def has_room(self) -> bool:
        """Whether a request is taken at this moment."""
        status = self.post({"prompt": "Hello", "max_new_tokens": 1, "stream": False}).status_code
        assert status in (200, 429), status
        return status == 200


def serve(command: str, build: Path, *words: str, timeout_s: float, **environment: str) -> subprocess.CompletedProcess:
    """What `make serve` and `make stop` run."""
    return subprocess.run(
        [sys.executable, "-m", "tools.serve", command, f"BUILD={build}", *words],
        cwd=PROJECT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def free_ports() -> int:
    """The first of as many free ports as a server takes; below those that the system hands to clients."""
    while True:
        first = random.SystemRandom().randrange(20000, 30000)
        if all(processes.port_is_free("127.0.0.1", port) for port in range(first, first + PORTS)):
            return first


def running(build: Path, *words: str) -> Iterator[Service]:
    """A server from the start to the end of which nothing is left."""
    port = free_ports()
    try:
        started = serve("start", build, f"PORT={port}", *words, timeout_s=START_S, **{SECRET_NAME: SECRET})
        logs = "\n".join(file.read_text(errors="replace")[-3000:] for file in build.glob("serve/logs/*.log"))
        assert started.returncode == 0, f"{started.stdout}{started.stderr}\n{logs}"
        record = Record.read(build / "serve")
        assert record is not None and record.alive
        yield Service(build, port, record)
    finally:
        record = Record.read(build / "serve")
        stopped = serve("stop", build, timeout_s=STOP_S)
        left = processes.of_server(record.mark) if record else []
        if left:
            processes.end(record.mark)  # a failure of the tests shall not leave them behind either
    assert stopped.returncode == 0, stopped.stderr
    assert not left, f"processes that outlived their server: {left}"
    assert not Path(record.scratch).exists()
    assert all(processes.port_is_free("127.0.0.1", each) for each in range(port, port + PORTS))


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One rank, which all files share: every test leaves it idle."""
    yield from running(tmp_path_factory.mktemp("service"), *LIMITS)


@pytest.fixture(scope="session")
def service_of_two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two ranks, and clients need a key."""
    words = ("TP=2", "TOKEN_AUTH=true")
    yield from running(tmp_path_factory.mktemp("service_of_two"), *LIMITS, *words)


def reference(checkpoint: str, questions: list[Request]) -> list[Completion]:
    """What the engine answers without any server, in the server's precision."""
    from engine.config import EngineConfig

    config = EngineConfig(dtype="float32", device="cpu", max_batch_size=SLOTS, max_seq_len=SEQ_LEN)
    return LLM(Path(checkpoint), config).generate(questions)


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Look again and again until it is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


def lines_of(answer: requests.Response) -> list[dict[str, Any]]:
    """The native stream's lines."""
    return [json.loads(line) for line in answer.content.decode().split("\n") if line]


def text_of(answer: requests.Response) -> str:
    """All text of a native stream with one choice."""
    assert answer.status_code == 200, answer.text
    return "".join(line["text"] for line in lines_of(answer))
