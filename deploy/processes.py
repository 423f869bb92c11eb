"""The processes of one server: each carries the server's mark in its environment, so that no other is ever touched."""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from collections.abc import Callable

import psutil

MARK = "LLAMA_SERVER"
FRONTEND_S = 20.0
WORKERS_S = 3.0
KILLED_S = 10.0


def of_server(mark: str) -> list[psutil.Process]:
    """This user's processes that were started for the server `mark`, oldest first."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.uids().real == os.getuid() and process.environ().get(MARK) == mark:
                found.append(process)
        except psutil.Error:  # it ended, or is not ours to look at
            continue
    return sorted((each for each in found if _alive(each)), key=lambda each: each.create_time())


def end(mark: str) -> int:
    """End all processes of a server, the frontend first and politely; how many there were."""
    processes = of_server(mark)
    seen = set(processes)

    def left() -> list[psutil.Process]:
        # One that is ending has lost its environment some time before it is gone.
        return [each for each in seen.union(of_server(mark)) if _alive(each)]

    # The frontend ends its workers by itself; ranks that are told at the same time would only look like crashes to it.
    _tell(processes[:1], signal.SIGTERM)
    _wait(lambda: any(_alive(each) for each in processes[:1]), FRONTEND_S)
    for patience, number in ((WORKERS_S, signal.SIGTERM), (WORKERS_S, signal.SIGKILL), (KILLED_S, None)):
        if _wait(lambda: bool(left()), patience):
            break
        still = left()
        seen.update(still)
        if number is not None:
            _tell(still, number)
    return len(seen)


def _wait(pending: Callable[[], bool], seconds: float) -> bool:
    """Whether `pending` became false in time."""
    deadline = time.monotonic() + seconds
    while pending():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _tell(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        try:
            process.send_signal(number)  # psutil checks that the id was not given to another process since
        except psutil.Error:
            pass


def port_is_free(host: str, port: int) -> bool:
    """Whether a server can listen there; OSError if none ever could, such as on an address of another machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return False
    return True


def listens(mark: str, port: int) -> bool:
    """Whether it is a process of the server `mark` that listens on a port."""
    for process in of_server(mark):
        try:
            connections = process.net_connections("tcp")
        except psutil.Error:  # it ended
            continue
        if any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in connections):
            return True
    return False


def listener(port: int) -> str:
    """Who listens on a port, as far as this user may know."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                process = psutil.Process(connection.pid)
                return f"process {process.pid} ({' '.join(process.cmdline())[:80]})"
    except psutil.Error:
        pass
    return "another program"
