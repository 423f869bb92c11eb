"""OpenAI's answers: completions and chat completions, whole and as server-sent events."""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.config import RequestError
from engine.sequence import TokenLogprobs
from handler.responses import EVENTS, JSON, Choice, Piece, Usage, error_json, finite, to_json
from tokenizing import Tokenizer

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Format:
    """What every object of an answer repeats, and what was asked to be in it."""

    tokenizer: Tokenizer
    model: str
    stream: bool
    logprobs: bool
    include_usage: bool


@dataclass(frozen=True)
class EchoedPrompt:
    """A prompt that stands in front of its completions."""

    text: str
    ids: tuple[int, ...]


def event(value: Any) -> bytes:
    """A value as one server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


def usage_json(usage: Usage) -> dict[str, Any]:
    """What a request took, as OpenAI writes it."""
    return usage.totals() | {"prompt_tokens_details": {"cached_tokens": usage.cached_tokens}}


def token_bytes(tokenizer: Tokenizer, id: int) -> bytes:
    """A token's bytes; a model's vocabulary may be padded beyond its tokenizer's, with tokens that have none."""
    return tokenizer.token_bytes(id) if id < tokenizer.vocab_size else b""


def token_text(tokenizer: Tokenizer, id: int) -> str:
    """A token as a string; bytes that are no text of their own are spelt out, as OpenAI does."""
    data = token_bytes(tokenizer, id)
    if not data:
        return tokenizer.control_names.get(id, "")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class _OpenAIRenderer:
    """What both APIs share: the envelope, the usage at the end, errors."""

    prefix = ""
    whole_object = ""
    chunk_object = ""

    def __init__(self, format: Format) -> None:
        self.content_type = EVENTS if format.stream else JSON
        self._format = format
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        # What stands around the one choice of every chunk, written once: a token's own part is small.
        usage = {"usage": None} if format.include_usage else {}
        around = event(self._envelope(self.chunk_object, []) | usage)
        self._before, self._behind = around.rsplit(b"[]", 1)

    def end(self, usage: Usage) -> bytes:
        """The usage, if asked for, and the end mark."""
        if not self._format.include_usage:
            return DONE
        return event(self._envelope(self.chunk_object, []) | {"usage": usage_json(usage)}) + DONE

    def error(self, error: RequestError) -> bytes:
        """An event that clients raise, and the end mark for those that wait for it; if nothing streams, an object."""
        return event(error_json(error)) + DONE if self._format.stream else to_json(error_json(error))

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """One object with all choices."""
        rendered = [self._whole_choice(index, choice) for index, choice in enumerate(choices)]
        return to_json(self._envelope(self.whole_object, rendered) | {"usage": usage_json(usage)})

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        return b"%b[%b]%b" % (self._before, to_json(choice), self._behind)

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._format.model,
            "choices": choices,
        }


class CompletionRenderer(_OpenAIRenderer):
    """`/v1/completions`; with `echo` the prompt and its log-probabilities come first."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, format: Format, n: int, echo: Sequence[EchoedPrompt] | None = None) -> None:
        super().__init__(format)
        self._n, self._echo = n, echo
        self._tokens: dict[int, _TokenList] = {}  # of each choice of a stream

    def begin(self, choice: int, prompt_logprobs: Sequence[TokenLogprobs] | None) -> bytes:
        """The echoed prompt."""
        prompt = self._prompt(choice)
        if prompt is None:
            return b""
        if not self._format.logprobs:
            return self._chunk(self._choice(choice, prompt.text, None, None))
        tokens = self._tokens[choice] = _TokenList(self._format.tokenizer)
        tokens.add_prompt(prompt, prompt_logprobs or ())
        tokens.written += len(prompt.text)
        return self._chunk(self._choice(choice, prompt.text, tokens, None))

    def piece(self, piece: Piece) -> bytes:
        """A chunk, if it has text, log-probabilities or the end."""
        logprobs = piece.logprobs if self._format.logprobs else ()
        if not (piece.text or logprobs or piece.finish_reason):
            return b""
        if not self._format.logprobs:
            return self._chunk(self._choice(piece.choice, piece.text, None, piece.finish_reason))
        tokens = self._tokens.setdefault(piece.choice, _TokenList(self._format.tokenizer))
        tokens.add(logprobs)
        tokens.written += len(piece.text)
        return self._chunk(self._choice(piece.choice, piece.text, tokens, piece.finish_reason))

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        prompt = self._prompt(index)
        text = choice.text if prompt is None else prompt.text + choice.text
        if not self._format.logprobs:
            return self._choice(index, text, None, choice.finish_reason)
        tokens = _TokenList(self._format.tokenizer)
        if prompt is not None:
            tokens.add_prompt(prompt, choice.prompt_logprobs or ())
        tokens.add(choice.logprobs or ())
        tokens.written = len(text)
        return self._choice(index, text, tokens, choice.finish_reason)

    def _prompt(self, choice: int) -> EchoedPrompt | None:
        return None if self._echo is None else self._echo[choice // self._n]

    def _choice(self, index: int, text: str, tokens: _TokenList | None, finish_reason: str | None) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": None if tokens is None else tokens.take(final=finish_reason is not None),
            "finish_reason": finish_reason,
        }


class _TokenList:
    """The log-probabilities of one choice's tokens as four parallel lists, and where each begins in its text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.written = 0  # characters of the choice's text that went out
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0
        self._clear()

    def add_prompt(self, prompt: EchoedPrompt, logprobs: Sequence[TokenLogprobs]) -> None:
        """A prompt's tokens, of which the first has no log-probability."""
        joined = b"".join(token_bytes(self._tokenizer, id) for id in prompt.ids).decode("utf-8", "replace")
        # The tokenizer puts a space before a text, which the text itself does not have.
        self._offset = min(0, len(prompt.text) - len(joined))
        for position, id in enumerate(prompt.ids):
            self._add(id, logprobs[position - 1] if 0 < position <= len(logprobs) else None)
        self._offset = len(prompt.text)
        self._utf8.reset()

    def add(self, logprobs: Iterable[TokenLogprobs]) -> None:
        """Generated tokens."""
        for logprob in logprobs:
            self._add(logprob.token, logprob)

    def take(self, *, final: bool) -> dict[str, list[Any]]:
        """What was added since the last time; the text that a stop string cut off has no place in the text."""
        lists = self._lists
        if final:
            lists["text_offset"] = [min(offset, self.written) for offset in lists["text_offset"]]
        self._clear()
        return lists

    def _clear(self) -> None:
        self._lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def _add(self, id: int, logprob: TokenLogprobs | None) -> None:
        text, data = token_text(self._tokenizer, id), token_bytes(self._tokenizer, id)
        if data and data[0] & 0xC0 != 0x80:  # no rest of a character: what waits for one was none
            self._offset += len(self._utf8.decode(b"", final=True))
        self._lists["tokens"].append(text)
        self._lists["text_offset"].append(max(0, self._offset))
        self._offset += len(self._utf8.decode(data))
        if logprob is None:
            self._lists["token_logprobs"].append(None)
            self._lists["top_logprobs"].append(None)
            return
        top = {}
        for other, value in logprob.top:  # by likelihood; of two tokens that read the same the likelier one stays
            top.setdefault(token_text(self._tokenizer, other), finite(value))
        top.setdefault(text, finite(logprob.logprob))
        self._lists["token_logprobs"].append(finite(logprob.logprob))
        self._lists["top_logprobs"].append(top)


class ChatRenderer(_OpenAIRenderer):
    """`/v1/chat/completions`."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def begin(self, choice: int, prompt_logprobs: Sequence[TokenLogprobs] | None) -> bytes:
        """Who speaks."""
        return self._chunk(self._delta(choice, {"role": "assistant", "content": ""}))

    def piece(self, piece: Piece) -> bytes:
        """A chunk of content, if there is any, and one of its own for the end."""
        chunks = b""
        logprobs = self._logprobs(piece.logprobs)
        if piece.text or (logprobs and logprobs["content"]):
            chunks = self._chunk(self._delta(piece.choice, {"content": piece.text}, logprobs))
        if piece.finish_reason is not None:
            chunks += self._chunk(self._delta(piece.choice, {}, finish_reason=piece.finish_reason))
        return chunks

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.logprobs or ()),
            "finish_reason": choice.finish_reason,
        }

    @staticmethod
    def _delta(
        index: int,
        delta: dict[str, str],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, logprobs: Iterable[TokenLogprobs]) -> dict[str, Any] | None:
        if not self._format.logprobs:
            return None
        content = [
            self._token(logprob.token, logprob.logprob)
            | {"top_logprobs": [self._token(token, value) for token, value in logprob.top]}
            for logprob in logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        data = token_bytes(self._format.tokenizer, id)
        return {
            "token": token_text(self._format.tokenizer, id),
            "logprob": finite(logprob),
            "bytes": list(data) or None,
        }
