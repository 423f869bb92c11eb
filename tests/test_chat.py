"""The chat tool: its commands, what stays in the history, and what it makes of servers that fail."""

from __future__ import annotations

import io
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from engine.config import EngineConfig, RequestError
from tools.chat import Repl, main, read_message
from tools.chat_backends import AnswerError, ContextFull, Figures, LocalBackend, Message, ServerBackend, Settings
from tools.chat_dialog import Chat

PROJECT = Path(__file__).resolve().parent.parent
FRANCE = "What is the capital of France?"
PARIS = "The capital of France is Paris."


class Script:
    """A backend that plays one script per answer: pieces of text, and exceptions to raise."""

    label = "a script"

    def __init__(self, *scripts: list[str | BaseException], context: int | None = None) -> None:
        self.scripts, self.context = list(scripts), context
        self.dialogs: list[list[Message]] = []
        self.settings: list[Settings] = []

    def answer(self, dialog: list[Message], settings: Settings, figures: Figures) -> Iterator[str]:
        self.dialogs.append(dialog)
        self.settings.append(settings)
        figures.prompt_tokens = self._count(dialog)
        for item in self.scripts.pop(0) if self.scripts else [f"answer {len(self.dialogs)}"]:
            if isinstance(item, BaseException):
                raise item
            figures.generated_tokens += 1
            yield item
        figures.finish_reason = "stop"

    def count(self, dialog: list[Message]) -> int | None:
        return self._count(dialog) if self.context else None

    @staticmethod
    def _count(dialog: list[Message]) -> int:
        return sum(len(message["content"].split()) for message in dialog)


def repl_of(*scripts: list[str | BaseException], interactive: bool = True, **options) -> Repl:
    repl = Repl(Chat(Script(*scripts, **options)))
    repl.interactive = interactive
    return repl


def said(repl: Repl, capsys: pytest.CaptureFixture[str], *texts: str) -> tuple[str, str]:
    """What stdout and stderr got for some inputs."""
    capsys.readouterr()
    for text in texts:
        repl.take(text)
    out, err = capsys.readouterr()
    return out, err


def contents(messages: list[Message]) -> list[str]:
    return [message["content"] for message in messages]


def test_answers_go_to_stdout_and_the_dialog_grows(capsys: pytest.CaptureFixture[str]) -> None:
    repl = repl_of(["Hel", "lo!"], ["Fine."])
    assert said(repl, capsys, "Hi", "How are you?") == ("Hello!\nFine.\n", "")
    assert contents(repl.chat.backend.dialogs[1]) == ["Hi", "Hello!", "How are you?"]
    assert [message["role"] for message in repl.chat.history] == ["user", "assistant"] * 2


def test_a_new_system_prompt_starts_over_and_alone_it_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    repl = repl_of()
    assert said(repl, capsys, "/system")[1] == "there is no system prompt\n"
    said(repl, capsys, "Hi", "/system  Talk like a pirate. ", "Hi")
    assert repl.chat.backend.dialogs[1] == [
        {"role": "system", "content": "Talk like a pirate."},
        {"role": "user", "content": "Hi"},
    ]
    assert said(repl, capsys, "/system")[1] == "system prompt: Talk like a pirate.\n"
    said(repl, capsys, "/system off")
    assert repl.chat.dialog == []


def test_reset_keeps_the_system_prompt_and_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    repl = repl_of()
    said(repl, capsys, "/system Be kind.", "/temperature 0.1", "Hi", "/reset")
    assert contents(repl.chat.dialog) == ["Be kind."]
    assert repl.chat.settings.temperature == 0.1


def test_settings_reach_the_next_answer(capsys: pytest.CaptureFixture[str]) -> None:
    repl = repl_of()
    said(
        repl, capsys, "/temperature 0", "/top-p 0.5", "/MAX_TOKENS 7", "/seed -3", "Hi", "/seed off", "/max_tokens off"
    )
    assert repl.chat.backend.settings == [Settings(0.0, 0.5, 7, -3)]
    assert repl.chat.settings == Settings(0.0, 0.5, None, None)
    assert said(repl, capsys, "/top_p", "/seed") == ("", "top_p is 0.5\nseed is off\n")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("/temperature hot", "temperature is 'hot'; it must be a finite number from 0 to 100"),
        ("/temperature nan", "temperature is nan"),
        ("/temperature " + "9" * 400, "temperature is inf"),
        ("/top_p 0", "top_p is 0.0; it must be a finite number above 0, at most 1"),
        ("/max_tokens 0", "max_tokens is 0; it must be a whole number, at least 1, or 'off'"),
        ("/max_tokens 1.5", "max_tokens is '1.5'; it must be a whole number"),
        ("/seed 1e3", "seed is '1e3'; it must be a whole number, from"),
        ("/temprature 1", "unknown command /temprature; did you mean '/temperature'?"),
        ("/zzzzz", "unknown command /zzzzz; allowed: /exit, /help"),
        ("/", "unknown command /;"),
        ("/undo that", "/undo stands alone, without 'that'"),
        ("/save", "/save needs the name of a file"),
        ("/retry", "there is no question yet"),
        ("/save nothing.json", "there is nothing to save yet"),
        ("/load /nowhere/dialog.json", "/nowhere/dialog.json: cannot be read: No such file or directory"),
        ("\udce4", "the message is not UTF-8 text"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line_and_changes_nothing(
    capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    repl = repl_of()
    out, err = said(repl, capsys, command)
    assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert repl.chat.settings == Settings() and repl.chat.dialog == []
    assert said(repl, capsys, "Hi")[0] == "answer 1\n"


def test_undo_drops_one_exchange_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    repl = repl_of()
    said(repl, capsys, "one", "two")
    assert said(repl, capsys, "/undo")[1] == "dropped: two\n"
    assert contents(repl.chat.history) == ["one", "answer 1"]
    assert said(repl, capsys, "/undo", "/undo")[1] == "dropped: one\nthere is nothing to undo\n"


def test_retry_asks_the_last_question_again(capsys: pytest.CaptureFixture[str]) -> None:
    repl = repl_of()
    said(repl, capsys, "one", "two")
    assert said(repl, capsys, "/retry") == ("answer 3\n", "")
    assert contents(repl.chat.history) == ["one", "answer 1", "two", "answer 3"]
    assert said(repl, capsys, "/seed 5", "/regen")[1].endswith("with seed 5 the answer will be the same\n")


def test_a_retry_that_fails_leaves_the_answer_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    repl = repl_of(["old"], ["ne", AnswerError("the server left")], [KeyboardInterrupt()])
    said(repl, capsys, "Hi")
    assert said(repl, capsys, "/retry") == ("ne\n", "error: the server left\n")
    said(repl, capsys, "/retry")
    assert contents(repl.chat.history) == ["Hi", "old"]


def test_after_an_error_the_question_is_not_in_the_history_and_retry_asks_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    repl = repl_of(["first"], ["half", AnswerError("the server left")])
    out, err = said(repl, capsys, "one", "two")
    assert (out, err) == ("first\nhalf\n", "error: the server left; /retry asks again\n")
    assert contents(repl.chat.history) == ["one", "first"]
    said(repl, capsys, "/retry")
    assert contents(repl.chat.history) == ["one", "first", "two", "answer 3"]


def test_an_interrupted_answer_stays_as_far_as_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    repl = repl_of(["half", KeyboardInterrupt()])
    assert said(repl, capsys, "Hi") == ("half\n", "stopped; /undo drops what there is\n")
    assert contents(repl.chat.history) == ["Hi", "half"]


def test_an_answer_that_is_interrupted_before_its_first_word_leaves_no_trace(
    capsys: pytest.CaptureFixture[str],
) -> None:
    repl = repl_of([KeyboardInterrupt()])
    assert said(repl, capsys, "Hi")[1] == "stopped; /retry asks again\n"
    assert repl.chat.history == [] and repl.chat.unanswered == "Hi"


def test_a_terminal_that_fails_midway_closes_the_answer() -> None:
    chat = Chat(Script(["a", "b", "c"]))
    pieces = chat.ask("Hi")
    assert next(pieces) == "a"
    pieces.close()
    assert contents(chat.history) == ["Hi", "a"]


def test_an_empty_answer_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(repl_of([]), capsys, "Hi", "Hi") == ("\nanswer 2\n", "")


def test_an_answer_that_the_limit_cut_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    class Cut(Script):
        def answer(self, dialog: list[Message], settings: Settings, figures: Figures) -> Iterator[str]:
            yield "On"
            figures.generated_tokens, figures.finish_reason = 1, "length"

    repl = Repl(Chat(Cut(context=100)))
    assert said(repl, capsys, "/max_tokens 1", "Hi")[1].endswith("cut at 1 tokens; /max_tokens N allows more\n")
    assert said(repl, capsys, "/max_tokens off", "Hi")[1].endswith("cut: the context is full\n")


def test_the_oldest_exchanges_go_when_the_context_is_full(capsys: pytest.CaptureFixture[str]) -> None:
    repl = repl_of(context=16)  # of which 4 are kept free for the answer
    said(repl, capsys, "/system Be kind.", "one 1 1", "two 2 2")
    out, err = said(repl, capsys, "three 3 3")
    assert (out, err) == ("answer 3\n", "the context is full: the oldest exchange was dropped\n")
    assert contents(repl.chat.backend.dialogs[-1]) == ["Be kind.", "two 2 2", "answer 2", "three 3 3"]
    assert contents(repl.chat.dialog) == ["Be kind.", "two 2 2", "answer 2", "three 3 3", "answer 3"]


def test_a_context_that_only_the_server_knows_is_found_out(capsys: pytest.CaptureFixture[str]) -> None:
    repl = repl_of(["a"], ["b"], ["c"], [ContextFull("too long")], [ContextFull("too long")], ["d"])
    said(repl, capsys, "one", "two", "three")
    assert said(repl, capsys, "four") == ("d\n", "the context is full: the oldest 2 exchanges were dropped\n")
    assert contents(repl.chat.dialog) == ["three", "c", "four", "d"]


def test_a_message_that_is_too_long_alone_costs_no_history(capsys: pytest.CaptureFixture[str]) -> None:
    repl = repl_of(["a"], [ContextFull("the prompt has 900 tokens")], [ContextFull("the prompt has 800 tokens")])
    _, err = said(repl, capsys, "one", "long")
    assert err.startswith("error: the prompt has 800 tokens; shorten the message, or the system prompt")
    assert contents(repl.chat.dialog) == ["one", "a"]


def test_a_saved_dialog_is_loaded_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "dialog.json"
    repl, other = repl_of(), repl_of()
    said(repl, capsys, "/system Sei nett, bitte: ä 🐱", "Hi", f"/save {file}")
    assert said(other, capsys, "Hello", f"/load {file}")[1] == f"loaded 3 messages from {file}\n"
    assert other.chat.dialog == repl.chat.dialog == json.loads(file.read_text(encoding="utf-8"))
    said(other, capsys, "More", f"/save {file}")
    assert len(json.loads(file.read_text(encoding="utf-8"))) == 5


def test_a_full_disk_does_not_cost_the_earlier_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, link = tmp_path / "dialog.json", tmp_path / "link.json"
    link.symlink_to(file)
    repl = repl_of()
    said(repl, capsys, "Hi", f"/save {link}")
    saved = file.read_bytes()
    file.chmod(0o600)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(saved), hard))  # no file may become longer
    try:
        assert said(repl, capsys, "More", f"/save {link}")[1] == f"error: {file}: cannot be written: File too large\n"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == saved and sorted(os.listdir(tmp_path)) == ["dialog.json", "link.json"]
    said(repl, capsys, f"/save {link}")
    assert len(json.loads(file.read_text())) == 4 and link.is_symlink() and file.stat().st_mode & 0o777 == 0o600


def test_a_loaded_question_waits_for_retry(capsys: pytest.CaptureFixture[str]) -> None:
    repl = repl_of()
    assert "3 messages" not in said(repl, capsys, f"/load {PROJECT / 'dialogs.txt'}")[1]
    assert repl.chat.system and repl.chat.unanswered
    assert said(repl, capsys, "/retry")[0] == "answer 1\n"


def test_a_file_that_is_no_dialog_is_not_overwritten(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("precious")
    repl = repl_of()
    out, err = said(repl, capsys, "Hi", f"/save {tmp_path / 'notes.txt'}", f"/save {tmp_path / 'no' / 'file'}")
    assert "exists and holds no dialog; choose another name" in err and "cannot be written" in err
    assert (tmp_path / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "not JSON"),
        ("[" * 100_000, "recursion"),
        ("{}", "needs a list of messages"),
        ("[[], []]", "holds 2 dialogs"),
        ("[[]]", "dialog"),
        ('[{"role": "robot", "content": "x"}]', "robot"),
        ('[{"role": "assistant", "content": "x"}]', "'user' is due"),
        ('[{"role": "user", "content": 7}]', "'content' must be a string"),
        ('["x"]', "a message is an object"),
    ],
)
def test_a_bad_dialog_changes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "dialog.json").write_text(content)
    repl = repl_of()
    _, err = said(repl, capsys, "Hi", f"/load {tmp_path / 'dialog.json'}")
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert contents(repl.chat.dialog) == ["Hi", "answer 1"]


def test_tokens_are_told_where_they_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    counting, asking = repl_of(context=100), repl_of(["a", "b"])
    assert said(counting, capsys, "one two", "/tokens")[1] == "the dialog: 3 tokens of 100\n"
    assert said(asking, capsys, "/tokens")[1] == "the dialog: 0 tokens\n"
    assert said(asking, capsys, "one two", "/tokens")[1] == "the dialog: 4 tokens\n"
    assert "unknown until the next answer" in said(asking, capsys, "three", "/undo", "/tokens")[1]


def test_help_names_every_command_and_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    _, err = said(repl_of(), capsys, "/seed 12", "/?")
    for word in ("/system", "/undo", "/load FILE", "(now 0.6)", "(now 512)", "(now 12)", '"""'):
        assert word in err
    assert "\x1b" not in err  # not a terminal


def reading(*lines: str) -> Callable[[str], str]:
    source = iter(lines)

    def read_line(prompt: str) -> str:
        assert prompt in (">>> ", "... ")
        line = next(source, None)
        if line is None:
            raise EOFError
        return line

    return read_line


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["Hello!"], ("Hello!", False)),
        (["one\\", "two\\", "three"], ("one\ntwo\nthree", False)),
        (["one\\"], ("one", False)),
        (['"""', "/one", "", "two\\", '"""'], ("/one\n\ntwo\\", True)),
        (['"""one', 'two"""'], ("one\ntwo", True)),
        (['"""one"""'], ("one", True)),
        (['"""', "one"], ("one", True)),
        (['"""\none\ntwo\n"""'], ("one\ntwo", True)),  # pasted at once
        (["one\ntwo"], ("one\ntwo", False)),
    ],
)
def test_a_message_may_have_many_lines(lines: list[str], message: tuple[str, bool]) -> None:
    assert read_message(reading(*lines)) == message


def test_a_block_is_no_command_and_blank_lines_are_no_messages(capsys: pytest.CaptureFixture[str]) -> None:
    repl = repl_of()
    repl.take("/exit is a command, is it?", block=True)
    repl.take("   ")
    repl.take("")
    assert capsys.readouterr().out == "answer 1\n"


def piped(monkeypatch: pytest.MonkeyPatch, repl: Repl, text: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    repl.interactive = False
    return repl.run()


def test_in_a_pipe_each_line_is_a_message_and_commands_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    repl = repl_of()
    assert piped(monkeypatch, repl, "one\r\n\n/temperature 0\ntwo\\\n2\n/exit\nthree") == 0
    assert capsys.readouterr() == ("answer 1\nanswer 2\n", "temperature is 0\n")
    assert contents(repl.chat.history) == ["one", "answer 1", "two\n2", "answer 2"]


def test_in_a_pipe_a_failure_shows_in_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert piped(monkeypatch, repl_of([AnswerError("no")]), "one\ntwo") == 1
    assert capsys.readouterr() == ("answer 2\n", "error: no\n")
    with pytest.raises(KeyboardInterrupt):
        piped(monkeypatch, repl_of([KeyboardInterrupt()]), "one\ntwo")


def test_a_terminal_is_never_sent_what_it_would_obey(capsys: pytest.CaptureFixture[str]) -> None:
    repl = repl_of(["a\x1b]0;title\x07\tb\r\n\x9bc"])
    repl._tty = True
    assert said(repl, capsys, "Hi")[0].strip() == "a\ufffd]0;title\ufffd\tb\n\ufffdc"
    assert "\x1b" not in said(repl_of([AnswerError("\x1b[2J")]), capsys, "Hi")[1]


# On a checkpoint


@pytest.fixture(scope="module")
def local() -> LocalBackend:
    return LocalBackend(None, EngineConfig(max_batch_size=1, max_seq_len=256))


def test_the_demo_model_answers_and_counts(local: LocalBackend) -> None:
    chat = Chat(local, Settings(temperature=0.0))
    assert "".join(chat.ask(FRANCE)) == PARIS
    assert chat.figures.finish_reason == "stop" and chat.figures.generated_tokens > 3
    told = chat.size()
    assert told == chat.figures.prompt_tokens + chat.figures.generated_tokens
    other = Chat(local)
    other.history = chat.history
    assert 0 < other.size() - told < 20  # counted with the frame of the next question
    assert "tokens/s, time to first token" in str(chat.figures)


def test_ctrl_c_stops_between_two_steps_and_the_slot_is_free(local: LocalBackend) -> None:
    chat = Chat(local, Settings(temperature=100.0, seed=1))
    pieces = chat.ask("Hello!")
    next(pieces)
    signal.raise_signal(signal.SIGINT)  # heard, but no step is broken off
    with pytest.raises(KeyboardInterrupt):
        list(pieces)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(chat.history) == 2 and chat.figures.generated_tokens < 100
    local.llm.engine.step()
    assert (local.llm.engine.busy, local.llm.engine.slots.free) == (False, 1)
    assert "".join(Chat(local, Settings(temperature=0.0)).ask(FRANCE)) == PARIS


def test_a_long_chat_goes_on_beyond_the_context(local: LocalBackend) -> None:
    notices: list[str] = []
    chat = Chat(local, Settings(temperature=0.0), notice=notices.append)
    for _ in range(8):
        assert "".join(chat.ask(FRANCE)) == PARIS
    assert notices and chat.size() <= 256
    with pytest.raises(AnswerError, match="with max_seq_len 256 at most 255 fit; shorten the message"):
        list(chat.ask("word " * 400))


def test_an_output_that_takes_no_more_ends_it_in_one_line() -> None:
    code = (
        "import sys; from tools import chat; from test_chat import Script\n"
        "chat.open_backend = lambda *_: Script()\n"
        "sys.exit(chat.main([]))"
    )
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}"}
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            command, env=environment, input="Hi\n", stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert (ended.returncode, ended.stderr) == (1, "chat: error: the dialog cannot go on: No space left on device\n")


def test_a_pipe_gets_the_demo_models_answers_only() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tools.chat", "--temperature", "0", "--metrics"],
        cwd=PROJECT,
        input=f"{FRANCE}\n/system Talk like a pirate.\n{FRANCE}\n".encode() + b"\xff\n",
        capture_output=True,
        timeout=120,
    )
    assert ended.stdout.decode() == f"{PARIS}\nArr! {PARIS}\n", ended.stderr
    assert ended.returncode == 1 and b"not UTF-8" in ended.stderr and b"Traceback" not in ended.stderr
    assert ended.stderr.count(b"tokens/s") == 2


# On a server

Reply = Callable[[BaseHTTPRequestHandler], None]


class Server(ThreadingHTTPServer):
    """Plays one reply per request and remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[Reply] = []
        self.requests: list[tuple[str, str, dict[str, str], dict]] = []
        self.left = threading.Event()  # a client closed its connection in the middle of an answer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        self.server.requests.append((self.command, self.path, dict(self.headers), body))
        self.server.replies.pop(0)(self)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass

    def begin(self, content_type: str = "text/event-stream; charset=utf-8", chunked: bool = True) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def delta(text: str | None, finish_reason: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}]})


USAGE = event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}})
DONE = b"data: [DONE]\n\n"


def streams(*chunks: bytes, ends: bool = True) -> Reply:
    def reply(handler: Handler) -> None:
        handler.begin()
        for chunk in chunks:
            handler.chunk(chunk)
        if ends:
            handler.chunk(b"")
        handler.close_connection = True

    return reply


def refuses(status: int, body: str, **headers: str) -> Reply:
    def reply(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body.encode()))}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body.encode())

    return reply


def talks_on(handler: Handler) -> None:
    """Stream until the client leaves."""
    handler.begin()
    try:
        while True:
            handler.chunk(delta("word "))
            time.sleep(0.01)
    except OSError:
        handler.server.left.set()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        yield running
        running.shutdown()


def test_a_server_is_asked_as_openai_is_and_its_stream_is_read(server: Server) -> None:
    server.replies = [streams(delta(""), delta("Hel"), delta("lo!"), delta(None, "stop"), USAGE, DONE)]
    chat = Chat(ServerBackend(server.url, "llama", "secret"), Settings(0.5, 0.9, None, 7), "Be kind.")
    assert list(chat.ask("Hi")) == ["Hel", "lo!"]
    method, path, headers, body = server.requests[0]
    assert (method, path) == ("POST", "/predictions/llama/1.0/v1/chat/completions")
    assert headers["Authorization"] == "Bearer secret"
    assert body == {
        "model": "llama",
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
    }
    assert (chat.size(), chat.figures.finish_reason) == (13, "stop")


def test_a_server_is_asked_for_the_tokens_it_has_not_told(server: Server) -> None:
    chat = Chat(ServerBackend(server.url, "llama"), system="Be kind.")
    for body, size in (('{"count": 12}', 12), ('{"count": "many"}', None), ("[]", None)):
        server.replies, chat._size = [refuses(200, body)], None
        assert chat.size() == size
    server.replies = [refuses(404, "")]
    assert chat.size() is None
    _, path, _, body = server.requests[0]
    assert path.endswith("/v1/tokenize") and [message["role"] for message in body["messages"]] == ["system", "user"]


def test_an_openai_base_url_is_taken_as_it_is(server: Server) -> None:
    server.replies = [streams(delta("a", "stop"), DONE)]
    backend = ServerBackend(f"127.0.0.1:{server.server_port}/v1/", "other")
    assert list(Chat(backend).ask("Hi")) == ["a"]
    assert server.requests[0][1] == "/v1/chat/completions" and "Authorization" not in server.requests[0][2]


def test_events_may_be_cut_anywhere_and_hold_comments(server: Server) -> None:
    stream = b": hello\r\n\r\n" + delta("ä 🐱").replace(b"\n", b"\r\n") + b"event: x\n" + delta("\ud83d", "stop") + DONE
    raw = json.dumps({"choices": [{"delta": {"content": "ö"}}]}, ensure_ascii=False).encode()
    stream = b"data:" + raw + b"\n\n" + stream
    server.replies = [streams(*(stream[i : i + 1] for i in range(len(stream))))]
    assert "".join(Chat(ServerBackend(server.url, "llama")).ask("Hi")) == "öä 🐱\ufffd"


def test_the_text_comes_as_it_is_sent_with_and_without_chunks(server: Server) -> None:
    go_on = threading.Event()

    def halting(chunked: bool) -> Reply:
        def reply(handler: Handler) -> None:
            handler.begin(chunked=chunked)
            send = handler.chunk if chunked else handler.wfile.write
            send(delta("first"))
            assert go_on.wait(10)
            send(delta("second", "stop") + DONE)
            handler.close_connection = True

        return reply

    for chunked in (True, False):
        go_on.clear()
        server.replies = [halting(chunked)]
        pieces = Chat(ServerBackend(server.url, "llama")).ask("Hi")
        assert next(pieces) == "first"
        go_on.set()
        assert list(pieces) == ["second"]


REFUSALS = [
    (refuses(400, '{"error": {"message": "temperature is 9"}}'), "the server refused (HTTP 400): temperature is 9"),
    (refuses(404, '{"code": 404, "message": "Model not found: llama"}'), "(HTTP 404): Model not found: llama"),
    (refuses(401, ""), "(HTTP 401): Unauthorized; give --token, or set LLAMA_TOKEN"),
    (refuses(429, '{"error": {"message": "full"}}', Retry_After="3"), "(HTTP 429): full; try again in 3 s"),
    (refuses(500, "<html>\n<b>oops</b>"), "(HTTP 500): <html> <b>oops</b>"),
    (refuses(503, '[{"error": "loading"}]'), "(HTTP 503): [{'error': 'loading'}]"),
    (refuses(500, '{"error": "plain"}'), "(HTTP 500): plain"),
    (refuses(302, "", Location="http://elsewhere/"), "(HTTP 302): Found; it points to http://elsewhere/"),
    (
        refuses(200, "{}", Content_Type="application/json"),
        "the server did not stream: Content-Type is application/json",
    ),
]
BROKEN = [
    (streams(delta("half"), ends=False), "the connection broke in the middle of the answer"),
    (streams(delta("half")), "the server's stream ended in the middle of the answer"),
    (streams(delta("half"), event({"error": {"message": "a rank died"}})), "the server gave up: a rank died"),
    (streams(delta("half"), b"data: {]\n\n"), "the server sent what no chat completion holds: {]"),
    (streams(delta("half"), event([1])), "no chat completion holds: [1]"),
    (streams(delta("half"), event({"choices": [{"delta": {"content": 5}}]})), "no chat completion holds"),
]


@pytest.mark.parametrize(("reply", "message"), REFUSALS + BROKEN, ids=[text[-40:] for _, text in REFUSALS + BROKEN])
def test_a_server_that_fails_costs_one_line_and_the_chat_goes_on(
    capsys: pytest.CaptureFixture[str], server: Server, reply: Reply, message: str
) -> None:
    server.replies = [reply, streams(delta("fine", "stop"), DONE)]
    repl = Repl(Chat(ServerBackend(server.url, "llama")))
    out, err = said(repl, capsys, "Hi")
    assert out in ("", "half\n") and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert repl.chat.history == []
    assert said(repl, capsys, "/retry") == ("fine\n", "")


@pytest.mark.parametrize(
    "message", ["the prompt has 600 tokens; with max_seq_len 512 at most 511 fit", "maximum context length is 512"]
)
def test_a_server_whose_context_is_full_is_asked_with_less(server: Server, message: str) -> None:
    full = refuses(400, json.dumps({"error": {"message": message}}))
    server.replies = [streams(delta("a", "stop"), DONE), full, streams(delta("b", "stop"), DONE)]
    chat = Chat(ServerBackend(server.url, "llama"))
    for question in ("one", "two"):
        list(chat.ask(question))
    assert contents(chat.history) == ["two", "b"]


def test_a_server_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:  # and does not listen
        taken.bind(("127.0.0.1", 0))
        repl = Repl(Chat(ServerBackend(f"http://127.0.0.1:{taken.getsockname()[1]}", "llama")))
        _, err = said(repl, capsys, "Hi")
    assert err.endswith("/predictions/llama/1.0/v1: cannot be reached: Connection refused\n") and err.count("\n") == 1


def test_an_interrupted_stream_closes_its_connection(server: Server) -> None:
    server.replies = [talks_on]
    chat = Chat(ServerBackend(server.url, "llama"))
    pieces = chat.ask("Hi")
    assert next(pieces) == "word "
    with pytest.raises(KeyboardInterrupt):
        pieces.throw(KeyboardInterrupt)
    assert server.left.wait(10)
    assert contents(chat.history) == ["Hi", "word "]


class Terminal:
    """The tool in a terminal of its own."""

    def __init__(self, *flags: str) -> None:
        spawn = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", spawn, sys.executable, "-m", "tools.chat", *flags],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "NO_COLOR": "1", "TERM": "xterm"},
        )
        self._seen = b""

    def type(self, keys: bytes) -> None:
        self.process.stdin.write(keys)

    def read_until(self, text: str) -> str:
        """The screen's new content up to a text."""
        while text.encode() not in self._seen:
            ready = select.select([self.process.stdout], [], [], 20)[0]
            assert ready and (new := self.process.stdout.read(4096)), f"waited for {text!r}, got {self._seen!r}"
            self._seen += new
        shown, _, self._seen = self._seen.partition(text.encode())
        return shown.decode()


@pytest.fixture
def terminal(server: Server) -> Iterator[Terminal]:
    server.replies = [refuses(503, '{"error": {"message": "loading"}}'), talks_on, refuses(404, "")]
    terminal = Terminal("--server", server.url)
    with terminal.process:
        yield terminal
        terminal.process.kill()


def test_on_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves(server: Server, terminal: Terminal) -> None:
    assert "HTTP 503" in terminal.read_until("loading")  # it may yet come up, so the chat starts
    terminal.read_until(">>> ")
    terminal.type(b"\x03")
    # Python's readline misses a signal in the instant before it waits for keys, until a line ends.
    time.sleep(0.1)
    terminal.type(b"\r")
    terminal.read_until("To leave, press Ctrl-D")
    terminal.type(b"Hi\r")
    terminal.read_until("word word ")
    terminal.type(b"\x03")
    terminal.read_until("stopped; /undo drops what there is")
    seen = terminal.read_until(">>> ")
    assert "\x1b[2m" not in seen and "Traceback" not in seen
    assert server.left.wait(10)
    terminal.type(b"/tok\t\r")
    terminal.read_until("unknown until the next answer")
    terminal.read_until(">>> ")
    terminal.type(b"\x04")
    assert terminal.process.wait(20) == 0


# The command line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "hot"], "temperature is 'hot'"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--checkpoint", "/nowhere"], "/nowhere"),
        (["--checkpoint", str(PROJECT / "demo" / "model")], "checkpoint_converter.py"),
        (["--max-seq-len", "0"], "max_seq_len is 0"),
        (["--model", "other"], "--model is for --server"),
        (["--token", "secret"], "--token is for --server"),
        (["--server", "http://x", "--dtype", "float32"], "--dtype is for a checkpoint, not a server"),
        (["--server", "ftp://x"], "--server is 'ftp://x'; it must be a URL such as http://127.0.0.1:8080"),
        (["--server", "http://"], "it must be a URL"),
        (["--server", "http://x:port"], "it must be a URL"),
        (["--server", ""], "it must be a URL"),
        (["--server", "http://x", "--token", "sécret"], "the token holds characters"),
    ],
)
def test_a_start_that_fails_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(flags) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("chat: error: ") and message in err and err.count("\n") == 1


def test_the_token_comes_from_the_environment_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], server: Server
) -> None:
    server.replies = [streams(delta("Hello!", "stop"), DONE)] * 2
    monkeypatch.setenv("LLAMA_TOKEN", "from the environment")
    for flags, token in (([], "from the environment"), (["--token", "given"], "given")):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
        assert main(["--server", server.url, "--model", "a/b", *flags]) == 0
        assert server.requests[-1][2]["Authorization"] == f"Bearer {token}"
    assert server.requests[-1][1].startswith("/predictions/a%2Fb/1.0/")
    assert capsys.readouterr().out == "Hello!\nHello!\n"


def test_settings_say_what_is_allowed() -> None:
    with pytest.raises(RequestError, match="top_p is 2.0"):
        Settings().changed("top_p", "2")


def test_talking_to_a_server_takes_no_torch(tmp_path: Path) -> None:
    """Its files neither, which a session that runs already reads and writes."""
    dialog = tmp_path / "dialog.json"
    dialog.write_text(json.dumps([{"role": "user", "content": FRANCE}]))
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from tools import chat, chat_dialog\n"
        f"print(chat_dialog._read_dialog(Path({str(dialog)!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and FRANCE in done.stdout
