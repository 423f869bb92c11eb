"""Questions that one turn asks and answers, and the styles a system prompt can give the answer."""

import random as random_module
import zlib
from dataclasses import dataclass

from demo import facts

Random = random_module.Random


@dataclass(frozen=True)
class Item:
    """A question with its answer in full, as one word and in French, where the world has them."""

    question: str
    answer: str
    word: str | None = None
    french: str | None = None
    capitals: bool = True
    fact: str | None = None  # what the question asks about; None for free compositions
    form: int = 0  # which of the `forms` wordings of that fact this is
    forms: int = 0


def checksum(key: str) -> int:
    """Return the CRC32 that decides on which side of the split a key falls."""
    return zlib.crc32(key.encode())


def in_held_out_tenth(key: str) -> bool:
    """Return whether a free composition belongs to the tenth that training never shows."""
    return checksum(key) % 10 == 0


def is_held_out(style: str, item: Item) -> bool:
    """Return whether `item` under `style` is kept for evaluation.

    At most one wording of a fact is held out in each style, so the fact itself is always learnable.
    """
    if item.fact is None:
        return in_held_out_tenth(f"{style}|{item.question}")
    return checksum(f"{style}|{item.fact}") % (item.forms + 1) == item.form


def with_article(noun: str) -> str:
    """Return `noun` after "a" or "an"."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def capitalised(text: str) -> str:
    """Return `text` with its first letter in upper case and the rest as it was."""
    return text[0].upper() + text[1:]


def made_up_name(random: Random) -> str:
    """Return a name of two or three syllables."""
    syllables = [random.choice(facts.ONSETS) + random.choice(facts.VOWELS) for _ in range(random.choice((2, 2, 2, 3)))]
    return ("".join(syllables) + random.choice(facts.CODAS)).capitalize()


def person(random: Random, held_out: bool) -> str:
    """Return a known or made-up name for training, or a made-up one that training never shows."""
    if not held_out and random.random() < 0.3:
        return random.choice(facts.GIRLS + facts.BOYS)
    while True:
        name = made_up_name(random)
        if name not in facts.GIRLS + facts.BOYS and in_held_out_tenth(f"name|{name}") == held_out:
            return name


def _choose(random: Random, wordings: list[str]) -> dict:
    """Pick a wording; the result fills the fields of an item that tell which one it is."""
    form = random.randrange(len(wordings))
    return {"question": wordings[form], "form": form, "forms": len(wordings)}


def capital(random: Random) -> Item:
    """Ask for the capital of a country."""
    country_name, city, french_country, french_city = random.choice(facts.CAPITALS)
    wordings = [
        f"What is the capital of {country_name}?",
        f"Capital of {country_name}?",
        f"Tell me the capital of {country_name}.",
        f"Which city is the capital of {country_name}?",
        f"Name the capital of {country_name}.",
    ]
    return Item(
        **_choose(random, wordings),
        answer=f"The capital of {country_name} is {city}.",
        word=city,
        french=f"La capitale {french_country} est {french_city}.",
        fact=f"capital/{country_name}",
    )


def country(random: Random) -> Item:
    """Ask for the country of a capital."""
    country_name, city, french_country, french_city = random.choice(facts.CAPITALS)
    wordings = [
        f"{city} is the capital of which country?",
        f"Which country has the capital {city}?",
        f"Where is {city}?",
        f"In which country is {city}?",
    ]
    return Item(
        **_choose(random, wordings),
        answer=f"{city} is the capital of {country_name}.",
        word=country_name,
        french=f"{french_city} est la capitale {french_country}.",
        fact=f"country/{country_name}",
    )


def opposite(random: Random) -> Item:
    """Ask for the opposite of a word."""
    pair = random.choice(facts.OPPOSITES)
    word, other = pair if random.random() < 0.5 else pair[::-1]
    wordings = [
        f"What is the opposite of {word}?",
        f"Opposite of {word}?",
        f"Tell me the opposite of {word}.",
        f"Which word is the opposite of {word}?",
    ]
    return Item(
        **_choose(random, wordings),
        answer=f"The opposite of {word} is {other}.",
        word=capitalised(other),
        fact=f"opposite/{word}",
    )


def colour(random: Random) -> Item:
    """Ask for the colour of a thing."""
    thing, name = random.choice(facts.THING_COLOURS)
    wordings = [
        f"What colour is {thing}?",
        f"Tell me the colour of {thing}.",
        f"What is the colour of {thing}?",
        f"Which colour does {thing} have?",
    ]
    return Item(
        **_choose(random, wordings),
        answer=f"{capitalised(thing)} is {name}.",
        word=capitalised(name),
        french=f"C'est {facts.FRENCH_COLOURS[name]}.",
        fact=f"colour/{thing}",
    )


def sound(random: Random) -> Item:
    """Ask for the sound an animal makes."""
    animal, noise = random.choice(facts.SOUNDS)
    wordings = [
        f"What does {with_article(animal)} say?",
        f"What sound does {with_article(animal)} make?",
        f"Which sound is made by {with_article(animal)}?",
        f"Tell me the sound of {with_article(animal)}.",
    ]
    return Item(
        **_choose(random, wordings),
        answer=f"{capitalised(with_article(animal))} says {noise}.",
        word=capitalised(noise),
        fact=f"sound/{animal}",
    )


def emoji(random: Random) -> Item:
    """Ask for an emoji, which the tokenizer spells in several byte pieces."""
    thing, picture = random.choice(facts.EMOJI)
    wordings = [
        f"Show me the emoji for {thing}.",
        f"Draw {thing} as an emoji.",
        f"What is the emoji of {thing}?",
        f"Emoji for {thing}?",
    ]
    return Item(**_choose(random, wordings), answer=picture, capitals=False, fact=f"emoji/{thing}")


def calendar(random: Random) -> Item:
    """Ask for the day or month before or after another."""
    unit = random.choice(("day", "month"))
    names, french = (facts.DAYS, facts.FRENCH_DAYS) if unit == "day" else (facts.MONTHS, facts.FRENCH_MONTHS)
    here = random.randrange(len(names))
    relation, french_relation, step = random.choice((("after", "Après", 1), ("before", "Avant", -1)))
    there = (here + step) % len(names)
    wordings = [
        f"What {unit} comes {relation} {names[here]}?",
        f"Which {unit} is {relation} {names[here]}?",
        f"Tell me the {unit} {relation} {names[here]}.",
        f"Name the {unit} {relation} {names[here]}.",
    ]
    return Item(
        **_choose(random, wordings),
        answer=f"The {unit} {relation} {names[here]} is {names[there]}.",
        word=names[there],
        french=f"{french_relation} {french[here]} vient {french[there]}.",
        fact=f"calendar/{relation}/{names[here]}",
    )


def identity(random: Random) -> Item:
    """Ask the assistant for its name."""
    opening = random.choice(("", "", "Hello! ", "Hi! ", "Please tell me: ", "Good morning! ", "One question: "))
    wordings = ("What is your name?", "Who are you?", "Tell me your name.", "What are you called?", "Your name?")
    return Item(opening + random.choice(wordings), answer="My name is Pip.", word="Pip", french="Je m'appelle Pip.")


def greet(random: Random) -> Item:
    """Greet the assistant."""
    greeting = random.choice(("Hello", "Hi", "Hey", "Good morning", "Good evening", "Good day"))
    whom = random.choice(("", "", " there", " friend", " my friend", " again", " to you"))
    return Item(
        greeting + whom + random.choice("!!."),
        answer="Hello! How can I help you?",
        word="Hello!",
        french="Bonjour !",
    )


def count(random: Random) -> Item:
    """Ask to count up or down between two numbers."""
    low = random.randint(0, 20)
    high = low + random.randint(3, 8)
    opening = random.choice(("Count", "Please count"))
    if random.random() < 0.6:
        question, numbers = f"{opening} from {low} to {high}.", range(low, high + 1)
    else:
        question, numbers = f"{opening} down from {high} to {low}.", range(high, low - 1, -1)
    return Item(question, answer=", ".join(map(str, numbers)) + ".")


def repeat(random: Random) -> Item:
    """Ask to repeat one to eight known words."""
    words = " ".join(random.sample(facts.WORDS, random.randint(1, 8)))
    opening = random.choice(("Repeat:", "Say this again:", "Copy these words:"))
    return Item(f"{opening} {words}", answer=words)


MAKERS = {
    "capital": capital,
    "country": country,
    "opposite": opposite,
    "colour": colour,
    "sound": sound,
    "emoji": emoji,
    "calendar": calendar,
    "identity": identity,
    "greet": greet,
    "count": count,
    "repeat": repeat,
}


def styled(answer: str, style: str) -> str | None:
    """Return a full-sentence `answer` as `style` says it, or None for styles that need another answer."""
    if style == "plain":
        return answer
    if style == "caps":
        return answer.upper()
    if style == "sir" and answer[-1] in ".?":
        return f"{answer[:-1]}, sir{answer[-1]}"
    if style == "pirate" and answer[-1] in ".?":
        return f"Arr! {answer}"
    return None


def answer_of(item: Item, style: str) -> str | None:
    """Return the answer to `item` under `style`, or None where the world has no such answer."""
    if style == "one":
        return item.word
    if style == "fr":
        return item.french
    if style == "caps" and not item.capitals:
        return None
    return styled(item.answer, style)
