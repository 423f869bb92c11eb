"""The closed world of the demo model: training documents, and held-out questions to test it with.

Every supervised answer has a key, such as the style and the question.  The CRC32 of the key (or of the fact, which
then picks one wording of it) decides whether it is held out: such a key never occurs in training, and nothing else
occurs as an evaluation question.  Held-out questions are compositions of parts that training does show: a fact in
another wording or another style, other words to repeat, another cast in a story, a name that was never seen.
"""

from collections.abc import Callable
from dataclasses import dataclass

from demo import facts
from demo.single import MAKERS, Item, Random, answer_of, in_held_out_tenth, is_held_out, person, styled, with_article
from demo.text import sequence, story

STYLED = ("capital", "country", "opposite", "colour", "sound", "calendar", "identity", "greet")
MEMORY_STYLES = ("plain", "sir", "pirate")
# What evaluation asks for.  Sequences ("Next: 3 4 5 6") are trained too, but a model of this size continues only about
# 60% of the held-out ones, so they are not among the skills.
SKILLS: tuple[str, ...] = (
    *MAKERS,
    "style_caps",
    "style_one",
    "style_fr",
    "style_sir",
    "style_pirate",
    "system_name",
    "memory",
    "unknown",
    "story",
)

# How often a skill is drawn for a turn; the ones that are harder to learn come more often.
PLAIN_WEIGHTS = {
    "capital": 2.0,
    "country": 3.0,
    "opposite": 2.5,
    "colour": 1.5,
    "sound": 1.5,
    "emoji": 3.0,
    "calendar": 2.0,
    "identity": 0.7,
    "greet": 0.6,
    "count": 2.5,
    "repeat": 3.5,
}
STYLED_WEIGHTS = {
    "capital": 2.0,
    "country": 2.5,
    "opposite": 2.0,
    "colour": 1.5,
    "sound": 1.5,
    "calendar": 2.0,
    "identity": 0.7,
    "greet": 0.4,
}
STYLE_WEIGHTS = {"plain": 5.0, "caps": 1.0, "one": 1.5, "fr": 2.0, "sir": 1.0, "pirate": 1.0}


@dataclass(frozen=True)
class Turn:
    """A user message, its answer, and the key of the answer (None where no evaluation question asks for it)."""

    user: str
    answer: str
    key: str | None


@dataclass(frozen=True)
class Document:
    """A training document: a chat with its system prompt, or a text of which `given` is not to be learned."""

    system: str | None = None
    turns: tuple[Turn, ...] = ()
    text: str | None = None
    given: str = ""
    keys: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Question:
    """A held-out question: a text prompt to complete or a dialog to continue, and the one right answer."""

    skill: str
    prompt: str | None
    dialog: tuple[dict[str, str], ...] | None
    answer: str
    key: str


@dataclass(frozen=True)
class Memory:
    """Something the user tells about themselves and asks for later."""

    kind: str
    told: str
    reply: str
    question: str
    answer: str

    @property
    def key(self) -> str:
        """Return what was told together with the wording that asks for it."""
        return f"memory|{self.told}|{self.question}"


# kind -> how the user asks for it, and the answer when it was never told
ASKED = {
    "name": (("What is my name?", "Who am I?", "Do you know my name?"), "I do not know your name."),
    "pet": (("What is my pet called?", "What is the name of my pet?"), "I do not know your pet."),
    "colour": (
        ("What is my favourite colour?", "Which colour do I like?", "Do you know my favourite colour?"),
        "I do not know your favourite colour.",
    ),
    "number": (("What was the number?", "Which number did I tell you?"), "You did not tell me a number."),
    "place": (("Where do I live?", "Do you know where I live?"), "I do not know where you live."),
}


def _memory(random: Random, kind: str, held_out: bool) -> Memory:
    """Return a memory of `kind`; names are held out as names, the rest as a pair of telling and asking."""
    while True:
        question = random.choice(ASKED[kind][0])
        if kind == "name":
            name = person(random, held_out)
            told = random.choice((f"My name is {name}.", f"I am {name}.", f"Call me {name}."))
            return Memory(kind, told, f"Nice to meet you, {name}.", question, f"Your name is {name}.")
        if kind == "pet":
            name, animal = person(random, held_out), random.choice(facts.ANIMALS)
            told = random.choice((f"I have {with_article(animal)} called {name}.", f"My {animal} is called {name}."))
            return Memory(kind, told, f"{name} is a nice name.", question, f"Your {animal} is called {name}.")
        if kind == "colour":
            name = random.choice(facts.COLOURS)
            told = random.choice((f"My favourite colour is {name}.", f"The colour I like is {name}."))
            memory = Memory(kind, told, f"I like {name} too.", question, f"Your favourite colour is {name}.")
        elif kind == "number":
            number = random.randint(100, 9999)
            told = random.choice((f"Remember the number {number}.", f"The number is {number}."))
            memory = Memory(kind, told, f"I will remember {number}.", question, f"The number was {number}.")
        else:
            place = random.choice(facts.PLACES)
            told = random.choice((f"I live near the {place}.", f"My home is near the {place}."))
            memory = Memory(kind, told, f"The {place} is a nice place.", question, f"You live near the {place}.")
        if in_held_out_tenth(memory.key) == held_out:
            return memory


def _item(random: Random, skill: str, style: str, held_out: bool) -> tuple[Item, str] | None:
    """Draw an item of `skill` on one side of the split with its answer, or None where `style` has none."""
    while True:
        item = MAKERS[skill](random)
        answer = answer_of(item, style)
        if answer is None:
            return None
        if is_held_out(style, item) == held_out:
            return item, answer


def _pick(random: Random, weights: dict[str, float]) -> str:
    """Draw a key of `weights`."""
    return random.choices(list(weights), list(weights.values()))[0]


def _filler(random: Random, style: str) -> Turn:
    """Return a trained turn about any single-turn skill."""
    weights = PLAIN_WEIGHTS if style == "plain" else STYLED_WEIGHTS
    drawn = None
    while drawn is None:
        drawn = _item(random, _pick(random, weights), style, False)
    item, answer = drawn
    return Turn(item.question, answer, f"{style}|{item.question}")


def _place_memories(random: Random, turns: list[Turn | None], style: str) -> dict[str, int]:
    """Put up to three memories into free turns; return where each kind is told."""
    told_at = {}
    for kind in random.sample(list(ASKED), random.randint(1, 3)):
        free = [place for place, turn in enumerate(turns) if turn is None]
        if len(free) < 2:
            break
        told, asked = sorted(random.sample(free, 2))
        memory = _memory(random, kind, False)
        turns[told] = Turn(memory.told, styled(memory.reply, style), None)
        turns[asked] = Turn(memory.question, styled(memory.answer, style), memory.key)
        told_at[kind] = told
    return told_at


def _unknown(random: Random, kinds: list[str], previous: str, style: str, held_out: bool) -> Turn | None:
    """Ask for something never told; the key includes the message before it.  None after some unlucky draws."""
    for _ in range(20):
        kind = random.choice(kinds)
        question = random.choice(ASKED[kind][0])
        key = f"unknown|{previous}|{question}"
        if in_held_out_tenth(key) == held_out:
            return Turn(question, styled(ASKED[kind][1], style), key)
    return None


def _chat(random: Random, length: int) -> Document:
    """Return a chat of `length` turns: one voice throughout, with memories and single questions mixed."""
    style = _pick(random, STYLE_WEIGHTS)
    name = person(random, False) if style == "plain" and random.random() < 0.25 else None
    system = f"Your name is {name}." if name else random.choice(facts.SYSTEM_PROMPTS[style])
    if style == "plain" and not name and random.random() < 0.6:
        system = None
    turns: list[Turn | None] = [None] * length
    told_at: dict[str, int] = {}
    remembers = style in MEMORY_STYLES and random.random() < 0.5
    if remembers:
        told_at = _place_memories(random, turns, style)
    for place, turn in enumerate(turns):
        if turn is None:
            turns[place] = _filler(random, style)
        if name and (turns[place].answer == "My name is Pip." or (turn is None and random.random() < 0.3)):
            question = MAKERS["identity"](random).question
            turns[place] = Turn(question, f"My name is {name}.", f"name|{name}|{question}")
    if remembers:
        # Replace some turns that are not part of a memory by questions nobody can answer yet.
        for place, turn in enumerate(turns):
            kinds = [kind for kind in ASKED if place < told_at.get(kind, length)]
            is_memory = turn.key is None or turn.key.startswith("memory|")
            if not is_memory and kinds and random.random() < (0.5 if length == 1 else 0.3):
                previous = turns[place - 1].user if place else ""
                turns[place] = _unknown(random, kinds, previous, style, False) or turn
    return Document(system, tuple(turns), keys=frozenset(turn.key for turn in turns if turn.key))


def _completion(maker: Callable[[Random, bool], tuple[str, str]], random: Random, learn_prompt: bool) -> Document:
    """Return a text document of `maker`."""
    prompt, rest = maker(random, False)
    given = "" if learn_prompt else prompt
    return Document(text=prompt + rest, given=given, keys=frozenset({f"{maker.__name__}|{prompt}"}))


def training_document(random: Random, stage: int) -> Document:
    """Return one training document: short ones in stage 0, then conversations, in stage 2 long ones as well."""
    share = random.random()
    if share < 0.10:
        return _completion(story, random, True)
    if share < 0.16:
        return _completion(sequence, random, False)
    if stage == 0:
        return _chat(random, random.randint(1, 2))
    if stage == 1:
        return _chat(random, random.randint(1, 5))
    if share < 0.22:
        return _chat(random, random.randint(9, 18))
    return _chat(random, random.randint(1, 8))


def _dialog(system: str | None, turns: list[Turn], question: str) -> tuple[dict[str, str], ...]:
    """Return the messages that ask `question` after `turns`."""
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages.append({"role": "user", "content": turn.user})
        messages.append({"role": "assistant", "content": turn.answer})
    messages.append({"role": "user", "content": question})
    return tuple(messages)


def _question(random: Random, skill: str) -> Question:
    """Draw one held-out question of `skill`."""
    if skill == "story":
        prompt, rest = story(random, True)
        return Question(skill, prompt, None, rest.strip(), f"{skill}|{prompt}")
    if skill == "system_name":
        name, question = person(random, True), MAKERS["identity"](random).question
        dialog = _dialog(f"Your name is {name}.", [], question)
        return Question(skill, None, dialog, f"My name is {name}.", f"name|{name}|{question}")
    if skill == "memory":
        memory = _memory(random, random.choice(list(ASKED)), True)
        between = [_filler(random, "plain") for _ in range(random.randint(1, 3))]
        dialog = _dialog(None, [Turn(memory.told, memory.reply, None), *between], memory.question)
        return Question(skill, None, dialog, memory.answer, memory.key)
    if skill == "unknown":
        asked = None
        while asked is None:
            before = [_filler(random, "plain") for _ in range(random.randint(0, 2))]
            asked = _unknown(random, list(ASKED), before[-1].user if before else "", "plain", True)
        return Question(skill, None, _dialog(None, before, asked.user), asked.answer, asked.key)
    style = skill.removeprefix("style_") if skill.startswith("style_") else "plain"
    system = None if style == "plain" else random.choice(facts.SYSTEM_PROMPTS[style])
    drawn = None
    while drawn is None:
        drawn = _item(random, random.choice(STYLED) if system else skill, style, True)
    item, answer = drawn
    return Question(skill, None, _dialog(system, [], item.question), answer, f"{style}|{item.question}")


def questions(skill: str, count: int, seed: int = 0) -> list[Question]:
    """Return `count` held-out questions of `skill`, the same for the same seed, distinct as far as the world goes."""
    random = Random(f"{seed}/{skill}")
    chosen: list[Question] = []
    seen: set[str] = set()
    for _ in range(count):
        for _ in range(50):
            question = _question(random, skill)
            if question.key not in seen:
                break
        seen.add(question.key)
        chosen.append(question)
    return chosen
