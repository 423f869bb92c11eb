"""The fuzzer: damaged checkpoints are refused or load, and a reader that fails otherwise is found out."""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from formats import FormatError, open_source
from formats.hf import HFSource
from tools import fuzz
from tools.fuzz import KINDS, described, main
from tools.fuzz_damage import Damage, damage
from tools.fuzz_readers import Limits
from tools.fuzz_samples import Sample, make_samples

DOZENS = 24
SOME = 2


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return make_samples(tmp_path_factory.mktemp("samples"))


def written(folder: Path, files: dict[str, bytes | None]) -> Path:
    for name, content in files.items():
        if content is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    return folder


def test_damaged_checkpoints_of_every_format_load_or_are_refused():
    said: list[str] = []
    report = fuzz.fuzz(DOZENS, seed=5, workers=1, say=lambda finding: said.append(described(finding, 5, details=True)))
    assert not said and not report.findings
    assert set(report.counts) == set(KINDS)
    for kind, counts in report.counts.items():
        assert counts.total() == DOZENS and set(counts) == {"loaded", "refused"}, kind


def test_a_mutation_is_the_same_again_and_another_under_another_seed(samples, tmp_path):
    again = make_samples(tmp_path)
    for kind in KINDS:
        for number in range(20):
            sample, done = damage(samples, kind, number, seed=3)
            other, repeated = damage(again, kind, number, seed=3)
            assert (sample.name, done.words) == (other.name, repeated.words)
            assert done.files == repeated.files, (kind, done.words)
        assert any(damage(samples, kind, n, 3)[1] != damage(samples, kind, n, 4)[1] for n in range(20))


def test_mutations_damage_every_sample_and_leave_its_other_files_alone(samples):
    for kind in KINDS:
        own = {sample.name for sample in samples if sample.kind == kind}
        made = [damage(samples, kind, number, seed=0) for number in range(200)]
        assert {sample.name for sample, _ in made} == own
        assert all(1 <= len(done.files) <= 2 and done.files.keys() <= sample.files.keys() for sample, done in made)
        changed = [any(sample.files[name] != new for name, new in done.files.items()) for sample, done in made]
        assert sum(changed) > 0.9 * len(changed)


# What is planted in the workers: a reader that fails in a way that no reader may.


def _plant(read: Any) -> None:
    HFSource.read = read


def plant_key_error() -> None:
    _plant(lambda self, name: {}[name])


def plant_sleep() -> None:
    _plant(lambda self, name: time.sleep(60))


def plant_work() -> None:
    _plant(lambda self, name: deque(itertools.count(), maxlen=0))


def plant_allocation() -> None:
    _plant(lambda self, name: bytearray(8 << 30))


def plant_crash() -> None:
    _plant(lambda self, name: os.abort())


def plant_exit() -> None:
    _plant(lambda self, name: os._exit(7))


def plant_long_refusal() -> None:
    def read(self: HFSource, name: str) -> None:
        raise FormatError("one line\nand another")

    _plant(read)


def plant_wrong_shape() -> None:
    right = HFSource.read
    _plant(lambda self, name: right(self, name)[:1])


@pytest.mark.parametrize(
    ("plant", "result", "what"),
    [
        (plant_key_error, "error", "KeyError"),
        (plant_sleep, "hang", "hang"),
        (plant_work, "hang", "hang"),
        (plant_allocation, "memory", "MemoryError"),
        (plant_crash, "crash", "SIGABRT"),
        (plant_exit, "crash", "exit status 7"),
        (plant_long_refusal, "error", "a refusal that is not in one line"),
        (plant_wrong_shape, "error", "AssertionError"),
    ],
)
def test_a_planted_bug_is_found_and_the_session_goes_on(monkeypatch, samples, plant, result, what):
    one = next(sample for sample in samples if sample.kind == "hf")
    monkeypatch.setattr(fuzz, "make_samples", lambda folder: [one])
    monkeypatch.setattr(fuzz, "damage", _nearly_whole)
    said: list[str] = []
    report = fuzz.fuzz(
        SOME,
        ("hf",),
        limits=Limits(cpu_s=0.3, wall_s=0.4 if plant is plant_sleep else 20.0),
        workers=1,
        prepare=plant,
        say=lambda finding: said.append(described(finding, 0)),
    )
    assert report.counts["hf"] == {result: SOME}
    assert {(found.outcome.result, found.outcome.what) for found in report.findings.values()} == {(result, what)}
    assert sum(report.seen.values()) == SOME and len(said) == 1
    place = "no place in the project" if plant is plant_exit else "tests/test_fuzz.py:"
    if plant is not plant_wrong_shape:  # the shape is the fuzzer's own complaint
        assert f"hf: {result}: {what} at {place}" in said[0]
    assert "python -m tools.fuzz --formats hf --seed 0 --only 0" in said[0]
    assert f"{SOME:,}" in report.table()


def _nearly_whole(samples: list[Sample], kind: str, number: int, seed: int) -> tuple[Sample, Damage]:
    """A space more in config.json, so that the reader gets as far as it can."""
    sample = next(sample for sample in samples if sample.kind == kind)
    return sample, Damage({"config.json": sample.files["config.json"] + b" "}, "config.json: a space more")


def test_the_time_limit_ends_a_session():
    report = fuzz.fuzz(10_000, ("tokenizers",), seconds=0.3, workers=1)
    assert 0 < report.counts["tokenizers"].total() < 10_000


def test_the_command_line_says_what_came_of_it(monkeypatch, capsys):
    assert main(["--mutations", "3", "--formats", "tokenizers,dcp", "--workers", "1"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["loaded", "refused", "error", "crash", "hang", "memory", "all"]
    assert [line.split()[0] for line in table[1:]] == ["dcp", "tokenizers"]
    assert all(line.split()[-1] == "3" for line in table[1:])
    for arguments in (["--formats", "onnx"], ["--mutations", "0"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    assert "allowed: meta, hf" in capsys.readouterr().err


def test_the_samples_are_whole(samples, tmp_path):
    assert {sample.kind for sample in samples} == set(KINDS)
    for index, sample in enumerate(samples):
        if sample.kind != "tokenizers":
            with open_source(written(tmp_path / str(index), sample.files) / sample.target) as source:
                assert source.name == sample.kind
