"""One TorchServe under a build folder: start it, wait until it answers, find it again, end it with all its ranks."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import locale
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploy import processes
from deploy.configuration import PORTS, PROJECT, Plan, properties_text
from deploy.java import Java
from engine.config import ConfigError

MODEL = "llama"
COPIED = ("log4j2.xml", "metrics.yaml")
LONGEST_TMPDIR = 70
STATE = "server.json"
ANSWER_S = 60.0
STARTING, READY, GIVEN_UP = "starting TorchServe", "READY", "given up after maxRetryTimeoutInSec"
FORGIVEN_FAILURES = 2
TAIL_BYTES = 200_000  # of a log, to find the reason in
OK, FULL = 200, 429  # a full queue is a sign of life too
PROBE = {"prompt": "Hello", "max_new_tokens": 1, "stream": False}

# torchrun reads these, TorchServe gives it no such flags. Without them its store listens on all interfaces and
# unpickles what it is sent. A file store without an endpoint is a fresh temporary file at every start of torchrun, so
# that a restart never meets what an earlier, killed one left.
ONE_MACHINE = {
    "PET_RDZV_CONF": "store_type=file",
    "PET_LOCAL_ADDR": "127.0.0.1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}
# What would have other code or settings served than ours: modules on PYTHONPATH come before the archive's, and
# torchserve takes TS_CONFIG_FILE for its --ts-config.
DROPPED = ("PYTHONPATH", "PYTHONSAFEPATH", "TS_CONFIG_FILE")


class StartError(Exception):
    """TorchServe or a rank ended instead of serving; the message is the reason as far as its logs tell it."""


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """One command at a time starts or stops the server of a folder, or packs its archive; a second one waits."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another make serve, stop or archive of {folder.parent}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class Record:
    """What is remembered of a started server, in build/serve/server.json."""

    mark: str
    fingerprint: str
    url: str
    management_url: str
    token_auth: bool
    ranks: int
    checkpoint: str
    scratch: str
    started: float

    @classmethod
    def read(cls, folder: Path) -> Record | None:
        """The server that was last started in a folder, running or not."""
        try:
            return cls(**json.loads((folder / STATE).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Remember it, wholly or not at all."""
        partial = folder / f".{STATE}"
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n")
        partial.replace(folder / STATE)

    @property
    def alive(self) -> bool:
        """Whether its frontend runs."""
        return any(is_frontend(each) for each in processes.of_server(self.mark))

    def key(self, folder: Path, kind: str) -> str | None:
        """The bearer key that TorchServe wrote, where it asks for one."""
        if not self.token_auth:
            return None
        try:
            return json.loads((folder / "key_file.json").read_text())[kind]["key"]
        except (OSError, ValueError, KeyError):
            return None


def is_frontend(process: Any) -> bool:
    """Whether a process of ours is TorchServe's Java frontend."""
    try:
        return "org.pytorch.serve.ModelServer" in process.cmdline()
    except processes.psutil.Error:
        return False


def fingerprint(plan: Plan, java: Java, code: str) -> str:
    """Equal for two starts that would run the same server."""
    parts = [plan.model_config_text(), properties_text(plan), code, str(java.home), sys.executable]
    parts += [(PROJECT / "deploy" / name).read_text() for name in COPIED]
    parts.append((plan.checkpoint / "manifest.json").read_text())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def write_configuration(plan: Plan) -> None:
    """Write what TorchServe is started with."""
    plan.write_model_config()
    (plan.folder / "config.properties").write_text(properties_text(plan))
    for name in COPIED:
        shutil.copyfile(PROJECT / "deploy" / name, plan.folder / name)


def check_ports(plan: Plan) -> None:
    """Refuse a port that somebody else has, with who it is."""
    first = plan.port
    for port in range(first, first + PORTS):
        host = plan.options.host if port == first else "127.0.0.1"
        try:
            free = processes.port_is_free(host, port)
        except OSError as error:
            raise ConfigError(f"{host}:{port} is no place to listen on: {error.strerror or error}") from None
        if not free:
            raise ConfigError(
                f"port {port} is taken by {processes.listener(port)}; end it, or choose others: make serve PORT=N "
                f"(N to N+{PORTS - 1} are used: requests, management, metrics, and two for gRPC)"
            )


def environment(
    base: Mapping[str, str], java: Java, mark: str, scratch: Path, folder: Path, nodes: int
) -> dict[str, str]:
    """What TorchServe and, through it, torchrun and the ranks are started with."""
    logs = str(folder / "logs")
    own = {
        processes.MARK: mark,
        # The frontend runs the bare word torchrun.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), base.get("PATH", os.defpath)]),
        # Its process file, its workers' sockets and the unpacked archive: two servers of one machine share no names.
        "TMPDIR": str(scratch),
        "TEMP": str(scratch),
        "LOG_LOCATION": logs,
        "METRICS_LOCATION": logs,
        "PYTHONUNBUFFERED": "1",
    }
    # In the locale C Python takes the names of files for UTF-8 all the same; Java finds none that is not ASCII.
    if sys.getfilesystemencoding() == "utf-8" and locale.getencoding().lower() != "utf-8":
        own["LC_ALL"] = "C.UTF-8"
    kept = {name: value for name, value in base.items() if name not in DROPPED}
    return java.environment({**kept, **(ONE_MACHINE if nodes == 1 else {}), **own})


def launch(plan: Plan, java: Java, wanted: str) -> Record:
    """Start TorchServe, whose fingerprint is `wanted`, in the background; it does not answer yet."""
    folder, options = plan.folder, plan.options
    logs = folder / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    (folder / "key_file.json").unlink(missing_ok=True)
    host = "127.0.0.1" if options.host == "0.0.0.0" else options.host
    record = Record(
        mark=uuid.uuid4().hex,
        fingerprint=wanted,
        url=f"http://{host}:{plan.port}",
        management_url=f"http://127.0.0.1:{plan.port + 1}",
        token_auth=options.token_auth,
        ranks=plan.ranks,
        checkpoint=str(plan.checkpoint),
        scratch=_scratch(),
        started=time.time(),
    )
    try:
        record.write(folder)  # before the start, so that `stop` finds whatever comes of it
    except OSError:
        shutil.rmtree(record.scratch, ignore_errors=True)
        raise
    nodes = plan.model_config["torchrun"].get("nnodes", 1)
    command = [str(Path(sys.executable).parent / "torchserve"), "--start", "--no-config-snapshots"]
    command += ["--ts-config", str(folder / "config.properties")]
    command += ["--model-store", str(options.build / "model_store"), "--models", f"{MODEL}={MODEL}.mar"]
    with open(logs / "console.log", "wb") as console:
        subprocess.run(
            command,
            cwd=folder,
            env=environment(os.environ, java, record.mark, Path(record.scratch), folder, nodes),
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            start_new_session=True,  # the Ctrl-C that ends `make serve` is not the server's
            check=False,
        )
    return record


def _scratch() -> str:
    """A folder for sockets, in /tmp where TMPDIR is too long: a socket's path has some 100 characters at most."""
    short = len(tempfile.gettempdir()) <= LONGEST_TMPDIR
    return tempfile.mkdtemp(prefix="llama-", dir=None if short else "/tmp")


def wait(record: Record, plan: Plan, show: Callable[[str], None]) -> None:
    """Return once a real request was answered; raise StartError as soon as that cannot come about any more."""
    folder, timeout_s = plan.folder, plan.model_config.get("startupTimeout", 120)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if not record.alive:
            check_ports(plan)  # they were free, but another server may have been faster
            raise StartError(reason(folder) or "TorchServe ended")
        failure = worker_failure(folder)
        if failure:
            raise StartError(failure)
        # Else it would be that other server that answers.
        state = worker_state(record, folder) if processes.listens(record.mark, plan.port + 1) else STARTING
        show(state)
        if state == READY:
            show("asking it something")
            status, body = probe(record, folder, ANSWER_S)
            if status in (OK, FULL):
                return
            raise StartError(f"the model loaded, but a request was answered with {status}: {body[:500]}")
        time.sleep(0.5)
    raise StartError(f"the model did not load within startupTimeout ({timeout_s:.0f} s)")


def probe(record: Record, folder: Path, timeout_s: float) -> tuple[int, str]:
    """The status (0 for no answer) and body of a tiny request."""
    url, body = f"{record.url}/predictions/{MODEL}", json.dumps(PROBE).encode()
    return _request(url, body, record.key(folder, "inference"), timeout_s)


def responds(record: Record, folder: Path) -> bool:
    """Whether the handler says anything within a minute: what it is asked here, it answers however busy it is."""
    url = f"{record.url}/predictions/{MODEL}/1.0/v1/models"
    return _request(url, None, record.key(folder, "inference"), ANSWER_S)[0] != 0


def worker_state(record: Record, folder: Path) -> str:
    """The worker's state in TorchServe's words, or what comes before it has one."""
    status, body = _request(f"{record.management_url}/models/{MODEL}", None, record.key(folder, "management"), 5.0)
    if status != 200:
        return STARTING if status == 0 else "registering the model"
    try:
        workers = json.loads(body)[0]["workers"]
    except (ValueError, LookupError, TypeError):
        return "registering the model"
    if not workers:
        return "starting the worker"
    if workers[0]["status"] == READY:
        return READY
    # While it loads, or is to load again, TorchServe says UNLOADING and that all is well.
    status, _ = _request(f"{record.url}/ping", None, record.key(folder, "inference"), 5.0)
    return GIVEN_UP if status >= 500 else "loading the model"


def _request(url: str, body: bytes | None, key: str | None, timeout_s: float) -> tuple[int, str]:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no business on this machine
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")
    except OSError as error:
        return 0, str(error)


def worker_failure(folder: Path) -> str | None:
    """Why the worker will not come up, once that is clear: TorchServe would try again for minutes.

    The handler's own word is final. Without it a worker may fail a few times: now and then TorchServe sends a request
    before the model, and the next attempt succeeds.
    """
    if "cannot start: " in _tail(folder / "logs" / "model_log.log"):
        return reason(folder)
    frontend = _tail(folder / "logs" / "ts_log.log")
    refused = re.search(r"Failed to load model: .*\n(.*)", frontend)
    if refused:  # no room, most often; TorchServe would go on without a model
        return f"TorchServe could not load the archive, which it unpacks in {tempfile.gettempdir()}: {refused[1]}"
    if frontend.count("Retry worker: ") <= FORGIVEN_FAILURES:
        return None
    return reason(folder) or "the worker ended while it loaded"


def reason(folder: Path) -> str | None:
    """The line of the logs that says what went wrong: the handler's own, else the last exception's."""
    model = _tail(folder / "logs" / "model_log.log")
    own = re.findall(r"cannot start: (.*)", model)
    if own:
        return own[-1].strip()
    raised = re.findall(r"^.*?\s((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit): .*)$", model, re.MULTILINE)
    raised = [line for line in raised if "ChildFailedError" not in line]  # torchrun's, of a rank that said why
    if raised:
        return raised[-1].strip()
    console = _tail(folder / "logs" / "console.log")
    lines = [line for line in console.splitlines() if re.search(r"ERROR|Exception|Error:|not found", line)]
    return lines[-1].strip() if lines else None


def _tail(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def stop(folder: Path) -> int:
    """End the server of a build folder, if there is one, with every process that it started; how many there were."""
    record = Record.read(folder)
    if record is None:
        return 0
    ended = processes.end(record.mark)
    left = processes.of_server(record.mark)
    if left:
        raise ConfigError(f"processes {', '.join(str(each.pid) for each in left)} do not end")
    shutil.rmtree(record.scratch, ignore_errors=True)
    (folder / STATE).unlink(missing_ok=True)
    return ended
