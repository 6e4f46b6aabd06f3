"""What an evaluation prints and draws: tables in Markdown, and sheets of pictures."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from plainsd.disk import written_whole
from plainsd.emoji.measures import wilson
from plainsd.emoji.protocol import scene_table
from plainsd.pictures.images import write_png

FRAME = 3  # pixels
PARTS = ("seen", "heldout")
ENOUGH = 56  # pictures, two for each of the features of FD and KID


def score_table(result: dict) -> str:
    """The scores as Markdown tables, in per cent."""
    sampler = result["sampler"] or "the model's own sampler"
    if result["scenes"]:
        head = (
            f"{result['prompts']} prompts of scenes, {result['emoji']} emoji, {result['steps']} steps of {sampler}, "
            f"guidance {result['guidance']:g}, seed {result['seed']}; per cent right, with 95 % intervals"
        )
        return "\n".join([head, "", *scene_table(result["rows"]), *quality_lines(result)]) + "\n"
    lines = [
        f"{result['prompts']} prompts, {result['emoji']} emoji, {result['steps']} steps of {sampler}, "
        f"seed {result['seed']}; per cent right, seen pairs / held-out pairs",
        "",
        "| pictures | background | object, top 1 | object, top 5 |",
        "|---|---|---|---|",
    ]
    for name, parts in result["rows"].items():
        cells = [
            " / ".join(f"{100 * parts[part][key]:.1f}" for part in PARTS) for key in ("background", "top1", "top5")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [*interval_lines(result), *quality_lines(result)]
    if not result["same_font"]:
        lines += ["", "The font here is not the file that the model was trained on: its drawings may differ."]
    return "\n".join(lines) + "\n"


def interval_lines(result: dict) -> list[str]:
    """Wilson's 95 % intervals of every share of the first table."""
    lines = ["", "| 95 % intervals | background | object, top 1 | object, top 5 |", "|---|---|---|---|"]
    for name, parts in result["rows"].items():
        cells = []
        for key in ("background", "top1", "top5"):
            ends = [wilson(parts[part][key] * parts[part]["count"], parts[part]["count"]) for part in PARTS]
            cells.append(" / ".join(f"{100 * low:.1f} to {100 * high:.1f}" for low, high in ends))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def quality_lines(result: dict) -> list[str]:
    """How the pictures of each row differ from true ones."""
    lines = [
        "",
        "Sharpness (gradient energy, drawn / true), Frechet distance (FD) and KID of fixed features (plainsd.emoji."
        "measures), beside true pictures of the same prompts. The first row is a second sample of true pictures: what "
        "chance gives.",
        "",
        "| pictures | sharpness | FD | KID | PSNR in dB, seen / held out |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["quality"].items():
        psnr = f"{row['psnr']:.2f} / {row['heldout_psnr']:.2f}" if "psnr" in row else ""
        distances = f"{row['fd']:.2f} | {row['kid']:.4f}" if result["prompts"] >= ENOUGH else "- | -"
        lines.append(f"| {name} | {row['sharpness']:.3f} | {distances} | {psnr} |")
    if result["prompts"] < ENOUGH:
        lines += ["", f"FD and KID say nothing of fewer than {ENOUGH} pictures; give more prompts."]
    return lines


# ---- sheets ----------------------------------------------------------------------------------------------------------


def labelled_sheet(
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    wrong: Sequence[str],
    size: int,
    columns: int = 8,
    most: int = 64,
) -> Image.Image:
    """The first pictures with their prompts, and below, in red, what is seen in those that are wrong."""
    font, pictures, side = ImageFont.load_default(11), pictures[:most], max(128, size)
    cell_width, cell_height = side + 12, side + 48
    sheet = Image.new("RGB", (columns * cell_width, math.ceil(len(pictures) / columns) * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (picture, prompt, seen) in enumerate(zip(pictures, prompts, wrong, strict=False)):
        left, top = k % columns * cell_width + 6, k // columns * cell_height + 4
        sheet.paste(picture.resize((side, side)), (left, top))
        lines = wrapped(prompt, font, side)
        draw.multiline_text((left, top + side + 2), "\n".join(lines[:2]), "black", font, spacing=2)
        if seen:
            draw.text((left, top + side + 29), wrapped(seen, font, side)[0], "red", font)
    return sheet


def framed_sheet(
    pictures: Sequence[Image.Image], failures: Sequence[bool], columns: int = 8, most: int = 64
) -> Image.Image:
    """The first pictures at their own size, each in a frame of FRAME pixels, red around a failure."""
    cell = pictures[0].width + 2 * FRAME
    rows = math.ceil(min(most, len(pictures)) / columns)
    sheet = Image.new("RGB", (columns * cell, rows * cell), "white")
    for k, (picture, failed) in enumerate(zip(pictures[:most], failures, strict=False)):
        left, top = k % columns * cell, k // columns * cell
        if failed:
            sheet.paste("red", (left, top, left + cell, top + cell))
        sheet.paste(picture, (left + FRAME, top + FRAME))
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
