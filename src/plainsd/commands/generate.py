"""`plainsd generate`: flags to settings, settings to batches, batches to files."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plainsd.commands.adapters import chosen_loras, embedding_from_flag, prompts_and_loras
from plainsd.commands.control import check_control_flags
from plainsd.commands.flags import GenerateFlags
from plainsd.commands.grid import (
    axis,
    axis_names,
    by_setup,
    cell_by_cell,
    check_axes,
    check_sheet_side,
    checked_sizes,
    grid_cells,
    sheet,
)
from plainsd.commands.image_prompt import check_image_prompt_flags
from plainsd.commands.output import Preview, PromptBatch, Target, check_writable, draw
from plainsd.commands.recorded import ELSEWHERE, NOISE, check_recorded, noise_flags, recorded, say_unused, with_notes
from plainsd.commands.setup import DrawingSetup, note_unused_embeddings, upscaler_file
from plainsd.commands.tasks import tasks_of
from plainsd.commands.texts import TEXTS_BESIDE, in_styles, texts_of_each
from plainsd.commands.torchrun import share_of_torchrun
from plainsd.errors import UserError
from plainsd.listing import read_prompts
from plainsd.pictures.settings import (
    DEFAULTS,
    NEEDS,
    RANDOM,
    SEEDS,
    Settings,
    check_needs,
    drawn_seed,
    notes,
    read_seed,
)
from plainsd.pictures.texts.comfyui import PASSED_BY
from plainsd.text.styles import Style, read_styles, styled

if TYPE_CHECKING:
    from PIL import Image

NOT_COMPILED = ("cache", "perturbed")  # settings that change what the UNet computes from call to call
COMMENTED = (*SEEDS, "guidance", "hires_guidance")  # the settings that `notes` may comment on


@dataclass
class Generate(GenerateFlags):
    """Generates pictures from a prompt, and writes them with their settings in the metadata.

    Flags that are not given take the defaults of the model, or with --from those of the picture.
    """

    def run(self) -> None:
        prompts, choices, each = self.prompts_and_choices()
        besides = [f"{key} ({what})" if key == PASSED_BY else key for key, what in choices.get("other", ())]
        share = share_of_torchrun()
        if not share.alone and (self.server or self.grid):
            raise UserError(f"{'--server' if self.server else '--grid'} runs in one process; start it without torchrun")
        self.check_cluster()
        for name in ("int8", "plain"):
            if self.compile and getattr(self, name):
                raise UserError(f"--{name} cannot be combined with --compile; leave one of them out", field=name)
        if self.server:
            from plainsd.commands import remote

            say_unused(besides)
            return remote.generate_remotely(self, prompts, choices, each)
        prompts, tags = prompts_and_loras(prompts, each)
        target = Target(self.out, self.format)  # UserError if it is not writable
        if self.preview:
            check_writable(self.preview.parent)
        elif self.preview_vae:
            raise UserError("--preview-vae needs --preview, the file to write; give both", field="preview")
        axes = [axis(text) for text in self.grid]
        if len(axes) > 2 or (axes and len(prompts) > 1):
            raise UserError(
                "a grid takes one or two axes and a single prompt; leave out --count, or give fewer --grid",
                field="grid",
            )
        check_axes([one.name for one in axes])
        for name in NOT_COMPILED if self.compile else ():
            if choices.get(name) or any(one.name == name for one in axes):
                raise UserError(f"--{name} cannot be combined with --compile; leave one of them out", field=name)
        noise = noise_flags(self, choices)
        like: dict[str, Any] = {name: choices.get(name) for name in ("noise", "like")}
        say_notes(Settings(**like | {one.name: value}) for one in axes for value in one.values if one.name in COMMENTED)
        recorded_controls = choices.pop("control", ())
        check_control_flags(self, recorded_controls)
        recorded_prompts = choices.pop("image_prompt", ())
        check_image_prompt_flags(self, recorded_prompts)
        tasks, part = tasks_of(self, choices), share.part(len(prompts))
        if len(tasks) > 1 and axes:
            raise UserError(
                "a grid takes one picture, and --image is a folder of several; give one file", field="image"
            )
        first_number = None if share.alone else share.agreed(target.next_number())
        if not part:
            return

        from tqdm import tqdm

        began = time.perf_counter()
        setup = DrawingSetup(
            self,
            device=share.device(self.device),
            loras=chosen_loras(self.lora, tags, self.lora_folder),
            embeddings=[embedding_from_flag(text) for text in self.embedding],
            noise=noise,
            controls=recorded_controls,
            image_prompts=recorded_prompts,
        )
        if self.ray.cluster is not None:
            say_unused(besides)
            return self.run_on_cluster(setup, tasks, prompts, choices, each, target)
        cells = list(grid_cells(prompts[0], choices | each[0], axes)) if axes else []
        setups = by_setup(cells)
        first = next(iter(setups))[0] if axes else None
        sd, words = setup.ready(first or self.model)
        note_unused_embeddings(words, [*prompts, *map(choices.get, TEXTS_BESIDE)])
        check_recorded(self, sd, prompts, setup.loras, words, choices)
        say_unused(besides)
        joins = setup.joins(sd)
        choices |= joins
        if axes:
            sizes = checked_sizes(cells, setups, sd, tasks[0], joins, self.vae)
            check_sheet_side(sizes, axes, target.file.suffix if target.file else target.suffix)
        for _, cell in cells:
            cell |= joins
        loaded = time.perf_counter()
        images: list[Image.Image] = []
        say = partial(tqdm.write, file=sys.stdout)  # does not break the progress bar
        show = Preview(sd, self.preview, self.preview_vae) if self.preview and not share.rank else None
        if axes:
            for pictures in cell_by_cell(
                cells, setups, sd, lambda model: setup.ready(model)[0], partial(draw, show=show), tasks[0], setup.joins
            ):
                images += pictures.images
            say(str(target.write(sheet(images, axes), None)))
        else:
            batches = list(prompt_batches(prompts, choices, each, self.batch, part))
            for index, task in enumerate(tasks):
                if first_number is not None:
                    target.number = first_number + index * len(prompts) + part.start
                for pictures in draw(sd, task, batches, show, hidden=share.rank > 0):
                    images += pictures.images
                    for image, settings in zip(pictures.images, pictures.settings, strict=True):
                        say(str(target.write(image, with_notes(settings, sd, setup.loras, words, self.vae, noise))))
        steps, sampler = pictures.settings[0].steps, pictures.settings[0].sampler
        print(
            f"{len(images)} picture{'s' * (len(images) > 1)} in {time.perf_counter() - loaded:.1f} s ({steps} steps of "
            f"{sampler}); the model was loaded in {loaded - began:.1f} s",
            file=sys.stderr,
        )

    def run_on_cluster(
        self, setup: DrawingSetup, tasks: list, prompts: list[str], choices: dict, each: list[dict], target: Target
    ) -> None:
        from tqdm import tqdm

        from plainsd.commands.generate_cluster import ListRun, digest_of_run, generate_on_cluster

        began, count = time.perf_counter(), len(prompts)
        self.ray.join()
        drawn = {name: value for name, value in choices.items() if name not in ELSEWHERE}
        batches = list(prompt_batches(prompts, drawn, each, self.batch, range(count)))
        one = Settings(**drawn)
        seeds = [one.seed + (index if one.counted == "seed" else 0) for index in range(count)]
        drawn_seeds = {name: choices[name] for name in SEEDS if choices.get(name) is not None}
        digest = digest_of_run(setup, prompts, choices | {"texts": each})
        run = ListRun.begin(target, digest, seeds * len(tasks), drawn_seeds)
        written = 0
        for path in generate_on_cluster(setup, tasks, prompts, choices, batches, run):
            tqdm.write(str(path), file=sys.stdout)
            written += 1
        run.finish()
        seconds, plural = time.perf_counter() - began, "s" * (written != 1)
        print(f"{written} picture{plural} in {seconds:.1f} s by {self.ray.workers} workers", file=sys.stderr)

    def check_cluster(self) -> None:
        self.ray.check()
        if self.ray.cluster is None:
            return
        for name in ("server", "grid", "preview"):
            if getattr(self, name):
                raise UserError(f"--{name} does not go with --cluster; leave one of them out", field=name)
        if not share_of_torchrun().alone:
            raise UserError("--cluster starts its own processes; start it without torchrun", field="cluster")

    # --- prompts and settings ---------------------------------------------------------------------------------------

    def prompts_and_choices(self) -> tuple[list[str], dict, list[dict[str, str]]]:
        """The prompts, and all other settings: of --from, overridden by flags; and of each picture the texts beside its
        prompt. `other` holds settings without effect."""
        choices: dict = {}
        prompts = [self.prompt] if self.prompt else []
        if self.from_:
            choices = recorded(self.from_)
            prompts = prompts or [choices.pop("prompt", "")]
            choices.pop("prompt", None)
        if self.prompts:
            prompts = read_prompts(self.prompts)
        if not prompts:
            raise UserError(
                "there is no prompt; give one, or a picture with --from, or a file with --prompts", field="prompt"
            )
        choosable = DEFAULTS.keys() - {"prompt", *ELSEWHERE, *NOISE}
        given = {
            name: value
            for name, value in asdict(self).items()
            if name in choosable and value is not None and value is not False
        }
        if self.count < 1 or self.batch < 1:
            name = "count" if self.count < 1 else "batch"
            value = getattr(self, name)
            raise UserError(f"{name} {value} is out of range; give 1 or more", field=name, value=value)
        if self.outpaint:
            choices.pop("size", None)  # of the canvas before it was extended
        if self.mask and choices.pop("outpaint", None):
            print(f"note: '{self.from_}' was outpainted; --mask is used instead", file=sys.stderr)
        if choices.pop("masked", False) and not (self.mask or self.outpaint):
            raise UserError(
                f"'{self.from_}' was made with a mask; give picture and mask with --image and --mask", field="mask"
            )
        choices |= given | self.seeds()
        if self.from_ and not (choices.get("hires") or "hires" in axis_names(self.grid)):
            for name in [name for name, need in NEEDS.items() if need == "hires" and name not in given]:
                choices.pop(name, None)  # of other programs' texts
        if upscaler_file(self):
            choices["upscaler"] = Path(self.upscaler or "").stem
        styles = self.chosen_styles()
        beside = {
            name: choices[name] for name in TEXTS_BESIDE if choices.get(name) or (name in choices and name in given)
        }
        if styles:
            beside = {"negative": ""} | beside
            choices["negative"] = in_styles("negative", beside["negative"], styles)
        settings = Settings(**choices)
        settings.check()
        if upscaler_file(self) and not settings.hires:
            raise UserError(
                f"--upscaler {self.upscaler} needs --hires; give that too, or use plainsd upscale", field="upscaler"
            )
        axes = axis_names(self.grid)
        check_needs({*given, *axes}, {*choices, *axes})
        made = {name for name in TEXTS_BESIDE if name not in given}  # of --from
        if not (self.prompt or self.prompts):
            made.add("prompt")
        how: dict[str, Any] = {"seed": settings.seed, "count": self.count, "counted": settings.counted == "seed"}
        prompts, each = texts_of_each(prompts, beside, made, styles, self.wildcards, self.combinations, **how)
        settings.check_count(len(prompts))
        if not self.server and (choices.keys() & {"sampler", "spacing"}):
            from plainsd.diffusion.samplers import check_names

            check_names(choices.get("sampler"), choices.get("spacing"))
        say_notes([settings])
        return prompts, choices, each

    def chosen_styles(self) -> dict[str, Style]:
        """The styles asked for, the inmost first."""
        styles = read_styles(self.styles) if self.style else {}
        styled("", "", self.style, styles)  # raises for a name that is not there
        return {name: styles[name] for name in self.style}

    def seeds(self) -> dict[str, int]:
        """The given seeds as numbers. Random ones are picked here, and printed; those of a run on a cluster that
        stopped are its own again."""
        texts = {name: text for name in SEEDS if (text := getattr(self, name)) is not None}
        found = {name: read_seed(text, name.replace("_", " ")) for name, text in texts.items()}
        for name in [name for name, seed in found.items() if seed == RANDOM]:
            said = name.replace("_", " ")
            if not share_of_torchrun().alone:
                raise UserError(
                    f"{said} {texts[name]} would differ from process to process under torchrun; give a number",
                    field=name,
                )
            found[name] = drawn_seed() if self.ray.cluster is None else self.seed_of_cluster(name)
            print(f"{said} {found[name]}", file=sys.stderr)
        return found

    def seed_of_cluster(self, name: str) -> int:
        from plainsd.commands.generate_cluster import seed_of_record

        before = seed_of_record(self.out, name)
        return drawn_seed() if before is None else before


def say_notes(settings: Iterable[Settings]) -> None:
    for note in dict.fromkeys(note for one in settings for note in notes(one)):
        print(f"note: {note}", file=sys.stderr)


def prompt_batches(
    prompts: list[str], choices: dict, each: list[dict[str, str]], size: int, part: range
) -> Iterator[PromptBatch]:
    """Batches of at most `size` of the prompts in `part`, alike in the texts of the hires pass. The seed increases by
    one from prompt to prompt."""
    counted = Settings(**choices).counted
    first = choices.get(counted, 0)
    whole = {"batch_size": choices.get("batch_size") or first + len(prompts)} if counted == "batch_index" else {}
    for start in part[::size]:
        indices = range(start, min(start + size, part.stop))
        for again, group in groupby(indices, lambda index: {**each[index], "negative": ""}):
            alike = list(group)
            negatives = [each[index].get("negative", "") for index in alike]
            texts = again | {"negative": negatives, counted: first + alike[0]}
            yield [prompts[index] for index in alike], choices | whole | texts
