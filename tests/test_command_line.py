"""A wrong command line costs one line that names the word, whichever program it was given to."""

from __future__ import annotations

import pytest

import checkpoint_converter
import generate
from tools import chat, check, download, serve


@pytest.mark.parametrize("program", [chat, check, download, serve, generate, checkpoint_converter])
def test_an_unknown_flag_is_told_in_one_line(program, capsys) -> None:
    try:
        status = program.main(["start", "x", "--bogus"])
    except SystemExit as ended:
        status = ended.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and ": error: " in err and err.endswith("(see --help)\n")
