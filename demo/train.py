"""Train the demo model from nothing on one CPU thread: corpus, tokenizer, weights, in Meta's checkpoint format."""

import argparse
import json
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo import world
from demo.evaluate import scores
from demo.model import Shape, forward, initial_weights, load_checkpoint, rotations, save_checkpoint
from demo.optimizer import Optimizer
from demo.tokenizer_training import IGNORED, Example, Tokenizer, train_tokenizer

CHUNK_DOCUMENTS = 1500  # documents that are drawn, sorted by length and shuffled together
WIDTH_STEP = 16  # rows of a batch are padded to a multiple of this
LONGEST = 2048  # tokens, more than any document has
WARM_UP = 0.02  # share of the training in which the learning rate rises
COOL_DOWN = 0.6  # share of the training, at its end, in which the learning rate falls to zero
STAGES = (0.15, 0.5)  # shares of the training after which documents become longer


def batches(tokenizer: Tokenizer, seed: int, chunk: int, stage: int, tokens: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield ids, the flat positions to learn from and the targets there: rows of like length, in random order."""
    random = world.Random(f"{seed}/{chunk}")
    by_width: dict[int, list[Example]] = defaultdict(list)
    for _ in range(CHUNK_DOCUMENTS):
        example = tokenizer.example(world.training_document(random, stage))
        by_width[-(-len(example.ids) // WIDTH_STEP) * WIDTH_STEP].append(example)
    planned = []
    for width, examples in by_width.items():
        rows = max(1, round(tokens / width))
        random.shuffle(examples)
        planned += [(width, examples[start : start + rows]) for start in range(0, len(examples), rows)]
    random.shuffle(planned)
    for width, examples in planned:
        ids = torch.tensor([example.ids + [0] * (width - len(example.ids)) for example in examples])
        targets = [example.targets + [IGNORED] * (width - len(example.targets)) for example in examples]
        targets = torch.tensor(targets).flatten()
        learned = (targets != IGNORED).nonzero()[:, 0]
        yield ids, learned, targets[learned]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=1, help="seed of the weights and of every document")
    parser.add_argument("--tokens", type=int, default=14_500_000, help="tokens to train on, padding included")
    parser.add_argument("--batch", type=int, default=640, help="tokens in a batch")
    parser.add_argument("--vocabulary", type=int, default=768, help="pieces of the tokenizer")
    parser.add_argument("--dim", type=int, default=128, help="width of the model")
    parser.add_argument("--layers", type=int, default=4, help="transformer layers")
    parser.add_argument("--heads", type=int, default=4, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=2, help="key and value heads")
    parser.add_argument("--muon-rate", type=float, default=0.005, help="peak learning rate of the layers' matrices")
    parser.add_argument("--adam-rate", type=float, default=0.01, help="peak learning rate of everything else")
    parser.add_argument("--questions", type=int, default=100, help="held-out questions per skill in the final score")
    parser.add_argument("--save-every", type=int, default=1_500_000, help="tokens between intermediate checkpoints")
    parser.add_argument("--resume", action="store_true", help="continue from the last intermediate checkpoint")
    return parser.parse_args()


def write_record(arguments: argparse.Namespace, shape: Shape, tokenizer: Tokenizer, progress: dict, count: int) -> None:
    """Score the checkpoint that was saved, and write training.json."""
    _, saved = load_checkpoint(arguments.out, shape.vocab_size)
    result = scores(shape, saved, tokenizer, count)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("out", "resume")}
    record = {
        "arguments": settings,
        "shape": asdict(shape),
        "tokens": progress["tokens"],
        "steps": progress["steps"],
        "seconds": round(progress["seconds"]),
        "finished": progress["tokens"] >= arguments.tokens,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "sentencepiece": sentencepiece.__version__,
        },
        "questions_per_skill": count,
        "scores": {skill: round(score, 4) for skill, score in result.items()},
        "mean": round(sum(result.values()) / len(result), 4),
    }
    partial = arguments.out / "training.json.partial"
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(arguments.out / "training.json")
    tqdm.write(f"{progress['tokens']} tokens: {record['mean']} {record['scores']}", file=sys.stderr)


def main() -> None:
    """Train the tokenizer and the weights, and write both with a record of the training."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer_path = arguments.out / "tokenizer.model"
    state_path = arguments.out / "resume.pt"
    if not arguments.resume:
        train_tokenizer(tokenizer_path, arguments.vocabulary, arguments.seed)
    tokenizer = Tokenizer(tokenizer_path)
    shape = Shape(tokenizer.size, arguments.dim, arguments.layers, arguments.heads, arguments.kv_heads)
    weights = initial_weights(shape, arguments.seed)
    for weight in weights.values():
        weight.requires_grad_()
    optimizer = Optimizer(weights, arguments.muon_rate, arguments.adam_rate)
    progress = {"tokens": 0, "steps": 0, "chunks": 0, "seconds": 0.0}
    if arguments.resume:
        state = torch.load(state_path, weights_only=True)
        for name, weight in weights.items():
            weight.data.copy_(state["weights"][name])
        optimizer.load_state_dict(state["optimizer"])
        progress = state["progress"]
    factors = rotations(shape, LONGEST)
    saved_at, average = progress["tokens"], 0.0
    with tqdm(total=arguments.tokens, initial=progress["tokens"], unit="tok", unit_scale=True, mininterval=10) as bar:
        while progress["tokens"] < arguments.tokens:
            started = time.monotonic()
            stage = sum(progress["tokens"] >= share * arguments.tokens for share in STAGES)
            for ids, learned, targets in batches(tokenizer, arguments.seed, progress["chunks"], stage, arguments.batch):
                done = progress["tokens"] / arguments.tokens
                loss = functional.cross_entropy(forward(shape, weights, ids, factors, learned), targets)
                loss.backward()
                optimizer.step(min(1.0, (done + 1e-4) / WARM_UP) * min(1.0, max(0.0, (1 - done) / COOL_DOWN)))
                progress["tokens"] += ids.numel()
                progress["steps"] += 1
                average += 0.01 * (loss.item() - average)
                bar.update(ids.numel())
                bar.set_postfix(loss=f"{average:.4f}", stage=stage, refresh=False)
                if progress["tokens"] >= arguments.tokens:
                    break
            progress["chunks"] += 1
            progress["seconds"] += time.monotonic() - started
            if saved_at + arguments.save_every <= progress["tokens"] < arguments.tokens:
                saved_at = progress["tokens"]
                save_checkpoint(arguments.out, shape, weights)
                state = {
                    "weights": {name: weight.detach() for name, weight in weights.items()},
                    "optimizer": optimizer.state_dict(),
                    "progress": progress,
                }
                partial = state_path.with_suffix(".partial")
                torch.save(state, partial)
                partial.replace(state_path)
                write_record(arguments, shape, tokenizer, progress, min(20, arguments.questions))
    save_checkpoint(arguments.out, shape, weights)
    write_record(arguments, shape, tokenizer, progress, arguments.questions)
    state_path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
