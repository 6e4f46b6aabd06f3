"""Captions of scenes, by a small grammar: `a small owl on a red background with blue dots`.

    caption   "SUBJECT on GROUND", "SUBJECT, GROUND", ...
    subject   what is there, and as far as the scene says it, where, how large, how many
    ground    the background's colours and pattern

A scene has four captions. The first says everything in one fixed form, with the emoji's own names; the others draw
their form and synonyms from a stream of their own, and the last leaves the background out.
"""

import random
from collections.abc import Container, Sequence

from plainsd.emoji.drawing import with_article
from plainsd.emoji.scenes import RELATIONS, DrawNumber, Scene, SceneSet
from plainsd.emoji.words import COUNT_WORDS, phrase_of, plural_of

FORMS = ("{subject} on {ground}", "{subject}, {ground}", "a picture of {subject} on {ground}")
PLAIN_FORMS = ("{ground} with {subject}",)  # of backgrounds of one colour
FORMS_OF_ONE = (  # of an object whose place and size are left open; {name} has no article
    "{subject} emoji on {ground}",
    "an emoji of {subject} on {ground}",
    "{name} on {ground}",
    "{name}, {ground}",
)
GROUNDS = {  # {a}, {b}: the colours; {article}: the first one with its article
    "plain": ("{article} background", "{a}", "{a} background"),
    "gradient": ("a gradient from {a} to {b}", "{article} to {b} gradient"),
    "stripes": ("{a} and {b} stripes", "a background of {a} and {b} stripes"),
    "dots": ("{article} background with {b} dots", "{a} with {b} dots"),
}
WHERE = {
    "left": ("on the left",),
    "right": ("on the right",),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "middle": ("in the middle", "in the centre"),
}
ADJECTIVES = {"small": ("small", "little", "tiny"), "big": ("big", "large", "huge")}
BETWEEN = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}


def captions_of(made_of: SceneSet, scene: Scene, kind: str, index: int) -> tuple[str, str, str, str]:
    """The captions of scene `index` of a kind: a pure function of (seed, kind, index)."""
    names = [made_of.nouns[one.concept].name for one in scene.objects]
    full = FORMS[0].format(subject=subject_of(scene, names, words=made_of.words), ground=ground_of(scene))
    draw = random.Random(f"{made_of.seed}:{kind}:{index}:captions").random
    return (
        full,
        free_caption(made_of, scene, draw),
        free_caption(made_of, scene, draw),
        free_subject(made_of, scene, draw),
    )


def free_caption(made_of: SceneSet, scene: Scene, draw: DrawNumber) -> str:
    forms = FORMS + (PLAIN_FORMS if scene.pattern == "plain" else ())
    forms += FORMS_OF_ONE if scene.task == "one" and not scene.said else ()
    names = free_names(made_of, scene, draw)
    subject = subject_of(scene, names, draw, made_of.words)
    return chosen(forms, draw).format(subject=subject, name=names[0], ground=ground_of(scene, draw))


def free_subject(made_of: SceneSet, scene: Scene, draw: DrawNumber) -> str:
    return subject_of(scene, free_names(made_of, scene, draw), draw, made_of.words)


def free_names(made_of: SceneSet, scene: Scene, draw: DrawNumber) -> list[str]:
    """Any of each object's names; of objects of the same kind, one."""
    objects = scene.objects[:1] if scene.task == "count" else scene.objects
    nouns = [made_of.nouns[one.concept] for one in objects]
    return [chosen((noun.name, *noun.synonyms), draw) for noun in nouns]


def subject_of(scene: Scene, names: Sequence[str], draw: DrawNumber | None = None, words: Container[str] = ()) -> str:
    """`names` of the objects. Without `draw`, in the first form. `words`: what emoji are called, so that none of them
    comes out by an adjective: a little airplane, where there is a `small airplane`."""
    if scene.task == "count":
        number = len(scene.objects)
        return f"{chosen((COUNT_WORDS[number], str(number)), draw)} {plural_of(names[0])}"
    if scene.task == "one" and scene.said in ADJECTIVES:
        clear = [word for word in ADJECTIVES[scene.said] if f"{word} {names[0]}" not in words]
        return phrase_of(names[0], chosen(clear or ADJECTIVES[scene.said], draw))
    phrases = [phrase_of(name) for name in names]
    if scene.task == "one":
        return f"{phrases[0]} {chosen(WHERE[scene.said], draw)}" if scene.said else phrases[0]
    said = scene.said
    if draw is not None and scene.task == "two" and draw() < 0.5:  # the same from the other one's side
        phrases.reverse()
        said = RELATIONS[said] if said else None
    if said:
        return f"{phrases[0]} {chosen(BETWEEN[said], draw)} {phrases[1]}"
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def ground_of(scene: Scene, draw: DrawNumber | None = None) -> str:
    a, b = scene.colours[0], scene.colours[-1]
    return chosen(GROUNDS[scene.pattern], draw).format(a=a, b=b, article=with_article(a))


def chosen(forms: Sequence[str], draw: DrawNumber | None) -> str:
    """One of them; without `draw` the first."""
    return forms[int(draw() * len(forms))] if draw else forms[0]
