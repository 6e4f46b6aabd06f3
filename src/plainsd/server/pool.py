"""The served models, by name: loaded on demand, kept while memory allows."""

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from math import prod
from pathlib import Path
from typing import Any

import torch

from plainsd.adapters.embeddings import bundled
from plainsd.adapters.lora import add_lora, attached
from plainsd.adapters.names import adaptable_networks
from plainsd.adapters.reading import open_lora
from plainsd.allocator import release_freed_memory
from plainsd.checkpoint import load
from plainsd.device import choose_device, choose_dtype
from plainsd.errors import UserError, unknown
from plainsd.files.convert import read
from plainsd.files.hashes import Hashes, hashes
from plainsd.files.hub import find
from plainsd.files.predicted import asked
from plainsd.files.stored import empties
from plainsd.files.tokenizers import tokenizers
from plainsd.json_reader import parsed_json
from plainsd.models.forms import make_plain
from plainsd.pictures.defaults import check_refiner, model_name
from plainsd.pictures.model import StableDiffusion, assemble
from plainsd.pictures.previews import Previewer
from plainsd.pictures.settings import UPSCALERS, Settings
from plainsd.server.controls import ControlNets
from plainsd.server.embeddings import Embedding, Embeddings, with_embeddings, with_own_words
from plainsd.server.errors import APIError
from plainsd.server.folders import changed_at, changed_below
from plainsd.server.image_prompts import ImageAdapters
from plainsd.server.loras import Loras, NamedLoras
from plainsd.server.previews import check_preview_vae, previewer_of
from plainsd.server.prompt_templates import PromptTemplates
from plainsd.server.upscalers import Upscalers
from plainsd.speed.model import faster
from plainsd.text.prompts import LoraTag

log = logging.getLogger("plainsd.server")

QUICK = {"steps": 4, "guidance": 2.0}  # of the embedded model: as many objects are right as in 20 steps, less sharp
QUICK_STEPS = 8  # models that are drawn in so few by default are quick as they are


@dataclass(frozen=True)
class PoolOptions:
    """How models are loaded, and the folders of adapters."""

    device: str = "auto"
    dtype: str = "auto"
    memory: float | None = None  # bytes for models; None: `budget_of` the device
    plain: bool = False  # weights are not packed for the processor
    loras: Path | None = None  # folder
    embeddings: Path | None = None  # folder
    controls: Path | None = None  # folder
    upscalers: Path | None = None  # folder
    wildcards: Path | None = None  # folder
    styles: Path | None = None  # file
    vae: Path | None = None  # another autoencoder than the models' own, for all of them
    preview_vae: Path | None = None  # TAESD, for previews
    prediction: str | None = None  # what the network of the one model predicts, where its files say it wrong or not
    zero_snr: bool | None = None  # whether its noise ends at zero SNR, likewise

    @property
    def noise(self) -> dict[str, Any]:
        """Arguments for `load`: what the files do not say of the model's noise."""
        return {"prediction": self.prediction, "zero_snr": self.zero_snr}

    @property
    def recorded(self) -> dict[str, Any]:
        """What a picture's settings say of these."""
        return self.noise | {"vae": self.vae and self.vae.resolve().name}

    def check(self, models: int) -> None:
        """UserError where these cannot go together, or not with so many models."""
        if models > 1 and (self.prediction, self.zero_snr) != (None, None):
            raise UserError(
                "--prediction and --zero-snr apply to a single model; leave them out, or serve that model alone"
            )


@dataclass
class ServedModel:
    """A served model; its networks exist while it is resident."""

    name: str
    source: str | None  # None: the embedded one
    bare: StableDiffusion  # without weights: enough to check a request
    bytes: int  # in memory
    noise: dict[str, Any]  # arguments for `load`: what its network predicts, where the file does not say
    changed: int  # when its files were, as of all this
    readable: bool = True  # the last time that they were found changed
    hashes: Hashes = ()  # of its weights and the autoencoder that all models get, as they were when loaded
    sd: StableDiffusion | None = None
    loaded: int = 0  # `changed`, as of loading
    preview: Previewer | None = None
    loras: tuple[tuple[Path, LoraTag, int], ...] | None = None  # those on it, and when their files were changed
    adapted: StableDiffusion | None = None  # the model with them: itself, or a copy with words that they bring along
    embedded: tuple[tuple[Embedding, ...], StableDiffusion] | None = (
        None  # last embeddings used, and the adapted model with them
    )
    example_prompts: list[str] = field(default_factory=list)  # from the model's concepts.json
    used: float = field(default_factory=time.monotonic)

    @property
    def hash(self) -> str | None:
        return dict(self.hashes).get("model")

    @property
    def quick(self) -> dict[str, float] | None:
        """Settings in which it draws while one types; None where it takes too many steps for that."""
        if self.source is None:
            return QUICK
        return {} if self.bare.variant.steps <= QUICK_STEPS else None


class Models:
    """All models by name; the first is the default. Only the worker thread loads and unloads."""

    def __init__(self, sources: Sequence[str | None], options: PoolOptions = PoolOptions()):
        options.check(len(sources))
        self.options, self.embeddings = options, Embeddings(options.embeddings)
        self.vae = options.vae and find(options.vae)  # where it lies, also of a Hub id
        self.loras = Loras(options.loras)
        self.controls = ControlNets(options.controls)
        self.templates = PromptTemplates(options.wildcards, options.styles)
        self.image_adapters = ImageAdapters(options.controls)
        self.device = choose_device(options.device)
        self.upscalers = Upscalers(options.upscalers, self.device)
        self.dtype = choose_dtype(options.dtype, self.device)
        self.budget = budget_of(self.device) if options.memory is None else options.memory
        self.lock, self.loads = threading.Lock(), 0
        self.known: dict[str, ServedModel] = {}
        for source in sources or [None]:
            model = self.described(source)
            if model.name in self.known:
                raise UserError(f"two models are called {model.name!r}; rename the folder or file of one")
            self.known[model.name] = model
        self.default = next(iter(self.known))
        if options.preview_vae is not None:
            vaes = {name: model.bare.variant.vae for name, model in self.known.items()}
            check_preview_vae(options.preview_vae, vaes)

    def described(self, source: str | None) -> ServedModel:
        """Inspects a model without reading its weights."""
        path = find(source)
        changed = self.changed(path)
        contents = read(path, vae=self.options.vae, **self.options.noise, ask=False)
        certain, contents = contents.certain, asked(contents, path)
        variant = contents.variant
        networks = empties(variant)
        bare = assemble(variant, networks, tokenizers(contents, path) if self.embeddings.folder else [], path)
        numbers = sum(prod(tensor.shape) for network in networks.values() for tensor in network.state_dict().values())
        noise = self.options.noise if certain else self.options.noise | {"prediction": variant.prediction}
        size, ideas = numbers * self.dtype.itemsize, example_prompts(path)
        return ServedModel(model_name(bare), source, bare, size, noise, changed, example_prompts=ideas)

    def refresh(self, model: ServedModel) -> None:
        """Describes a model anew if its files were changed. It stays as it is while they are gone or cannot be read,
        as those that are still being copied."""
        with self.lock:
            if self.changed(model.bare.path) in (0, model.changed):
                return
            try:
                new = self.described(model.source)
            except (UserError, OSError) as error:
                if model.readable:
                    log.warning("model %s was changed on disk and cannot be read (%s); trying again", model.name, error)
                model.readable = False
                return
            model.bare, model.bytes, model.noise, model.changed = new.bare, new.bytes, new.noise, new.changed
            model.readable = True

    def __getitem__(self, name: str | None) -> ServedModel:
        """By name; None is the default. APIError 404 if unknown."""
        name = self.default if name is None else name
        if name not in self.known:
            raise APIError(404, str(unknown("model", name, self.known)), "model", name)
        return self.known[name]

    def prepare(self, name: str, loras: NamedLoras, one: Settings) -> tuple[ServedModel, StableDiffusion]:
        """A model, and all that draws a picture of these settings: its networks with just these LoRAs, the words that
        the prompts use, the refiner, the upscaler."""
        model = self.resident(name, loras)
        assert model.adapted is not None  # it is resident
        embeddings = tuple(self.embeddings.get(text) for text in one.embeddings)
        if model.embedded is None or model.embedded[0] != embeddings:
            model.embedded = embeddings, with_embeddings(model.adapted, embeddings)
        sd = model.embedded[1]
        if one.refiner is not None:
            sd = replace(sd, refiner=self.resident(one.refiner, beside=model).adapted)
        if one.hires and one.upscaler not in UPSCALERS:
            sd = replace(sd, upscaler=self.upscalers.network(one.upscaler))
        return model, sd

    def hashes(self, model: ServedModel, one: Settings) -> Hashes:
        """Of the files that draw a picture of these settings."""
        embeddings = {embedding.text: embedding.path for embedding in map(self.embeddings.get, one.embeddings)}
        files = [(lora.name, path) for path, lora, _ in model.loras or ()]
        adapters = hashes(None, loras=files, words=embeddings.items())
        return model.hashes + adapters

    def resident(self, name: str, loras: NamedLoras = (), beside: ServedModel | None = None) -> ServedModel:
        """The model with its networks, and just these LoRAs. It is loaded if necessary; others are unloaded for it,
        least recently used first, except `beside`."""
        if name not in self.known:
            raise UserError(
                f"model {name!r} is not served any more; start the server with --model for it",
                field="model",
                value=name,
            )
        model = self.known[name]
        model.used = time.monotonic()
        self.refresh(model)
        if model.sd is not None and model.loaded != model.changed:
            log.info("model %s was changed on disk and is loaded again", name)
            self.unload(model)
        if model.sd is None:
            changed = model.changed
            while self.bytes() + model.bytes > self.budget and (oldest := self.least_recently_used(beside)) is not None:
                self.unload(oldest)
            sd = load(model.source, device=self.device, dtype=self.dtype, vae=self.options.vae, **model.noise)
            preview, known = previewer_of(sd, self.options.preview_vae), hashes(sd.path, self.options.vae)
            with self.lock:
                model.sd, model.preview, model.loras, model.hashes, model.loaded = sd, preview, None, known, changed
                self.loads += 1
        files = [(self.loras.path(one.name), one) for one in loras]
        wanted = tuple((path, one, changed_at(path)) for path, one in files)
        if model.loras != wanted:
            self.adapt(model, model.sd, wanted)
        return model

    def changed(self, path: Path | None) -> int:
        """When a model's files were, and those of the autoencoder that all models get; 0 if they are gone."""
        times = [changed_below(one) for one in (path, self.vae) if one]
        return max(times) if all(times) else 0

    def adapt(self, model: ServedModel, sd: StableDiffusion, loras: Sequence[tuple[Path, LoraTag, int]]) -> None:
        """Puts just these LoRAs on the model, and packs what is not packed. For that, networks that can have LoRAs are
        made plain first; a model that stays without pays nothing. Words that a LoRA brings along are those of a copy,
        which shares the networks but for their token tables, and goes with it."""
        for network in adaptable_networks(sd).values():
            make_plain(network)
        for lora in attached(sd):
            lora.remove()
        model.loras = model.adapted = model.embedded = None  # in case one of these fails
        adapted = with_own_words(sd) if any(bundled(sd, open_lora(path)) for path, _, _ in loras) else sd
        for path, one, _ in loras:
            add_lora(adapted, path, one.strength, one.text_strength)
        if not self.options.plain:
            faster(adapted)
        release_freed_memory()  # what loading and packing took and need no more
        model.loras, model.adapted = tuple(loras), adapted

    # --- refiners ----------------------------------------------------------------------------------------------------

    def refined(self, model: ServedModel, refiner: str | None) -> StableDiffusion:
        """The model without weights, with its refiner, another served model. APIError if they do not fit."""
        if refiner is None:
            return model.bare
        if refiner not in self.known:
            raise APIError(404, str(unknown("refiner", refiner, self.known)), "refiner", refiner)
        if refiner == model.name:
            raise UserError(
                f"refiner {refiner!r} is the model itself; choose another, or leave it out",
                field="refiner",
                value=refiner,
            )
        refined = replace(model.bare, refiner=self.known[refiner].bare)
        try:
            check_refiner(refined, Settings())
        except UserError as error:
            raise APIError(422, f"refiner: {error}", "refiner", refiner) from None
        return refined

    def refiners(self, model: ServedModel) -> list[str]:
        """Names of the models that can be its refiner."""
        return [name for name in self.known if self.can_refine(name, model)]

    def can_refine(self, name: str, model: ServedModel) -> bool:
        try:
            return bool(self.refined(model, name))
        except (APIError, UserError):
            return False

    # --- memory ------------------------------------------------------------------------------------------------------

    def least_recently_used(self, exclude: ServedModel | None = None) -> ServedModel | None:
        resident = [model for model in self.known.values() if model.sd is not None and model is not exclude]
        return min(resident, key=lambda model: model.used, default=None)

    def unload(self, model: ServedModel) -> None:
        with self.lock:
            model.sd = model.preview = model.loras = model.adapted = model.embedded = None
        if self.device.type != "cpu":
            torch.accelerator.empty_cache()
        release_freed_memory()

    def resident_names(self) -> frozenset[str]:
        """Names of the models that are loaded."""
        return frozenset(name for name, model in self.known.items() if model.sd is not None)

    def bytes(self) -> int:
        """Memory of the resident models."""
        return sum(model.bytes for model in self.known.values() if model.sd is not None)


def example_prompts(path: Path) -> list[str]:
    """Prompts from the `concepts.json` of a model trained by recipes/emoji; empty for other models."""
    try:
        data = parsed_json((path / "concepts.json").read_text("utf-8-sig"))
        phrases, colours = [concept["phrase"] for concept in data["concepts"]], list(data["backgrounds"])
    except (OSError, ValueError, LookupError, TypeError):
        return []
    grounds = [f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} background" for colour in colours]
    return [f"{phrase} on {ground}" for phrase, ground in zip(phrases, cycle(grounds))]


def budget_of(device: torch.device) -> float:
    """Default memory for models: three quarters of a GPU's memory, or half of the RAM."""
    if device.type == "cuda":
        return 0.75 * torch.cuda.get_device_properties(device).total_memory
    return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
