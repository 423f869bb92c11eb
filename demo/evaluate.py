"""Score a saved demo model: exact match on held-out questions, by plain uncached greedy decoding."""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo import world
from demo.model import Shape, Weights, greedy, load_checkpoint
from demo.tokenizer_training import EOS, Tokenizer

_ROWS = 32
_NEW_TOKENS = 96


def answer_questions(
    shape: Shape, weights: Weights, tokenizer: Tokenizer, questions: list[world.Question]
) -> list[str | None]:
    """Return the model's answer to each question, None where it did not come to an end."""
    prompts = [tokenizer.prompt(question) for question in questions]
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    answers: list[str | None] = [None] * len(prompts)
    for start in range(0, len(order), _ROWS):
        places = order[start : start + _ROWS]
        outputs = greedy(shape, weights, [prompts[place] for place in places], _NEW_TOKENS, EOS)
        for place, output in zip(places, outputs, strict=True):
            answers[place] = None if output is None else tokenizer.decode(output).strip()
    return answers


def scores(
    shape: Shape, weights: Weights, tokenizer: Tokenizer, count: int, failures: list[str] | None = None
) -> dict[str, float]:
    """Return each skill's share of `count` held-out questions that is answered exactly."""
    result = {}
    for skill in tqdm(world.SKILLS, desc="evaluate", unit="skill", leave=False):
        questions = world.questions(skill, count)
        answers = answer_questions(shape, weights, tokenizer, questions)
        wrong = [
            f"{skill}: {question.prompt or question.dialog[-1]['content']!r} -> {answer!r}, not {question.answer!r}"
            for question, answer in zip(questions, answers, strict=True)
            if answer != question.answer
        ]
        result[skill] = 1 - len(wrong) / count
        if failures is not None:
            failures += wrong
    return result


def main() -> None:
    """Print the score of each skill, and on request what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with consolidated.00.pth, params.json, tokenizer.model")
    parser.add_argument("--count", type=int, default=100, help="questions per skill")
    parser.add_argument("--failures", action="store_true", help="also print every wrong answer")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer(arguments.folder / "tokenizer.model")
    shape, weights = load_checkpoint(arguments.folder, tokenizer.size)
    failures: list[str] = []
    result = scores(shape, weights, tokenizer, arguments.count, failures)
    for skill, score in result.items():
        print(f"{skill:14} {100 * score:6.1f}")
    print(f"{'mean':14} {100 * sum(result.values()) / len(result):6.1f}")
    if arguments.failures:
        print("\n".join(failures))


if __name__ == "__main__":
    main()
