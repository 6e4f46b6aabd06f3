"""`plainsd generate`: flags to settings, settings to batches, batches to files."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, UseAppendAction, arg
from tyro.constructors import PrimitiveConstructorSpec

from plainsd.commands.recorded import ELSEWHERE, check_recorded, noted, recorded, say_unused
from plainsd.commands.grid import axis, grid_cells, sheet
from plainsd.commands.adapters import chosen, learned, without_tags
from plainsd.commands.output import Batch, Target, check_writable, draw
from plainsd.commands.torchrun import share_of_torchrun
from plainsd.errors import UserError
from plainsd.pictures.settings import DEFAULTS, Settings

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from plainsd.pictures.model import StableDiffusion


def flag(metavar: str, name: str | None = None):
    return arg(metavar=metavar, name=name, help_behavior_hint=default_hint)


def several(kind: type, count: int):
    """Exactly so many numbers, or None. tyro by itself takes whatever follows, and with it the prompt."""
    return PrimitiveConstructorSpec(
        nargs=count,
        metavar="",
        instance_from_str=lambda texts: tuple(map(kind, texts)),
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: [] if value is None else list(map(str, value)),
    )


def default_hint(default: str) -> str:
    return "" if default in ("", "None", "''") else f"(default: {default})"


@dataclass
class Generate:
    """Pictures of a prompt, written as PNG files that know how they were made.

    Flags that are not given take the model's own defaults; with --from, those of the picture.
    """

    prompt: Annotated[Positional[str], flag("PROMPT")] = ""
    """what to draw"""
    model: Annotated[str | None, flag("MODEL")] = None
    """folder, single file or hub name of a model; the embedded one if not given"""
    vae: Annotated[Path | None, flag("PATH")] = None
    """another autoencoder, a folder or a file, in place of the model's own"""
    lora: Annotated[UseAppendAction[tuple[str, ...]], flag("FILE:STRENGTH")] = ()
    """a LoRA, such as style.safetensors:0.8; more than once for several"""
    lora_folder: Annotated[Path | None, flag("FOLDER")] = None
    """where the LoRAs lie that a prompt names as <lora:style:0.8>"""
    lora_partial: bool = False
    """leave out what of a LoRA does not fit the model"""
    embedding: Annotated[UseAppendAction[tuple[str, ...]], flag("FILE:WORD")] = ()
    """a learned word (textual inversion), such as cat.pt:<cat>, or FILE alone; more than once for several"""
    refiner: Annotated[str | None, flag("MODEL")] = None
    """folder, file or hub name of a model that draws the last part, such as SDXL's refiner"""
    handover: Annotated[float | None, flag("SHARE")] = None
    """of the timesteps, after which the refiner draws (default 0.8)"""
    negative: Annotated[str | None, flag("TEXT")] = None
    """what to keep away from"""
    size: Annotated[tuple[int, int] | None, flag("W H"), several(int, 2)] = None
    """pixels, multiples of 8; with --image any, and the picture is scaled"""
    steps: Annotated[int | None, flag("N")] = None
    """steps of the sampler"""
    guidance: Annotated[float | None, flag("SCALE")] = None
    """how strictly the prompt is followed; 1 ignores --negative and is twice as fast"""
    sampler: Annotated[str | None, flag("NAME")] = None
    """ddpm ddim plms euler euler_a heun dpm2 dpm2_a dpmpp_2m dpmpp_2s_a dpmpp_sde dpmpp_2m_sde dpmpp_3m_sde lms unipc
    lcm"""
    spacing: Annotated[str | None, flag("NAME")] = None
    """of the noise levels: leading trailing linspace karras exponential"""
    seed: Annotated[int | None, flag("N")] = None
    """of the first picture (default 0); the following ones have the next seeds"""
    count: Annotated[int, flag("N")] = 1
    """pictures a prompt"""
    batch: Annotated[int, flag("N")] = 4
    """pictures at once; fewer need less memory"""
    prompts: Annotated[Path | None, flag("FILE")] = None
    """a text file with one prompt a line, in place of PROMPT"""
    out: Annotated[Path, flag("FILE-OR-FOLDER")] = Path("out")
    """where pictures go; nothing is overwritten, files are numbered"""
    from_: Annotated[Path | None, flag("PNG", "from")] = None
    """make this picture again; other flags change single settings"""

    image: Annotated[Path | None, flag("FILE")] = None
    """a picture to start from"""
    strength: Annotated[float | None, flag("SHARE")] = None
    """how far from it: the share of the steps that run (default 0.75; 1 with a mask)"""
    mask: Annotated[Path | None, flag("FILE")] = None
    """a picture of the same size; only where it is light is --image drawn anew"""
    outpaint: Annotated[tuple[int, int, int, int] | None, flag("L T R B"), several(int, 4)] = None
    """continue --image by so many pixels at its left, top, right, bottom"""
    hires: Annotated[float | None, flag("TIMES")] = None
    """a second pass on the picture enlarged so many times"""
    upscaler: Annotated[str | None, flag("NAME")] = None
    """how it is enlarged: latent or lanczos"""
    variation_seed: Annotated[int | None, flag("N")] = None
    """a second seed, to vary a picture"""
    variation_strength: Annotated[float | None, flag("SHARE")] = None
    """how far towards the second seed, 0 to 1"""
    grid: Annotated[UseAppendAction[tuple[str, ...]], flag("NAME=A,B,C")] = ()
    """one sheet over several values of a setting; twice for columns and rows"""

    clip_skip: Annotated[int | None, flag("N")] = None
    """layer of the text encoder that is read: 1 the last, 2 the one before"""
    eta: Annotated[float | None, flag("SHARE")] = None
    """fresh noise a step, 0 to 1, for samplers that have the choice"""
    rescale: Annotated[float | None, flag("SHARE")] = None
    """guidance keeps the contrast of the prompted estimate by this share, such as 0.7"""
    interval: Annotated[tuple[float, float] | None, flag("LOW HIGH"), several(float, 2)] = None
    """noise levels (sigma) between which guidance acts"""
    perturbed: Annotated[float | None, flag("SCALE")] = None
    """perturbed-attention guidance, such as 3"""
    threshold: Annotated[float | None, flag("PERCENTILE")] = None
    """dynamic thresholding, such as 0.995"""
    cache: Annotated[int | None, flag("N")] = None
    """run the UNet's deep layers at every N-th step only: faster, and not quite the same picture"""

    preview: Annotated[Path | None, flag("FILE")] = None
    """a PNG file that shows the picture while it is drawn"""
    server: Annotated[str | None, flag("URL")] = None
    """draw on a running `plainsd serve`; its token comes with the URL, as ?token=..., or from $PLAINSD_TOKEN"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16"""
    fast: bool = False
    """weights packed for the processor: a second more at the start, less at every step; the same but for rounding"""
    compile: bool = False
    """torch.compile too, which takes minutes the first time that a size is drawn"""
    int8: bool = False
    """the UNet's weights in 8 bits: less memory, and not quite the same picture; needs torchao"""
    low_memory: bool = False
    """the least memory, for more time: done by itself, and said, where memory is short"""

    def run(self) -> None:
        prompts, choices = self.wanted()
        besides = [key for key, _ in choices.pop("other", ())]
        share = share_of_torchrun()
        if not share.alone and (self.server or self.grid):
            raise UserError(f"{'--server' if self.server else '--grid'} is for one process; leave torchrun out")
        if self.int8 and (self.fast or self.compile):
            raise UserError("--int8 does not go with --fast or --compile; leave one of them out")
        if self.server:
            from plainsd.server import errand

            say_unused(besides)
            return errand.run(self, prompts, choices)
        prompts, tags = without_tags(prompts)
        target = Target(self.out)  # says at once where nothing can be written
        if self.preview:
            check_writable(self.preview.parent)
        axes = [axis(text) for text in self.grid]
        if len(axes) > 2 or (axes and self.count * len(prompts) > 1):
            raise UserError("a grid has one or two axes and one prompt; leave out --count, or give fewer --grid")
        task, part = self.task(choices), share.part(len(prompts))
        target.number = None if share.alone else share.agreed(target.next_number()) + part.start
        if not part:
            return

        from tqdm import tqdm

        from plainsd.device import choose_device
        from plainsd.adapters.embeddings import add_embedding
        from plainsd.pictures.memory import fitted

        began = time.perf_counter()
        loras = chosen(self.lora, tags, self.lora_folder)
        files = [learned(text) for text in self.embedding]
        device = choose_device(share.device(self.device))
        sd = fitted(partial(self.loaded, device, loras), device, self.low_memory)
        words = {add_embedding(sd, file, word or None): file for file, word in files}
        check_recorded(self, sd, prompts, words, choices)
        say_unused(besides)
        if self.int8:
            from plainsd.speed.int8 import int8

            int8(sd)
        if self.fast or self.compile:
            from plainsd.speed.model import faster

            faster(sd, compiled=self.compile, tell=partial(tqdm.write, file=sys.stderr))
        loaded = time.perf_counter()
        batches = grid_cells(prompts[0], choices, axes) if axes else cut(prompts, choices, self.batch, part)
        images: list[Image.Image] = []
        say = partial(tqdm.write, file=sys.stdout)  # keeps clear of the progress bar
        for pictures in draw(sd, task, list(batches), None if share.rank else self.preview, hidden=share.rank > 0):
            images += pictures.images
            if not axes:
                for image, settings in zip(pictures.images, pictures.settings, strict=True):
                    say(str(target.write(image, noted(settings, sd, loras, words, self.vae))))
        if axes:
            say(str(target.write(sheet(images, axes), None)))
        steps, sampler = pictures.settings[0].steps, pictures.settings[0].sampler
        print(
            f"{len(images)} picture{'s' * (len(images) > 1)} in {time.perf_counter() - loaded:.1f} s ({steps} steps of "
            f"{sampler}); the model was loaded in {loaded - began:.1f} s",
            file=sys.stderr,
        )

    def loaded(self, device: torch.device, loras: list, place: torch.device) -> StableDiffusion:
        """The model, and its refiner, at a place, in the precision of the device where it will draw."""
        from plainsd.device import choose_dtype
        from plainsd.checkpoint import load

        where = {"device": place, "dtype": choose_dtype(self.dtype, device)}
        sd = load(self.model, vae=self.vae, loras=loras, lora_partial=self.lora_partial, **where)
        if self.refiner:
            sd.refiner = load(self.refiner, **where)
        return sd

    # --- what is wanted ---------------------------------------------------------------------------------------------

    def wanted(self) -> tuple[list[str], dict]:
        """The prompts, and every other choice: those of --from under those of the flags. `other`: no choice of ours."""
        choices: dict = {}
        prompts = [self.prompt] if self.prompt else []
        if self.from_:
            choices = recorded(self.from_)
            prompts = prompts or [choices.pop("prompt", "")]
            choices.pop("prompt", None)
        if self.prompts:
            prompts = read_prompts(self.prompts)
        if not prompts:
            raise UserError("there is no prompt; give one, or a picture with --from, or a file with --prompts")
        choosable = DEFAULTS.keys() - {"prompt", *ELSEWHERE}
        given = {name: value for name, value in asdict(self).items() if name in choosable and value is not None}
        if self.count < 1 or self.batch < 1:
            raise UserError(f"count {self.count} and batch {self.batch} must be 1 or more")
        if self.outpaint:
            choices.pop("size", None)  # of another canvas
        if self.mask:
            choices.pop("outpaint", None)
        if choices.pop("masked", False) and not (self.mask or self.outpaint):
            raise UserError(f"'{self.from_}' was made with a mask; give picture and mask with --image and --mask")
        choices |= given
        Settings(**choices).check()
        return [prompt for prompt in prompts for _ in range(self.count)], choices

    def task(self, choices: dict) -> Callable:
        """(sd, prompts, **choices) -> events."""
        if self.mask and self.outpaint:
            raise UserError("--mask and --outpaint do not go together; choose one of them")
        sides = choices.pop("outpaint", None)  # of --from, too
        if (self.mask or sides) and not self.image:
            raise UserError(f"{'--mask' if self.mask else 'outpainting'} needs the picture; give it with --image")
        if not self.image:
            if choices.get("strength") is not None and not choices.get("hires"):
                raise UserError(f"strength {choices['strength']} means a picture was drawn over; give it with --image")
            return lambda sd, prompts, **more: generate().text_to_image(sd, prompts, **more)

        from plainsd.pictures.images import open_picture

        image = open_picture(self.image)
        if self.mask:
            mask = open_picture(self.mask, background="black")
            return lambda sd, prompts, **more: generate().inpaint(sd, prompts, image, mask, **more)
        if sides:
            return lambda sd, prompts, **more: generate().outpaint(sd, prompts, image, *sides, **more)
        return lambda sd, prompts, **more: generate().image_to_image(sd, prompts, image, **more)


def generate():
    from plainsd import generate as module

    return module


def read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts in '{path}' ({error}); give a text file in UTF-8") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"'{path}' has no prompts; write one a line")
    return prompts


def cut(prompts: list[str], choices: dict, size: int, part: range) -> Iterator[Batch]:
    """Batches of at most `size` prompts, of those in `part`; the seeds go on from prompt to prompt."""
    varied = choices.get("variation_strength") and choices.get("variation_seed") is not None
    counted = "variation_seed" if varied else "seed"
    first = choices.get(counted, 0)
    for start in part[::size]:
        yield prompts[start : min(start + size, part.stop)], choices | {counted: first + start}
