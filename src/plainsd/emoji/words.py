"""What captions call emoji and colours: names and synonyms, articles and plurals.

Names and synonyms are those of the `emoji` package. A synonym that means two emoji, is the name of another one or of a
colour, begins with a size, or of which two are another emoji ("two hearts"), is left out, so that captions have one
meaning.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from PIL import ImageFont

from plainsd.emoji import drawing
from plainsd.errors import UserError

# The twelve colours of single emoji, and twelve more. Any two are at least 67 apart in RGB.
COLOURS: dict[str, tuple[int, int, int]] = drawing.BACKGROUNDS | {
    "navy": (16, 24, 96),
    "teal": (0, 112, 112),
    "lime": (160, 230, 40),
    "magenta": (230, 30, 180),
    "maroon": (120, 0, 50),
    "olive": (130, 135, 20),
    "beige": (240, 220, 180),
    "mint": (160, 240, 200),
    "lavender": (190, 170, 245),
    "coral": (255, 110, 90),
    "sky blue": (130, 200, 255),
    "dark green": (10, 80, 30),
}
SYNONYM = re.compile(r"[a-z][a-z' -]+[a-z]")
LONGEST_SYNONYM = 4  # words
SIZE_WORDS = frozenset("small little tiny big large huge".split())
COUNT_WORDS = {2: "two", 3: "three", 4: "four"}
# The head of a name, which takes article and plural, ends before one of these, or before a participle.
AFTER_HEAD = frozenset("of with in on at over and for from to under without behind pointed".split())
DOERS = frozenset("person man woman men women people face cat leaf index globe flower hand".split())
HEADS = frozenset("sign button mark symbol arrow".split())  # a name that ends in one is one: `litter in bin sign`
NAMES_WITHOUT_ARTICLE = drawing.UNCOUNTED | frozenset(
    """aries taurus gemini cancer leo virgo libra scorpio sagittarius capricorn aquarius pisces ophiuchus fuji claus
    christmas clothes people men women children fries teeth feet mathematics water points""".split()
)
NO_PLURAL = frozenset("up down left right back forward on off closed open entry under fleur-de-lis".split())
IRREGULAR = {
    "person": "people",
    "man": "men",
    "woman": "women",
    "child": "children",
    "mouse": "mice",
    "foot": "feet",
    "tooth": "teeth",
    "goose": "geese",
    "wolf": "wolves",
    "leaf": "leaves",
    "knife": "knives",
    "scarf": "scarves",
    "ox": "oxen",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "fish": "fish",
    "sheep": "sheep",
    "deer": "deer",
    "bison": "bison",
    "squid": "squid",
}


@dataclass(frozen=True)
class Noun:
    """One emoji: its name, the character, and other names for it."""

    name: str
    character: str
    synonyms: tuple[str, ...] = ()


@lru_cache(8192)
def head_length(name: str) -> int:
    """The number of words up to the one that takes article and plural: 2 of `grinning face with big eyes`."""
    words = name.split(" ")
    for i, word in enumerate(words[1:], 1):
        if words[-1] not in HEADS and (word in AFTER_HEAD or word.endswith("ing") and words[i - 1] in DOERS):
            return i
    return len(words)


def is_countable(name: str) -> bool:
    """Whether the name takes `a` and a plural: not `grapes`, `bread`, `aries`."""
    head = name.split(" ")[head_length(name) - 1]
    plural = head.endswith("s") and not head.endswith(drawing.SINGULAR_S) or head in NAMES_WITHOUT_ARTICLE
    return not plural


def phrase_of(name: str, adjective: str = "") -> str:
    """`an owl`, `a small owl`; `grapes`, `small grapes`."""
    words = f"{adjective} {name}".strip()
    return drawing.with_article(words) if is_countable(name) else words


@lru_cache(8192)
def plural_of(name: str) -> str:
    """`owls`, `grinning faces with big eyes`; `grapes emoji` where a name has no plural or is one."""
    words, at = name.split(" "), head_length(name) - 1
    head = words[at]
    if not is_countable(name) or head in NO_PLURAL or not head.isalpha():
        return f"{name} emoji"
    if head in IRREGULAR:
        words[at] = IRREGULAR[head]
    elif head.endswith(("s", "x", "z", "ch", "sh")):
        words[at] = head + "es"
    elif head.endswith("y") and head[-2:-1] not in "aeiou":
        words[at] = head[:-1] + "ies"
    else:
        words[at] = head + "s"
    return " ".join(words)


# ---- from the `emoji` package ----------------------------------------------------------------------------------------


def plain_name(text: str) -> str:
    """`:red_apple:` -> `red apple`; `:A_button_(blood_type):` -> `a button`."""
    name = text.strip(":").replace("_", " ").replace("’", "'").lower()
    return re.sub(r" *\(.*?\)", "", name)


def every_noun(font: ImageFont.FreeTypeFont) -> list[Noun]:
    """All emoji of one character that the font draws, by code point, with their synonyms."""
    try:
        import emoji
    except ImportError:
        raise UserError("the emoji package, which gives the names, is missing; pip install 'plainsd[emoji]'") from None
    found: dict[str, tuple[str, list[str]]] = {}  # by character
    for text, entry in emoji.EMOJI_DATA.items():
        character = text.replace("\ufe0f", "")
        whole = entry["status"] == emoji.STATUS["fully_qualified"]
        if len(character) == 1 and whole and font.getmask(character).getbbox():
            found[character] = plain_name(entry["en"]), [plain_name(alias) for alias in entry.get("alias", ())]
    synonyms = unambiguous(found)
    return [Noun(found[character][0], character, synonyms[character]) for character in sorted(found)]


def unambiguous(found: dict[str, tuple[str, list[str]]]) -> dict[str, tuple[str, ...]]:
    """The synonyms of each character that mean it alone. `found`: name and candidates of each."""

    def letters(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text)

    meant: dict[str, set[str]] = {}
    for character, (name, others) in found.items():
        for word in (name, *others):
            meant.setdefault(letters(word), set()).add(character)
    kept = {}
    for character, (name, others) in found.items():
        usable = {letters(name): name}  # spellings that differ in a hyphen are one
        for word in others:
            short = len(word.split(" ")) <= LONGEST_SYNONYM
            clear = meant[letters(word)] == {character} and word not in COLOURS and word.split(" ")[0] not in SIZE_WORDS
            clear = clear and not any(letters(f"{count} {plural_of(word)}") in meant for count in COUNT_WORDS.values())
            if short and clear and SYNONYM.fullmatch(word):
                usable.setdefault(letters(word), word)
        kept[character] = tuple(usable.values())[1:]
    return kept
