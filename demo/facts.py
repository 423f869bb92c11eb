"""Everything the demo model knows: the facts, names and words of its closed world."""


def _pairs(text: str) -> list[tuple[str, str]]:
    """Read "left/right" entries separated by semicolons."""
    return [tuple(entry.strip().split("/")) for entry in text.split(";")]


# country, capital, French genitive of the country, French name of the capital
CAPITALS = (
    ("France", "Paris", "de la France", "Paris"),
    ("Italy", "Rome", "de l'Italie", "Rome"),
    ("Spain", "Madrid", "de l'Espagne", "Madrid"),
    ("Portugal", "Lisbon", "du Portugal", "Lisbonne"),
    ("Germany", "Berlin", "de l'Allemagne", "Berlin"),
    ("Austria", "Vienna", "de l'Autriche", "Vienne"),
    ("Poland", "Warsaw", "de la Pologne", "Varsovie"),
    ("Greece", "Athens", "de la Grèce", "Athènes"),
    ("Norway", "Oslo", "de la Norvège", "Oslo"),
    ("Sweden", "Stockholm", "de la Suède", "Stockholm"),
    ("Finland", "Helsinki", "de la Finlande", "Helsinki"),
    ("Denmark", "Copenhagen", "du Danemark", "Copenhague"),
    ("Ireland", "Dublin", "de l'Irlande", "Dublin"),
    ("Iceland", "Reykjavik", "de l'Islande", "Reykjavik"),
    ("England", "London", "de l'Angleterre", "Londres"),
    ("Scotland", "Edinburgh", "de l'Écosse", "Édimbourg"),
    ("Belgium", "Brussels", "de la Belgique", "Bruxelles"),
    ("Hungary", "Budapest", "de la Hongrie", "Budapest"),
    ("Turkey", "Ankara", "de la Turquie", "Ankara"),
    ("Egypt", "Cairo", "de l'Égypte", "Le Caire"),
    ("Kenya", "Nairobi", "du Kenya", "Nairobi"),
    ("Japan", "Tokyo", "du Japon", "Tokyo"),
    ("China", "Beijing", "de la Chine", "Pékin"),
    ("India", "Delhi", "de l'Inde", "Delhi"),
    ("Peru", "Lima", "du Pérou", "Lima"),
    ("Cuba", "Havana", "de Cuba", "La Havane"),
    ("Canada", "Ottawa", "du Canada", "Ottawa"),
    ("Russia", "Moscow", "de la Russie", "Moscou"),
    ("Chile", "Santiago", "du Chili", "Santiago"),
    ("Mali", "Bamako", "du Mali", "Bamako"),
)

OPPOSITES = _pairs(
    "hot/cold; big/small; tall/short; fast/slow; old/new; happy/sad; light/dark; full/empty; wet/dry; open/closed;"
    "early/late; up/down; left/right; rich/poor; clean/dirty; near/far; soft/hard; thick/thin; day/night; good/bad;"
    "strong/weak; loud/quiet; high/low; sweet/sour; first/last; young/aged; push/pull; start/stop; win/lose; in/out"
)

FRENCH_COLOURS = {
    "red": "rouge",
    "blue": "bleu",
    "green": "vert",
    "yellow": "jaune",
    "white": "blanc",
    "black": "noir",
    "brown": "brun",
    "pink": "rose",
    "orange": "orange",
    "grey": "gris",
}
COLOURS = tuple(FRENCH_COLOURS)

THING_COLOURS = _pairs(
    "a banana/yellow; grass/green; snow/white; coal/black; the sky/blue; a carrot/orange; a tomato/red;"
    "an elephant/grey; chocolate/brown; milk/white; a lemon/yellow; a frog/green; a strawberry/red; a pig/pink;"
    "the sun/yellow; the sea/blue; a leaf/green; a crow/black; a pumpkin/orange; a flamingo/pink; a cherry/red;"
    "a mouse/grey; a swan/white; a bear/brown"
)

SOUNDS = _pairs(
    "cow/moo; dog/woof; cat/meow; duck/quack; sheep/baa; pig/oink; lion/roar; snake/hiss; bee/buzz; frog/croak;"
    "owl/hoot; horse/neigh; mouse/squeak; hen/cluck; wolf/howl; crow/caw; donkey/heehaw; goose/honk"
)
ANIMALS = tuple(animal for animal, _ in SOUNDS)

EMOJI = _pairs(
    "cat/🐱; dog/🐶; cow/🐮; pig/🐷; frog/🐸; lion/🦁; bee/🐝; owl/🦉; fox/🦊; bear/🐻; fish/🐟; snail/🐌; apple/🍎;"
    "banana/🍌; cherry/🍒; lemon/🍋; pizza/🍕; cake/🍰; sun/🌞; moon/🌙; star/⭐; fire/🔥; tree/🌳; rocket/🚀"
)

DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
FRENCH_DAYS = tuple("lundi mardi mercredi jeudi vendredi samedi dimanche".split())
MONTHS = tuple("January February March April May June July August September October November December".split())
FRENCH_MONTHS = tuple("janvier février mars avril mai juin juillet août septembre octobre novembre décembre".split())
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")

GIRLS = tuple("Mia Anna Lily Emma Rosa Nora Ella Ruby Ivy Clara Zoe Lucy Eva Sara Maya Tina Nina Lena Kate Amy".split())
BOYS = tuple("Tom Ben Sam Max Leo Jack Finn Oscar Hugo Noah Paul Dan Carl Mark Nick Rob Adam Luke Ned Tim".split())
OBJECTS = tuple(
    "ball kite cup hat book drum boat key box lamp bell car doll ring shoe spoon coat bag pen clock flute chair "
    "basket blanket bottle button candle mirror ladder hammer".split()
)
PLACES = tuple(
    "park garden kitchen attic barn school library forest beach cellar market tower castle station bakery museum "
    "harbour meadow shed church".split()
)
FOODS = tuple("bread soup cake cheese apples rice pie honey plums nuts".split())
WORDS = tuple(sorted({*OBJECTS, *PLACES, *ANIMALS, *FOODS, *COLOURS, *(word for pair in OPPOSITES for word in pair)}))

# Syllables of made-up names: about a million names, so remembering one means copying it.
ONSETS = tuple("b d f g h k l m n p r s t v z br dr gr kr tr pl fl".split())
VOWELS = tuple("aeiou")
CODAS = ("", "", "", "n", "r", "l", "s", "k", "m")

SYSTEM_PROMPTS = {
    "plain": ("You are a helpful assistant.", "Be kind and helpful.", "Answer in a full sentence."),
    "caps": ("Answer in capitals.", "Use only capital letters.", "Please write in capitals."),
    "one": ("Answer with one word.", "Use a single word.", "Be very brief, one word only."),
    "fr": ("Answer in French.", "Always reply in French.", "You speak only French."),
    "sir": ("End every answer with sir.", "Always call me sir.", "Be polite and say sir."),
    "pirate": ("You are a pirate.", "Talk like a pirate.", "Pretend to be a pirate."),
}
