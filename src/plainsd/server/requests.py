"""Turns a request into a job. The functions that will run it check it first, on a model without weights."""

import time
from dataclasses import replace
from itertools import product
from typing import Any

from pydantic import ValidationError

from plainsd.diffusion.schedule import SPACINGS
from plainsd.errors import UserError, unknown
from plainsd.generate import enlarged_size, image_to_image, inpaint, text_to_image
from plainsd.pictures.control import Control
from plainsd.pictures.defaults import size_multiple
from plainsd.pictures.image_prompt import ImagePrompt
from plainsd.pictures.model import StableDiffusion
from plainsd.pictures.settings import (
    DEFAULTS,
    MASK_OPTIONS,
    RANDOM,
    SEEDS,
    Resolved,
    Settings,
    check_needs,
    content_notes,
    drawn_seed,
    notes,
    read_seed,
)
from plainsd.pictures.texts.fields import FIELDS, read_switch
from plainsd.pictures.texts.labels import sampler_named, spacing_named
from plainsd.server.canvas import InitImages, init_images_of
from plainsd.server.controls import controls_of
from plainsd.server.errors import APIError
from plainsd.server.image_prompts import image_prompts_of
from plainsd.server.jobs.job import Job, Source
from plainsd.server.jobs.pictures import new_id, new_path_prefix
from plainsd.server.limits import Limits
from plainsd.server.loras import NamedLoras
from plainsd.server.pool import Models
from plainsd.server.prompt_checks import check_prompt_sizes, check_prompts, prompts_in
from plainsd.server.prompt_templates import settled_texts, texts_of
from plainsd.server.schema import Axis, JobRequest
from plainsd.server.sheets import check_sheet, sheet_of
from plainsd.server.uploads import check_pixels, without_tags
from plainsd.text.prompts import LoraTag
from plainsd.text.wildcard_files import Wildcards

NOT_IN_GRIDS = ("size", "interval", "model", "upscaler", "refiner", "embeddings", "outpaint", "like", "hires_prompt",
                "hires_negative", "seed_resize", "batch_index", "batch_size", *MASK_OPTIONS)  # fmt: skip
OF_SECOND_PASS = [name for name in JobRequest.model_fields if name.startswith("hires_")]
CANVAS_OPTIONS = tuple(name for name in MASK_OPTIONS if name != "soft_mask")  # applied when the canvas was made
UNIT_FIELDS = {
    "control": "controls",
    "image_prompt": "image_prompts",
    "image_encoder": "image_prompts",
}  # fields of a task
CELLS = [name for _, name, _, _ in FIELDS if name in JobRequest.model_fields and name not in NOT_IN_GRIDS]
CELLS += ["sampler", "spacing"]


def job_request(**fields: Any) -> JobRequest:
    """A JobRequest from the fields of another API, already renamed. APIError if one is invalid."""
    try:
        return JobRequest(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        raise APIError(422, f"{field}: {first['msg']}; see /docs for what it takes", field, first["input"]) from None


def resolved_settings(
    bare: StableDiffusion,
    request: JobRequest,
    init: InitImages | None,
    control: list[Control],
    image_prompt: list[ImagePrompt],
    prompts: list[str],
    negatives: list[str],
    **cell: Any,
) -> list[Resolved]:
    """The resolved settings of each picture. UserError if the model does not support them."""
    choices = request.choices() | cell | {"control": control, "image_prompt": image_prompt}
    if init is None:
        if "strength" in choices and "hires" not in choices:
            raise UserError(
                f"strength {choices['strength']} without an image; send one, or leave strength out",
                field="strength",
                value=choices["strength"],
            )
        return text_to_image(bare, prompts, negatives, **choices).settings
    choices |= {"size": init.image.size, "negative": negatives}
    if init.hole is None:
        return image_to_image(bare, prompts, init.image, choices.pop("strength", None), **choices).settings
    done = {name: value for name, value in choices.items() if name in CANVAS_OPTIONS}
    choices = {name: value for name, value in choices.items() if name not in CANVAS_OPTIONS}
    settings = inpaint(bare, prompts, init.image, init.hole, choices.pop("strength", 1.0), **choices).settings
    return [replace(one, **done) for one in settings]


def cells(request: JobRequest) -> list[dict[str, Any]]:
    """The varying settings of the cells of a grid, row by row; one empty dict without a grid."""
    readers = {name: read for _, name, read, _ in FIELDS}
    readers |= {"sampler": lambda text: sampler_named(text) or text, "spacing": spacing_from}
    readers |= dict.fromkeys(SEEDS, read_seed) | {"tiling": read_switch}
    axes = []
    for axis in request.grid or []:
        name = axis.name.strip().replace(" ", "_")
        if name not in CELLS:
            raise APIError(422, str(unknown("grid setting", axis.name, CELLS)), "grid", axis.name)
        try:
            axes.append([(name, readers[name](str(value).strip())) for value in axis.values])
        except (ValueError, OverflowError):
            message = f"grid {axis.name} has a value that cannot be read; give numbers such as 3, 5, 7"
            raise APIError(422, message, "grid", axis.values) from None
    named = [pairs[0][0] for pairs in axes]
    if twice := {name for name in named if named.count(name) > 1}:
        raise APIError(422, f"both axes of the grid are {min(twice)}; choose another setting for one", "grid")
    return [dict(pairs) for pairs in product(*reversed(axes))]


def with_drawn_seeds(grid: list[Axis] | None) -> list[Axis] | None:
    """The grid with a seed in place of each random one: its labels say it, and cells draw with it."""
    return grid and [
        axis.model_copy(
            update={"values": [drawn_seed() if str(v).strip().lower() in ("random", "-1") else v for v in axis.values]}
        )
        if axis.name.strip().replace(" ", "_") in SEEDS
        else axis
        for axis in grid
    ]


def spacing_from(text: str) -> str:
    """By internal name or label."""
    return text if text in SPACINGS else spacing_named(text) or text


def check_limits(request: JobRequest, limits: Limits) -> None:
    check_prompt_sizes(prompts_in(request), limits)
    pictures = request.count
    for axis in request.grid or []:
        pictures *= len(axis.values)
    if not 1 <= request.count <= limits.count:
        raise APIError(
            422, f"count {request.count} is out of range; choose 1 to {limits.count}", "count", request.count
        )
    if pictures > limits.count:
        raise APIError(422, f"grid has {pictures} pictures; at most {limits.count} are drawn at once", "grid", pictures)
    if request.grid and request.count > 1:
        raise APIError(422, f"count {request.count} with a grid; leave count out", "count", request.count)


def check_numbers(request: JobRequest) -> None:
    """UserError for the first number out of range or without effect, in the request or the cells of its grid."""
    for cell in cells(request):
        settings_of_cell(request, cell).check()
        given = request.choices() | cell
        check_needs([name for name, value in given.items() if value != DEFAULTS.get(name)], given.keys())


def settings_of_cell(request: JobRequest, cell: dict[str, Any]) -> Settings:
    known = Settings.__dataclass_fields__.keys()
    return Settings(**{name: value for name, value in (request.choices() | cell).items() if name in known})


def seeds_of(request: JobRequest, cell: dict[str, Any]) -> list[int]:
    """The seed of each picture: consecutive, unless another setting counts up."""
    one = settings_of_cell(request, cell)
    return [one.seed + index * (one.counted == "seed") for index in range(request.count)]


def finished_size(one: Resolved, multiple: int) -> tuple[int, int]:
    """After enlarging."""
    return enlarged_size(one.size, one.hires, multiple, one.like) if one.hires else one.size


def finished_sizes(settings: list[Resolved], init: InitImages | None, multiple: int) -> list[tuple[int, int]]:
    """Of the finished pictures: pasted into another, they have its size."""
    whole = init.base.size if init and init.base else None
    return [whole or finished_size(one, multiple) for one in settings]


def check_work(settings: list[Resolved], limits: Limits, multiple: int) -> None:
    for one in settings:
        check_pixels(finished_size(one, multiple), limits)
        for name in ("steps", "hires_steps"):
            if (steps := getattr(one, name) or 0) > limits.steps:
                what = f"{name.replace('_', ' ')} {steps} is out of range"
                raise APIError(422, f"{what}; choose 1 to {limits.steps}", name, steps)


def new_job(
    request: JobRequest, models: Models, limits: Limits, client: str, api: str, init: InitImages | None = None
) -> Job:
    """A fully checked job, not yet queued. APIError if anything is wrong."""
    model = models[request.model]
    for name in {model.name, request.refiner or model.name} & models.known.keys():
        models.refresh(models.known[name])
    check_limits(request, limits)
    random_seeds = [
        name for name in SEEDS if getattr(request, name) == RANDOM or (name == "seed" and request.seed is None)
    ]
    drawn: dict[str, Any] = {name: drawn_seed() for name in random_seeds}
    request = request.model_copy(update=drawn | {"grid": with_drawn_seeds(request.grid)})
    try:
        check_numbers(request)
        bare = models.refined(model, request.refiner)
        if bare.refiner is None and request.handover is not None:
            raise UserError(
                f"handover {request.handover} without a refiner; name one, or leave handover out",
                field="handover",
                value=request.handover,
            )
        bare = models.upscalers.bare(bare, request.upscaler)
        init = init or init_images_of(request, limits)
        control, control_inputs, maps = controls_of(request.controls, models.controls, limits, init, request.size)
        image_prompt, shown, files = image_prompts_of(request.image_prompts, models.image_adapters, limits, init)
        resolve_choices = api == "jobs" or models.templates.wildcards is not None  # in A1111 this takes an extension
        settings: list[Resolved] = []
        shared: NamedLoras | None = None
        texts = texts_of(request, models.templates)
        check_prompt_sizes(texts, limits)
        wildcards = Wildcards(models.templates.wildcards) if resolve_choices else None
        for cell in cells(request):
            each = settled_texts(request, texts, seeds_of(request, cell), wildcards)
            prompts, shared = without_loras([one["prompt"] for one in each], shared)
            found = resolved_settings(
                bare, request, init, control, image_prompt, prompts, [one["negative"] for one in each], **cell
            )
            settings += [replace(one, **of_second_pass(text)) for one, text in zip(found, each, strict=True)]
        loras = list(shared or [])
        loras += [lora.as_tag() for lora in request.loras]
        models.loras.check(model.bare, loras)
        for one in settings:
            check_prompt_sizes(prompts_in(one), limits)
        whole = "\n".join(dict.fromkeys(text for one in settings for text in prompts_in(one).values()))
        embeddings = tuple(embedding.text for embedding in models.embeddings.used(bare, request.embeddings, whole))
        settings = [replace(one, embeddings=embeddings) for one in settings]
        messages = [note for cell in cells(request) for note in notes(Settings(**note_settings(request, cell)))]
        messages += [note for one in settings for note in content_notes(one)]
        messages += scaled_maps(control, settings[0].size)
        check_clip_skip(bare, settings)
        check_work(settings, limits, size_multiple(bare.variant.vae))
        sheet = sheet_of(request)
        if sheet is not None:
            check_sheet(sheet, finished_sizes(settings, init, size_multiple(bare.variant.vae)))
        check_prompts(settings, limits)
    except UserError as error:
        if error.field in {axis.name.strip().replace(" ", "_") for axis in request.grid or []}:
            error.field = "grid"
        error.field = UNIT_FIELDS.get(error.field or "", error.field)  # the tasks' name, and the request's
        raise APIError.from_user_error(
            error, request.model_dump(exclude={"image", "mask", *UNIT_FIELDS.values()})
        ) from None
    source, inputs = init.as_source() if init else (None, {})
    if control_inputs or shown:
        source = replace(source or Source(), controls=tuple(control_inputs), image_prompts=tuple(shown))
        inputs |= maps | files
    id, created = new_id(), time.time()
    return Job(
        id=id, client=client, api=api, model=model.name, loras=loras, created=created, settings=settings,
        path_prefix=new_path_prefix(settings[0].prompt, id, created),
        source=source, inputs=inputs, sheet=sheet, notes=list(dict.fromkeys(messages)),
    )  # fmt: skip


def of_second_pass(texts: dict[str, str]) -> dict[str, Any]:
    return {name: text for name, text in texts.items() if name in OF_SECOND_PASS}


def without_loras(prompts: list[str], before: NamedLoras | None) -> tuple[list[str], list[LoraTag]]:
    """The prompts without LoRA tags, and the LoRAs, which all pictures of a job share."""
    pairs = [without_tags(prompt) for prompt in prompts]
    shared = pairs[0][1] if before is None else list(before)
    if any(loras != shared for _, loras in pairs):
        raise UserError("the prompt's choices give the pictures different LoRAs; draw them as several jobs",
                        field="prompt")  # fmt: skip
    return [prompt for prompt, _ in pairs], shared


def scaled_maps(control: list[Control], size: tuple[int, int]) -> list[str]:
    """Notes about maps of another size than the picture."""
    return [
        f"the map of {one.name} is {image.width}x{image.height} and the picture {size[0]}x{size[1]}: it is scaled"
        for one in control
        for image in one.images
        if image.size != size
    ]


def note_settings(request: JobRequest, cell: dict[str, Any]) -> dict[str, Any]:
    """The settings that `notes` examines."""
    return {name: getattr(request, name) for name in (*SEEDS, "guidance", "like", "noise")} | {
        name: value for name, value in cell.items() if name in (*SEEDS, "guidance", "noise")
    }


def check_clip_skip(bare: StableDiffusion, settings: list[Resolved]) -> None:
    layers = min(text.layers for one in (bare, bare.refiner) if one for text in one.variant.text)
    for one in settings:
        if (one.clip_skip or 1) > layers:
            raise UserError(
                f"clip skip {one.clip_skip} is out of range; this model has {layers} layers",
                field="clip_skip",
                value=one.clip_skip,
            )
