"""Convert a Llama checkpoint from any format to any other: by default to the one folder that the server loads.

python checkpoint_converter.py IN OUT --to meta|dcp|hf|gguf|megatron
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command_line import Parser, interrupts, signals_to
from engine.checkpoint import CHECKPOINT_DTYPES
from engine.config import ConfigError
from formats import FORMATS, SINKS, FormatError, open_source
from formats.conversion import Conversion, ConversionError, convert, format_of, make_sink
from formats.output import OutputError
from formats.sink import Option, whole_number

__all__ = ["ConversionError", "convert", "main"]

PROGRAM = "checkpoint_converter.py"


def _parsing(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """The parser, its complaint as argparse wants it."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def _options() -> dict[str, Option]:
    return {option.name: option for sink in SINKS for option in sink.options}


def _parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description="Convert a Llama checkpoint from any format to any other. The default, dcp, is the folder that the "
        "server loads: tensors in PyTorch's distributed format, which loads on any number of ranks, model_args.json, "
        "the tokenizer and a manifest.",
        epilog="Options may be spelt with - for _. Under torchrun rank 0 converts and the other ranks do nothing.",
    )

    def add(name: str, **settings: Any) -> None:
        parser.add_argument(f"--{name}", **settings)

    readable = ", ".join(source.title for source in FORMATS)
    parser.add_argument("source", nargs="?", metavar="IN", help=f"the checkpoint, whichever it is of {readable}")
    parser.add_argument("output", nargs="?", metavar="OUT", help="folder or .gguf to write; appears when complete")
    add("to", choices=[sink.name for sink in SINKS], help="format to write (default: dcp, or gguf for OUT.gguf)")
    add("original_ckpt_dir", metavar="IN", help="the same as IN")
    add("save_checkpoint_dir", metavar="OUT", help="the same as OUT")
    add("tokenizer_path", metavar="FILE", help="tokenizer.model or tokenizer.json (default: the one in or beside IN)")
    add(
        "model_parallel_size",
        type=_parsing(whole_number),
        metavar="N",
        help="how many shards IN has; the output does not depend on it",
    )
    add("dtype", choices=list(CHECKPOINT_DTYPES), help="dtype to store (default: as in IN)")
    add("force", action="store_true", help="replace what this program made at OUT, if damaged or of other origin")
    add("no_verify", action="store_true", help="do not check the checksums of IN's files")
    for option in _options().values():
        owners = " and ".join(sink.name for sink in SINKS if any(own.name == option.name for own in sink.options))
        add(
            option.name,
            type=_parsing(option.parse),
            choices=option.choices,
            metavar=None if option.choices else option.metavar,
            help=f"{owners}: {option.help}",
        )
    return parser


def _one_of(parser: Parser, options: argparse.Namespace, positional: str, flag: str, name: str) -> str:
    given = {value for value in (getattr(options, positional), getattr(options, flag)) if value is not None}
    if len(given) > 1:
        parser.error(f"{name} and --{flag} name different folders")
    if not any(given):
        parser.error(f"{name} (or --{flag}) is needed")
    return given.pop()


def _run(parser: Parser, options: argparse.Namespace, warn: Callable[[str], None]) -> str:
    """Convert as the command line says; what there is to say when it is done."""
    source_path = _one_of(parser, options, "source", "original_ckpt_dir", "IN")
    output = _one_of(parser, options, "output", "save_checkpoint_dir", "OUT")
    dtype = CHECKPOINT_DTYPES[options.dtype] if options.dtype else None
    settings = {name: getattr(options, name) for name in _options()}
    with open_source(source_path, options.tokenizer_path, verify=False) as source:
        sink = make_sink(source, options.to or format_of(output), dtype, settings)
        conversion = Conversion(sink, Path(output))
        if source.shards is not None and options.model_parallel_size not in (None, source.shards):
            warn(
                f"--model_parallel_size is {options.model_parallel_size}, but {source_path} has {source.shards} shards"
            )
        if conversion.tokens < source.args.vocab_size:
            origin = sink.vocabulary.origin
            warn(f"{origin} has {conversion.tokens} tokens, the model {source.args.vocab_size} (padded?)")
        if source.mixed_dtypes:
            warn(f"{source_path} mixes dtypes; all is stored as {sink.stored_as}")
        with interrupts():
            written = conversion.run(options.force, verify=not options.no_verify)
    what = f"{sink.args.parameter_count():,} parameters in {sink.stored_as}"
    return f"{output}: {what} {'converted' if written else 'were already converted'} to {sink.title}"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0":
        return 0  # under torchrun, and not the first
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        # Until there is something to clean up, a signal ends all at once: a hostile file can keep Python from hearing.
        with signals_to(signal.SIG_DFL):
            said = _run(parser, options, lambda text: print(f"{PROGRAM}: warning: {text}", file=sys.stderr))
    except (FormatError, ConfigError, ConversionError, OutputError) as error:
        message, status = str(error), 1
    except OSError as error:
        message, status = f"{error.filename or 'output'}: {error.strerror or error}", 1
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise  # a bug, which needs its traceback
        message, status = "not enough memory", 1
    except KeyboardInterrupt as error:
        message = f"stopped by {signal.Signals(error.args[0]).name}; nothing was changed"
        status = 128 + error.args[0]
    else:
        return _say(said)
    print(f"{PROGRAM}: error: {message}", file=sys.stderr)
    return status


def _say(said: str) -> int:
    """The last line of a conversion that is complete, whether or not anybody reads it."""
    try:
        print(said, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or it is tried again at exit
    return 0


if __name__ == "__main__":
    sys.exit(main())
