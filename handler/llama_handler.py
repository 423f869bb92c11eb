"""The TorchServe handler: continuous batching as transport, the engine in its own thread.

TorchServe's contract, as measured on 0.12, that this file keeps:

- `ctx.request_ids` is the only truth about which requests live; an id that is gone means that its client left.
- `ctx.stopping_criteria[i](ret[i])` is False when more follows, True for the last chunk, and None when this reply is
  the whole answer; a first reply that is also the last must be None, or the client never gets its headers.
- An index deleted from `ctx.request_ids` is left out of this reply, so its status is still open.
- The first chunk fixes status and content type; what fails later ends the stream with an error event.
- Nothing is raised for one client: an exception fails the whole batch.
- The frontend notices that a client left only when it is sent something for it, so every request is, now and then.
- When the last request of a worker goes, `handle` is not called again: after a moment of silence what is left behind
  gives back its slots. If the frontend had only stalled, it comes back and goes on where it was.
- After a restart the frontend may lag one reply behind: an id that was answered is not answered twice.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import OrderedDict
from http import HTTPStatus
from pathlib import Path
from typing import Any

from ts.torch_handler.base_handler import BaseHandler

from engine.config import ConfigError, RequestError
from engine.engine import Engine
from engine.lifeline import die_with_parent
from engine.parallel import Launch
from engine.sequence import FinishReason, Sequence
from handler.bodies import parse_json
from handler.engine_loop import CRASHED, EngineLoop
from handler.generation import Generation, Service
from handler.metrics import ServiceMetrics
from handler.protocol import understand
from handler.responses import Reply, error_reply
from handler.session import News, Session
from handler.settings import HandlerSettings, parse
from handler.transport import read_messages_whole
from tokenizing import Tokenizer, load_tokenizer

log = logging.getLogger("llama")

# After this long without a first token the status goes out, and from then on something at this pace: only when the
# frontend writes does it see that a client is gone.
SIGN_OF_LIFE_S = 0.25
LEAST_WAIT_S = 0.002
REMEMBERED = 4096
# They are written in one go, each in some 10 us, and TorchServe takes replies up to a size.
MOST_LOGPROBS = 1 << 18


def more(_: bytes) -> bool:
    """This request gets further chunks."""
    return False


def last(_: bytes) -> bool:
    """This was the request's last chunk."""
    return True


def whole(_: bytes) -> None:
    """This one reply is the request's whole answer."""
    return None


class LlamaHandler(BaseHandler):
    """One per rank; rank 0 answers, the others follow its engine."""

    def initialize(self, ctx: Any) -> None:
        """Load this rank's share of the model; a setting that cannot work stops the start with one line."""
        die_with_parent()
        logging.getLogger().setLevel(logging.WARNING)  # TorchServe's own line for every call
        model_dir = Path(ctx.system_properties["model_dir"])
        try:
            self.settings = parse(ctx.model_yaml_config or {}, model_dir)
            for name in ("llama", "engine", "handler"):
                logging.getLogger(name).setLevel(self.settings.log_level)
            launch = Launch.from_environment()
            self.engine, checkpoint = Engine.load(self.settings.converted_ckpt_dir, self.settings, launch)
            tokenizer = load_tokenizer(self.settings.tokenizer_path or checkpoint.tokenizer_path)
        except (ConfigError, ValueError) as error:
            log.error("llama cannot start: %s", error)
            raise
        self.leads = self.engine.ranks.leads
        if self.leads:
            if self.engine.ranks.device.startswith("cuda"):
                self.engine.rehearse()
            self._lead(ctx, self.settings, tokenizer, checkpoint.args.vocab_size)
        else:
            threading.Thread(target=self._follow, name="engine", daemon=True).start()
        log.info("llama ready: rank %d of %d, process %d", launch.rank, launch.size, os.getpid())
        self.initialized = True

    def _lead(self, ctx: Any, settings: HandlerSettings, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._service = Service(
            tokenizer=tokenizer,
            model_name=ctx.model_name or "llama",
            max_seq_len=self.engine.limits.max_seq_len,
            vocab_size=vocab_size,
            created=int(time.time()),
            defaults=settings.sampling_defaults(),
            max_body_bytes=settings.max_body_bytes,
        )
        self._metrics = ServiceMetrics(ctx.metrics, self._service.model_name)
        self._sessions: dict[str, Session] = {}
        self._answered: OrderedDict[str, None] = OrderedDict()  # the latest requests that are over
        self._untaken: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}  # came, and wait to be understood
        self._guard = threading.Lock()  # the handler's thread against the lease's
        self._last_call = time.monotonic()
        self._loop = EngineLoop(self.engine, settings.max_waiting, settings.watchdog_sec)
        self._loop.start()
        read_messages_whole()
        threading.Thread(target=self._keep_lease, name="lease", daemon=True).start()

    def _follow(self) -> None:
        try:
            self.engine.follow()
        except BaseException:
            log.exception("rank %d lost its leader; this process ends", self.engine.ranks.launch.rank)
        os._exit(CRASHED)

    def handle(self, data: list[dict[str, Any]], ctx: Any) -> list[bytes]:
        """Take what is new, wait a moment for news, and say what there is."""
        if not self.leads:
            return [b""] * len(data)
        with self._guard:
            try:
                return self._handle(data, ctx)
            finally:
                self._last_call = time.monotonic()

    def _handle(self, data: list[dict[str, Any]], ctx: Any) -> list[bytes]:
        ids: dict[int, str] = ctx.request_ids
        bodies, criteria = [b""] * len(data), [more] * len(data)
        present = set(ids.values())
        for request_id in [request_id for request_id in self._sessions if request_id not in present]:
            self._end(self._sessions[request_id], FinishReason.CANCELLED)
        self._untaken = {request_id: kept for request_id, kept in self._untaken.items() if request_id in present}
        answered_at_once, began = False, None
        for place in range(len(data)):
            request_id = ids[place]
            if request_id in self._sessions:
                self._sessions[request_id].left_at = None
                self._loop.resume(self._sessions[request_id])
                continue
            if request_id in self._answered:
                del ids[place]
                continue
            new = self._untaken.pop(request_id, None) or (ctx.get_all_request_header(place), data[place])
            began = began or time.monotonic()
            # Long bodies take time, and others have news: but one is read in every call.
            if time.monotonic() - began > self.settings.poll_sec:
                self._untaken[request_id] = new
                del ids[place]
                continue
            reply = self._take(request_id, *new)
            if reply is not None:
                bodies[place], criteria[place] = self._whole(ctx, place, reply)
                self._remember(request_id)
                answered_at_once = True
        sessions = [(place, self._sessions[id_]) for place, id_ in list(ids.items()) if id_ in self._sessions]
        with self._loop.changed:
            if not answered_at_once and not self._untaken:
                self._loop.changed.wait_for(lambda: any(session.has_news for _, session in sessions), self._patience())
            now = time.monotonic()
            for _, session in sessions:
                if now > session.deadline:
                    session.fail(self._too_late())
            # Settled under the lock: one that ends a moment later has not been told yet.
            news = [session.news() for _, session in sessions]
        for (place, session), told in zip(sessions, news, strict=True):
            if not self._say(ctx, place, session, told, bodies, criteria, now):
                del ids[place]
            elif told.done:
                self._end(session, "error" if told.error else "ok")
        self._metrics.gauges(self.engine.running, self.engine.waiting, self.engine.limits.max_batch_size)
        ctx.stopping_criteria = criteria
        return bodies

    def _patience(self) -> float:
        """How long to wait for news.

        Each call costs the frontend and this process work on every running request. While a slot is free there are some
        in every step, as whoever comes waits for the next one; else the step's news are soon enough.
        """
        engine, longest = self.engine, self.settings.poll_sec
        if engine.running + engine.waiting >= engine.limits.max_batch_size:
            return longest
        return min(longest, max(LEAST_WAIT_S, self._loop.step_s / 4))

    def _take(self, request_id: str, headers: dict[str, Any], row: dict[str, Any]) -> Reply | None:
        """Start a new request; what needs no engine, or is refused, is answered at once."""
        headers = {str(name).lower(): value for name, value in headers.items()}
        try:
            encoding = str(headers.get("content-encoding") or "identity").lower()
            if encoding != "identity":
                raise RequestError(f"the body is encoded with {encoding!r}; send it as it is", status=415)
            content_type = _content_type(headers)
            body = b"" if not row and "form" not in content_type else _body(row)
            understood = understand(headers.get("url_path", ""), content_type, body, self._service)
            if isinstance(understood, Reply):
                return understood
            self._sessions[request_id] = self._start(request_id, understood)
        except RequestError as error:
            self._metrics.refused(error.status)
            return error_reply(error)
        except Exception:  # a defect of ours must not take the neighbours along
            log.exception("request %s could not be understood", request_id)
            self._metrics.refused(500)
            return error_reply(RequestError("the server failed to understand the request", status=500))
        return None

    def _start(self, request_id: str, generation: Generation) -> Session:
        try:
            sequences = [
                self.engine.prepare(list(prompt), generation.params_for(choice), self._tokenizer.stop_ids)
                for prompt in generation.prompts
                for choice in range(generation.n)
            ]
        except RequestError as error:
            if error.param == "prompt":
                error.param = generation.content
            raise
        told = sum(_logprobs_at_once(each, generation.stream) for each in sequences)
        if told > MOST_LOGPROBS:
            advice = "stream, or ask for fewer tokens, alternatives or answers"
            raise RequestError(
                f"up to {told} log-probabilities would be in one reply, at most {MOST_LOGPROBS}; {advice}", "logprobs"
            )
        deadline = time.monotonic() + self.settings.request_timeout_sec
        session = Session(request_id, generation, sequences, self._tokenizer, deadline)
        self._loop.submit(session)
        return session

    def _too_late(self) -> RequestError:
        limit = self.settings.request_timeout_sec
        return RequestError(f"no complete answer within request_timeout_sec ({limit:g} s)", status=504)

    def _say(
        self, ctx: Any, place: int, session: Session, news: News, bodies: list[bytes], criteria: list[Any], now: float
    ) -> bool:
        """Put a session's news into the reply; False when there is nothing to say about it this time."""
        if news.error is not None and not session.committed:
            bodies[place], criteria[place] = self._whole(ctx, place, error_reply(news.error))
            return True
        body = news.render()
        if news.error is not None:
            body += session.generation.renderer.error(news.error)
        silent_since = session.last_sent if session.committed else session.times.arrived
        if not body and not news.done and now - silent_since < SIGN_OF_LIFE_S:
            return False
        ctx.set_response_content_type(place, session.generation.renderer.content_type)
        bodies[place] = body
        if news.done:
            criteria[place] = last if session.committed else whole
        session.committed, session.last_sent = True, now
        return True

    def _whole(self, ctx: Any, place: int, reply: Reply) -> tuple[bytes, Any]:
        """A reply that is complete in itself."""
        phrase = HTTPStatus(reply.status).phrase
        ctx.set_response_status(code=reply.status, phrase=phrase, idx=place)
        ctx.set_response_content_type(place, reply.content_type)
        for name, value in reply.headers.items():
            ctx.set_response_header(place, name, value)
        return reply.body, whole

    def _end(self, session: Session, outcome: str) -> None:
        """Forget a session, free what it holds, and leave one line about it."""
        self._loop.cancel(session)
        self._sessions.pop(session.request_id, None)
        self._remember(session.request_id)
        seconds = (session.left_at or time.monotonic()) - session.times.arrived
        self._metrics.finished(session, outcome, seconds)
        usage, times = session.usage, session.times
        first = f"{times.first_token - times.arrived:.3f}" if times.first_token is not None else "-"
        log.info(
            "request %s %s prompt_tokens=%d generated_tokens=%d ttft_s=%s total_s=%.3f",
            session.request_id,
            outcome,
            usage.prompt_tokens,
            usage.completion_tokens,
            first,
            seconds,
        )

    def _remember(self, request_id: str) -> None:
        self._answered[request_id] = None
        while len(self._answered) > REMEMBERED:
            self._answered.popitem(last=False)

    def _keep_lease(self) -> None:
        """While requests live the frontend calls back to back; when it stops, it has dropped them all, or is stuck."""
        while True:
            time.sleep(self.settings.lease_sec / 4)
            with self._guard:
                if time.monotonic() - self._last_call < self.settings.lease_sec:
                    continue
                # Whether they are gone for good, the next call will tell.
                for session in self._sessions.values():
                    session.left_at = session.left_at or self._last_call
                    self._loop.suspend(session)
                # Slots are free only after the call that cancelled, and there may be no further one to tell so.
                self._metrics.gauges(self.engine.running, self.engine.waiting, self.engine.limits.max_batch_size)


FORM_ADVICE = (
    "the body came as a form, of which TorchServe passes on named fields only: send JSON with "
    "-H 'Content-Type: application/json', a text with -H 'Content-Type: text/plain' (or curl -T FILE), "
    "or fields such as -d 'prompt=Hello' -d max_new_tokens=20"
)


def _body(row: dict[str, Any]) -> bytes:
    """The request's content, under either name that TorchServe gives it, or as JSON made of a form's fields.

    `curl -d` calls whatever it sends a form; the frontend takes it apart and drops what has no name and value.
    """
    value = row.get("body", row.get("data"))
    if value is not None and len(row) == 1:
        return value.encode() if isinstance(value, str) else bytes(value)
    if not row or any(not name.isidentifier() for name in row):
        raise RequestError(FORM_ADVICE)
    return json.dumps({name: _field(name, bytes(value)) for name, value in row.items()}).encode()


def _field(name: str, value: bytes) -> Any:
    """A form's field: JSON where it is JSON, but a prompt is a text whatever it looks like."""
    text = value.decode(errors="replace")
    if name == "prompt":
        return text
    try:
        given = parse_json(text)
    except RequestError:
        return text
    return text if name == "stop" and not isinstance(given, list | None) else given


def _content_type(headers: dict[str, Any]) -> str:
    """The client's content type; TorchServe nests the one of each parameter."""
    value = headers.get("content-type", "")
    if not value:
        nested = headers.get("body", headers.get("data"))
        value = nested.get("content-type", "") if isinstance(nested, dict) else ""
    return value if isinstance(value, str) else ""


def _logprobs_at_once(sequence: Sequence, stream: bool) -> int:
    """How many log-probabilities one reply may have to hold of a sequence: all, or a stream's of the prompt."""
    params, prompt = sequence.params, sequence.prompt_length
    told = 0 if params.prompt_logprobs is None else prompt * (1 + params.prompt_logprobs)
    if params.logprobs is not None and not stream:
        told += (sequence.limit - prompt) * (1 + params.logprobs)
    return told
