"""Talk to a Llama in a terminal or a pipe: on a server, or straight on a checkpoint.

python -m tools.chat
python -m tools.chat --checkpoint converted/7b
python -m tools.chat --server http://127.0.0.1:8080

Answers go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO
from urllib.parse import quote, urlsplit

from command_line import Parser
from engine.config import DEVICES, DTYPES, QUANTIZATIONS, EngineConfig, RequestError, nearest
from engine.sequence import FinishReason, SamplingParams

# What takes seconds to import (torch) or serves one backend only is imported where it is used.
try:
    import readline
except ImportError:  # not everywhere; lines are then edited as the terminal does it
    readline = None

Message = dict[str, str]

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 600  # a full queue and a long prompt may take minutes before the first token
OFF = ("off", "none")
BLOCK = '"""'
DIM, RED, BOLD = "2", "31", "1"
COMMANDS = {
    "system": ("[TEXT]", "set the system prompt and start over; alone: show it; 'off': have none"),
    "reset": ("", "forget the dialog, keep the system prompt and the settings"),
    "undo": ("", "drop the last question and its answer"),
    "retry": ("", "ask the last question again"),
    "temperature": ("X", "0 always takes the likeliest token, higher is more adventurous"),
    "top_p": ("X", "draw from the likeliest tokens whose probabilities add up to X"),
    "max_tokens": ("N", "longest answer; 'off': as long as the context allows"),
    "seed": ("N", "the same seed gives the same answer; 'off': a new one each time"),
    "save": ("FILE", "write the dialog as JSON, such as generate.py --dialog reads"),
    "load": ("FILE", "go on with a saved dialog"),
    "tokens": ("", "how much of the context the dialog takes"),
    "help": ("", "this list"),
    "exit": ("", "leave, as Ctrl-D does"),
}
ALIASES = {"bye": "exit", "quit": "exit", "clear": "reset", "regen": "retry", "?": "help"}  # from llama.cpp and ollama


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
        self._session.trust_env = parts.hostname not in ("localhost", "127.0.0.1", "::1")
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
            raise AnswerError(f"the server sent what no chat completion holds: {_one_line(event)}") from None
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
        advice = f"; it points to {_one_line(response.headers.get('Location', 'nowhere'))}"
    # OpenAI's code for it, or words of our server, llama.cpp's and vLLM's.
    long = "context_length_exceeded" in text or re.search(r"max_seq_len|context (length|size|window)", message)
    kind = ContextFull if response.status_code in (400, 413) and long else AnswerError
    return kind(f"the server refused (HTTP {response.status_code}): {message}{advice}")


def _message_of(value: Any) -> str:
    """The message in an error body: OpenAI's, or TorchServe's own without the frame."""
    error = value.get("error", value) if isinstance(value, dict) else value
    return _one_line(str(error.get("message", error) if isinstance(error, dict) else error))


def _one_line(text: str, longest: int = 300) -> str:
    words = " ".join(text.split())
    return words if len(words) <= longest else words[:longest] + "..."


def _cause(error: BaseException) -> str:
    """What the operating system said, under the layers of the HTTP library."""
    innermost: BaseException | None = error
    while innermost is not None:
        if type(innermost).__module__ in ("builtins", "socket", "ssl") and getattr(innermost, "strerror", None):
            return str(innermost.strerror)
        innermost = innermost.__cause__ or innermost.__context__
    return _one_line(str(error))


class Chat:
    """A dialog, how to go on with it, and who answers; `notice` hears what the user should know."""

    def __init__(
        self,
        backend: Backend,
        settings: Settings | None = None,
        system: str | None = None,
        notice: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.backend, self.settings, self.system, self.notice = backend, settings or Settings(), system, notice
        self.history: list[Message] = []  # questions and answers in turn
        self.unanswered: str | None = None  # the last question, if it failed
        self.figures = Figures()
        self._size: int | None = None  # the history's tokens, as far as the last answer told

    @property
    def dialog(self) -> list[Message]:
        """The system prompt and the history."""
        return self._with_system(self.history)

    def ask(self, question: str) -> Iterator[str]:
        """The answer as it comes: stopped by the user its beginning is kept, after an error not even the question."""
        self.unanswered, self._size = question, None
        asked = {"role": "user", "content": question}
        pieces: list[str] = []
        complete = False
        started = time.perf_counter()
        try:
            with closing(self._answer(asked)) as texts:
                for text in filter(None, texts):
                    self.figures.first_s = self.figures.first_s or time.perf_counter() - started
                    pieces.append(text)
                    yield text
            complete = True
        except Exception:
            pieces.clear()
            raise
        finally:
            figures = self.figures
            figures.total_s = time.perf_counter() - started
            if complete or pieces:
                self.history += [asked, {"role": "assistant", "content": "".join(pieces)}]
                self.unanswered = None
                if figures.prompt_tokens is not None:
                    self._size = figures.prompt_tokens + figures.generated_tokens

    def retry(self) -> Iterator[str]:
        """Ask the last question again; what was answered before is back if nothing comes."""
        if self.unanswered is not None:
            yield from self.ask(self.unanswered)
            return
        if not self.history:
            raise AnswerError("there is no question yet")
        before = self.history[-2:]
        del self.history[-2:]
        try:
            yield from self.ask(before[0]["content"])
        finally:
            if self.unanswered is not None:
                self.history += before
                self.unanswered = None

    def undo(self) -> str | None:
        """Drop the last exchange; its question, or None where there was none."""
        if self.unanswered is not None or not self.history:
            dropped, self.unanswered = self.unanswered, None
            return dropped
        dropped, self._size = self.history[-2]["content"], None
        del self.history[-2:]
        return dropped

    def reset(self) -> None:
        """Start over, with the same system prompt and settings."""
        self.history, self.unanswered, self._size = [], None, None

    def size(self) -> int | None:
        """The tokens of the dialog, if they are known."""
        if self._size is None and self.dialog:
            self._size = self.backend.count([*self.dialog, {"role": "user", "content": ""}])
        return self._size if self.dialog else 0

    def save(self, path: str) -> None:
        """Write the dialog; only another dialog is overwritten."""
        if not self.history:
            raise AnswerError("there is nothing to save yet")
        target = Path(os.path.expanduser(path))
        if os.path.exists(target):
            try:
                _read_dialog(target)
            except AnswerError:
                raise AnswerError(f"{target}: exists and holds no dialog; choose another name") from None
        try:
            target.write_text(json.dumps(self.dialog, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise AnswerError(f"{target}: cannot be written: {error.strerror}") from None

    def load(self, path: str) -> None:
        """Go on with the dialog of a file; a question at its end waits for `retry`."""
        dialog = _read_dialog(Path(os.path.expanduser(path)))
        self.reset()
        self.system = dialog.pop(0)["content"] if dialog[0]["role"] == "system" else None
        if dialog[-1]["role"] == "user":
            self.unanswered = dialog.pop()["content"]
        self.history = dialog

    def _answer(self, asked: Message) -> Iterator[str]:
        """Answer, without the oldest exchanges where the context is too small for all."""
        history = list(self.history)
        while True:
            self._make_room(history, asked)
            self.figures = Figures()
            dialog = self._with_system([*history, asked])
            try:
                with closing(self.backend.answer(dialog, self.settings, self.figures)) as texts:
                    for text in texts:
                        if text:
                            self._forget_down_to(history)
                        yield text
                self._forget_down_to(history)
                return
            except ContextFull as error:
                if not history:  # what was dropped in vain is not forgotten
                    raise AnswerError(f"{error}; shorten the message, or the system prompt") from None
                del history[:2]

    def _make_room(self, history: list[Message], asked: Message) -> None:
        """Drop the oldest exchanges until an answer has room, as far as the backend can count."""
        context = self.backend.context
        if context is None:
            return
        room = min(self.settings.max_tokens or context, context // 4)
        while history and (self.backend.count(self._with_system([*history, asked])) or 0) + room > context:
            del history[:2]

    def _forget_down_to(self, history: list[Message]) -> None:
        dropped = (len(self.history) - len(history)) // 2
        if dropped:
            self.history = list(history)
            what = "exchange was" if dropped == 1 else f"{dropped} exchanges were"
            self.notice(f"the context is full: the oldest {what} dropped")

    def _with_system(self, messages: list[Message]) -> list[Message]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *messages]


def _read_dialog(path: Path) -> list[Message]:
    """The one dialog of a file, whether it ends with a question or an answer."""
    from generate import read_dialogs
    from tokenizing import check_dialog

    try:
        dialogs = [body["dialog"] for body in read_dialogs(os.path.abspath(path))]  # in full, as it takes '-' for stdin
        if len(dialogs) != 1:
            raise AnswerError(f"{path}: holds {len(dialogs)} dialogs; a chat goes on with one")
        answered = dialogs[0] and isinstance(dialogs[0][-1], dict) and dialogs[0][-1].get("role") == "assistant"
        check_dialog(dialogs[0] + ([{"role": "user", "content": ""}] if answered else []))
    except (ValueError, RecursionError) as error:  # of which all errors in files and dialogs are
        raise AnswerError(_one_line(str(error))) from None
    return [{"role": message["role"], "content": message["content"]} for message in dialogs[0]]


def read_message(read_line: Callable[[str], str]) -> tuple[str, bool]:
    """One message, and whether it was a block; `read_line(prompt)` raises EOFError at the end."""
    text = read_line(">>> ")
    if text.lstrip().startswith(BLOCK):
        text = text.lstrip().removeprefix(BLOCK)
        while not text.rstrip().endswith(BLOCK):
            try:
                text += "\n" + read_line("... ")
            except EOFError:
                return text.strip("\n"), True
        return text.rstrip().removesuffix(BLOCK).strip("\n"), True
    while text.endswith("\\"):
        try:
            text = text[:-1] + "\n" + read_line("... ")
        except EOFError:
            return text[:-1], False
    return text, False


class Repl:
    """Reads messages and commands, writes answers; on a terminal, or quietly in a pipe."""

    def __init__(self, chat: Chat, metrics: bool = False, colours: bool = True) -> None:
        self.chat, self.metrics = chat, metrics
        self.interactive = sys.stdin.isatty()
        self.failed = False  # in a pipe the exit status tells
        self._tty = sys.stdout.isatty()
        self._colours = colours and sys.stderr.isatty()
        self._leaving = False
        self._clean = True  # whether stdout is at the beginning of a line
        chat.notice = self.note

    def run(self) -> int:
        """Go on until the user leaves or the input ends."""
        if self.interactive:
            self._prepare_terminal()
            self.note(f"{self.chat.backend.label}. /help lists the commands, Ctrl-D leaves.")
        while not self._leaving:
            try:
                text, block = read_message(self._read_line)
                self.take(text, block)
            except EOFError:
                if self.interactive:
                    print(file=sys.stderr)
                break
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                print(file=sys.stderr)
                if readline is None or not readline.get_line_buffer():  # else it was to drop what stood there
                    self.note("To leave, press Ctrl-D or type /exit.")
        return int(self.failed and not self.interactive)

    def take(self, text: str, block: bool = False) -> None:
        """One message or command; a block is never a command."""
        if text.lstrip().startswith("/") and not block:
            self._command(text.strip())
        elif text.strip():
            if any("\ud800" <= character <= "\udfff" for character in text):
                self.fail("the message is not UTF-8 text")
            else:
                self._show(self.chat.ask(text))

    def note(self, text: str) -> None:
        """Tell something beside the answers."""
        self._tell(text, DIM)

    def fail(self, text: str) -> None:
        """Tell of an error; the session goes on."""
        self.failed = True
        self._tell(f"error: {text}", RED)

    def _tell(self, text: str, colour: str) -> None:
        self._end_line()
        text = _printable(text)
        print(f"\x1b[{colour}m{text}\x1b[0m" if self._colours else text, file=sys.stderr, flush=True)

    def _end_line(self) -> None:
        if not self._clean:
            print(flush=True)
        self._clean = True

    def _read_line(self, prompt: str) -> str:
        if not self.interactive:
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            return line.removesuffix("\n").removesuffix("\r")
        if not self._tty:  # input() would write the prompt between the answers
            print(prompt, end="", file=sys.stderr, flush=True)
            return input()
        if self._colours and readline is not None:  # which has to be told what takes no room on the screen
            prompt = f"\001\x1b[{BOLD}m\002{prompt}\001\x1b[0m\002"
        return input(prompt)

    def _prepare_terminal(self) -> None:
        """Editing, history for this session only, completion of commands, and pasting several lines as one message."""
        if readline is None:
            return
        words = [f"/{name}" for name in COMMANDS]

        def complete(text: str, state: int) -> str | None:
            found = [word + " " for word in words if text.startswith("/") and word.startswith(text)]
            return found[state] if state < len(found) else None

        readline.set_completer_delims(" \t\n")
        readline.set_completer(complete)
        if "libedit" in (readline.__doc__ or ""):
            readline.parse_and_bind("bind ^I rl_complete")
        else:
            readline.parse_and_bind("tab: complete")
            readline.parse_and_bind("set enable-bracketed-paste on")

    def _show(self, pieces: Iterator[str]) -> None:
        """Write an answer as it comes, and what there is to say of it."""
        chat = self.chat
        try:
            with closing(pieces):
                for text in pieces:
                    sys.stdout.write(_printable(text) if self._tty else text)
                    sys.stdout.flush()
                    self._clean = text.endswith("\n")
            self._clean = self._clean and bool(chat.history[-1]["content"])  # an empty answer is a line as well
            self._end_line()
        except AnswerError as error:
            self.fail(str(error) + ("; /retry asks again" if self.interactive and chat.unanswered else ""))
            return
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            self._clean = False  # the terminal wrote ^C
            kept = chat.unanswered is None
            self.note("stopped; " + ("/undo drops what there is" if kept else "/retry asks again"))
        else:
            self._tell_of_cut()
        if self.metrics:
            self.note(str(chat.figures))
        if self.interactive and self._tty:
            print()

    def _tell_of_cut(self) -> None:
        figures, allowed = self.chat.figures, self.chat.settings.max_tokens
        if figures.finish_reason != FinishReason.LENGTH:
            return
        if allowed is not None and figures.generated_tokens >= allowed:
            self.note(f"cut at {allowed} tokens; /max_tokens N allows more")
        else:
            self.note("cut: the context is full" if self.chat.backend.context else "cut at the server's limit")

    def _command(self, text: str) -> None:
        word, _, argument = text[1:].partition(" ")
        if "\n" in word:  # a pasted text
            word, _, argument = text[1:].partition("\n")
        word = word.lower().replace("-", "_")
        name, argument = ALIASES.get(word, word), argument.strip()
        if name not in COMMANDS:
            hint = nearest(f"/{word}", [f"/{known}" for known in COMMANDS])
            self.fail(f"unknown command /{word}; {hint}")
            return
        usage = COMMANDS[name][0]
        if argument and not usage:
            self.fail(f"/{name} stands alone, without {_one_line(argument, 40)!r}")
        elif usage == "FILE" and not argument:
            self.fail(f"/{name} needs the name of a file")
        elif name in Settings.__dataclass_fields__:
            self._set(name, argument)
        else:
            try:
                getattr(self, f"_do_{name}")(argument)
            except AnswerError as error:
                self.fail(str(error))

    def _set(self, name: str, argument: str) -> None:
        try:
            if argument:
                self.chat.settings = self.chat.settings.changed(name, argument)
            self.note(f"{name} is {_shown(getattr(self.chat.settings, name))}")
        except RequestError as error:
            self.fail(str(error))

    def _do_system(self, argument: str) -> None:
        if argument:
            self.chat.reset()
            self.chat.system = None if argument.lower() in OFF else argument
            self.note("no system prompt; a new dialog" if self.chat.system is None else "a new dialog")
        else:
            self.note(f"system prompt: {self.chat.system}" if self.chat.system else "there is no system prompt")

    def _do_reset(self, _: str) -> None:
        self.chat.reset()
        self.note("a new dialog")

    def _do_undo(self, _: str) -> None:
        dropped = self.chat.undo()
        self.note("there is nothing to undo" if dropped is None else f"dropped: {_one_line(dropped, 60)}")

    def _do_retry(self, _: str) -> None:
        settings = self.chat.settings
        if (
            self.chat.unanswered is None
            and self.chat.dialog
            and (settings.seed is not None or settings.temperature == 0)
        ):
            why = "at temperature 0" if settings.temperature == 0 else f"with seed {settings.seed}"
            self.note(f"{why} the answer will be the same")
        self._show(self.chat.retry())

    def _do_save(self, path: str) -> None:
        self.chat.save(path)
        self.note(f"saved {len(self.chat.dialog)} messages to {path}")

    def _do_load(self, path: str) -> None:
        self.chat.load(path)
        waiting = "" if self.chat.unanswered is None else "; /retry asks the question at the end"
        self.note(f"loaded {len(self.chat.dialog)} messages from {path}{waiting}")

    def _do_tokens(self, _: str) -> None:
        size, context = self.chat.size(), self.chat.backend.context
        known = "unknown until the next answer" if size is None else f"{size} tokens"
        self.note(f"the dialog: {known}" + (f" of {context}" if context and size is not None else ""))

    def _do_help(self, _: str) -> None:
        lines = []
        for name, (usage, what) in COMMANDS.items():
            if name in Settings.__dataclass_fields__:
                what += f" (now {_shown(getattr(self.chat.settings, name))})"
            lines.append(f"/{name} {usage}".ljust(16) + f"  {what}")
        lines += [
            "",
            'A \\ at the end of a line goes on in the next. A text between two """ may have many lines, and',
            "may begin with /. Ctrl-C stops an answer; what is there of it stays in the dialog.",
        ]
        self.note("\n".join(lines))

    def _do_exit(self, _: str) -> None:
        self._leaving = True


def _shown(value: object) -> str:
    return "off" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _printable(text: str) -> str:
    """The text without what a terminal would obey: a model can draw an escape character like any other."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text.replace("\r", ""))


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m tools.chat",
        description="Talk to a Llama: on a server, or straight on a checkpoint (the embedded demo model if neither is "
        "given). In a pipe, each line is a message and only the answers go to stdout.",
        epilog="example:  echo 'What is the capital of France?' | python -m tools.chat --temperature 0",
    )
    who = parser.add_argument_group("who answers").add_mutually_exclusive_group()
    who.add_argument(
        "--server", metavar="URL", help="such as http://127.0.0.1:8080; or an OpenAI base URL ending in /v1"
    )
    who.add_argument("--checkpoint", type=Path, metavar="DIR", help="what checkpoint_converter.py wrote")
    remote = parser.add_argument_group("with --server")
    remote.add_argument("--model", metavar="NAME", help="default: llama")
    remote.add_argument("--token", help="better set LLAMA_TOKEN, which other users of the machine do not see")
    local = parser.add_argument_group("without --server")
    local.add_argument("--device", choices=DEVICES, help="default: auto")
    local.add_argument("--dtype", choices=DTYPES, help="default: auto")
    local.add_argument("--quantization", choices=QUANTIZATIONS, help="of the weights (default: none)")
    local.add_argument("--max-seq-len", type=int, metavar="N", help="the context, in tokens")
    chat = parser.add_argument_group("chat (each can be changed while it runs)")
    chat.add_argument("--system", metavar="TEXT", help="the system prompt (default: none)")
    chat.add_argument("--temperature", metavar="X", help=f"0 is greedy (default: {Settings.temperature})")
    chat.add_argument("--top-p", metavar="X", help=f"default: {Settings.top_p}")
    chat.add_argument("--max-tokens", metavar="N", help=f"or 'off' (default: {Settings.max_tokens})")
    chat.add_argument("--seed", metavar="N", help="the same seed gives the same answers (default: off)")
    parser.add_argument("--metrics", action="store_true", help="after each answer its speed, on stderr")
    return parser


def open_backend(flags: argparse.Namespace, token: str | None) -> LocalBackend | ServerBackend:
    """The backend that the command line asks for."""
    foreign = ("device", "dtype", "quantization", "max_seq_len") if flags.server is not None else ("model", "token")
    for name in foreign:
        if getattr(flags, name) is not None:
            fits = "a checkpoint, not a server" if flags.server is not None else "--server"
            raise RequestError(f"--{name.replace('_', '-')} is for {fits}")
    if flags.server is not None:
        return ServerBackend(flags.server, flags.model or "llama", token)
    config = EngineConfig(
        max_seq_len=flags.max_seq_len,
        max_batch_size=1,
        device=flags.device or "auto",
        dtype=flags.dtype or "auto",
        quantization=flags.quantization or "none",
    )
    return LocalBackend(flags.checkpoint, config)


def start(flags: argparse.Namespace) -> Repl:
    """Everything that can fail before the first question."""
    settings = Settings()
    for name in Settings.__dataclass_fields__:
        if getattr(flags, name) is not None:
            settings = settings.changed(name, getattr(flags, name))
    backend = open_backend(flags, flags.token or os.getenv("LLAMA_TOKEN"))
    colours = not os.getenv("NO_COLOR") and os.getenv("TERM") != "dumb"
    repl = Repl(Chat(backend, settings, flags.system), flags.metrics, colours)
    if repl.interactive and isinstance(backend, ServerBackend):
        try:
            backend.check()
        except AnswerError as error:  # it may yet start
            repl.fail(str(error))
    return repl


def _lenient(*streams: TextIO) -> None:
    """Bytes that are no text, and text that the terminal's encoding lacks, must not end the session."""
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "replace")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; one line on stderr and status 1 for a start that fails."""
    flags = build_parser().parse_args(argv)
    _lenient(sys.stdin, sys.stdout, sys.stderr)
    try:
        try:
            repl = start(flags)
        except (ValueError, OSError) as error:  # settings, files, formats and tokenizers all raise one of the two
            print(f"chat: error: {_one_line(str(error), 1000)}", file=sys.stderr)
            return 1
        return repl.run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader left; nothing more can be written, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
