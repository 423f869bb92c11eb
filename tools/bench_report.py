"""Figures as rows of a table, as JSON and as pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Table:
    """Rows that are printed as they come; a column has a title, the row's key and a format."""

    def __init__(self, *columns: tuple[str, str, str]) -> None:
        self._columns = columns

    def head(self) -> str:
        """The titles."""
        return "  ".join(f"{title:>{self._width(title, form)}}" for title, _, form in self._columns)

    def line(self, row: Mapping[str, Any]) -> str:
        """One row; what it does not have is a dash."""
        cells = []
        for title, key, form in self._columns:
            value = row.get(key)
            text = "-" if value is None else format(value, form.lstrip("0123456789"))
            cells.append(f"{text:>{self._width(title, form)}}")
        return "  ".join(cells)

    @staticmethod
    def _width(title: str, form: str) -> int:
        digits = form[: len(form) - len(form.lstrip("0123456789"))]
        return max(len(title), int(digits or 0))


DECODE = Table(
    ("weights", "weights", "8"),
    ("batch", "batch", "5d"),
    ("prompt", "prompt", "6d"),
    ("context", "context", "7.0f"),
    ("tokens/s", "tokens_per_s", "8.1f"),
    ("ms/step", "step_ms", "8.1f"),
    ("p99", "p99_ms", "7.1f"),
    ("first token ms", "first_token_ms", "8.0f"),
    ("of bandwidth", "bandwidth_share", "6.2f"),
    ("of FLOP/s", "flops_share", "6.2f"),
)


def write_json(path: Path, results: Mapping[str, Any]) -> None:
    """The results as a file, which appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(results, indent=2) + "\n")
    partial.replace(path)
