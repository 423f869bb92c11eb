"""Wrong command lines get one line that says what may be meant; both spellings of an option do."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import checkpoint_converter
import generate
from command_line import SIGNALS, Parser, interrupts, signals_to
from tools import archive, bench, bench_peers, chat, check, download, fuzz, parity, serve, stress

PROJECT = Path(__file__).resolve().parent.parent


def parser() -> Parser:
    made = Parser(prog="tool")
    made.add_argument("--max-new-tokens", type=int)
    made.add_argument("--tensor_parallel", type=int)
    made.add_argument("--text")
    return made


@pytest.mark.parametrize("max_new", ["--max-new-tokens", "--max_new_tokens", "--max-new_tokens"])
@pytest.mark.parametrize("tensor", ["--tensor-parallel", "--tensor_parallel"])
def test_options_are_taken_with_either_spelling(max_new, tensor):
    flags = parser().parse_args([max_new, "3", f"{tensor}=2", "--text", "a_b-c=d_e"])
    assert (flags.max_new_tokens, flags.tensor_parallel, flags.text) == (3, 2, "a_b-c=d_e")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-new-token", "3"], "unrecognized arguments: --max-new-token; did you mean --max-new-tokens?"),
        (["--max_new", "3"], "unrecognized arguments: --max_new; did you mean --max-new-tokens?"),  # no short forms
        (["--tensorparallel=2"], "unrecognized arguments: --tensorparallel=2; did you mean --tensor_parallel?"),
        (["--quantize"], "unrecognized arguments: --quantize"),
        (["--max-new-tokens", "many"], "argument --max-new-tokens: invalid int value: 'many'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(capsys, words, said):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(words)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"tool: error: {said} (see --help)\n"


def test_a_misspelt_option_that_is_needed_is_the_one_that_is_told(capsys):
    made = parser()
    made.add_argument("--prompt", required=True)
    with pytest.raises(SystemExit):
        made.parse_args(["--promptt", "a"])
    assert "--promptt; did you mean --prompt?" in capsys.readouterr().err
    assert made.parse_args(["--prompt", "--- a title"]).prompt == "--- a title"


PROGRAMS = [archive, bench, bench_peers, chat, check, download, fuzz, parity, serve, stress]


@pytest.mark.parametrize("program", [generate, checkpoint_converter, *PROGRAMS])
def test_every_program_tells_an_unknown_flag_in_one_line(program, capsys):
    with pytest.raises(SystemExit) as ended:
        program.main(["start", "x", "--bogus"])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.count("\n") == 1 and ": error: " in err and err.endswith("(see --help)\n")


def start(words: str, **options) -> subprocess.Popen:
    command = ["bash", "-c", f"exec {sys.executable} {words}"]
    return subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("words", ["generate.py --prompt x", "checkpoint_converter.py a b", "-m tools.check a b"])
def test_ctrl_c_while_torch_is_imported_leaves_no_traceback(words):
    with start(words) as program:
        try:
            loaded = Path(f"/proc/{program.pid}/maps")
            deadline = time.monotonic() + 60
            while "/libtorch" not in loaded.read_text() and time.monotonic() < deadline:
                time.sleep(0.01)
            program.send_signal(signal.SIGINT)
            _, err = program.communicate(timeout=60)
        finally:
            program.kill()
    assert (program.returncode, err) == (-signal.SIGINT, "")  # which a shell calls 130


def test_who_imports_a_program_keeps_ctrl_c():
    code = "import signal, checkpoint_converter; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE, text=True, timeout=60)
    assert ended.stdout == "True\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("generate.py --prompts - <&-", "generate.py: error: -: cannot be read: Bad file descriptor\n"),
        ("-m tools.chat --server 127.0.0.1:1 <&-", "chat: error: the dialog cannot go on: Bad file descriptor\n"),
        (
            "-m tools.serve status >&-",
            "python -m tools.serve: error: stdout is closed; send it somewhere, such as > FILE\n",
        ),
        ("checkpoint_converter.py /nowhere out 2>&-", ""),
        ("-m tools.chat --server 127.0.0.1:1 <&- >&- 2>&-", ""),
    ],
)
def test_a_stream_that_is_closed_gives_a_message_where_it_can_be_seen(words, said):
    with start(words, stdout=subprocess.PIPE) as program:
        assert program.communicate(timeout=60) == ("", said)
    assert program.returncode == 1


def test_what_the_encoding_of_stdout_lacks_is_replaced(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    parser().parse_args([])
    print("ä 🐱", flush=True)
    assert sys.stdout.buffer.getvalue() == b"\xe4 ?\n"


def test_words_that_are_no_options_stay_as_they_are():
    made = parser()
    made.add_argument("words", nargs="*")
    assert made.parse_args(["--text", "xxtext", "xxtext", "__text"]).words == ["xxtext", "__text"]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_is_ignored_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        for block in (interrupts(), signals_to(signal.SIG_DFL)):
            with block:
                os.kill(os.getpid(), number)
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interrupt_comes_once_and_leaves_the_cleaning_up_in_peace(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    cleaned = []
    with pytest.raises(KeyboardInterrupt, match=str(int(number))), interrupts():
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            for again in SIGNALS:
                os.kill(os.getpid(), again)
            cleaned.append(True)
    assert cleaned == [True]
    assert [signal.getsignal(each) for each in SIGNALS] == before
