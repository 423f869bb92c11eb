"""Texts to complete: stories whose ending follows from their beginning, and sequences."""

from demo import facts
from demo.single import Random, in_held_out_tenth, with_article

# kind -> (step, smallest start, largest start), for sequences of numbers
_NUMBERS = {"up": (1, 0, 40), "twos": (2, 0, 30), "fives": (5, 0, 60), "tens": (10, 0, 30), "down": (-1, 7, 40)}
_NAMES = {"days": facts.DAYS, "months": facts.MONTHS, "letters": facts.LETTERS}


def story(random: Random, held_out: bool) -> tuple[str, str]:
    """Return a prompt and the ending that follows from it; template, hero and a detail decide the split."""
    while True:
        template = random.randrange(6)
        is_girl = random.random() < 0.5
        hero = random.choice(facts.GIRLS if is_girl else facts.BOYS)
        friend = random.choice([name for name in facts.GIRLS + facts.BOYS if name != hero])
        thing, other_thing = random.sample(facts.OBJECTS, 2)
        colour, other_colour = random.sample(facts.COLOURS, 2)
        place, other_place = random.sample(facts.PLACES, 2)
        animal, food = random.choice(facts.ANIMALS), random.choice(facts.FOODS)
        detail = colour if template == 3 else place
        if in_held_out_tenth(f"story|{template}|{hero}|{detail}") == held_out:
            break
    he, his, him = ("she", "her", "her") if is_girl else ("he", "his", "him")
    capital_he = he.capitalize()
    coloured, other_coloured = f"{colour} {thing}", f"{other_colour} {other_thing}"
    if template == 0:
        kid, other_kid = ("girl" if name in facts.GIRLS else "boy" for name in (hero, friend))
        return (
            f"Once upon a time there was a {kid} named {hero}. {hero} had {with_article(coloured)}. "
            f"One day {hero} went to the {place} and met a {other_kid} named {friend}. "
            f"{friend} had {with_article(other_coloured)}.",
            f" They played together all day. In the evening {hero} took the {coloured} home and {friend} took "
            f"the {other_coloured} home. The end.",
        )
    if template == 1:
        return (
            f"{hero} lost {his} {coloured}. {capital_he} looked in the {place}, but it was not there. "
            f"Then {hero} asked {friend}. {friend} said: I saw it in the {other_place}.",
            f" So {hero} ran to the {other_place} and found the {coloured}. {hero} thanked {friend}. The end.",
        )
    if template == 2:
        return (
            f"There was {with_article(animal)} who lived in the {place}. "
            f"Every day {hero} gave the {animal} some {food}. "
            f"One day {hero} could not come, so {friend} came with some {food}.",
            f" The {animal} ate the {food} and was happy. "
            f"{friend} told {hero} that the {animal} in the {place} was fine. The end.",
        )
    if template == 3:
        return (
            f"It was the birthday of {hero}. {friend} gave {him} {with_article(coloured)}, "
            f"and the {animal} gave {him} some {food}.",
            f" {hero} loved the {coloured}. {capital_he} shared the {food} with {friend} and the {animal}. The end.",
        )
    if template == 4:
        return (
            f"{hero} wanted to make {food}. {capital_he} went to the {place} to buy {with_article(coloured)}. "
            f"On the way {he} saw {with_article(animal)}. The {animal} was hungry.",
            f" {hero} bought the {coloured} at the {place} and made the {food}. "
            f"Then {he} gave some {food} to the {animal}. The end.",
        )
    return (
        f"{hero} and {friend} lived near the {place}. "
        f"{hero} liked the colour {colour} and {friend} liked the colour {other_colour}. "
        f"They found two things in the {other_place}: "
        f"{with_article(coloured)} and {with_article(other_coloured)}.",
        f" {hero} took the {coloured} and {friend} took the {other_coloured}. They went back to the {place}. The end.",
    )


def sequence(random: Random, held_out: bool) -> tuple[str, str]:
    """Return a prompt that shows four terms, and the next four."""
    while True:
        kind = random.choice(("up", "up", "twos", "fives", "tens", "down", "days", "months", "letters"))
        if kind in _NAMES:
            names = _NAMES[kind]
            start = random.randrange(len(names))
            terms = [names[(start + place) % len(names)] for place in range(8)]
        else:
            step, smallest, largest = _NUMBERS[kind]
            start = random.randrange(smallest, largest + 1, max(1, step) if step >= 5 else 1)
            terms = [str(start + step * place) for place in range(8)]
        if in_held_out_tenth(f"sequence|{kind}|{start}") == held_out:
            break
    return "Next: " + " ".join(terms[:4]), " " + " ".join(terms[4:])
