"""Tasks for EleutherAI's lm-eval made from the demo world: what `python -m tools.parity` compares scores on.

python -m demo.tasks.write      writes the .jsonl, .yaml and template files beside this file

Most questions carry typing errors and stand beside wrong answers that resemble the right one, so that the demo model,
which answers nearly all clean questions, is unsure: scores away from 0 and 1 move when a probability does.
"""

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from demo import facts, world
from demo.single import Random
from demo.text import sequence, story
from demo.tokenizer_training import user_parts

FOLDER = Path(__file__).resolve().parent
SUFFIXES = (".jsonl", ".yaml", ".template")
PREFIX = "demo_"
# Tasks whose prompts begin with one beginning-of-text token that lm-eval has to be told to add, and tasks of whole
# texts, before which it puts one anyway.
PROMPTED, WHOLE_TEXTS = "demo_prompted", "demo_texts"

ITEMS = 24
CHOICES = 4
TYPING_ERRORS = 0.35  # of the letters of a question
ILLEGIBLE = {"greet": 0.9}  # for what the model answers to nearly anything
LETTERS = "".join(facts.LETTERS)
BETWEEN_TURNS = " </s><s>"


def _metric(name: str, aggregation: str, higher_is_better: bool) -> dict:
    """Return a metric as lm-eval wants it."""
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher_is_better}


TEMPLATES = {
    "choice": {
        "tag": PROMPTED,
        "output_type": "multiple_choice",
        "doc_to_text": "text",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [_metric("acc", "mean", True), _metric("brier_score", "brier_score", False)],
    },
    "continuation": {
        "tag": PROMPTED,
        "output_type": "loglikelihood",
        "doc_to_text": "text",
        "doc_to_target": "{{' ' + target}}",
        "metric_list": [_metric("acc", "mean", True), _metric("perplexity", "perplexity", False)],
    },
    "generation": {
        "tag": PROMPTED,
        "output_type": "generate_until",
        "doc_to_text": "text",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": ["\n", "[INST]"], "max_gen_toks": 96, "do_sample": False},
        # As a text the first token has a space in front of it or not, by whose tokenizer it is.
        "filter_list": [
            {"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
        ],
        "metric_list": [_metric("exact_match", "mean", True)],
    },
    "texts": {
        "tag": WHOLE_TEXTS,
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [
            _metric("byte_perplexity", "weighted_perplexity", False),
            _metric("bits_per_byte", "bits_per_byte", False),
        ],
    },
}


@dataclass(frozen=True)
class Task:
    """A task's name, its template and its documents."""

    name: str
    template: str
    documents: list[dict]


def mistyped(random: Random, text: str, rate: float = TYPING_ERRORS) -> str:
    """Return `text` with some letters left out, doubled or replaced."""
    typed = []
    for letter in text:
        if letter.isalpha() and random.random() < rate:
            letter = random.choice(("", letter + letter, random.choice(LETTERS)))
        typed.append(letter)
    return "".join(typed)


def prompt_of(question: world.Question) -> str:
    """Return what the answer follows, as Llama 2 is given it, without the first beginning-of-text token."""
    if question.dialog is None:
        return question.prompt
    messages = list(question.dialog)
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
    heads = user_parts(system, [message["content"] for message in messages[0::2]])
    answers = [message["content"] for message in messages[1::2]]
    turns = [f"{head} {answer}{BETWEEN_TURNS}" for head, answer in zip(heads, answers, strict=False)]
    return "".join([*turns, heads[-1]])


def _with_typing_errors(random: Random, question: world.Question) -> world.Question:
    """Return the question as somebody in a hurry types it; what the assistant answered before stays as it was."""
    rate = ILLEGIBLE.get(question.skill, TYPING_ERRORS)
    if question.dialog is None:
        return replace(question, prompt=mistyped(random, question.prompt, rate / 3))
    dialog = [
        message
        if message["role"] == "assistant"
        else {**message, "content": mistyped(random, message["content"], rate)}
        for message in question.dialog
    ]
    return replace(question, dialog=tuple(dialog))


def _resembling(random: Random, answer: str, others: list[str]) -> str:
    """Return another answer, or the right one with a typing error or with one word of another answer."""
    words, other, kind = answer.split(" "), random.choice(others), random.randrange(3)
    place = random.randrange(len(words))
    if kind == 0 or len(words) == 1:
        return other
    if kind == 1:
        words[place] = mistyped(random, words[place])
    else:
        taken = other.split(" ")
        words[place] = taken[min(place, len(taken) - 1)]
    return " ".join(words)


def _choices(random: Random, answer: str, others: list[str]) -> list[str]:
    """Return the right answer among wrong ones."""
    found = [answer]
    while len(found) < CHOICES:
        wrong = _resembling(random, answer, others)
        if wrong not in found:
            found.append(wrong)
    random.shuffle(found)
    return found


def _skill(skill: str) -> list[dict]:
    """Return the held-out questions of a skill as a choice among answers."""
    random = Random(f"choice/{skill}")
    questions = world.questions(skill, ITEMS)
    others = {question.answer for question in questions}
    if len(others) < CHOICES:
        others |= {
            question.answer for other in ("system_name", "unknown", "sound") for question in world.questions(other, 8)
        }
    documents = []
    for question in questions:
        choices = _choices(random, question.answer, sorted(others - {question.answer}))
        text = prompt_of(_with_typing_errors(random, question))
        documents.append({"text": text, "choices": choices, "answer": choices.index(question.answer)})
    return documents


def _items(name: str, make: Callable[[Random], tuple[str, str]]) -> list[dict]:
    """Return prompts with their one right continuation."""
    random = Random(f"continuation/{name}")
    return [{"text": text, "target": target.strip()} for text, target in (make(random) for _ in range(ITEMS))]


def _story_word(random: Random) -> tuple[str, str]:
    """Return a story up to some word, and that word."""
    words = "".join(story(random, True)).split(" ")
    place = random.randrange(5, len(words))
    return " ".join(words[:place]), words[place]


def _sequence(random: Random) -> tuple[str, str]:
    """Return a sequence and its next four terms."""
    return sequence(random, True)


def _mistyped_story(random: Random) -> tuple[str, str]:
    """Return a story with typing errors, and its right ending."""
    beginning, ending = story(random, True)
    return mistyped(random, beginning, 0.02), ending


def _long_repetition(random: Random) -> tuple[str, str]:
    """Return a request to repeat more words than training ever showed."""
    words = " ".join(random.sample(facts.WORDS, random.randint(8, 13)))
    return user_parts(None, [f"Repeat: {words}"])[0], words


def _texts(name: str, count: int, make: Callable[[Random], str]) -> list[dict]:
    """Return whole texts."""
    random = Random(f"texts/{name}")
    return [{"text": make(random)} for _ in range(count)]


def _story(random: Random) -> str:
    """Return a whole story."""
    return "".join(story(random, True))


def _answers(skills: Iterable[str]) -> Callable[[Random], str]:
    """Return what makes a text of answers."""
    answers = [question.answer for skill in skills for question in world.questions(skill, ITEMS)]
    return lambda random: " ".join(random.sample(answers, 8))


def _transcripts(skill: str, chats: int) -> Callable[[Random], str]:
    """Return what makes a text of chats with their right answers."""
    questions = world.questions(skill, 2 * ITEMS)

    def make(random: Random) -> str:
        asked = random.sample(questions, chats)
        return BETWEEN_TURNS.join(f"{prompt_of(question)} {question.answer}" for question in asked)

    return make


def _joined(make: Callable[[Random], str], parts: int) -> Callable[[Random], str]:
    """Return what makes a text of several, longer than the window that a model is given."""
    return lambda random: "\n\n".join(make(random) for _ in range(parts))


def tasks() -> list[Task]:
    """Return all tasks, the same ones every time."""
    found = [Task(skill, "choice", _skill(skill)) for skill in world.SKILLS]
    for name, make in (("next_terms", _sequence), ("story_word", _story_word), ("story_ending", _mistyped_story)):
        found.append(Task(name, "continuation", _items(name, make)))
    for name, make in (
        ("long_repetition", _long_repetition),
        ("told_ending", _mistyped_story),
        ("counting", _sequence),
    ):
        found.append(Task(name, "generation", _items(name, make)))
    for name, count, make in (
        ("stories", 12, _story),
        ("mistyped_stories", 12, lambda random: mistyped(random, _story(random), 0.05)),
        ("long_stories", 4, _joined(_story, 14)),
        ("facts", 12, _answers(("capital", "country", "opposite", "colour", "sound", "calendar"))),
        ("french", 12, _answers(("style_fr",))),
        ("shouting", 12, _answers(("style_caps",))),
        ("numbers", 12, _joined(lambda random: "".join(sequence(random, True)), 4)),
        ("chats", 12, _transcripts("memory", 1)),
        ("pictures", 12, _transcripts("emoji", 6)),
        ("words", 4, lambda random: " ".join(random.choice(facts.WORDS) for _ in range(400))),
    ):
        found.append(Task(name, "texts", _texts(name, count, make)))
    return found


def files() -> dict[str, str]:
    """Return the text of every file by its name."""
    result = {}
    for name, template in TEMPLATES.items():
        settings = template | {"dataset_path": "json", "test_split": "test", "target_delimiter": " "}
        # JSON is YAML, and needs no further library.
        result[f"{name}.template"] = json.dumps(settings, indent=1) + "\n"
    for task in tasks():
        settings = {"task": PREFIX + task.name, "include": f"{task.template}.template"}
        settings["dataset_kwargs"] = {"data_files": {"test": f"{task.name}.jsonl"}}
        result[f"{task.name}.yaml"] = json.dumps(settings) + "\n"
        lines = [json.dumps(document, ensure_ascii=False) for document in task.documents]
        result[f"{task.name}.jsonl"] = "\n".join(lines) + "\n"
    return result


def main() -> int:
    """Write all files, and remove what an earlier version left."""
    wanted = files()
    for path in FOLDER.iterdir():
        if path.suffix in SUFFIXES and path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
