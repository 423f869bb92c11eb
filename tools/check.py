"""Say whether two checkpoints, of whatever formats, are the same model.

python -m tools.check A B      settings, vocabulary, every tensor, then logits and greedy text on prompts
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from command_line import Parser, signals_to
from engine.config import ConfigError
from engine.engine import Engine
from engine.loader import FLOAT32_LIMIT_BYTES, Limits, available_memory
from engine.parallel import Launch, Ranks
from engine.runner import Runner
from engine.scheduler import Segment, StepPlan
from engine.sequence import SamplingParams
from formats import FormatError, Source, open_source
from formats.source import byte_bar, shape_text
from llama2 import Transformer
from tokenizing import Tokenizer, TokenizerError

PROMPTS = ("Once upon a time", "The capital of France is", "def main():\n    ", "1 + 1 =", "Égypte, 🔥 fire")
# What a format may decide by itself: defaults for a server, not the model.
NOT_THE_MODEL = ("max_seq_len", "max_batch_size", "multiple_of", "ffn_dim_multiplier")
# Half a step between neighbouring numbers, relative to a number: what rounding to a dtype may change.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
WORST = 8


@dataclass(frozen=True)
class Difference:
    """How two tensors of one name differ; `relative` is against the largest number of the first."""

    name: str
    absolute: float
    relative: float
    rounding: float
    """What rounding between their dtypes may change; 0 where they are equal."""


def main(argv: list[str] | None = None) -> int:
    """Compare and report; 0 when they are the same to the tolerance, 1 when not, 2 when one cannot be read."""
    parser = Parser(
        prog="python -m tools.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", metavar="A", type=Path)
    parser.add_argument("b", metavar="B", type=Path)
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="largest difference of a tensor, relative to its largest number (default: what rounding to the narrower "
        "of the two dtypes allows; 0 between equal ones)",
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one per line (default: five short ones)")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="of greedy text per prompt (default: 32)")
    parser.add_argument("--tensors-only", action="store_true", help="do not run the models")
    flags = parser.parse_args(argv)
    if flags.tokens < 0:
        parser.error(f"--tokens is {flags.tokens}; it must be at least 0")
    try:
        flags.prompts = _prompts(flags.prompts) if flags.prompts else list(PROMPTS)
        # There is nothing to clean up, and a hostile file can keep Python from hearing Ctrl-C.
        with signals_to(signal.SIG_DFL), open_source(flags.a) as a, open_source(flags.b) as b:
            return 0 if compare(a, b, flags) else 1
    except (FormatError, ConfigError, TokenizerError, OSError) as error:
        print(f"check: error: {error}", file=sys.stderr)
        return 2


def compare(a: Source, b: Source, flags: argparse.Namespace) -> bool:
    """Print the report; whether they are the same."""
    print(f"A: {flags.a}: {a.title}, {_count(a)} parameters, {_dtype(a)}")
    print(f"B: {flags.b}: {b.title}, {_count(b)} parameters, {_dtype(b)}")
    if not same_settings(a, b):
        return False
    alike = same_vocabulary(a, b)
    differences = differing_tensors(a, b)
    same = report_tensors(len(a.names), differences, flags.tolerance) and alike
    if not flags.tensors_only:
        same &= same_answers(a, b, flags.prompts, flags.tokens, not differences)
    print("the same" if same else "NOT the same")
    return same


def _prompts(path: Path) -> list[str]:
    try:
        prompts = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    if not prompts:
        raise ConfigError(f"{path}: holds no prompt; it needs one per line")
    return prompts


def same_settings(a: Source, b: Source) -> bool:
    """Compare what the model's shape and arithmetic follow from."""
    ours, theirs = (dataclasses.asdict(source.args) for source in (a, b))
    wrong = [name for name in ours if name not in NOT_THE_MODEL and ours[name] != theirs[name]]
    for name in wrong:
        print(f"settings: {name} is {ours[name]} in A, {theirs[name]} in B")
    if not wrong:
        print("settings: equal")
    return not wrong


def same_vocabulary(a: Source, b: Source) -> bool:
    """Compare the tokens and the special ids; a checkpoint may come without any."""
    ours, theirs = a.vocabulary(), b.vocabulary()
    if ours is None or theirs is None:
        print(f"vocabulary: none in {' and '.join(name for name, v in (('A', ours), ('B', theirs)) if v is None)}")
        return True
    wrong = [
        name for name in ("tokens", "bos_id", "eos_id", "stop_ids") if getattr(ours, name) != getattr(theirs, name)
    ]
    print(f"vocabulary: {len(ours.tokens)} tokens, {'different ' + ', '.join(wrong) if wrong else 'equal'}")
    return not wrong


def differing_tensors(a: Source, b: Source) -> list[Difference]:
    """Every tensor that is not bitwise the same, with at most one of each checkpoint in memory."""
    differences = []
    shapes = a.args.tensor_shapes()
    with byte_bar(a.args.parameter_count() * a.dtype.itemsize, "comparing", True) as bar:
        for name in a.names:
            difference = _difference(name, a.read(name), b.read(name))
            if difference is not None:
                differences.append(difference)
            bar.update(torch.Size(shapes[name]).numel() * a.dtype.itemsize)
    return differences


def _difference(name: str, ours: Tensor, theirs: Tensor) -> Difference | None:
    if ours.shape != theirs.shape:
        raise FormatError(f"{name} is {shape_text(ours.shape)} in A, {shape_text(theirs.shape)} in B")
    if ours.dtype == theirs.dtype and torch.equal(ours, theirs):
        return None
    largest = absolute = 0.0
    rows = max(1, (1 << 22) // max(1, ours[0].numel())) if ours.dim() > 1 else len(ours)
    for part, other in zip(ours.split(rows), theirs.split(rows), strict=True):
        difference = (part.float() - other.float()).abs().max().item()
        # What is no number differs from everything.
        absolute = max(absolute, difference if difference == difference else float("inf"))
        largest = max(largest, part.float().abs().max().item())
    if not absolute:
        return None
    rounding = 0.0 if ours.dtype == theirs.dtype else max(ROUNDING[ours.dtype], ROUNDING[theirs.dtype])
    return Difference(name, absolute, absolute / largest if largest else float("inf"), rounding)


def report_tensors(count: int, differences: list[Difference], tolerance: float | None) -> bool:
    """Say how many tensors are equal and which differ most; whether all are within the tolerance."""
    print(f"tensors: {count - len(differences)} of {count} equal to the bit")
    worst = sorted(differences, key=lambda each: -each.relative)
    for each in worst[:WORST]:
        allowed = each.rounding if tolerance is None else tolerance
        mark = "" if each.relative <= allowed else "  <-- too much"
        print(f"  {each.name}: differs by up to {each.absolute:.3g} ({each.relative:.2e} of its largest number){mark}")
    if len(worst) > WORST:
        print(f"  ... and {len(worst) - WORST} more, by less")
    good = all(each.relative <= (each.rounding if tolerance is None else tolerance) for each in worst)
    if worst:
        limit = "what rounding allows" if tolerance is None else f"the tolerance of {tolerance:.2e}"
        print(f"  {'all within' if good else 'not within'} {limit}")
    return good


def same_answers(a: Source, b: Source, prompts: list[str], tokens: int, identical: bool) -> bool:
    """Logits and greedy text of both, on A's token ids; equal weights must give equal ones."""
    tokenizers = [tokenizer for source in (a, b) if (tokenizer := _tokenizer(source)) is not None]
    if not tokenizers:
        print("answers: not compared, as neither has a tokenizer")
        return True
    tokenizer = tokenizers[0]
    ids, *others = ([each.encode(prompt, bos=True, eos=False) for prompt in prompts] for each in tokenizers)
    if others and (cut := [prompt for prompt, x, y in zip(prompts, ids, others[0], strict=True) if x != y]):
        print(f"tokens: {len(cut)} of {len(prompts)} prompts are cut into others, such as {cut[0]!r}")
        return False
    need = (4 if _fits_float32(a) else 2) * a.args.parameter_count()
    if need > available_memory("cpu") * 0.8:
        print(f"answers: not compared: {need / 1e9:.1f} GB for the weights are more than this machine has free")
        return True
    ours, theirs = (_answers(source, ids, tokens) for source in (a, b))
    largest = max((x - y).abs().max().item() for x, y in zip(ours[0], theirs[0], strict=True))
    equal = sum(x == y for x, y in zip(ours[1], theirs[1], strict=True))
    print(f"logits: differ by up to {largest:.3g} over {sum(map(len, ids))} positions")
    print(f"greedy text: {equal} of {len(prompts)} equal over {tokens} tokens")
    for prompt, x, y in zip(prompts, ours[1], theirs[1], strict=True):
        if x != y:
            print(f"  {prompt!r}\n    A: {tokenizer.decode(x)!r}\n    B: {tokenizer.decode(y)!r}")
    return not identical or largest <= 1e-4


def _answers(source: Source, prompts: list[list[int]], tokens: int) -> tuple[list[Tensor], list[list[int]]]:
    dtype = torch.float32 if _fits_float32(source) else torch.bfloat16
    with torch.device("meta"):
        model = Transformer(source.args)
    model.load_state_dict({name: source.read(name).to(dtype) for name in source.args.tensor_shapes()}, assign=True)
    model.requires_grad_(False).eval().set_rope(torch.device("cpu"))
    longest = max(map(len, prompts))
    limits = Limits(longest + tokens, 1, max(longest, 1), dtype)
    runner = Runner(model, limits, "cpu", 1)
    logits = [runner.run(StepPlan((Segment(0, 0, tuple(ids), len(ids)),))).clone() for ids in prompts]
    engine = Engine(runner, limits, Ranks(Launch(), "cpu", source.args), source.args.vocab_size)
    texts = []
    for ids in prompts:
        sequence = engine.add(ids, SamplingParams(max_tokens=tokens, temperature=0.0))
        while not sequence.finished:
            engine.step()
        texts.append(sequence.tokens[sequence.prompt_length :])
    return logits, texts


def _tokenizer(source: Source) -> Tokenizer | None:
    vocabulary = source.vocabulary()
    return None if vocabulary is None else vocabulary.served()


def _fits_float32(source: Source) -> bool:
    return source.args.parameter_count() * 4 <= 8 * FLOAT32_LIMIT_BYTES


def _count(source: Source) -> str:
    return f"{source.args.parameter_count():,}"


def _dtype(source: Source) -> str:
    return str(source.dtype).removeprefix("torch.") + (" and others" if source.mixed_dtypes else "")


if __name__ == "__main__":
    sys.exit(main())
