"""The methods that begin from a loaded model, as jobs: `full`, `lora`, `inversion`, `controlnet`."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from plainsd.adapters.embeddings import check_word, occurs_in, save_embedding
from plainsd.adapters.lora import save_lora, to_adapt
from plainsd.checkpoint import load_control, save, save_control
from plainsd.errors import UserError
from plainsd.files.convert import read
from plainsd.files.hub import find
from plainsd.files.predicted import on_or_off
from plainsd.files.tokenizers import tokenizers
from plainsd.models.control import ControlNet
from plainsd.models.unet import UNet
from plainsd.pictures.model import StableDiffusion, assemble
from plainsd.speed.training import trained_faster
from plainsd.train.checkpoints import saving
from plainsd.train.claim import model_identity, weights_digest
from plainsd.train.consistency import check_teacher
from plainsd.train.data.examples import Examples
from plainsd.train.data.pictures import PictureSet, read_pictures
from plainsd.train.data.run_data import heldout_folder
from plainsd.train.data.sources import folder_of
from plainsd.train.gradient_checkpointing import checkpointing
from plainsd.train.job import EMBEDS, TrainJob, lora_endings, word_as_file
from plainsd.train.methods.controlnet import check_maps, check_start, controlnet
from plainsd.train.methods.dreambooth import PRIOR_FILE, check_whole_set, make_prior
from plainsd.train.methods.finetune import FineTune, frozen
from plainsd.train.methods.full import full
from plainsd.train.methods.inversion import first_rows, inversion, settle, written_down
from plainsd.train.methods.lora import lora
from plainsd.train.shard import gather

LCM_FLAGS = "--sampler lcm --steps 4 --guidance 1"
Check = Callable[[StableDiffusion, PictureSet], None]  # before anything takes long
Make = Callable[[StableDiffusion, Examples, dict], FineTune]
Write = Callable[[StableDiffusion, str | None], None]  # the result; with a mark, an intermediate one


def train_full(job: TrainJob) -> None:
    distill = job.distill()

    def make(sd: StableDiffusion, examples: Examples, shared: dict) -> FineTune:
        return full(sd, examples, text_encoder=job.options.lora.text_encoder, distill=distill, **shared)

    def write(sd: StableDiffusion, mark: str | None) -> None:
        save(sd, job.result(mark), dtype=job.save_dtype)

    if sd := tuned(job, make, write):
        with saving("the model"):
            write(sd, None)
        job.say(f"model in {job.result()}")


def train_lora(job: TrainJob) -> None:
    own, distill = job.options.lora, job.distill()
    where: dict[str, Any] = {"targets": own.targets, "conv": own.conv, "kind": own.kind, "factor": own.factor}

    def check(sd: StableDiffusion, pictures: PictureSet) -> None:
        to_adapt(sd, own.rank, own.rank if own.alpha is None else own.alpha, text=own.text_encoder, **where)
        if own.dora:
            others = "; diffusers/PEFT read it as it is" if own.kind == "lora" else ""
            job.say(f"A1111, ComfyUI and Forge reckon with dora_scale otherwise, and draw other pictures{others}")

    def make(sd: StableDiffusion, examples: Examples, shared: dict) -> FineTune:
        return lora(
            sd,
            examples,
            rank=own.rank,
            alpha=own.alpha,
            dora=own.dora,
            text_encoder=own.text_encoder,
            seed=job.options.pace.seed,
            distill=distill,
            **where,
            **shared,
        )

    notes = {"modelspec.title": f"{job.name} (LCM-LoRA)", "modelspec.usage_hint": LCM_FLAGS} if distill else {}
    endings = lora_endings(own.kind)

    def write(sd: StableDiffusion, mark: str | None) -> None:
        place = job.result(mark)
        for naming, ending in endings.items():
            save_lora(sd, place.with_name(place.name + ending), naming, notes, dtype=job.save_dtype)

    if sd := tuned(job, make, write, check):
        with saving("the LoRA"):
            write(sd, None)
        also = f" and {job.name}-peft.safetensors (diffusers')" if "peft" in endings else ""
        job.say(f"LoRA in {job.result()}.safetensors (kohya's names){also}")
        if distill:
            job.say(f"it makes the model a latent consistency model: draw with {LCM_FLAGS}")


def train_inversion(job: TrainJob) -> None:
    own = job.options.inversion
    token = own.token
    if job.world.sharded:
        raise UserError("method inversion learns a few numbers; leave out --shard")
    if not token:
        raise UserError("method inversion needs --token, the new word that the captions use, such as '<cat>'")
    plain = word_as_file(token)

    def check(sd: StableDiffusion, pictures: PictureSet) -> None:
        check_word(sd, token, first_rows(sd, own.initial, own.vectors, job.options.pace.seed))
        texts = [text for item in pictures.items for text in item.texts]
        without = sum(not occurs_in(token, text) for text in texts)
        if without:
            raise UserError(
                f"{without} of {len(texts)} captions do not have the word {token!r}; write it into "
                f'them, or give --caption "a photo of {token}" and pictures without captions'
            )

    def make(sd: StableDiffusion, examples: Examples, shared: dict) -> FineTune:
        return inversion(
            sd, examples, token, vectors=own.vectors, initial=own.initial, seed=job.options.pace.seed, **shared
        )

    def write(sd: StableDiffusion, mark: str | None) -> None:
        written_down(sd)
        folder, end = (job.out, "") if mark is None else (job.out / "results", f"-{mark}")
        for dialect, name in (("a1111", plain), ("diffusers", EMBEDS)):
            save_embedding(sd, token, folder / f"{name}{end}.safetensors", dialect)

    if sd := tuned(job, make, write, check):
        settle(sd)
        with saving("the word"):
            write(sd, None)
        job.say(
            f"{token} in {job.out}: {plain}.safetensors for A1111, which calls it {plain}; "
            f"{EMBEDS}.safetensors for diffusers"
        )


def train_controlnet(job: TrainJob) -> None:
    if job.world.sharded:
        raise UserError("method controlnet does not go with --shard; leave it out")
    found: list[ControlNet] = []
    own = job.options.control.control
    start = load_control(own, device=job.world.device, dtype="float32") if own else None
    if not isinstance(start, ControlNet | None):
        raise UserError(f"method controlnet goes on from ControlNets, and {own} is a T2I-Adapter; choose another one")

    def check(sd: StableDiffusion, pictures: PictureSet) -> None:
        if start:
            check_start(start, sd)
        check_maps(pictures)

    def make(sd: StableDiffusion, examples: Examples, shared: dict) -> FineTune:
        kept = {name: shared[name] for name in ("objective", "chunks")}
        method = controlnet(sd, examples, start, seed=job.options.pace.seed, **kept)
        found.append(cast(ControlNet, method.modules["net"]))
        return method

    def write(sd: StableDiffusion, mark: str | None) -> None:
        place = job.result(mark)
        save_control(found[0], place.with_name(f"{place.name}.safetensors"), dtype=job.save_dtype)
        save_control(found[0], place, dtype=job.save_dtype)

    if sd := tuned(job, make, write, check):
        with saving("the ControlNet"):
            write(sd, None)
        job.say(f"ControlNet in {job.result()}.safetensors (the original's names) and {job.result()} (diffusers')")


def tuned(job: TrainJob, make: Make, write: Write, check_it: Check | None = None) -> StableDiffusion | None:
    """The trained model; None if the run was stopped early, or if another process saves it."""
    sd = frozen(base_model(job))
    weights = weights_digest(sd.unet, sd.vae, *sd.text_encoders)
    job.check_options(base_weights=weights, **model_identity(sd, job.options.reading.size))
    if distill := job.distill():
        check_teacher(sd, distill)
    job.check_prompts(sd)
    network: nn.Module
    for network in (sd.unet, sd.vae, *sd.text_encoders):
        network.to(memory_format=torch.channels_last)
    pictures, heldout = job.data.pictures(sd.variant.size, sd.vae.config)
    if check_it:
        check_it(sd, pictures)
    if job.options.method == "controlnet" and heldout:
        check_maps(heldout, "held-out pictures")
    job.data.count_long_captions(sd, pictures)
    shared = {
        "objective": job.objective(),
        "chunks": job.options.reading.chunks,
        "prior": prior_set(job, sd, pictures.size),
        "prior_weight": job.options.prior.prior_weight,
    }
    examples, held = job.data.examples(sd.vae, pictures), job.data.examples(sd.vae, heldout) if heldout else None
    if job.options.method != "full" and job.options.telling.prompts is None:
        sd.vae.to("meta")  # latents are cached, and it is not needed for samples or saving
    method = make(sd, examples, shared)
    parts = job.spread(sd)
    check = (lambda: method.validate(held)) if held else None
    nets = [module for module in method.modules.values() if isinstance(module, ControlNet)]
    copies = [method.teacher] if isinstance(method.teacher, UNet) else []
    with ExitStack() as stack:
        for network in (sd.unet, *nets, *copies):
            stack.enter_context(trained_faster(network))
            stack.enter_context(checkpointing(network, job.options.pace.checkpointing))
        save_it, sample = partial(write, sd), job.sampler(sd, *nets, pictures=pictures)
        done = job.train(method, pictures, check, sample, before=True, save=save_it)
    for network in parts if done else []:
        gather(network)
    return sd if done and job.world.first else None


def base_model(job: TrainJob) -> StableDiffusion:
    """The base model in float32; with --half-base its UNet is loaded in bfloat16, never held in float32."""
    half, path = job.options.lora.half_base, find(job.options.base)
    if half and job.dtype != torch.bfloat16:
        raise UserError("--half-base keeps frozen weights in bfloat16: it goes with --dtype bfloat16")
    zero_snr = on_or_off(job.options.zero_snr)
    contents = read(path, vae=job.options.from_scratch.vae, prediction=job.options.prediction, zero_snr=zero_snr)
    networks = {}
    for name, network in contents.networks.items():
        networks[name] = network.build(job.world.device, torch.bfloat16 if half and name == "unet" else torch.float32)
    return assemble(contents.variant, networks, tokenizers(contents, path), path)


def prior_set(job: TrainJob, sd: StableDiffusion, size: int) -> Examples | None:
    """DreamBooth's prior (class) pictures: read, or generated first."""
    own = job.options.prior
    if own.prior is None and own.prior_prompt is None:
        return None
    folder = own.prior or job.out / "prior"
    with job.world.first_goes_ahead():
        begun = own.prior_prompt is not None and (folder / PRIOR_FILE).is_file()
        if own.prior is None or not own.prior.is_dir() or begun:
            if own.prior_prompt is None:
                raise UserError(f"no folder {str(own.prior)!r}; give --prior-prompt, and the model makes the pictures")
            make_prior(sd, folder, own.prior_prompt, own.prior_count, size, job.say)
        else:
            check_whole_set(folder)
        known, sources = job.out / "cache" / "scanned.json", [folder_of(one) for one in job.options.data]
        without = (*sources, *filter(None, [heldout_folder(job.options)]), job.out)
        pictures = read_pictures(
            folder,
            size,
            bad_share=job.options.reading.bad_share,
            caption=own.prior_prompt,
            known=known,
            without=without,
            say=job.say,
        )
    job.data.compare_pictures("prior", pictures)
    return job.data.examples(sd.vae, pictures)
