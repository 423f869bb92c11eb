"""Checkpoint formats that can be converted: one file each, every one a lazy `Source` of canonical tensors."""

from __future__ import annotations

import os
from pathlib import Path

from formats.dcp import DCPSink, DCPSource
from formats.gguf import GGUFSink, GGUFSource
from formats.hf import HFSource
from formats.hf_sink import HFSink
from formats.megatron import MegatronSource
from formats.megatron_sink import MegatronSink
from formats.meta import MetaSource
from formats.meta_sink import MetaSink
from formats.sink import Sink
from formats.source import FormatError, Source

__all__ = ["FORMATS", "SINKS", "FormatError", "Sink", "Source", "open_source"]

# What can be read, in the order in which a folder is asked whether it is one; and what can be written.
FORMATS: tuple[type[Source], ...] = (DCPSource, MegatronSource, MetaSource, HFSource, GGUFSource)
SINKS: tuple[type[Sink], ...] = (DCPSink, MetaSink, HFSink, GGUFSink, MegatronSink)


def open_source(
    path: str | os.PathLike[str],
    tokenizer_path: str | os.PathLike[str] | None = None,
    verify: bool = True,
    progress: bool = False,
) -> Source:
    """Open the checkpoint at `path`, a folder or a .gguf file, and check its files' own checksums if `verify`."""
    path = Path(path)
    if not path.exists():
        raise FormatError(f"{path}: no such file or folder")
    if not os.access(path, os.R_OK | os.X_OK if path.is_dir() else os.R_OK):
        raise FormatError(f"{path}: permission denied")
    for source_class in FORMATS:
        if source_class.recognizes(path):
            source = source_class(path, Path(tokenizer_path) if tokenizer_path is not None else None)
            break
    else:
        if not path.is_dir():
            raise FormatError(f"{path}: is a file; the folder that holds the checkpoint is needed")
        looked_for = "; ".join(f"{source_class.title} ({source_class.needs})" for source_class in FORMATS)
        raise FormatError(f"{path}: holds no checkpoint of a known format; looked for: {looked_for}")
    try:
        if verify:
            source.verify(progress)
    except BaseException:
        source.close()
        raise
    return source
