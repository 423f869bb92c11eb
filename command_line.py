"""What all command lines here have in common."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn


def _is_ours() -> bool:
    """Whether a program of ours was started, and not somebody else's that imports one.

    `python -m tools.x` imports `tools`, which imports this, while it still looks for the module.
    """
    started = Path(getattr(sys.modules["__main__"], "__file__", None) or "?").resolve()
    ours = (Path(__file__).resolve().with_name(name) for name in ("generate.py", "checkpoint_converter.py"))
    return sys.argv[:1] == ["-m"] or started in ours


if _is_ours():
    # A stream may have been closed by who started us: no file that is opened later may get its number.
    if sys.stdin is None:
        sys.stdin = open(os.open(os.devnull, os.O_WRONLY))  # so that reading it is an error
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    # Importing torch takes seconds. Until a command line is read, Ctrl-C ends a program without a traceback.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


class Parser(argparse.ArgumentParser):
    """Takes options spelt with - or _, but not shortened; says in one line what is wrong and what may be meant."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """All ways to read a command line lead through here, where what it is for begins."""
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if sys.stdout is None:
            self.exit(1, f"{self.prog}: error: stdout is closed; send it somewhere, such as > FILE\n")
        if sys.stdout.errors == "strict":  # the locale's encoding may lack what is to be written
            sys.stdout.reconfigure(errors="replace")
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        words = [self._respelt(word) for word in (sys.argv[1:] if args is None else args)]
        if not self._subparsers:  # before the one that was meant is missed
            self._refuse([word for word in words[: (*words, "--").index("--")] if self._is_unknown(word)])
        flags, unknown = self.parse_known_args(words, namespace)
        self._refuse(unknown)
        return flags

    def _is_unknown(self, word: str) -> bool:
        return word.startswith("--") and " " not in word and word.partition("=")[0] not in self._option_string_actions

    def _refuse(self, unknown: Sequence[str]) -> None:
        if unknown:
            close = difflib.get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")

    def _respelt(self, word: str) -> str:
        name, equals, value = word.partition("=")
        if word.startswith("--") and name not in self._option_string_actions:
            for other in (name.replace("_", "-"), "--" + name[2:].replace("-", "_")):
                if other in self._option_string_actions:
                    return other + equals + value
        return word


# What ends a program: Ctrl-C, `kill`, and a terminal that is closed.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def end_with(main: Callable[[], int]) -> NoReturn:
    """Run a command line and end with its status; the signals that end a program let it clean up."""
    try:
        with interrupts():
            sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def interrupts() -> Iterator[None]:
    """Let one of SIGNALS raise KeyboardInterrupt with its number, once; what is cleaned up then is left in peace."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    with signals_to(interrupt):
        yield


@contextlib.contextmanager
def signals_to(action: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """Give SIGNALS another action for a while.

    One that is ignored stays so, as Ctrl-C in a shell's background and SIGHUP under nohup.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():  # signals interrupt no other
        heard = [each for each in SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
        before = {each: signal.signal(each, action) for each in heard}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
