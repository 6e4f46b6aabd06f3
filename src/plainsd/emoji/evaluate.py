"""Score a model that was trained on captioned emoji: is the background right, and is the object right?

Prompts are made from concepts.json, half from training pairs and half from held-out pairs. scorer.py recognizes what
the pictures show, without any learned part, so the font and concepts.json are enough to reproduce the scores.
The same scorer runs on freshly drawn pictures (it must find nearly all) and on those after the VAE's encode and decode
(the most that any denoiser could reach). A concepts.json that describes scenes of more than one emoji is scored as
protocol.py says, by the objects that spotting.py finds.
"""

import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from plainsd import generate
from plainsd.diffusion.samplers import SAMPLERS
from plainsd.emoji import drawing, protocol
from plainsd.emoji.measures import compared
from plainsd.emoji.painting import Painter
from plainsd.emoji.scenes import moved_scene, set_of
from plainsd.emoji.scorer import Score, Scorer
from plainsd.emoji.spotting import Spotter
from plainsd.emoji.tables import framed_sheet, labelled_sheet, score_table, write_file
from plainsd.errors import UserError
from plainsd.pictures.images import to_pil, to_tensor

OnProgress = Callable[[str, int, int], None]  # the row's name, pictures of it scored so far, pictures in all
BATCH = 32  # pictures generated, or sent through the VAE, at once
TAKING_PAIRS = {name for name, sampler in SAMPLERS.items() if "pair" in sampler.takes}  # guided at scale 1 too


# ---- what is asked ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """One prompt and its right answers."""

    prompt: str
    concept: int
    background: str
    seen: bool


def questions(concepts: dict, count: int, seed: int = 0) -> list[Question]:
    """`count` prompts, every other one of a held-out pair, spread over pairs and templates; fixed by the seed. None
    comes twice before every pair has been asked in every template that names the background."""
    table = read_concepts(concepts)
    heldout = {tuple(pair) for pair in concepts["heldout"]}
    pairs = [(i, name) for i in range(len(table)) for name in concepts["backgrounds"]]
    pairs.sort(key=lambda pair: random.Random(f"{seed}:question:{table[pair[0]].name}:{pair[1]}").random())
    kinds = [[p for p in pairs if ((table[p[0]].name, p[1]) in heldout) != seen] for seen in (True, False)]
    if not all(kinds):
        raise UserError("concepts.json has no held-out pairs; make the data with a held-out share above 0")
    templates = [t for t in concepts["templates"] if names_background(t)]
    asked = []
    for k in range(count):
        (rounds, place), known = divmod(k // 2, len(kinds[k % 2])), len(templates)
        concept, background = kinds[k % 2][place]
        prompt = drawing.caption(templates[(place + rounds) % known], table[concept], background)
        asked.append(Question(prompt, concept, background, seen=k % 2 == 0))
    return asked


def read_concepts(concepts: dict) -> list[drawing.Concept]:
    missing = [key for key in ("concepts", "backgrounds", "templates", "heldout", "size") if key not in concepts]
    if missing:
        raise UserError(f"concepts.json lacks {', '.join(missing)}; write it with recipes/emoji/data.py")
    drawing.check_cells(concepts.get("cells"))
    try:
        table = [drawing.Concept(str(entry["name"]), str(entry["character"])) for entry in concepts["concepts"]]
        grounds = list(dict(concepts["backgrounds"]).values())
        templates = [t for t in concepts["templates"] if names_background(t)]
        pairs = [(name, colour) for name, colour in concepts["heldout"]]
        whole = table and templates and all(map(drawing.is_colour, grounds)) and drawing.is_side(concepts["size"])
        names = {one.name for one in table}
        known = all(name in names and colour in concepts["backgrounds"] for name, colour in pairs)
        font = concepts.get("font", {})["sha256"] if "font" in concepts else ""
        for template in templates:
            drawing.caption(template, table[0], next(iter(concepts["backgrounds"])))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration) as error:
        raise UserError(
            f"concepts.json is damaged: {type(error).__name__} {error}; write it with recipes/emoji/data.py"
        ) from error
    if not (whole and known and isinstance(font, str)):
        raise UserError(
            "concepts.json is damaged: it needs emoji, backgrounds of three numbers from 0 to 255, templates that name "
            f"the background, held-out pairs of both, and a size from {drawing.LEAST_SIDE} to {drawing.MOST_SIDE}; "
            "write it with recipes/emoji/data.py"
        )
    return table


def names_background(template: str) -> bool:
    return "{background}" in template or "{ground}" in template


def draw_all(concepts: dict, font: Path | None) -> list[Image.Image]:
    """Every emoji of the set; an error names the first that the font lacks."""
    opened, glyphs = drawing.open_font(font), []
    for concept in read_concepts(concepts):
        glyph = drawing.draw_glyph(opened, concept.character)
        if glyph is None:
            raise UserError(
                f"the font has no picture of {concept.name!r} ({concept.character}); give --font FILE"
                " with the font that concepts.json names"
            )
        glyphs.append(glyph)
    return glyphs


# ---- pictures to score -----------------------------------------------------------------------------------------------


def real_pictures(
    asked: Sequence[Question], glyphs: Sequence[Image.Image], concepts: dict, seed: int, kind: str = "evaluate"
) -> list[Image.Image]:
    """The right answer to each question, drawn as in training but at places and sizes not seen in training, unless all
    are whole cells; other ones for another `kind`."""
    size, pictures = concepts["size"], []
    for k, question in enumerate(asked):
        glyph = glyphs[question.concept]
        place = drawing.random_place(f"{seed}:{kind}:{k}", glyph.size, size, concepts.get("cells"))
        pictures.append(drawing.draw_picture(glyph, tuple(concepts["backgrounds"][question.background]), size, place))
    return pictures


@torch.inference_mode()
def reconstructed(sd: generate.StableDiffusion, pictures: Sequence[Image.Image]) -> Iterable[Image.Image]:
    """Scales to the model's size, as for training; encodes to the mean and decodes."""
    weight, side = next(sd.vae.parameters()), sd.variant.size
    pictures = [to_side(picture, side) for picture in pictures]
    for start in range(0, len(pictures), BATCH):
        pixels = torch.cat([to_tensor(picture) for picture in pictures[start : start + BATCH]]).to(weight)
        yield from to_pil(sd.vae.decode(sd.vae.encode(pixels).mean))


def generated(sd: generate.StableDiffusion, asked: Sequence[Question], seed: int, **options) -> Iterable[Image.Image]:
    """One picture per question; picture k has seed + k whatever the batch."""
    for start in range(0, len(asked), BATCH):
        prompts = [question.prompt for question in asked[start : start + BATCH]]
        yield from generate.final(generate.text_to_image(sd, prompts, seed=seed + start, **options))


def generated_rows(
    sd: generate.StableDiffusion, asked: Sequence[Any], scales: Sequence[float], options: dict[str, Any]
) -> list[Iterable[Image.Image]]:
    """The pictures of all questions, once for each guidance scale."""
    return [generated(sd, asked, guidance=scale, **options) for scale in scales]


DrawRows = Callable[
    [generate.StableDiffusion, Sequence[Any], Sequence[float], dict[str, Any]], Sequence[Iterable[Image.Image]]
]


# ---- the two exams ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exam:
    """Questions, their right answers, and how answers are judged."""

    asked: Sequence[Any]  # of Question or SceneQuestion
    real: list[Image.Image]  # the right answers
    again: list[Image.Image]  # the same with other sizes and places: a second sample of what is right
    judge: Callable[[Image.Image], Any]
    summary: Callable[[Sequence[Any]], dict]
    wrong: Callable[[Any, Any], str]  # of a question and what was judged: what was seen, if wrong


def single_exam(concepts: dict, count: int, seed: int, font: Path | None) -> Exam:
    """Single emoji on flat backgrounds."""
    glyphs, asked = draw_all(concepts, font), questions(concepts, count, seed)
    names = [concept.name for concept in read_concepts(concepts)]

    def wrong(question: Question, score: Score) -> str:
        right = score.objects[0] == question.concept and score.background == question.background
        return "" if right else f"{names[score.objects[0]]}, {score.background}"

    return Exam(
        asked,
        real_pictures(asked, glyphs, concepts, seed),
        real_pictures(asked, glyphs, concepts, seed, "again"),
        Scorer(glyphs, concepts["backgrounds"], concepts["size"], concepts.get("cells")),
        lambda scores: summary(asked, scores),
        wrong,
    )


def has_scenes(concepts: dict) -> bool:
    """Whether a set's pictures show more than one emoji of usual size on one colour."""
    return "scenes" in concepts and not set_of(concepts).single


def asked_of(concepts: dict, count: int, seed: int) -> Sequence[Any]:
    """The questions to a model: scenes, if its set has any, else single emoji."""
    if has_scenes(concepts):
        return protocol.scene_questions(set_of(concepts), count, seed)
    return questions(concepts, count, seed)


def exam_of(concepts: dict, count: int, seed: int, font: Path | None = None) -> Exam:
    return (scene_exam if has_scenes(concepts) else single_exam)(concepts, count, seed, font)


def scene_exam(concepts: dict, count: int, seed: int, font: Path | None) -> Exam:
    made_of, asked = set_of(concepts), asked_of(concepts, count, seed)
    painter = Painter(made_of, font)

    def wrong(question: protocol.SceneQuestion, found: Any) -> str:
        return protocol.spotted_text(made_of, found) if protocol.is_failure(question, found, made_of.size) else ""

    return Exam(
        asked,
        [painter(question.scene) for question in asked],
        [painter(moved_scene(made_of, question.scene, f"again {seed}", k)) for k, question in enumerate(asked)],
        Spotter(painter),
        lambda found: protocol.scene_summary(asked, found, made_of.size),
        wrong,
    )


# ---- the whole -------------------------------------------------------------------------------------------------------


def evaluate(
    sd: generate.StableDiffusion,
    concepts: dict,
    *,
    prompts: int = 1024,
    steps: int = 20,
    guidance: float | None = None,
    seed: int = 0,
    sampler: str | None = None,
    out: Path | None = None,
    font: Path | None = None,
    sheet: Path | None = None,
    about: Mapping[str, Any] | None = None,
    progress: OnProgress = lambda row, done, count: None,
    draw: DrawRows = generated_rows,
) -> dict:
    """Accuracies, 0 to 1: on real pictures (the scorer's ceiling), after the VAE, and of the model without and with
    guidance. Of scenes, the numbers that are right, and the model with guidance alone. Under "quality", how the
    pictures of each row differ from true ones as a whole.

    None takes the variant's default guidance and sampler. With a folder `out`, `scores.json`, `scores.txt` and
    `contact-sheet.png` (of the last row) are written there; `sheet` is a file for the same pictures without prompts.
    `about` is what scores.json says of the model; under "answers" it has each prompt of the last row, whether it was
    right, and what was shown instead. `draw` draws the pictures, as `generated_rows` does.
    """
    if prompts < 2:
        raise UserError(f"prompts is {prompts}; ask for at least 2, one of a seen and one of a held-out pair")
    guidance, side = sd.variant.guidance if guidance is None else guidance, sd.variant.size
    scenes = has_scenes(concepts)
    exam = exam_of(concepts, prompts, seed, font)
    options: dict[str, Any] = {"seed": seed, "steps": steps, "sampler": sampler}
    rows: dict[str, Iterable[Image.Image]] = {
        "real pictures": exam.real,
        "real pictures through the VAE": reconstructed(sd, exam.real),
    }
    plain_sampler = (sampler or sd.variant.sampler) not in TAKING_PAIRS
    off = guidance == 0 or guidance == 1 and plain_sampler
    scales = [0.0] if off else [guidance] if scenes else [0.0, guidance]
    for scale, pictures in zip(scales, draw(sd, exam.asked, scales, options), strict=True):
        rows["generated, no guidance" if scale == 0 else f"generated, guidance {scale:g}"] = pictures
    true, measured, quality = [to_side(picture, side) for picture in exam.real], {}, {}
    for name, pictures in rows.items():
        kept, scores = [], []
        for picture in pictures:
            kept.append(picture)
            scores.append(exam.judge(picture))
            progress(name, len(scores), prompts)
        measured[name] = exam.summary(scores)
        beside = [to_side(picture, side) for picture in exam.again] if name == "real pictures" else kept
        quality[name] = compared(beside, true)
        if name == "real pictures through the VAE":
            quality[name] |= mean_psnr(kept, true, exam.asked)
    used, wanted = drawing.font_identity(font), concepts.get("font", {}).get("sha256")
    wrong = [exam.wrong(question, score) for question, score in zip(exam.asked, scores, strict=True)]
    result = {
        **(about or {}),
        "prompts": prompts,
        "guidance": guidance,
        **options,
        "emoji": len(concepts["concepts"]),
        "font": used,
        "same_font": wanted is None or used["sha256"] == wanted,
        "scenes": scenes,
        "rows": measured,
        "quality": quality,
        "answers": [
            {"prompt": question.prompt, "seen": question.seen, "right": not shown} | ({"shown": shown} if shown else {})
            for question, shown in zip(exam.asked, wrong, strict=True)
        ],
    }
    if out is not None:  # numbers first: pictures may not fit onto the disk
        write_file(score_table(result), Path(out) / "scores.txt")
        write_file(json.dumps(result, indent=1) + "\n", Path(out) / "scores.json")
        labelled = labelled_sheet(kept, [question.prompt for question in exam.asked], wrong, concepts["size"])
        write_file(labelled, Path(out) / "contact-sheet.png")
    if sheet is not None:
        write_file(framed_sheet(kept, [bool(seen) for seen in wrong]), sheet)
    return result


def to_side(picture: Image.Image, side: int) -> Image.Image:
    """Scaled to the model's size, as for training."""
    return picture if picture.width == side else picture.resize((side, side), Image.Resampling.LANCZOS)


def mean_psnr(drawn: Sequence[Image.Image], true: Sequence[Image.Image], asked: Sequence[Any]) -> dict[str, float]:
    """Means of the peak signal to noise ratio in dB, of seen and of held-out combinations; at most 100 a picture."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for one, other, question in zip(drawn, true, asked, strict=True):
        error = (np.asarray(one, np.float64) - np.asarray(other, np.float64)) / 255
        found[question.seen].append(-10 * math.log10(max(float((error**2).mean()), 1e-10)))
    return {name: sum(found[seen]) / len(found[seen]) for name, seen in (("psnr", True), ("heldout_psnr", False))}


def summary(asked: Sequence[Question], scores: Sequence[Score]) -> dict[str, dict[str, float]]:
    """Accuracies on seen pairs and held-out pairs."""
    parts = {}
    for part, seen in (("seen", True), ("heldout", False)):
        both = [(q, s) for q, s in zip(asked, scores, strict=True) if q.seen == seen]
        parts[part] = {
            "count": len(both),
            "background": sum(q.background == s.background for q, s in both) / len(both),
            "top1": sum(q.concept == s.objects[0] for q, s in both) / len(both),
            "top5": sum(q.concept in s.objects[:5] for q, s in both) / len(both),
        }
    return parts
