"""The converted checkpoint that a server loads: the demo model, a converted folder, or one that is converted first."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from pathlib import Path

from engine.config import ConfigError

MANIFEST = "manifest.json"  # engine/checkpoint.py's; repeated, because that one imports torch


def converted(checkpoint: Path | None, build: Path) -> Path:
    """The folder for `converted_ckpt_dir`, made first where it is not there; None is the demo model."""
    if checkpoint is not None:
        checkpoint = Path(os.path.expanduser(checkpoint)).resolve()
        if not checkpoint.exists():
            raise ConfigError(f"checkpoint {checkpoint}: no such folder")
        if (checkpoint / MANIFEST).exists():
            return checkpoint
    target = target_of(checkpoint, build)
    # Imported here, because torch takes seconds and neither `stop` nor `status` needs it.
    from checkpoint_converter import ConversionError, convert
    from engine.checkpoint import CheckpointError
    from formats import FormatError
    from formats.output import OutputError
    from generate import DEMO_MODEL

    demo = checkpoint is None
    source, limits = (DEMO_MODEL, {"max_seq_len": 512, "progress": False}) if demo else (checkpoint, {})
    if not demo and not (target / MANIFEST).exists():
        print(f"{source} is not converted yet; converting it to {target}", file=sys.stderr, flush=True)
    try:
        try:
            return convert(source, target, **limits)
        except ConversionError:
            if not (target / MANIFEST).exists():
                raise
            # Of other files or settings than an earlier run's. Not forced at once: that reads and hashes all of it.
            return convert(source, target, **limits, force=True)
    except (FormatError, ConversionError, OutputError, CheckpointError) as error:
        raise ConfigError(str(error)) from None


def target_of(checkpoint: Path | None, build: Path) -> Path:
    """Where the conversion of a checkpoint goes; folders of the same name at other places do not meet."""
    if checkpoint is None:
        return build / "demo"
    place = hashlib.sha256(str(checkpoint).encode()).hexdigest()[:6]
    return build / "converted" / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', checkpoint.name)}-{place}"


def check_ranks(folder: Path, ranks: int) -> None:
    """Refuse a number of ranks that the model cannot be sharded over, before anything starts."""
    from engine.checkpoint import CheckpointError, open_checkpoint

    try:
        sizes = open_checkpoint(folder, verify=False).args.tensor_parallel_sizes()
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    if ranks not in sizes:
        raise ConfigError(f"TP={ranks} does not fit this model; sizes that work: {', '.join(map(str, sizes))}")
