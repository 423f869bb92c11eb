"""What goes back to clients: whole answers, streamed lines and errors, all of it JSON in UTF-8."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine.config import RequestError
from engine.sequence import TokenLogprobs

JSON = "application/json"
LINES = "application/x-ndjson; charset=utf-8"
EVENTS = "text/event-stream; charset=utf-8"  # without the charset, clients read text/* as Latin-1

LEAST_LOGPROB = -9999.0  # OpenAI's number for "as good as impossible"; JSON has no infinity
MAX_MESSAGE = 2000  # characters of an error's message

# Line ends to str.splitlines(), by which clients cut a stream, though not to JSON.
_LINE_ENDS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})

# Made once: json.dumps makes an encoder for every token.
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode

_INVALID = "invalid_request_error"
_ERRORS = {
    404: (_INVALID, "not_found"),
    413: (_INVALID, "body_too_large"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    503: ("server_error", "service_unavailable"),
    504: ("server_error", "timeout"),
}


@dataclass(frozen=True)
class Reply:
    """A whole HTTP answer."""

    status: int
    body: bytes
    content_type: str = JSON
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """What one step adds to one choice; `ids` and `logprobs` include a stop token, `text` never does."""

    choice: int
    text: str
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: str | None


@dataclass(frozen=True)
class Choice:
    """A finished answer; `prompt_logprobs` begin with the prompt's second token, as the first has none."""

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: str


@dataclass(frozen=True)
class Usage:
    """How many tokens a request took, over all of its prompts and choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Of the prompts, what was in the cache already."""

    def totals(self) -> dict[str, int]:
        """What every API here writes alike."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def to_json(self) -> dict[str, int]:
        """All of it in one row; OpenAI's API has it nested."""
        return self.totals() | {"cached_tokens": self.cached_tokens}


class Renderer(Protocol):
    """How one request's answers are written; a stream is `begin` and `piece` per choice, then `end` once."""

    content_type: str

    def begin(self, choice: int, prompt_logprobs: Sequence[TokenLogprobs] | None) -> bytes:
        """What precedes a choice's first piece in a stream, b"" if nothing does."""
        ...

    def piece(self, piece: Piece) -> bytes:
        """The stream's next bytes for one choice, b"" if there is nothing to say."""
        ...

    def end(self, usage: Usage) -> bytes:
        """The end of a stream, when every choice had its last piece."""
        ...

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """The body of an answer that is not streamed."""
        ...

    def error(self, error: RequestError) -> bytes:
        """The end of an answer that fails after its status went out."""
        ...


def to_json(value: Any) -> bytes:
    """A value as one line of JSON, without a line end."""
    text = _encode(value).translate(_LINE_ENDS)
    return text.encode("utf-8", "replace")


def json_reply(value: Any) -> Reply:
    """A value as a whole answer."""
    return Reply(200, to_json(value))


def error_json(error: RequestError) -> dict[str, Any]:
    """An error as OpenAI writes it."""
    kind, code = _ERRORS.get(error.status, ("server_error" if error.status >= 500 else _INVALID, None))
    message = error.message if len(error.message) <= MAX_MESSAGE else error.message[:MAX_MESSAGE] + "..."
    return {"error": {"message": message, "type": kind, "param": error.param, "code": error.code or code}}


def error_reply(error: RequestError) -> Reply:
    """An error as a whole answer; what may pass by itself says when to try again."""
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    return Reply(error.status, to_json(error_json(error)), headers=headers)


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, LEAST_LOGPROB) if math.isfinite(logprob) else LEAST_LOGPROB


class NativeRenderer:
    """The model's own endpoint: lines of JSON, or one object; several choices are told apart by their number."""

    def __init__(self, choices: int, *, stream: bool, logprobs: bool) -> None:
        self.content_type = LINES if stream else JSON
        self._choices, self._logprobs = choices, logprobs
        self._unfinished = choices
        self._last: dict[str, Any] | None = None

    def begin(self, choice: int, prompt_logprobs: Sequence[TokenLogprobs] | None) -> bytes:
        """The prompt's log-probabilities, if asked for."""
        if prompt_logprobs is None:
            return b""
        line = self._line(choice, "", ())
        return _line(line | {"prompt_logprobs": [None, *map(_native_logprob, prompt_logprobs)]})

    def piece(self, piece: Piece) -> bytes:
        """A line; the very last one waits for the usage, so that one line ends the stream."""
        if not (piece.text or piece.ids or piece.finish_reason):
            return b""
        line = self._line(piece.choice, piece.text, piece.ids)
        if self._logprobs:
            line["logprobs"] = list(map(_native_logprob, piece.logprobs))
        if piece.finish_reason is not None:
            line["finish_reason"] = piece.finish_reason
            self._unfinished -= 1
            if self._unfinished == 0:
                self._last = line
                return b""
        return _line(line)

    def end(self, usage: Usage) -> bytes:
        """The last line, with the usage."""
        line, self._last = self._last or {"text": "", "ids": []}, None
        return _line(line | {"usage": usage.to_json()})

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """One object; of several choices, a list."""
        answers = []
        for number, choice in enumerate(choices):
            answer = self._line(number, choice.text, choice.ids)
            if self._logprobs and choice.logprobs is not None:
                answer["logprobs"] = list(map(_native_logprob, choice.logprobs))
            if choice.prompt_logprobs is not None:
                answer["prompt_logprobs"] = [None, *map(_native_logprob, choice.prompt_logprobs)]
            answers.append(answer | {"finish_reason": choice.finish_reason})
        body = answers[0] if self._choices == 1 else {"choices": answers}
        return _line(body | {"usage": usage.to_json()})

    def error(self, error: RequestError) -> bytes:
        """The error as the last line, behind any line that waited."""
        waited, self._last = self._last, None
        return (_line(waited) if waited else b"") + _line(error_json(error))

    def _line(self, choice: int, text: str, ids: tuple[int, ...]) -> dict[str, Any]:
        number = {"choice": choice} if self._choices > 1 else {}
        return number | {"text": text, "ids": list(ids)}


def _line(value: Any) -> bytes:
    return to_json(value) + b"\n"


def _native_logprob(logprob: TokenLogprobs) -> dict[str, Any]:
    top = {str(token): finite(value) for token, value in logprob.top}
    return {"id": logprob.token, "logprob": finite(logprob.logprob), "top": top}


class _Whole:
    """What the protocols without streams have in common."""

    content_type = JSON

    def begin(self, choice: int, prompt_logprobs: Sequence[TokenLogprobs] | None) -> bytes:
        """Nothing; this protocol has no streams."""
        return b""

    def piece(self, piece: Piece) -> bytes:
        """Nothing; this protocol has no streams."""
        return b""

    def end(self, usage: Usage) -> bytes:
        """Nothing; this protocol has no streams."""
        return b""

    def error(self, error: RequestError) -> bytes:
        """The body of an error."""
        return to_json(error_json(error))


class KServeV1Renderer(_Whole):
    """KServe's first protocol: a list of texts."""

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """One prediction per instance."""
        return to_json({"predictions": [choice.text for choice in choices]})


class KServeV2Renderer(_Whole):
    """KServe's second protocol (Open Inference): named tensors of strings."""

    OUTPUTS = ("text", "finish_reason")

    def __init__(self, model: str, id: str | None, outputs: Sequence[str]) -> None:
        self._model, self._id, self._outputs = model, id, outputs

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """One tensor per output that was asked for, with one element per prompt."""
        tensors = [
            {"name": name, "shape": [len(choices)], "datatype": "BYTES", "data": [getattr(c, name) for c in choices]}
            for name in self._outputs
        ]
        number = {} if self._id is None else {"id": self._id}
        return to_json({"model_name": self._model} | number | {"outputs": tensors, "parameters": usage.to_json()})
