"""Where tools.chat has its answers from: an engine in this process, or a server."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

from engine.config import EngineConfig, RequestError
from engine.sequence import SamplingParams

# What takes seconds to import (torch) or serves one backend only is imported where it is used.
Message = dict[str, str]

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 600  # a full queue and a long prompt may take minutes before the first token
OFF = ("off", "none")


class AnswerError(Exception):
    """A question that got no answer, or only the beginning of one; the message is one line for the user."""


class ContextFull(AnswerError):
    """A dialog that is too long for the model; nothing of an answer has come yet."""


@dataclass(frozen=True)
class Settings:
    """How answers are drawn."""

    temperature: float = 0.6
    top_p: float = 0.9
    max_tokens: int | None = 512
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and not (isinstance(self.max_tokens, int) and self.max_tokens >= 1):
            raise RequestError(f"max_tokens is {self.max_tokens!r}; it must be a whole number, at least 1, or 'off'")
        self.sampling()

    def sampling(self) -> SamplingParams:
        """The same for the engine, which also checks it."""
        return SamplingParams(**dataclasses.asdict(self))

    def changed(self, name: str, text: str) -> Settings:
        """These settings with one taken from what a user typed; RequestError says what is allowed."""
        value: Any = text
        if name in ("max_tokens", "seed") and text.lower() in OFF:
            value = None
        else:
            try:
                value = int(text) if name in ("max_tokens", "seed") else float(text)
            except ValueError:
                pass  # the check of the text itself has the better message
        return dataclasses.replace(self, **{name: value})


@dataclass
class Figures:
    """What is known of one answer; a backend fills in the tokens, the chat the times."""

    prompt_tokens: int | None = None
    generated_tokens: int = 0
    finish_reason: str | None = None
    first_s: float | None = None
    total_s: float = 0.0

    def __str__(self) -> str:
        about = "" if self.prompt_tokens is not None else "about "  # a server that does not count for us
        rate = self.generated_tokens / self.total_s if self.total_s else 0.0
        first = "none" if self.first_s is None else f"{1000 * self.first_s:.0f} ms"
        return f"{about}{self.generated_tokens} tokens, {rate:.1f} tokens/s, time to first token {first}"


class Backend(Protocol):
    """Where answers come from."""

    label: str
    context: int | None  # in tokens, where it is known

    def answer(self, dialog: list[Message], settings: Settings, figures: Figures) -> Iterator[str]:
        """The answer's text as it comes; closing the iterator stops it."""

    def count(self, dialog: list[Message]) -> int | None:
        """The tokens of a dialog that ends with a question, where they can be counted."""


class HeldInterrupt:
    """Holds Ctrl-C back until it is asked for, as half a step could lose a slot; a second one does not wait."""

    def __init__(self) -> None:
        self._heard = self._installed = False

    def __enter__(self) -> HeldInterrupt:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._hear)
            self._installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def raise_if_heard(self) -> None:
        """Be interrupted here."""
        if self._heard:
            raise KeyboardInterrupt

    def _hear(self, *_: object) -> None:
        if self._heard:
            raise KeyboardInterrupt
        self._heard = True


class LocalBackend:
    """A converted checkpoint in this process."""

    def __init__(self, checkpoint: Path | None, config: EngineConfig) -> None:
        from generate import LLM, demo_checkpoint

        self.llm = LLM(checkpoint or demo_checkpoint(), config)
        limits = self.llm.engine.limits
        self.context: int | None = limits.max_seq_len
        name = "the embedded demo model" if checkpoint is None else str(checkpoint)
        self.label = f"{name}, context of {self.context} tokens"

    def answer(self, dialog: list[Message], settings: Settings, figures: Figures) -> Iterator[str]:
        """Step the engine for one sequence; whoever stops early leaves its slot free."""
        from tokenizing import StreamDecoder

        engine, tokenizer = self.llm.engine, self.llm.tokenizer
        with HeldInterrupt() as interrupt:
            prompt = self._encode(dialog)
            try:
                sequence = engine.add(prompt, settings.sampling(), tokenizer.stop_ids)
            except RequestError as error:
                raise (ContextFull if len(prompt) >= self.context else AnswerError)(str(error)) from None
            figures.prompt_tokens = len(prompt)
            decoder = StreamDecoder(tokenizer, strip_leading_space=tokenizer.answer_begins_with_space)
            try:
                while not sequence.finished:
                    interrupt.raise_if_heard()
                    for output in engine.step():
                        if output.token is not None:
                            figures.generated_tokens += 1
                        if output.token is not None and output.token not in sequence.stop_ids:
                            yield decoder.push(output.token)
                yield decoder.finish()
            finally:
                engine.cancel(sequence)
        figures.finish_reason = sequence.finish_reason
        if sequence.error:
            raise AnswerError(sequence.error)

    def count(self, dialog: list[Message]) -> int | None:
        """As the model is given it."""
        return len(self._encode(dialog))

    def _encode(self, dialog: list[Message]) -> list[int]:
        from tokenizing import DialogError, TokenizerError

        try:
            return self.llm.tokenizer.encode_dialog(dialog)
        except (DialogError, TokenizerError) as error:
            raise AnswerError(str(error)) from None


class ServerBackend:
    """OpenAI's chat completions over HTTP, streamed."""

    context: int | None = None

    def __init__(self, server: str, model: str, token: str | None = None) -> None:
        try:
            import requests

            from tools.download_http import is_local
        except ImportError:
            raise RequestError("--server needs the package 'requests'; pip install requests") from None
        self._errors = requests.exceptions
        server = server.rstrip("/") if "://" in server else f"http://{server.rstrip('/')}"
        try:
            parts = urlsplit(server)
            usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        except ValueError:  # a port that is none
            usable = False
        if not usable:
            raise RequestError(f"--server is {server!r}; it must be a URL such as http://127.0.0.1:8080")
        if token and not (token.isascii() and token.isprintable()):
            raise RequestError("the token holds characters that no HTTP header can carry")
        # The base URL of any OpenAI client is taken as it is.
        self.base = server if server.endswith("/v1") else f"{server}/predictions/{quote(model, safe='')}/1.0/v1"
        self.label = f"{model} at {server}"
        self._model = model
        self._session = requests.Session()
        # A proxy is no way to this machine.
        self._session.trust_env = not is_local(parts.hostname)
        self._session.headers.update({"Connection": "close", "Accept-Encoding": "identity"})

        def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
            if token:
                request.headers["Authorization"] = f"Bearer {token}"
            return request

        self._session.auth = authorize  # and not a header, which a .netrc would overrule

    def answer(self, dialog: list[Message], settings: Settings, figures: Figures) -> Iterator[str]:
        """One request; leaving early closes its connection, by which the server knows to stop."""
        options = {name: value for name, value in dataclasses.asdict(settings).items() if value is not None}
        body = {"model": self._model, "messages": dialog, "stream": True, "stream_options": {"include_usage": True}}
        with closing(self._request("POST", "/chat/completions", json={**body, **options})) as response:
            kind = response.headers.get("Content-Type", "none")
            if "text/event-stream" not in kind:
                raise AnswerError(f"the server did not stream: Content-Type is {kind}, text/event-stream was expected")
            # Chunks are passed on as they come; a body without them would be waited for until the size is reached.
            size = 1 << 16 if getattr(response.raw, "chunked", False) else 1
            try:
                yield from _read_answer(_events(response.iter_content(size)), figures)
            except self._errors.RequestException:
                raise AnswerError("the connection broke in the middle of the answer") from None

    def count(self, dialog: list[Message]) -> int | None:
        """Asked of the server, where it has such an endpoint."""
        try:
            with closing(self._request("POST", "/tokenize", CONNECT_TIMEOUT_S, json={"messages": dialog})) as response:
                count = response.json()["count"]
        except (AnswerError, self._errors.RequestException, ValueError, KeyError, TypeError):
            return None
        return count if isinstance(count, int) else None

    def check(self) -> None:
        """Raise AnswerError if the server cannot be asked, or does not want to be."""
        self._request("GET", "/models", read_timeout_s=CONNECT_TIMEOUT_S).close()

    def _request(self, method: str, path: str, read_timeout_s: float = READ_TIMEOUT_S, **options: Any) -> Any:
        """Send a request; any answer but a good one is an error."""
        timeout = (CONNECT_TIMEOUT_S, read_timeout_s)
        self._session.close()  # one connection per question: an idle one may have been closed by the other side
        try:
            response = self._session.request(
                method, self.base + path, stream=True, timeout=timeout, allow_redirects=False, **options
            )
            if response.status_code != 200:
                raise _refusal(response)
            return response
        except self._errors.Timeout:
            raise AnswerError(f"{self.base}: no answer in time") from None
        except self._errors.RequestException as error:
            raise AnswerError(f"{self.base}: cannot be reached: {_cause(error)}") from None


def _events(chunks: Iterable[bytes]) -> Iterator[str]:
    """The data of server-sent events; a character or a line may be spread over several chunks."""
    rest, data = b"", []
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" ").decode(errors="replace"))
            elif not line and data:
                yield "\n".join(data)
                data = []
    if data:
        yield "\n".join(data)


def _read_answer(events: Iterable[str], figures: Figures) -> Iterator[str]:
    """The text of a streamed completion."""
    for event in events:
        if event.strip() == "[DONE]":
            return
        try:
            value = json.loads(event)
            if value.get("error"):
                raise AnswerError(f"the server gave up: {_message_of(value)}")
            for choice in value.get("choices") or ():
                figures.finish_reason = choice.get("finish_reason") or figures.finish_reason
                text = (choice.get("delta") or {}).get("content") or ""
                # JSON can spell half a surrogate pair, which no terminal or file takes.
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                figures.generated_tokens += bool(text)
                yield text
            if usage := value.get("usage"):
                figures.prompt_tokens = int(usage["prompt_tokens"])
                figures.generated_tokens = int(usage["completion_tokens"])
        except (ValueError, AttributeError, TypeError, KeyError):
            raise AnswerError(f"the server sent what no chat completion holds: {one_line(event)}") from None
    if figures.finish_reason is None:
        raise AnswerError("the server's stream ended in the middle of the answer")


def _refusal(response: Any) -> AnswerError:
    """The error that an HTTP status and its body make."""
    with closing(response):
        text = next(response.iter_content(1 << 16), b"").decode(errors="replace")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    message = _message_of(value) or response.reason or "no reason given"
    advice = ""
    if response.status_code in (401, 403) or "Authorization" in message:  # TorchServe says 400
        advice = "; give --token, or set LLAMA_TOKEN"
    elif response.headers.get("Retry-After", "").isdigit():
        advice = f"; try again in {response.headers['Retry-After']} s"
    elif 300 <= response.status_code < 400:
        advice = f"; it points to {one_line(response.headers.get('Location', 'nowhere'))}"
    # OpenAI's code for it, or words of our server, llama.cpp's and vLLM's.
    long = "context_length_exceeded" in text or re.search(r"max_seq_len|context (length|size|window)", message)
    kind = ContextFull if response.status_code in (400, 413) and long else AnswerError
    return kind(f"the server refused (HTTP {response.status_code}): {message}{advice}")


def _message_of(value: Any) -> str:
    """The message in an error body: OpenAI's, or TorchServe's own without the frame."""
    error = value.get("error", value) if isinstance(value, dict) else value
    return one_line(str(error.get("message", error) if isinstance(error, dict) else error))


def one_line(text: str, longest: int = 300) -> str:
    """A text of any length, for a message."""
    words = " ".join(text.split())
    return words if len(words) <= longest else words[:longest] + "..."


def _cause(error: BaseException) -> str:
    """What the operating system said, under the layers of the HTTP library."""
    innermost: BaseException | None = error
    while innermost is not None:
        if type(innermost).__module__ in ("builtins", "socket", "ssl") and getattr(innermost, "strerror", None):
            return str(innermost.strerror)
        innermost = innermost.__cause__ or innermost.__context__
    return one_line(str(error))
