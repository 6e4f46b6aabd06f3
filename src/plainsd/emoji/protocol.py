"""Score a model on scenes: what is asked, what is right, and the table.

The tasks are those of GenEval (Ghosh et al. 2023, arXiv:2310.11513) as far as the scenes have them: single object, two
objects, counting, position, and colours, which here are the background's. As in MOSAIC (arXiv:2605.00273), the pictures
are made by rule, combinations are held out by rule, and each is scored apart. Objects are found by `spotting`, which
sees the picture alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from plainsd.emoji.captions import captions_of
from plainsd.emoji.measures import wilson
from plainsd.emoji.scenes import EDGES, MIDDLE, Scene, SceneSet, make_scene
from plainsd.emoji.spotting import Spotted

ORDER = ("one", "two", "count", "one", "two", "count", "two", "many")  # of the tasks, round and round
SIZE_LIMITS = {"small": (0.0, 0.5), "big": (0.6, 1.0)}  # of the side

# name, the scenes that it counts, and whether a picture is right
Rule = tuple[str, Callable[[Scene], bool], Callable[[Scene, Spotted, int], bool]]


@dataclass(frozen=True)
class SceneQuestion:
    """One prompt, and the scene that it describes."""

    prompt: str
    scene: Scene
    seen: bool


def scene_questions(made_of: SceneSet, count: int, seed: int = 0) -> list[SceneQuestion]:
    """`count` prompts, every other one held out, spread over the tasks; each is a first caption, which says all."""
    asked, kind = [], f"question {seed}"
    order = [task for task in ORDER if task in made_of.tasks]
    for k in range(count):
        task = order[k // 2 % len(order)]
        scene = make_scene(made_of, kind, k, heldout=k % 2 == 1, task=task)
        asked.append(SceneQuestion(captions_of(made_of, scene, kind, k)[0], scene, seen=k % 2 == 0))
    return asked


# ---- what is right ---------------------------------------------------------------------------------------------------


def objects_right(scene: Scene, spotted: Spotted, size: int) -> bool:
    """Those that were asked for, and no others."""
    return sorted(one.concept for one in scene.objects) == sorted(one.concept for one in spotted.objects)


def number_right(scene: Scene, spotted: Spotted, size: int) -> bool:
    return len(scene.objects) == len(spotted.objects)


def place_right(scene: Scene, spotted: Spotted, size: int) -> bool:
    """Whether the objects are right, and where or how large the scene says."""
    if not objects_right(scene, spotted, size):
        return False
    wanted, said = [one.concept for one in scene.objects], scene.said
    found = sorted(spotted.objects, key=lambda one: wanted.index(one.concept))
    x, y = found[0].centre
    if scene.task == "two":
        other_x, other_y = found[1].centre
        return is_where(said, x - other_x, y - other_y)
    if said in SIZE_LIMITS:
        low, high = SIZE_LIMITS[said]
        return low <= found[0].side / size <= high
    if said == "middle":
        return max(abs(x - size / 2), abs(y - size / 2)) <= MIDDLE * size
    return is_where(said, x - size / 2, y - size / 2)


def is_where(said: str | None, across: float, down: float) -> bool:
    """Of a way from one place to another, in pixels: whether it leads left, right, up or down."""
    return {"left": -across, "right": across, "top": -down, "above": -down, "bottom": down, "below": down}[
        said or ""
    ] > 0


def colours_right(scene: Scene, spotted: Spotted, size: int) -> bool:
    return scene.pattern == spotted.pattern and scene.colours == spotted.colours


RULES: tuple[Rule, ...] = (
    ("single object", lambda scene: scene.task == "one", objects_right),
    ("two objects, both right", lambda scene: scene.task == "two", objects_right),
    ("position of two objects", lambda scene: scene.task == "two" and scene.said is not None, place_right),
    ("place of one object", lambda scene: scene.task == "one" and scene.said in (*EDGES, "middle"), place_right),
    ("size of one object", lambda scene: scene.task == "one" and scene.said in SIZE_LIMITS, place_right),
    ("counts 1 to 4", lambda scene: scene.task in ("one", "count"), number_right),
    ("counting, object and number right", lambda scene: scene.task == "count", objects_right),
    ("three or four objects, all right", lambda scene: scene.task == "many", objects_right),
    ("background, colours and pattern", lambda scene: True, colours_right),
)


def scene_summary(asked: Sequence[SceneQuestion], spotted: Sequence[Spotted], size: int) -> dict[str, dict[str, Any]]:
    """For each rule and part, seen and held out: how many there were, and how many were right."""
    found: dict[str, dict[str, Any]] = {}
    for name, counts, is_right in RULES:
        found[name] = {}
        for part, seen in (("seen", True), ("heldout", False)):
            both = [(q.scene, s) for q, s in zip(asked, spotted, strict=True) if q.seen == seen and counts(q.scene)]
            found[name][part] = {"count": len(both), "right": sum(is_right(scene, s, size) for scene, s in both)}
    return found


def is_failure(question: SceneQuestion, spotted: Spotted, size: int) -> bool:
    """Whether any rule that counts the scene is broken."""
    scene = question.scene
    return not all(is_right(scene, spotted, size) for _, counts, is_right in RULES if counts(scene))


def spotted_text(made_of: SceneSet, spotted: Spotted) -> str:
    """`fox, owl, owl; red, blue stripes`."""
    names = ", ".join(made_of.nouns[one.concept].name for one in spotted.objects) or "nothing"
    return f"{names}; {', '.join(spotted.colours)} {spotted.pattern}"


def scene_table(rows: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Lines of a Markdown table, a line a rule that counts any, a column a row of pictures: per cent with Wilson
    intervals."""
    lines = [f"| {' | '.join(['', *rows])} |", "|---" * (len(rows) + 1) + "|"]
    for name, *_ in RULES:
        if not any(counted["count"] for row in rows.values() for counted in row[name].values()):
            continue
        for part, word in (("seen", "seen"), ("heldout", "held out")):
            cells = [share_text(row[name][part]["right"], row[name][part]["count"]) for row in rows.values()]
            lines.append(f"| {name}, {word} | {' | '.join(cells)} |")
    return lines


def share_text(right: float, count: int) -> str:
    """`87.5 (80.1 to 92.4)` per cent; `-` where nothing was counted."""
    low, high = wilson(right, count)
    return f"{100 * right / count:.1f} ({100 * low:.1f} to {100 * high:.1f})" if count else "-"
