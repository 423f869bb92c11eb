"""Start, stop and look at a TorchServe with the model: `make serve`, `make stop`, `make status`.

python -m tools.serve start [KEY=VALUE ...] | stop | status
"""

from __future__ import annotations

import os
import shlex
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

from command_line import Parser, interrupts
from deploy import processes, server
from deploy.configuration import Options, plan_model
from deploy.java import find_java
from engine.config import ConfigError

QUESTION = '{"mode": "chat", "dialog": [{"role": "user", "content": "What is the capital of France?"}]}'


class Progress:
    """One line on stderr: what is awaited and for how long."""

    def __init__(self) -> None:
        self._began, self._last, self._open = time.monotonic(), "", False

    def show(self, state: str) -> None:
        """Say what is awaited; on a terminal the seconds run, elsewhere each state is one line."""
        seconds = time.monotonic() - self._began
        if sys.stderr.isatty():
            print(f"\r\033[K{seconds:4.0f} s  {state}", end="", file=sys.stderr, flush=True)
            self._open = True
        elif state != self._last:
            print(f"{seconds:4.0f} s  {state}", file=sys.stderr, flush=True)
        self._last = state

    def end(self) -> None:
        """Leave the line."""
        if self._open:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
            self._open = False


# What somebody may have put in front of `make serve` instead of behind it.
_BEHIND = ("CHECKPOINT", "CONFIG", "TP", "DTYPE", "QUANTIZATION", "MAX_SEQ_LEN", "MAX_BATCH_SIZE")


def start(options: Options) -> int:
    """Start the server, or leave one alone that already is what was asked for."""
    from tools.archive import archive, digest

    java = find_java(os.environ)
    plan = plan_model(options)
    wanted = server.fingerprint(plan, java, digest())
    running = server.Record.read(plan.folder)
    if running is not None and running.alive:
        # No generated text is asked for: one that is busy must not be restarted for being slow.
        state = server.worker_state(running, plan.folder)
        why = "with other settings" if running.fingerprint != wanted else f"but not ready ({state})"
        if running.fingerprint == wanted and state == server.READY:
            if server.responds(running, plan.folder):
                print(f"already running with these settings at {running.url}", file=sys.stderr)
                return _tell(running, plan.folder)
            why = "but without an answer"
        print(f"running {why}; restarting", file=sys.stderr)
    server.stop(plan.folder)  # also what a server that was killed left behind
    server.check_ports(plan)
    if options.host not in ("127.0.0.1", "localhost") and not options.token_auth:
        print(f"warning: {options.host} may be open to a network, without keys: TOKEN_AUTH=true", file=sys.stderr)
    server.write_configuration(plan)
    archive(plan.folder / "model-config.yaml", options.build)
    print(
        f"starting TorchServe (Java {java.version} from {java.found}) with {plan.checkpoint}, "
        f"{plan.ranks} rank(s) on {plan.model_config['handler']['device']}",
        file=sys.stderr,
    )
    progress, ready = Progress(), False
    try:
        record = server.launch(plan, java, wanted)
        server.wait(record, plan, progress.show)
        ready = True
    except server.StartError as error:
        progress.end()
        print(f"serve: error: {error}\nThe logs are in {plan.folder / 'logs'}", file=sys.stderr)
        return 1
    finally:
        if not ready:  # whatever the reason, Ctrl-C too: nothing half-started stays behind
            server.stop(plan.folder)
        progress.end()  # which fails where the terminal was closed
    return _tell(record, plan.folder)


def _tell(record: server.Record, folder: Path) -> int:
    """Say where it answers and how to ask."""
    header = ""
    if record.token_auth:
        path = shlex.quote(str(folder / "key_file.json"))
        print(f'KEY=$(sed -n \'/inference/,/}}/s/.*"key": "\\(.*\\)".*/\\1/p\' {path})')
        header = ' -H "Authorization: Bearer $KEY"'
    url = f"{record.url}/predictions/{server.MODEL}"
    host = urllib.parse.urlsplit(url).hostname
    if {"http", "all"} & urllib.request.getproxies().keys() and not urllib.request.proxy_bypass(host):
        header += " --noproxy '*'"
    print(f"curl {url}{header} -H 'Content-Type: application/json' -d '{QUESTION}'")
    return 0


def stop(options: Options) -> int:
    """End the server."""
    _record(options)
    ended = server.stop(options.build / "serve")
    print(f"stopped ({ended} processes)" if ended else "not running", file=sys.stderr)
    return 0


def _record(options: Options) -> server.Record | None:
    """The server of a build folder, which is not to be taken for another one."""
    record = server.Record.read(options.build / "serve")
    said = options.port is not None and record is not None and record.alive
    if said and not record.url.endswith(f":{options.port}"):
        raise ConfigError(
            f"the server of {options.build} is at {record.url}; one on another PORT has its own BUILD=DIR"
        )
    return record


def status(options: Options) -> int:
    """Say whether the server runs and answers; 0 if it does."""
    folder, record = options.build / "serve", _record(options)
    if record is None or not record.alive:
        print("not running")
        return 1
    state = server.worker_state(record, folder)
    good = state == server.READY and server.probe(record, folder, 10.0)[0] in (server.OK, server.FULL)
    seconds = time.time() - record.started
    ids = " ".join(str(each.pid) for each in processes.of_server(record.mark))
    print(f"{'answers' if good else 'does not answer'} at {record.url} ({state}), up {seconds / 60:.0f} min")
    print(f"checkpoint {record.checkpoint}, {record.ranks} rank(s), processes {ids}\nlogs {folder / 'logs'}")
    return 0 if good else 1


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = Parser(prog="python -m tools.serve", description="Serve the model with TorchServe.")
    parser.add_argument("command", choices=("start", "stop", "status"))
    Options.add_arguments(parser)
    flags = parser.parse_args(argv)
    with interrupts():
        return _run(flags.command, flags.words)


def _run(command: str, words: list[str]) -> int:
    options = Options()
    try:
        options = Options.from_words(words)
        said = {word.partition("=")[0].upper() for word in words}
        for name in (name for name in _BEHIND if name in os.environ and name not in said):
            print(f"warning: {name} of the environment is not read; say: make {command} {name}=...", file=sys.stderr)
        if command == "status":
            return status(options)
        with server.only_one(options.build / "serve"):
            return start(options) if command == "start" else stop(options)
    except ConfigError as error:
        print(f"serve: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = error.filename2 or error.filename or options.build
        print(f"serve: error: {where}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        record = server.Record.read(options.build / "serve")
        left = f"the server at {record.url} still runs" if record is not None and record.alive else "no server runs"
        print(f"interrupted; {left}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
