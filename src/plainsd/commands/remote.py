"""`plainsd generate --server URL`: the same command, run by a server. The pictures are written on this machine."""

from __future__ import annotations

import base64
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plainsd.commands.control import asked_controls, check_control_flags
from plainsd.commands.flags import GenerateFlags
from plainsd.commands.image_prompt import asked_image_prompts, check_image_prompt_flags
from plainsd.commands.recorded import NOISE, words_in
from plainsd.commands.tasks import drop_idle_strength
from plainsd.commands.texts import TEXTS_BESIDE
from plainsd.errors import UserError
from plainsd.listing import suffix_of
from plainsd.pictures.settings import ControlNote, ImagePromptNote, Settings
from plainsd.server.client import Busy, Finished, Lost, Progress, Remote, cancelling
from plainsd.text.prompts import LORA_TAG, LoraTag, tagged_loras

if TYPE_CHECKING:
    from plainsd.commands.output import Target

AHEAD = 4  # jobs in flight, so that the server can batch them
MOST_WAITS, LONGEST_WAIT = 20, 60.0  # for room in the server's queue, or its restart, and the seconds of each
PREVIEW_SCALE, SMALL_PREVIEW = 8, 256  # previews with sides below 256 pixels are enlarged 8 times
NOT_SENT = (
    "vae",
    "preview_vae",
    "prediction",
    "zero_snr",
    "lora_folder",
    "lora_partial",
    "device",
    "dtype",
    "plain",
    "compile",
    "int8",
    "low_memory",
    "batch",
    "ray",
)
NOT_FIELDS = (
    "embeddings",
    "masked",
    "vae",
    "hashes",
    "other",
    "control",
    "image_prompt",
    *NOISE,
)  # recorded settings that a job has no field for
EMBEDDING_SUFFIXES = (".safetensors", ".pt", ".bin")
CHOICE_SIGNS = re.compile("[{}]|__")
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".bin")


def generate_remotely(
    command: GenerateFlags, prompts: list[str], choices: dict[str, Any], each: list[dict[str, str]]
) -> None:
    """Sends the prompts and settings of `Generate.prompts_and_choices` as jobs, and writes the pictures."""
    from plainsd.commands.output import Target, check_writable

    assert command.server is not None
    check_sent(command, choices)
    jobs = list(jobs_of(command, prompts, choices, each))
    target, remote = Target(command.out, command.format), Remote(command.server, os.environ.get("PLAINSD_TOKEN"))
    if command.preview:
        check_writable(command.preview.parent)
    began, written = time.perf_counter(), 0
    for pictures in remote_pictures(remote, jobs, command.preview):
        if command.grid:
            pictures = pictures[-1:]  # the sheet; its pictures stay in the server's gallery
        for picture in pictures:
            print(write_picture(target, picture, is_sheet=bool(command.grid)))
            written += 1
    print(f"{written} picture{'s' * (written > 1)} in {time.perf_counter() - began:.1f} s from {remote.url}",
          file=sys.stderr)  # fmt: skip


# --- requests --------------------------------------------------------------------------------------------------------


def check_sent(command: GenerateFlags, choices: dict[str, Any]) -> None:
    """UserError for flags and recorded settings that a server does not take."""
    for name in NOT_SENT:
        if getattr(command, name) != getattr(type(command), name):
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} does not go with --server; leave one of them out", field=name)
    if found := [name for name in NOISE if name in choices]:
        flag = f"--{found[0].replace('_', '-')}"
        raise UserError(f"'{command.from_}' was made with {flag}, which a server takes only when it is started; leave "
                        "--server out", field=found[0], value=choices[found[0]])  # fmt: skip
    if choices.get("vae"):
        raise UserError(f"'{command.from_}' was made with the VAE {choices['vae']!r}, which cannot be sent to a "
                        "server; leave --server out", field="vae", value=choices["vae"])  # fmt: skip
    if choices.get("masked") and command.mask is None:
        raise UserError(
            f"'{command.from_}' was made with a mask; give picture and mask with --image and --mask", field="mask"
        )


def jobs_of(
    command: GenerateFlags, prompts: list[str], choices: dict[str, Any], each: list[dict[str, str]]
) -> Iterator[dict[str, Any]]:
    """The bodies of POST /api/jobs, one for neighbours of the same texts. Seeds increase from picture to picture, as
    without a server."""
    from plainsd.commands.adapters import from_flag
    from plainsd.commands.grid import axis

    choices = dict(choices)
    drop_idle_strength(command, choices)
    shared = {name: value for name, value in choices.items() if name not in NOT_FIELDS}
    for name in ("model", "refiner", "outpaint"):
        shared[name] = getattr(command, name) or choices.get(name)
    for name, path in (("image", command.image), ("mask", command.mask)):
        if path is not None:
            shared[name] = encoded_file(path)
    shared["controls"] = list(control_fields(command, choices.get("control", ())))
    shared["image_prompts"] = list(image_prompt_fields(command, choices.get("image_prompt", ())))
    loras = [from_flag(text) for text in command.lora]
    recorded = words_in([*prompts, *map(choices.get, TEXTS_BESIDE)], choices.get("embeddings", ()))
    shared["embeddings"] = [*dict.fromkeys([*map(embedding_of, command.embedding), *recorded])]
    axes = [axis(text) for text in command.grid]
    if axes:
        shared["grid"] = [{"name": one.name, "values": one.values} for one in axes]
    counted = Settings(**choices).counted
    shared, first = {"seed": 0} | shared, choices.get(counted) or 0
    if counted == "batch_index":
        shared = {"batch_size": first + len(prompts)} | shared
    own = ({**beside, **prompt_and_loras(prompt, loras)} for prompt, beside in zip(prompts, each, strict=True))
    for fields, group in groupby(own):
        count = len(list(group))
        yield shared | fields | settled_in(fields) | {"count": count, counted: first}
        first += count


def settled_in(fields: dict[str, Any]) -> dict[str, Any]:
    """`settled` of POST /api/jobs: choices have been made here, and what looks like one is text."""
    names = [name for name in ("prompt", *TEXTS_BESIDE) if CHOICE_SIGNS.search(fields.get(name, ""))]
    return {"settled": names} if names else {}  # which older servers do not know


def prompt_and_loras(prompt: str, loras: Sequence[tuple[Path, float | None]]) -> dict[str, Any]:
    """`prompt` and `loras` of POST /api/jobs. As without a server, a LoRA of --lora has the strength of the flag, or
    else those of its tags in the prompt, which are taken out."""
    from plainsd.commands.adapters import flag_strengths

    names = [path.stem if suffix_of(path) == ".safetensors" else str(path) for path, _ in loras]
    tags: list[tuple[list[int], LoraTag]] = []

    def kept(found: re.Match[str]) -> str:
        _, (tag,) = tagged_loras(found[0])
        indices = [index for index, name in enumerate(names) if Path(name).name == Path(tag.name).name]
        indices = indices or called_so([path for path, _ in loras], tag.name)
        tags.extend([(indices, tag)] if indices else [])
        return "" if indices else found[0]

    text = LORA_TAG.sub(kept, prompt)
    fields = []
    for index, one in flag_strengths([number for _, number in loras], tags):
        own = {} if one.text_strength == one.strength else {"text_strength": one.text_strength}
        fields.append({"name": names[index], "strength": one.strength, **own})
    return {"prompt": text if text == prompt else text.rstrip(), "loras": fields}


def called_so(paths: Sequence[Path], alias: str) -> list[int]:
    """The indices of the LoRA that its trainer called so, where the files are on this machine."""
    if not any(path.exists() for path in paths):
        return []
    from plainsd.adapters.reading import lora_of_alias

    found = lora_of_alias(paths, alias)
    return [index for index, path in enumerate(paths) if path == found]


def control_fields(command: GenerateFlags, recorded: Sequence[ControlNote]) -> Iterator[dict[str, Any]]:
    """`controls` of POST /api/jobs. The server finds a net by the name of its file or folder."""
    check_control_flags(command, recorded)
    for path, map, note in asked_controls(command, recorded):
        yield {
            "name": name_there(path), "image": None if map is None else encoded_file(map), "preprocess": note.module,
            "strength": note.weight, "start": note.start, "end": note.end, "guess": note.guess, "mode": note.mode,
            "kind": list(note.kinds), "resolution": note.resolution, "resize": note.resize,
            **(dict(zip(("low", "high"), note.thresholds, strict=True)) if note.thresholds else {}),
        }  # fmt: skip


def image_prompt_fields(command: GenerateFlags, recorded: Sequence[ImagePromptNote]) -> Iterator[dict[str, Any]]:
    """`image_prompts` of POST /api/jobs, likewise."""
    check_image_prompt_flags(command, recorded)
    for asked in asked_image_prompts(command, recorded):
        yield {
            "name": name_there(asked.path), "images": [encoded_file(path) for path in asked.images],
            "masks": [encoded_file(path) for path in asked.masks], "strength": asked.note.weight,
            "start": asked.note.start, "end": asked.note.end,
            "encoder": name_there(asked.encoder) if asked.encoder else None,
        }  # fmt: skip


def name_there(path: Path) -> str:
    """`nets/canny.safetensors` -> canny, a folder's own name."""
    return path.stem if suffix_of(path) in WEIGHT_SUFFIXES else path.name


def encoded_file(path: Path) -> str:
    return base64.b64encode(file_content(path)).decode()


def embedding_of(flag: str) -> str:
    """`cat.pt:<cat>` -> the word, `cat.pt` -> the file's name. A server finds an embedding by either."""
    _, colon, word = flag.rpartition(":")
    path = Path(flag)
    if colon and word and not path.exists():
        return word
    return path.stem if suffix_of(path) in EMBEDDING_SUFFIXES else str(path)


def file_content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read '{path}' ({error.strerror}); give a PNG, JPEG or WebP file") from None


# --- responses -------------------------------------------------------------------------------------------------------


def remote_pictures(remote: Remote, jobs: list[dict[str, Any]], preview: Path | None) -> Iterator[list[Finished]]:
    """The pictures of each job in turn, with one progress bar. If closed early, cancels the remaining jobs."""
    from tqdm import tqdm

    sent: list[str] = []
    with cancelling(remote, sent), tqdm(total=100 * len(jobs), unit="%", disable=None, dynamic_ncols=True) as bar:
        for i in range(len(jobs)):
            for fields in jobs[i + len(sent) : i + AHEAD]:
                try:
                    sent.append(submitted(remote, fields, is_first=not sent))  # one at a time: one may be refused
                except (Busy, Lost):
                    if not sent:
                        raise
                    break  # until one of them has ended
            pictures: list[Finished] = []
            for event in remote.follow(sent[0]):
                if isinstance(event, Finished):
                    pictures.append(event)
                    continue
                bar.update(100 * i + round(100 * event.share) - bar.n)
                if preview and event.previews:
                    show(event, preview)
            del sent[0]
            bar.update(100 * (i + 1) - bar.n)
            yield pictures


def submitted(remote: Remote, fields: dict[str, Any], *, is_first: bool) -> str:
    """The id of the job. While the server takes none, the only one in flight waits; Busy for another, or at last."""
    waited = False
    for _ in range(MOST_WAITS if is_first else 0):
        try:
            return remote.submit(**fields)
        except (Busy, Lost) as error:
            if isinstance(error, Lost) and not waited:  # else it restarts
                raise
            print(f"{error.what}; waiting", file=sys.stderr)
            time.sleep(min(error.seconds, LONGEST_WAIT))
            waited = True
    return remote.submit(**fields)


def show(event: Progress, path: Path) -> None:
    from PIL import Image

    from plainsd.pictures.images import enlarged_to, grid, write_png

    images = [Image.open(BytesIO(png)).convert("RGB") for _, png in sorted(event.previews.items())]
    images = [
        enlarged_to(image, (PREVIEW_SCALE * image.width, PREVIEW_SCALE * image.height))
        if max(image.size) < SMALL_PREVIEW
        else image
        for image in images
    ]
    write_png(grid(images, math.ceil(math.sqrt(len(images)))), path)


def write_picture(target: Target, picture: Finished, *, is_sheet: bool) -> Path:
    from PIL import Image

    from plainsd.pictures.images import read_settings

    with Image.open(BytesIO(picture.png)) as image:
        image.load()
        return target.write(image, None if is_sheet else read_settings(BytesIO(picture.png)))
