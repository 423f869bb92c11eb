"""Talk to a Llama in a terminal or a pipe: on a server, or straight on a checkpoint.

python -m tools.chat
python -m tools.chat --checkpoint converted/7b
python -m tools.chat --server http://127.0.0.1:8080

Answers go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TextIO

from command_line import Parser
from engine.config import DEVICES, DTYPES, QUANTIZATIONS, EngineConfig, RequestError, nearest
from engine.sequence import FinishReason
from tools.chat_backends import OFF, AnswerError, LocalBackend, ServerBackend, Settings, one_line
from tools.chat_dialog import Chat

try:
    import readline
except ImportError:  # not everywhere; lines are then edited as the terminal does it
    readline = None

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
            self.fail(f"/{name} stands alone, without {one_line(argument, 40)!r}")
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
        self.note("there is nothing to undo" if dropped is None else f"dropped: {one_line(dropped, 60)}")

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
            print(f"chat: error: {one_line(str(error), 1000)}", file=sys.stderr)
            return 1
        return repl.run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:  # nothing more can be read or written, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader left
            return 141
        print(f"chat: error: the dialog cannot go on: {error.strerror}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
