"""Scenes of one to four emoji on a background: what is where. Scene `index` is a pure function of (seed, kind, index).

    one     one object: anywhere; on the left or right, at the top or bottom, in the middle; small or big
    two     two different objects, one left of, right of, above or below the other
    count   two, three or four of the same object
    many    three or four different objects

In a set with cells, sizes and places are whole cells, as in `drawing.place_in_cells`. In a single set every scene is
one object of usual size, anywhere, on one colour.

A background has one colour, or two: a gradient, stripes or dots. Two rules say what training never sees: pairs of an
object and a colour, listed in the set; and pairs of objects in one scene, by a hash of their names. Every scene of the
kind "heldout" breaks one of the two: `one` and `count` the first, `two` and `many` the second. No other scene breaks
any.

A set is a JSON file, which is the concepts.json of the models trained on it: see `describe_set`.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from plainsd.disk import read_json
from plainsd.emoji import drawing
from plainsd.emoji.words import Noun, phrase_of
from plainsd.errors import UserError

PATTERNS = ("plain", "gradient", "stripes", "dots")
EDGES = ("left", "right", "top", "bottom")
RELATIONS = {"left": "right", "right": "left", "above": "below", "below": "above"}  # and their converses
TASKS = {"one": 0.4, "two": 0.3, "count": 0.2, "many": 0.1}  # shares
MIDDLE = 0.15  # of the side: farther from the centre is not "in the middle"
PLAIN_SHARE = 0.5  # of backgrounds
SIZE_RANGES = {
    "small": (0.25, 0.38),
    "big": (0.75, 0.92),
    "usual": (0.55, 0.92),
    "placed": (0.28, 0.44),
    "shared": (0.26, 0.43),
}
CELL_RANGES = {  # the same in a set with cells: of an object's square, as a share of the side
    "small": (0.3, 0.4),
    "big": (0.85, 1.0),
    "usual": (0.7, 1.0),
    "placed": (0.3, 0.5),
    "shared": (0.3, 0.5),
}
ANOTHER = "make another with recipes/emoji/data.py --set"
MOST_DRAWS = 10_000
DrawNumber = Callable[[], float]
Area = tuple[int, int, int, int]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class SceneObject:
    """An emoji in a square: its longer side fills it, and the other is centred. In pixels."""

    concept: int
    left: int
    top: int
    side: int

    @property
    def centre(self) -> tuple[float, float]:
        return self.left + self.side / 2, self.top + self.side / 2


@dataclass(frozen=True)
class Scene:
    """`said`, for captions: of `one`, a side, "middle", "small" or "big"; of `two`, where the first object is, seen
    from the second; None where captions leave it open."""

    task: str
    objects: tuple[SceneObject, ...]
    pattern: str
    colours: tuple[str, ...]  # one, or two; names
    said: str | None = None


@dataclass(frozen=True, eq=False)
class SceneSet:
    """What scenes are made of."""

    nouns: tuple[Noun, ...]
    colours: dict[str, tuple[int, int, int]]
    heldout: frozenset[tuple[int, str]]  # (object, colour)
    share: float  # of the pairs of objects that is held out
    size: int  # pixels of a side
    seed: int
    count: int  # scenes of an epoch
    heldout_count: int
    font: dict[str, str]  # the file's name and SHA-256
    templates: tuple[str, ...] = drawing.TEMPLATES
    cells: int | None = None  # of a side, that sizes and places are multiples of; None: any size and place
    single: bool = False  # only `one`, its place and size left open, and plain backgrounds
    digest: str = ""
    held_list: tuple[tuple[int, str], ...] = field(default=(), repr=False)
    words: frozenset[str] = field(default=frozenset(), repr=False)  # names and synonyms

    def __post_init__(self):
        """UserError for cells that no scene of this set fits into."""
        drawing.check_cells(self.cells)
        missing = {
            "no emoji": not self.nouns,
            "no held-out pairs of emoji and colour": not self.heldout,
            f"{self.size} pixels a side, where {drawing.LEAST_SIDE} to {drawing.MOST_SIDE} are possible": not (
                drawing.is_side(self.size)
            ),
            "emoji without a name or a character": not all(
                isinstance(text, str) and text
                for one in self.nouns
                for text in (one.name, one.character, *one.synonyms)
            ),
            "colours that are not three numbers from 0 to 255": not all(map(drawing.is_colour, self.colours.values())),
            "held-out pairs of other colours": any(colour not in self.colours for _, colour in self.heldout),
            "no scenes of one kind": min(self.count, self.heldout_count) < 1,
        }
        if any(missing.values()):
            raise UserError(f"the set has {' and '.join(what for what, so in missing.items() if so)}; {ANOTHER}")
        if self.cells == 1 and not self.single:
            raise UserError("cells 1: two objects need two cells of a side; give 2 or more, or a single set")
        object.__setattr__(self, "held_list", tuple(sorted(self.heldout)))
        words = frozenset(word for noun in self.nouns for word in (noun.name, *noun.synonyms))
        object.__setattr__(self, "words", words)

    @property
    def tasks(self) -> dict[str, float]:
        return {"one": 1.0} if self.single else TASKS

    @property
    def patterns(self) -> tuple[str, ...]:
        return PATTERNS[:1] if self.single else PATTERNS

    def held_together(self, a: int, b: int) -> bool:
        """Whether two objects are never in one scene of training."""
        first, second = sorted((self.nouns[a].name, self.nouns[b].name))
        digest = hashlib.sha256(f"{self.seed}:objects:{first}:{second}".encode()).digest()
        return int.from_bytes(digest[:4], "big") < self.share * 2**32


# ---- making a scene --------------------------------------------------------------------------------------------------


def moved_scene(made_of: SceneSet, scene: Scene, kind: str, index: int) -> Scene:
    """The same scene with other sizes and places, as far as captions leave them open."""
    draw = random.Random(f"{made_of.seed}:{kind}:{index}").random
    for _ in range(MOST_DRAWS):
        said, areas, sizes = arranged(draw, scene.task, len(scene.objects), made_of)
        if said == scene.said:
            break
    places = zip(scene.objects, areas, strict=True)
    moved = (put_into(draw, one.concept, area, sizes, made_of, scene.said) for one, area in places)
    return replace(scene, objects=tuple(moved))


def make_scene(
    made_of: SceneSet, kind: str, index: int, *, heldout: bool | None = None, task: str | None = None
) -> Scene:
    """Scene `index` of a kind, such as "train", "heldout" or "question". `heldout`: whether it breaks a rule of holding
    out, by default if that is its kind; `task`: one of TASKS instead of a random one."""
    draw = random.Random(f"{made_of.seed}:{kind}:{index}").random
    heldout = kind == "heldout" if heldout is None else heldout
    task = task or chosen_task(made_of.tasks, draw())
    count = {"one": 1, "two": 2, "count": 2 + int(draw() * 3), "many": 3 + int(draw() * 2)}[task]
    colour = None
    if heldout and task in ("one", "count"):
        first, colour = made_of.held_list[int(draw() * len(made_of.held_list))]
        concepts = [first]
    else:
        concepts = drawn_objects(made_of, draw, count if task in ("two", "many") else 1, heldout)
    pattern, *others = made_of.patterns
    if others and draw() >= PLAIN_SHARE:
        pattern = others[int(draw() * len(others))]
    colours = drawn_colours(made_of, draw, concepts, 1 if pattern == "plain" else 2, colour)
    said, areas, sizes = arranged(draw, task, count, made_of)
    objects = tuple(
        put_into(draw, concept, area, sizes, made_of, said)
        for concept, area in zip(concepts * count if task == "count" else concepts, areas, strict=True)
    )
    return Scene(task, objects, pattern, colours, said)


def chosen_task(shares: dict[str, float], chance: float) -> str:
    for task, share in shares.items():
        if chance < share:
            return task
        chance -= share
    return next(iter(shares))


def drawn_objects(made_of: SceneSet, draw: DrawNumber, count: int, heldout: bool) -> list[int]:
    """Different objects. With `heldout` the first two are a held-out pair; else no two are."""
    for _ in range(MOST_DRAWS):
        concepts = [int(draw() * len(made_of.nouns)) for _ in range(count)]
        if len(set(concepts)) < count:
            continue
        held = [made_of.held_together(a, b) for i, a in enumerate(concepts) for b in concepts[:i]]
        if count == 1 or (held[0] if heldout else not any(held)):
            return concepts
    what = "held-out pair of objects" if heldout else f"group of {count} objects whose pairs are trained on"
    raise UserError(
        f"among {len(made_of.nouns)} emoji there is no {what}; take more, or another share of held-out pairs"
    )


def drawn_colours(
    made_of: SceneSet, draw: DrawNumber, concepts: Sequence[int], count: int, first: str | None
) -> tuple[str, ...]:
    """Different colours; but for `first`, none that is held out with one of the objects."""
    names = list(made_of.colours)
    colours = [first] if first else []
    for _ in range(MOST_DRAWS):
        if len(colours) == count:
            return tuple(colours)
        name = names[int(draw() * len(names))]
        if name not in colours and not any((concept, name) in made_of.heldout for concept in concepts):
            colours.append(name)
    raise UserError(
        f"of {len(names)} colours, fewer than {count} are trained on with these emoji; hold out fewer pairs"
    )


def arranged(draw: DrawNumber, task: str, count: int, made_of: SceneSet) -> tuple[str | None, list[Area], str]:
    """What captions say of the places; an area for each object; the name of their range of sizes."""
    size = made_of.size
    margin, half = max(1, size // 40), size // 2
    edge = size - margin
    whole = (margin, margin, edge, edge)
    halves = {
        "left": (margin, margin, half - margin, edge),
        "right": (half + margin, margin, edge, edge),
        "top": (margin, margin, edge, half - margin),
        "bottom": (margin, half + margin, edge, edge),
    }
    if task == "one":
        kinds = (None, None, "small", "big", "middle", *EDGES)
        said = None if made_of.single else kinds[int(draw() * len(kinds))]
        if said in EDGES:
            return said, [halves[said]], "placed"
        if said == "middle":
            room = round(0.26 * size)
            return said, [(half - room, half - room, half + room, half + room)], "placed"
        return said, [whole], said or "usual"
    if task == "two":
        where = tuple(RELATIONS)[int(draw() * len(RELATIONS))]
        names = {"above": "top", "below": "bottom"}
        areas = [halves[names.get(place, place)] for place in (where, RELATIONS[where])]
        return where if draw() < 0.8 else None, areas, "shared"
    if count == 2:
        pair = ("left", "right") if draw() < 0.5 else ("top", "bottom")
        return None, [halves[name] for name in pair], "shared"
    quarters = [(*(halves[x][0], halves[y][1]), *(halves[x][2], halves[y][3])) for y in EDGES[2:] for x in EDGES[:2]]
    spare = int(draw() * 4)
    return None, [area for i, area in enumerate(quarters) if count == 4 or i != spare], "shared"


def put_into(
    draw: DrawNumber, concept: int, area: Area, sizes: str, made_of: SceneSet, said: str | None
) -> SceneObject:
    """An object of a random size at a random place in its area."""
    if made_of.cells:
        return put_into_cells(draw, concept, area, sizes, made_of.size, made_of.cells, said == "middle")
    low, high = SIZE_RANGES[sizes]
    side = min(area[2] - area[0], area[3] - area[1], round(made_of.size * (low + (high - low) * draw())))
    left = area[0] + int(draw() * (area[2] - area[0] - side + 1))
    top = area[1] + int(draw() * (area[3] - area[1] - side + 1))
    return SceneObject(concept, left, top, side)


def put_into_cells(
    draw: DrawNumber, concept: int, area: Area, sizes: str, size: int, cells: int, middle: bool
) -> SceneObject:
    """The same on whole cells: the object's square is of whole cells, less a quarter of one on each side. In the
    `middle` it is larger where so few cells have none in their middle."""
    first_x, first_y, last_x, last_y = (round(edge * cells / size) for edge in area)
    room = min(last_x - first_x, last_y - first_y)
    low, high = CELL_RANGES[sizes]
    most = min(room, max(1, math.floor(high * cells)))
    least = min(most, math.ceil(low * cells))
    taken = least + int(draw() * (most - least + 1))
    columns, rows = [*range(first_x, last_x - taken + 1)], [*range(first_y, last_y - taken + 1)]
    if middle:
        columns, rows = (in_the_middle(places, taken, size, cells) for places in (columns, rows))
        if not columns or not rows:
            taken += 1
            columns = rows = [(cells - taken) // 2]
    left = columns[int(draw() * len(columns))]
    top = rows[int(draw() * len(rows))]
    cell = size / cells
    return SceneObject(concept, round((left + 0.25) * cell), round((top + 0.25) * cell), round((taken - 0.5) * cell))


def in_the_middle(places: Iterable[int], taken: int, size: int, cells: int) -> list[int]:
    """Those at which a square of so many cells has its centre near the picture's, whole pixels or not."""
    return [place for place in places if abs(place + (taken - cells) / 2) * size / cells + 1 <= MIDDLE * size]


# ---- the set as a file -----------------------------------------------------------------------------------------------


def describe_set(made_of: SceneSet) -> dict[str, Any]:
    """The content of concepts.json: what a scorer needs of single objects, and under "scenes" what scenes need."""
    return {
        "concepts": [
            {"name": noun.name, "character": noun.character, "phrase": phrase_of(noun.name)}
            | ({"synonyms": list(noun.synonyms)} if noun.synonyms else {})
            for noun in made_of.nouns
        ],
        "backgrounds": {name: list(colour) for name, colour in made_of.colours.items()},
        "templates": list(made_of.templates),
        "heldout": [[made_of.nouns[concept].name, colour] for concept, colour in made_of.held_list],
        "size": made_of.size,
        **({"cells": made_of.cells} if made_of.cells else {}),
        "seed": made_of.seed,
        "font": made_of.font,
        "scenes": {
            "patterns": list(made_of.patterns),
            "tasks": made_of.tasks,
            **({"single": True} if made_of.single else {}),
            "heldout_objects": made_of.share,
            "count": made_of.count,
            "heldout_count": made_of.heldout_count,
        },
    }


SET_REMEDY = "write it with recipes/emoji/data.py --set"


def read_set(path: Path) -> SceneSet:
    return set_of(read_json(path, SET_REMEDY), str(path))


def set_of(content: dict[str, Any], where: str = "concepts.json") -> SceneSet:
    """The set that a concepts.json describes; UserError for one without scenes, or with other ones than this version
    makes."""
    scenes = content.get("scenes")
    if not isinstance(scenes, dict):
        raise UserError(f"{where} describes no scenes; {SET_REMEDY}")
    try:
        nouns = tuple(
            Noun(entry["name"], entry["character"], tuple(listed(entry.get("synonyms", []))))
            for entry in content["concepts"]
        )
        number = {noun.name: i for i, noun in enumerate(nouns)}
        made_of = SceneSet(
            nouns=nouns,
            colours={name: tuple(colour) for name, colour in content["backgrounds"].items()},
            heldout=frozenset((number[name], colour) for name, colour in content["heldout"]),
            share=float(scenes["heldout_objects"]),
            size=content["size"],
            seed=int(content["seed"]),
            count=int(scenes["count"]),
            heldout_count=int(scenes["heldout_count"]),
            font={"file": str(content["font"]["file"]), "sha256": str(content["font"]["sha256"])},
            templates=tuple(content["templates"]),
            cells=content.get("cells"),
            single=scenes.get("single", False) is True,
            digest=digest_of(content),
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where} is damaged: {type(error).__name__} {error}; {SET_REMEDY}") from error
    if (scenes.get("patterns"), scenes.get("tasks")) != (list(made_of.patterns), made_of.tasks):
        raise UserError(f"{where} describes scenes of another version of plainsd; {SET_REMEDY}")
    return made_of


def listed(value: Any) -> list[Any]:
    """TypeError for anything but a list, such as a text, which is a row of letters too."""
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is no list")
    return value


def digest_of(content: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits that change with any scene or caption of the set, and not with their number."""
    scenes = {name: value for name, value in content["scenes"].items() if not name.endswith("count")}
    text = json.dumps(content | {"scenes": scenes}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
