"""The engine's own thread: it steps whenever there is work and never waits for HTTP."""

from __future__ import annotations

import logging
import os
import threading
import time

from engine.config import RequestError
from engine.engine import Engine
from handler.session import Session

log = logging.getLogger(__name__)

HEARTBEAT_S = 30.0
LAST_WORDS_S = 2.0  # for which a process that is to end waits until all clients are told
CRASHED, HUNG = 70, 71  # the process's exit status when its engine crashes or stops making progress


class EngineLoop(threading.Thread):
    """Feeds sessions to the engine and its tokens to the sessions; `changed` guards both and tells of news."""

    def __init__(self, engine: Engine, max_waiting: int, watchdog_s: float) -> None:
        super().__init__(name="engine", daemon=True)
        self.engine = engine
        self.changed = threading.Condition()
        self._inbox: list[Session] = []
        self._leaving: set[Session] = set()
        self._owners: dict[int, Session] = {}
        self._capacity = engine.limits.max_batch_size + max_waiting
        self._watchdog_s = watchdog_s
        self._step_began: float | None = None
        self._ended: RequestError | None = None
        self.step_s = 0.0  # how long the last step took

    @property
    def live(self) -> int:
        """How many sequences wait or run."""
        return sum(not sequence.finished for session in self._inbox for sequence in session.sequences) + len(
            self._owners
        )

    def start(self) -> None:
        """Start the engine's thread and the one that watches it."""
        super().start()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def submit(self, session: Session) -> None:
        """Hand a session to the engine, or refuse it when the queue is full."""
        with self.changed:
            if self._ended is not None:
                raise self._ended
            if len(session.sequences) > self._capacity:
                raise RequestError(
                    f"the request asks for {len(session.sequences)} answers; this server takes {self._capacity} at once"
                )
            if self.live + len(session.sequences) > self._capacity:
                raise RequestError(
                    f"the queue is full: {self.live} answers wait or run, at most {self._capacity} may; try again",
                    status=429,
                )
            self._inbox.append(session)
            self.changed.notify_all()

    def cancel(self, session: Session) -> None:
        """Stop a session's sequences; their slots are free before the next step is planned."""
        with self.changed:
            for sequence in session.sequences:
                self.engine.cancel(sequence)
                self._owners.pop(sequence.number, None)
            self.changed.notify_all()

    def suspend(self, session: Session) -> None:
        """Give back what a session holds, so that `resume` can undo it; between steps, when no token is on its way."""
        with self.changed:
            self._leaving.add(session)
            self.changed.notify_all()

    def resume(self, session: Session) -> None:
        """Let a suspended session go on; what it had said already is computed again and not said again."""
        with self.changed:
            self._leaving.discard(session)
            if session.resume():
                self._inbox.append(session)
                self.changed.notify_all()

    def run(self) -> None:
        """Step for ever; an engine that fails takes its process along, since other ranks may be out of step."""
        try:
            while True:
                self._once()
        except BaseException:
            log.exception("the engine failed; this process ends")
            self._die(CRASHED, "the engine failed")

    def _once(self) -> None:
        with self.changed:
            if not self._inbox and not self.engine.busy and not self.changed.wait(HEARTBEAT_S):
                idle = not self._inbox
            else:
                idle = False
            leaving, self._leaving = self._leaving, set()
            for session in leaving:
                for sequence in session.suspend():
                    self.engine.cancel(sequence)
                    self._owners.pop(sequence.number, None)
            sessions, self._inbox = self._inbox, []
            for session in sessions:
                for sequence in session.sequences:
                    if not sequence.finished:  # its client may have left already
                        self.engine.enqueue(sequence)
                        self._owners[sequence.number] = session
        began = self._step_began = time.monotonic()
        if idle:
            self.engine.heartbeat()
        outputs = self.engine.step()
        self.step_s = time.monotonic() - began
        self._step_began = None
        if not outputs:
            return
        with self.changed:
            for output in outputs:
                session = self._owners.get(output.sequence.number)
                if session is None:  # cancelled while the step ran
                    continue
                stopped = session.take(output)
                if stopped:
                    self.engine.cancel(output.sequence)
                if stopped or output.finish_reason is not None:
                    self._owners.pop(output.sequence.number, None)
            self.changed.notify_all()

    def _watch(self) -> None:
        """End the process when one step takes too long: a rank that hangs in a collective says nothing."""
        while True:
            time.sleep(min(1.0, self._watchdog_s / 4))
            began = self._step_began
            if began is not None and time.monotonic() - began > self._watchdog_s:
                log.error("no step was completed in %.0f s; this process ends", self._watchdog_s)
                self._die(HUNG, f"no step was completed in {self._watchdog_s:.0f} s")

    def _die(self, status: int, why: str) -> None:
        """End the process, but tell every client first: whoever TorchServe was not waiting for then would hang."""
        self._step_began = None  # nobody else is to end it
        if self.changed.acquire(timeout=LAST_WORDS_S):
            self._ended = RequestError(f"{why}; the model starts anew: send the request again", status=503)
            for session in [*self._inbox, *self._owners.values()]:
                session.fail(self._ended)
            self.changed.notify_all()
            self.changed.release()
        deadline = time.monotonic() + LAST_WORDS_S
        while self.live and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)  # for the last reply itself
        os._exit(status)
