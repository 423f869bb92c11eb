"""One conversion, from any source to any sink: its output appears whole or not at all, and is not made twice."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from command_line import signals_to
from engine.checkpoint import FORMAT_VERSION, MANIFEST, CheckpointError, check_hashes, check_sizes, sha256_of
from formats import SINKS, open_source
from formats.output import (
    OutputError,
    OutputTaken,
    in_background,
    partial_folder,
    put_file_in_place,
    put_in_place,
    write_file,
)
from formats.sink import Sink
from formats.source import FormatError, Source, byte_bar, read_json

# Manifest, checklists and what the file system needs for their names.
_SMALL_FILES = 1 << 20


class ConversionError(ValueError):
    """A setting, or an output that cannot be written; the message says what to change."""


def convert(
    source_path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    to: str | None = None,
    tokenizer_path: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    verify: bool = True,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Convert the checkpoint at `source_path` to the format `to` at `output`, which appears whole or not at all.

    `to` is "gguf" where `output` ends in .gguf and "dcp" otherwise; `options` are those of the format's sink. An output
    of the same sources and settings is left as it is; another one is an error, or replaced if `force`.
    """
    with open_source(source_path, tokenizer_path, verify=False) as source:
        sink = make_sink(source, to or format_of(output), dtype, options)
        Conversion(sink, Path(output), progress).run(force, verify)
    return Path(output)


def format_of(output: str | os.PathLike[str]) -> str:
    """The format of an output that nobody named."""
    return "gguf" if Path(output).suffix.lower() == ".gguf" else "dcp"


def make_sink(source: Source, to: str, dtype: torch.dtype | None, options: dict[str, Any]) -> Sink:
    """The sink of the format `to`; an option of another format is an error that names both."""
    sinks = {sink_class.name: sink_class for sink_class in SINKS}
    if to not in sinks:
        raise ConversionError(f"--to is {to!r}; allowed: {', '.join(sinks)}")
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        owners = [other for other in sinks if any(option.name == name for option in sinks[other].options)]
        if to not in owners:
            belongs = f"it belongs to --to {' and '.join(owners)}" if owners else "no format has it"
            raise ConversionError(f"--{name} is no option of --to {to}; {belongs}")
    return sinks[to](source, dtype, **given)


class Conversion:
    """One sink on its way to one output: a folder, or the one file that the sink writes where a file is named."""

    def __init__(self, sink: Sink, output: Path, progress: bool = True) -> None:
        self.sink, self.source, self.progress = sink, sink.source, progress
        # A link stays a link, to a new output.
        self.target = Path(os.path.realpath(output))
        self._is_file = format_of(output) == "gguf"
        if self._is_file and sink.name != "gguf":
            raise ConversionError(f"{output}: is the name of a GGUF file, which --to gguf writes; not --to {sink.name}")
        self._manifest = (
            self.target.with_name(f"{self.target.name}.{MANIFEST}") if self._is_file else self.target / MANIFEST
        )
        self._root = self._manifest.parent
        self.tokens = _checked_tokenizer(sink)
        self.fingerprint = self._fingerprint()

    def run(self, force: bool = False, verify: bool = True) -> bool:
        """Write the output; False if it was there already, from the same sources and settings."""
        # One that is to be replaced if need be must prove that there is no need.
        if self._is_done(verify=force):
            return False
        self._check_target(force)
        self._check_space()
        with partial_folder(self.target) as folder:
            try:
                self._write_manifest(folder, self._write(folder, verify))
            except OSError as error:
                raise OutputError(f"{self.target}: cannot be written: {error.strerror or error}") from None
            try:
                if force and self._is_done(verify=True):
                    return False  # another process did the same meanwhile, and may have readers
                # What is complete is put in place, whatever comes: half of that would be neither old nor new.
                with signals_to(signal.SIG_IGN):
                    self._put_in_place(folder, replace=force)
            except OutputTaken:
                if not self._is_done(verify=False):
                    raise
                return False
        return True

    def _write(self, folder: Path, verify: bool) -> dict[str, dict[str, Any]]:
        """Have the sink write the folder, and check the input's own checksums meanwhile, which reads it only once."""
        checked = in_background(self.source.verify if verify else lambda: None)
        with _one_thread(), byte_bar(self.sink.tensor_bytes(), "converting", self.progress) as bar:

            def advance(size: int) -> None:
                bar.update(size)
                if checked.done():
                    checked.result()

            try:
                hashed = self.sink.write(folder, advance)
            except FormatError:
                checked.result()  # that the input is damaged explains more
                raise
            checked.result()
        return hashed

    def _fingerprint(self) -> dict[str, Any]:
        """What the output follows from; equal fingerprints mean that converting again would change nothing."""
        root = os.path.commonpath([path.parent for path in self.source.files])
        found = {os.path.relpath(path, root): path.stat() for path in self.source.files}
        found |= {path.name: path.stat() for path in self.source.tokenizer_files}
        return {
            "source_format": self.source.name,
            "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in sorted(found.items())},
            "model_args": dataclasses.asdict(self.sink.args),
            "dtype": self.sink.stored_as,
            "format": self.sink.name,
            "settings": self.sink.settings,
        }

    def _is_done(self, verify: bool) -> bool:
        """Whether the target is a complete output of exactly this conversion."""
        manifest = _read_manifest(self._manifest)
        # Before there were other formats, manifests did not say which it was.
        if manifest is None or {"format": "dcp", "settings": {}} | manifest["fingerprint"] != self.fingerprint:
            return False
        try:
            check_sizes(self._root, manifest["files"])
            if verify:
                with byte_bar(
                    sum(entry["size"] for entry in manifest["files"].values()), "checking", self.progress
                ) as b:
                    check_hashes(self._root, manifest["files"], b.update)
        except (CheckpointError, OSError):
            return False
        return True

    def _check_target(self, force: bool) -> None:
        target = self.target
        for path in map(os.path.realpath, self.source.files):
            if path == str(target) or path.startswith(f"{target}{os.sep}"):
                raise ConversionError(f"{target}: holds the checkpoint to convert; choose another place")
        if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir()) and not self._is_file):
            return
        if target.is_dir() and self._is_file:
            raise ConversionError(f"{target}: is a folder; a file is to be written")
        if not target.is_dir() and not self._is_file:
            raise ConversionError(f"{target}: is a file; a folder is needed")
        # Even --force destroys nothing but what the converter can make again.
        manifest = _read_manifest(self._manifest)
        if self._is_file and (manifest is None or target.name not in manifest["files"]):
            raise ConversionError(f"{target}: is there already, and not made by this program; choose a new name")
        if not self._is_file:
            others = sorted(_files_of(target) - set(manifest["files"] if manifest else ()) - {MANIFEST})
            if manifest is None or others:
                listed = f" ({', '.join(others[:3])}{', ...' if len(others) > 3 else ''})" if others else ""
                raise ConversionError(f"{target}: is a folder with other files{listed}; choose a new one")
        if not force:
            raise ConversionError(
                f"{target}: is there already, damaged or from other files or settings; --force replaces it"
            )

    def _check_space(self) -> None:
        needed = self.sink.size_bound() + _SMALL_FILES
        there = next(folder for folder in self.target.parents if folder.exists())
        if not there.is_dir():
            raise ConversionError(f"{there}: is a file; the output cannot be made there")
        free = shutil.disk_usage(there).free
        if free < needed:
            raise ConversionError(
                f"{there}: not enough disk space: {needed / 1e9:.4f} GB needed, {free / 1e9:.4f} GB free"
            )

    def _write_manifest(self, folder: Path, hashed: dict[str, dict[str, Any]]) -> None:
        """Hash what the sink did not hash, wait until it is on disk, and list every file."""
        files = {}
        for name in sorted(_files_of(folder)):
            path = folder / name
            if name not in hashed:
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            files[name] = hashed.get(name) or {"size": path.stat().st_size, "sha256": sha256_of(path)}
        if self._is_file:
            if len(files) != 1:
                raise ConversionError(
                    f"{self.target}: {self.sink.title} needs a folder, not a file, for {len(files)} files"
                )
            files = {self.target.name: next(iter(files.values()))}
        manifest = {
            "format_version": FORMAT_VERSION,
            "format": self.sink.name,
            "source_format": self.source.name,
            "dtype": self.sink.stored_as,
            "parameters": self.sink.args.parameter_count(),
            "context_length": self.sink.context_length(),
            "files": files,
            "fingerprint": self.fingerprint,
        }
        write_file(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())

    def _put_in_place(self, folder: Path, replace: bool) -> None:
        if self._is_file:
            made = next(path for path in folder.iterdir() if path.name != MANIFEST)
            put_file_in_place(made, self.target, folder / MANIFEST, self._manifest, replace)
        else:
            put_in_place(folder, self.target, replace)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Copies wait for memory and disk, so more of torch's threads would only spin beside those that hash and check."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def _checked_tokenizer(sink: Sink) -> int:
    """How many tokens there are; they must fit into the model's vocabulary, which may be padded."""
    tokens, rows = sink.vocabulary.tokens, sink.args.vocab_size
    if len(tokens) > rows:
        raise ConversionError(
            f"{sink.vocabulary.origin}: has {len(tokens)} tokens, the model only {rows}: it belongs to another model"
        )
    return len(tokens)


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """A manifest of this program's, or None where there is no such."""
    try:
        manifest = read_json(path)
    except FormatError:
        return None
    files, fingerprint = manifest.get("files"), manifest.get("fingerprint")
    if not isinstance(files, dict) or not isinstance(fingerprint, dict) or "format_version" not in manifest:
        return None
    for name, entry in files.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not isinstance(entry, dict):
            return None
        if type(entry.get("size")) is not int or not isinstance(entry.get("sha256"), str):
            return None
    return manifest


def _files_of(folder: Path) -> set[str]:
    """Everything in a folder that is no folder, by its path in it."""
    return {
        (Path(path) / name).relative_to(folder).as_posix()
        for path, folders, names in os.walk(folder)
        for name in names + [each for each in folders if (Path(path) / each).is_symlink()]
    }
