"""Prints the table of docs/compatibility.md: how far pictures are from those of the program that wrote the settings.

    python bench/compatibility.py --a1111 FOLDER --k-diffusion FOLDER --comfyui FOLDER [--only WORD] [--write]

Each program's own published code draws on a small model with our networks and writes its settings into the picture;
plainsd reads them and draws. A number is the largest difference of any latent, float32, one thread; latents are about
1 in size. The code is not part of this project. The folders are checkouts, which git gets:

    git clone https://github.com/AUTOMATIC1111/stable-diffusion-webui   # then: git checkout 82a973c0 (v1.10.1)
    git clone https://github.com/crowsonkb/k-diffusion                  # then: git checkout ab527a9a, as v1.10.1 has it
    git clone https://github.com/comfyanonymous/ComfyUI                 # then: git checkout 3cd7b32f (after v0.8.0)

They import scipy, torchsde, torchdiffeq, einops, lark and transformers. A folder that is not given leaves its part of
the table out, and says so. --only draws the rows in whose name the word is; --write puts the table into the chapter.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from oracles.comparing import Cell, compared, drawn, small_model, tests_module
from PIL import Image

from plainsd.pictures.settings import Settings
from plainsd.pictures.texts.a1111 import parse_settings

HERE = Path(__file__).parent
CHAPTER = HERE.parent / "docs" / "compatibility.md"
MARKS = "<!-- table: bench/compatibility.py -->", "<!-- end of table -->"
FOLDERS = {
    "a1111": "AUTOMATIC1111/stable-diffusion-webui",
    "k_diffusion": "crowsonkb/k-diffusion",
    "comfyui": "ComfyUI",
}


# --- A1111 -----------------------------------------------------------------------------------------------------------

PICTURE = tests_module().smooth_picture(64)
A1111_BASE: dict[str, Any] = {
    "prompt": "a red apple on a (blue:1.2) table",
    "negative_prompt": "blurred",
    "seed": 3,
    "steps": 7,
    "width": 64,
    "height": 64,
    "cfg_scale": 5,
    "options": {"randn_source": "CPU"},
}
EDITED = "a [red:green:0.4] apple AND [a pear|a plum] on ((wood)):0.7"
LONG = "a red apple, " * 12 + "[cut] in two BREAK on wood"
A1111_TASKS: dict[str, dict[str, Any]] = {
    "text to image": {},
    "image to image": {"image": PICTURE, "denoising_strength": 0.6},
    "hires": {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.6},
    "variation": {"subseed": 5, "subseed_strength": 0.3},
    "edited prompt": {"prompt": EDITED},
    "long prompt": {"prompt": LONG},
    "two at once": {"batch_size": 2},
    "NV noise": {"options": {"randn_source": "NV"}},
    "ENSD": {"options": {"randn_source": "CPU", "eta_noise_seed_delta": 31337}},
}


def a1111_cells(folders: dict[str, Path], only: str) -> Iterator[Cell]:
    """Every sampler with every schedule, text to image; then every sampler with every task, at its own schedule."""
    from oracles.a1111 import A1111

    sd = small_model()
    program = A1111(folders["a1111"], folders["k_diffusion"], sd)
    schedules = [scheduler.label for scheduler in program.schedulers]

    def cell(table: str, sampler: str, column: str, **choices: Any) -> Cell:
        image = choices.pop("image", None)
        count = choices.get("batch_size", 1)
        choices = A1111_BASE | {"sampler_name": sampler} | choices
        return compared(
            (table, sampler, column),
            lambda: program.draw(image, **choices),
            lambda: drawn(sd, parse_settings(program.text), image, count),
        )

    for sampler in (entry.name for entry in program.samplers.all_samplers):
        if only in sampler:
            for schedule in schedules:
                yield cell("A1111: schedules", sampler, schedule, scheduler=schedule)
            for task, choices in A1111_TASKS.items():
                yield cell("A1111: tasks", sampler, task, scheduler="Automatic", **choices)


# --- ComfyUI ---------------------------------------------------------------------------------------------------------

COMFY_BASE: dict[str, Any] = {"negative": "blurred", "seed": 3, "steps": 7, "cfg": 5.0, "scheduler": "normal"}
COMFY_PROMPT = "a red apple on a (blue:1.2) table"
COMFY_TASKS: dict[str, dict[str, Any]] = {
    "text to image": {},
    "image to image": {"image": PICTURE, "denoise": 0.6},
    "weights": {"prompt": "a ((red)) apple, (on (a table:0.5):1.5) \\(wood\\)"},
    "long prompt": {"prompt": "a (red:1.3) apple, " * 12},
    "two at once": {"count": 2},
}
COMFY_NAMES = {  # where ours differ
    "euler_ancestral": "euler_a", "euler_ancestral_cfg_pp": "euler_a_cfg_pp", "dpm_2": "dpm2",
    "dpm_2_ancestral": "dpm2_a", "dpmpp_2s_ancestral": "dpmpp_2s_a", "res_multistep_ancestral": "res_multistep_a",
    "uni_pc": "unipc", "uni_pc_bh2": "unipc_bh2", "normal": "uniform",
    **{f"{name}_gpu": name for name in ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde")},
}  # fmt: skip


def comfyui_cells(folders: dict[str, Path], only: str) -> Iterator[Cell]:
    """Every sampler with every scheduler, text to image; then every sampler with every task."""
    from oracles.comfyui import ComfyUI

    sd = small_model()
    program = ComfyUI(folders["comfyui"], sd)

    def cell(table: str, sampler: str, column: str, image: Image.Image | None = None, **choices: Any) -> Cell:
        choices = COMFY_BASE | {"prompt": COMFY_PROMPT} | choices
        count, strength = choices.pop("count", 1), choices.get("denoise", 1.0)
        ours = Settings(
            prompt=choices["prompt"],
            negative=choices["negative"],
            seed=choices["seed"],
            steps=choices["steps"],
            guidance=choices["cfg"],
            sampler=COMFY_NAMES.get(sampler, sampler),
            spacing=COMFY_NAMES.get(choices["scheduler"], choices["scheduler"]),
            strength=strength if image else None,
            size=(64, 64),
            like="comfyui",
        )
        return compared(
            (table, sampler, column),
            lambda: program.draw(sampler=sampler, latent=program.latent(image, (64, 64), count), **choices),
            lambda: drawn(sd, ours, image, count),
        )

    for sampler in program.comfy.samplers.SAMPLER_NAMES:
        if only in sampler:
            for scheduler in program.comfy.samplers.SCHEDULER_NAMES:
                yield cell("ComfyUI: schedulers", sampler, scheduler, scheduler=scheduler)
            for task, choices in COMFY_TASKS.items():
                yield cell("ComfyUI: tasks", sampler, task, **choices)


# --- diffusers -------------------------------------------------------------------------------------------------------


def diffusers_cells(folders: dict[str, Path], only: str) -> Iterator[Cell]:
    """Every sampler with every spacing that its scheduler has, text to image and image to image."""
    from oracles.pipelines import SAMPLERS, SPACINGS, UNSPACED, Pipelines

    sd = small_model()
    program = Pipelines(sd)
    drawing = {"prompt": "a red apple", "negative": "blurred", "seed": 3}
    for sampler in (name for name in SAMPLERS if only in name):
        for spacing in list(SPACINGS)[: 3 if sampler in UNSPACED else None]:
            for table, image, strength in (("text to image", None, None), ("image to image", PICTURE, 0.6)):
                ours = Settings(
                    **drawing,
                    steps=7,
                    guidance=5.0,
                    sampler=sampler,
                    spacing=spacing,
                    strength=strength,
                    size=None if image else (64, 64),
                )
                more = {"num_inference_steps": 7, "guidance_scale": 5.0} | ({"strength": strength} if image else {})
                yield compared(
                    (f"diffusers: {table}", sampler, spacing),
                    lambda: program.draw(**drawing, sampler=sampler, spacing=spacing, image=image, **more),
                    lambda: drawn(sd, ours, image),
                )


# --- the table -------------------------------------------------------------------------------------------------------

PARTS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Path], str], Iterator[Cell]]]] = {
    "diffusers": ((), diffusers_cells),  # first: it looks for packages for which others bring stand-ins
    "A1111": (("a1111", "k_diffusion"), a1111_cells),
    "ComfyUI": (("comfyui",), comfyui_cells),
}


def cells(folders: dict[str, Path], only: str = "") -> Iterator[Cell]:
    """Of all programs whose folders are there. One line is said for each that is not."""
    for program, (needed, part) in PARTS.items():
        if missing := [name for name in needed if name not in folders]:
            flags = " and ".join(f"--{name.replace('_', '-')} FOLDER" for name in missing)
            print(f"{program}: left out; give {flags}", file=sys.stderr)
            continue
        yield from part(folders, only)


def tables(found: list[Cell]) -> str:
    """Markdown: a table for each kind, its rows and columns in the order in which they came."""
    texts = []
    for table in dict.fromkeys(cell.table for cell in found):
        mine = {(cell.row, cell.column): cell for cell in found if cell.table == table}
        columns = list(dict.fromkeys(column for _, column in mine))
        lines = [f"| {table} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for row in dict.fromkeys(row for row, _ in mine):
            entries = [written(mine.get((row, column))) for column in columns]
            lines.append(f"| {row} | {' | '.join(entries)} |")
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def reasons(found: list[Cell]) -> list[str]:
    """Why some cells have no number: a line for each reason, with the first cell that has it, and how many have."""
    lines = []
    for why in dict.fromkeys(cell.why for cell in found if cell.why):
        first, *rest = [cell for cell in found if cell.why == why]
        more = f" and {len(rest)} more" if rest else ""
        lines.append(f"{first.table}, {first.row}, {first.column}{more}: {why}")
    return lines


def written(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if cell.error is None:
        return "—"
    return f"{cell.error:.0e}" if cell.error else "0"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in FOLDERS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path, metavar="FOLDER", help=f"a checkout of {what}")
    parser.add_argument("--only", default="", metavar="WORD", help="rows in whose name it is")
    parser.add_argument("--write", action="store_true", help=f"put the table into {CHAPTER.name}")
    given = vars(parser.parse_args())
    folders = {name: given[name].resolve() for name in FOLDERS if given[name]}
    torch.set_num_threads(1)
    found = list(cells(folders, given["only"]))
    text = tables(found)
    print(*reasons(found), sep="\n", file=sys.stderr)
    if given["write"]:
        before, _, rest = CHAPTER.read_text("utf-8").partition(MARKS[0])
        CHAPTER.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}", "utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
