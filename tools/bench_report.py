"""Figures as rows of a table, as JSON, as CSV and as pictures."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Ordered
from pathlib import Path
from typing import Any

PERCENTILES = (50, 90, 99)


def percentile(values: Ordered[float], percent: float) -> float:
    """The smallest value that so many percent of all do not exceed."""
    ranked = sorted(values)
    return ranked[max(0, -int(-len(ranked) * percent // 100) - 1)]


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


ENGINE = Table(
    ("weights", "weights", "8"),
    ("batch", "batch", "5d"),
    ("prompt", "prompt", "6d"),
    ("context", "context", "7.0f"),
    ("tokens/s", "tokens_per_s", "8.1f"),
    ("ms/step", "step_ms", "8.1f"),
    ("p50", "p50_ms", "7.1f"),
    ("p90", "p90_ms", "7.1f"),
    ("p99", "p99_ms", "7.1f"),
    ("first token ms", "first_token_ms", "8.0f"),
    ("of bandwidth", "bandwidth_share", "6.2f"),
    ("of FLOP/s", "flops_share", "6.2f"),
    ("gap", "gap_share", "4.2f"),
)
SERVICE = Table(
    ("load", "load", "24"),
    ("requests", "requests", "5d"),
    ("tokens/s", "tokens_per_s", "8.1f"),
    ("first token p50 ms", "first_token_p50_ms", "8.0f"),
    ("p99", "first_token_p99_ms", "7.0f"),
    ("gap p50 ms", "gap_p50_ms", "8.1f"),
    ("p99", "gap_p99_ms", "8.1f"),
    ("token mean ms", "per_token_mean_ms", "8.1f"),
    ("whole p50 ms", "whole_p50_ms", "8.0f"),
    ("good/s", "goodput", "6.2f"),
    ("of all", "good_share", "6.2f"),
    ("of bandwidth", "bandwidth_share", "6.2f"),
)
HISTORICAL = ("model_size", "max_gen_len", "max_prompt_len", "batch_size", "tokens/second", "bandwidth", "GPUs")


def write_json(path: Path, results: Mapping[str, Any]) -> None:
    """The results as a file, which appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(results, indent=2) + "\n")
    partial.replace(path)


def write_csv(path: Path, shape: str, rows: Iterable[Mapping[str, Any]], gpus: int) -> None:
    """The decode rows in the columns that such tables have always had, the kind of weights added to the size.

    Tokens per second are all generated tokens over the wall time, prompts included; bandwidth is in GB/s.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HISTORICAL)
        for row in rows:
            bandwidth = row["bytes_per_step"] / row["step_ms"] / 1e6
            sizes = (f"{shape}-{row['weights']}", row["tokens"], row["prompt"], row["batch"])
            writer.writerow((*sizes, f"{row['throughput']:.2f}", f"{bandwidth:.2f}", gpus))


class NoPictures(RuntimeError):
    """Why there are none."""


def draw(
    path: Path,
    title: str,
    rows: Iterable[Mapping[str, Any]],
    across: tuple[str, str],
    up: tuple[str, str],
    by: str | None = None,
    logarithmic: bool = False,
) -> None:
    """A picture of one figure against another (key and label), a line for each value of `by`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise NoPictures("no pictures: matplotlib is not installed; run: make install") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes, lines = figure.add_subplot(), defaultdict(list)
    for row in rows:
        lines[row[by] if by else None].append((row[across[0]], row[up[0]]))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    if logarithmic:
        axes.set_xscale("log", base=2)
        ticks = sorted({across_ for points in lines.values() for across_, _ in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set(title=title, xlabel=across[1], ylabel=up[1])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if by:
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
