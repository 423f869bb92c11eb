"""What all command lines here have in common."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Takes options spelt with - or _, but not shortened; says in one line what is wrong and what may be meant."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        words = [self._respelt(word) for word in (sys.argv[1:] if args is None else args)]
        flags, unknown = self.parse_known_args(words, namespace)
        if unknown:
            close = difflib.get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return flags

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")

    def _respelt(self, word: str) -> str:
        name, equals, value = word.partition("=")
        for other in (name.replace("_", "-"), "--" + name[2:].replace("-", "_")):
            if name not in self._option_string_actions and other in self._option_string_actions:
                return other + equals + value
        return word
