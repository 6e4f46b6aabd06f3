"""Score a model that was trained on captioned emoji: is the background right, and is the object right?

Prompts are made from concepts.json, half from training pairs and half from held-out pairs. scorer.py recognizes what
the pictures show, without any learned part, so the font and concepts.json are enough to reproduce the scores.
The same scorer runs on freshly drawn pictures (it must find nearly all) and on those after the VAE's encode and decode
(the most that any denoiser could reach).
"""

import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from plainsd import generate
from plainsd.disk import written_whole
from plainsd.emoji import drawing
from plainsd.emoji.scorer import Score, Scorer
from plainsd.errors import UserError
from plainsd.pictures.images import to_pil, to_tensor, write_png

OnProgress = Callable[[str, int, int], None]  # the row's name, pictures of it scored so far, pictures in all
BATCH = 32  # pictures generated, or sent through the VAE, at once


# ---- what is asked ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """One prompt and its right answers."""

    prompt: str
    concept: int
    background: str
    seen: bool


def questions(concepts: dict, count: int, seed: int = 0) -> list[Question]:
    """`count` prompts, every other one of a held-out pair, spread over pairs and templates; fixed by the seed."""
    table = read_concepts(concepts)
    heldout = {tuple(pair) for pair in concepts["heldout"]}
    pairs = [(i, name) for i in range(len(table)) for name in concepts["backgrounds"]]
    pairs.sort(key=lambda pair: random.Random(f"{seed}:question:{table[pair[0]].name}:{pair[1]}").random())
    kinds = [[p for p in pairs if ((table[p[0]].name, p[1]) in heldout) != seen] for seen in (True, False)]
    if not all(kinds):
        raise UserError("concepts.json has no held-out pairs; make the data with a held-out share above 0")
    templates = [t for t in concepts["templates"] if "{background}" in t or "{ground}" in t]
    asked = []
    for k in range(count):
        concept, background = kinds[k % 2][k // 2 % len(kinds[k % 2])]
        prompt = drawing.caption(templates[k // 2 % len(templates)], table[concept], background)
        asked.append(Question(prompt, concept, background, seen=k % 2 == 0))
    return asked


def read_concepts(concepts: dict) -> list[drawing.Concept]:
    missing = [key for key in ("concepts", "backgrounds", "templates", "heldout", "size") if key not in concepts]
    if missing:
        raise UserError(f"concepts.json lacks {', '.join(missing)}; write it with recipes/emoji/data.py")
    return [drawing.Concept(entry["name"], entry["character"]) for entry in concepts["concepts"]]


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
    asked: Sequence[Question], glyphs: Sequence[Image.Image], concepts: dict, seed: int
) -> list[Image.Image]:
    """The right answer to each question, drawn as in training but at places and sizes not seen in training."""
    size, pictures = concepts["size"], []
    for k, question in enumerate(asked):
        glyph = glyphs[question.concept]
        place = drawing.random_place(f"{seed}:evaluate:{k}", glyph.size, size)
        pictures.append(drawing.draw_picture(glyph, tuple(concepts["backgrounds"][question.background]), size, place))
    return pictures


@torch.inference_mode()
def reconstructed(sd: generate.StableDiffusion, pictures: Sequence[Image.Image]) -> Iterable[Image.Image]:
    """Scales to the model's size, as for training; encodes to the mean and decodes."""
    weight, side = next(sd.vae.parameters()), sd.variant.size
    pictures = [picture.resize((side, side), Image.Resampling.LANCZOS) for picture in pictures]
    for start in range(0, len(pictures), BATCH):
        pixels = torch.cat([to_tensor(picture) for picture in pictures[start : start + BATCH]]).to(weight)
        yield from to_pil(sd.vae.decode(sd.vae.encode(pixels).mean))


def generated(sd: generate.StableDiffusion, asked: Sequence[Question], seed: int, **options) -> Iterable[Image.Image]:
    """One picture per question; picture k has seed + k whatever the batch."""
    for start in range(0, len(asked), BATCH):
        prompts = [question.prompt for question in asked[start : start + BATCH]]
        yield from generate.final(generate.text_to_image(sd, prompts, seed=seed + start, **options))


# ---- the whole -------------------------------------------------------------------------------------------------------


def evaluate(
    sd: generate.StableDiffusion,
    concepts: dict,
    *,
    prompts: int = 512,
    steps: int = 20,
    guidance: float | None = None,
    seed: int = 0,
    sampler: str | None = None,
    out: Path | None = None,
    font: Path | None = None,
    progress: OnProgress = lambda row, done, count: None,
) -> dict:
    """Accuracies, 0 to 1: on real pictures (the scorer's ceiling), after the VAE, and of the model without and with
    guidance.

    None takes the variant's default guidance and sampler. With a folder `out`, `scores.json`, `scores.txt` and
    `contact-sheet.png` (of the last row) are written there.
    """
    if prompts < 2:
        raise UserError(f"prompts is {prompts}; ask for at least 2, one of a seen and one of a held-out pair")
    guidance = sd.variant.guidance if guidance is None else guidance
    glyphs = draw_all(concepts, font)
    asked = questions(concepts, prompts, seed)
    real = real_pictures(asked, glyphs, concepts, seed)
    options: dict[str, Any] = {"seed": seed, "steps": steps, "sampler": sampler}
    rows: dict[str, Iterable[Image.Image]] = {
        "real pictures": real,
        "real pictures through the VAE": reconstructed(sd, real),
        "generated, no guidance": generated(sd, asked, guidance=1.0, **options),
    }
    if guidance not in (0, 1):
        rows[f"generated, guidance {guidance:g}"] = generated(sd, asked, guidance=guidance, **options)
    scorer, measured = Scorer(glyphs, concepts["backgrounds"], concepts["size"]), {}
    for name, pictures in rows.items():
        kept, scores = [], []
        for picture in pictures:
            kept.append(picture)
            scores.append(scorer(picture))
            progress(name, len(scores), prompts)
        measured[name] = summary(asked, scores)
    used = drawing.font_identity(font)
    result = {
        "prompts": prompts,
        "guidance": guidance,
        **options,
        "emoji": len(glyphs),
        "font": used,
        "same_font": used["sha256"] == concepts.get("font", {}).get("sha256"),
        "rows": measured,
    }
    if out is not None:
        write_file(contact_sheet(kept, asked, scores, concepts), Path(out) / "contact-sheet.png")
        write_file(json.dumps(result, indent=1) + "\n", Path(out) / "scores.json")
        write_file(score_table(result), Path(out) / "scores.txt")
    return result


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


def score_table(result: dict) -> str:
    """The scores as a Markdown table, in per cent."""
    sampler = result["sampler"] or "the model's own sampler"
    lines = [
        f"{result['prompts']} prompts, {result['emoji']} emoji, {result['steps']} steps of {sampler}, "
        f"seed {result['seed']}; per cent right, seen pairs / held-out pairs",
        "",
        "| pictures | background | object, top 1 | object, top 5 |",
        "|---|---|---|---|",
    ]
    for name, parts in result["rows"].items():
        cells = [
            " / ".join(f"{100 * parts[part][key]:.1f}" for part in ("seen", "heldout"))
            for key in ("background", "top1", "top5")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if not result["same_font"]:
        lines += ["", "The font here is not the file that the model was trained on: its drawings may differ."]
    return "\n".join(lines) + "\n"


def contact_sheet(
    pictures: Sequence[Image.Image],
    asked: Sequence[Question],
    scores: Sequence[Score],
    concepts: dict,
    columns: int = 8,
    most: int = 64,
) -> Image.Image:
    """The first pictures with their prompts; under a wrong one, in red, what the scorer saw."""
    names, font = [concept.name for concept in read_concepts(concepts)], ImageFont.load_default(11)
    pictures, side = pictures[:most], max(128, concepts["size"])
    cell_width, cell_height = side + 12, side + 48
    sheet = Image.new("RGB", (columns * cell_width, math.ceil(len(pictures) / columns) * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (picture, question, score) in enumerate(zip(pictures, asked, scores, strict=False)):
        left, top = k % columns * cell_width + 6, k // columns * cell_height + 4
        sheet.paste(picture.resize((side, side)), (left, top))
        wrong = score.objects[0] != question.concept or score.background != question.background
        lines = wrapped(question.prompt, font, side)
        draw.multiline_text((left, top + side + 2), "\n".join(lines[:2]), "black", font, spacing=2)
        if wrong:
            seen = f"{names[score.objects[0]]}, {score.background}"
            draw.text((left, top + side + 29), wrapped(seen, font, side)[0], "red", font)
    return sheet


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The text wrapped to a width in pixels."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def write_file(content: str | Image.Image, path: Path) -> None:
    """Writes a text or a PNG atomically."""
    if isinstance(content, Image.Image):
        write_png(content, path)
    else:
        with written_whole(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
