"""Jobs of the methods that can train from scratch: `vae`, then `scratch` with the resulting autoencoder."""

import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from plainsd.checkpoint import load, load_vae, save, save_vae
from plainsd.disk import read_json, written_whole
from plainsd.errors import UserError
from plainsd.files.described import read_description
from plainsd.files.detect import UNET_PREFIX
from plainsd.files.hub import find
from plainsd.files.single import read_single
from plainsd.files.tensorfile import open_tensors
from plainsd.models.vae import VAE, VAEConfig
from plainsd.models.variants import SD1, Variant
from plainsd.pictures.images import grid, to_pil, write_png
from plainsd.pictures.model import StableDiffusion
from plainsd.speed.training import trained_faster
from plainsd.text.tokenizer import Tokenizer
from plainsd.train.checkpoints import saving
from plainsd.train.claim import model_identity, weights_digest
from plainsd.train.data.crops import Framing
from plainsd.train.gradient_checkpointing import checkpointing
from plainsd.train.job import TrainJob
from plainsd.train.methods.dreambooth import AT_ONCE
from plainsd.train.methods.finetune import frozen
from plainsd.train.methods.full import full
from plainsd.train.methods.scratch import from_scratch
from plainsd.train.methods.vae import VaeMethod, init_vae, measure_scaling, validate
from plainsd.train.shard import gather


def described_variant(job: TrainJob) -> Variant:
    """The networks that --model describes."""
    if job.options.from_scratch.model is None:
        raise UserError(f"method {job.options.method} needs --model, a JSON file that describes the networks")
    variant = read_description(job.options.from_scratch.model)
    return replace(variant, size=job.options.reading.size or variant.size)


def first_vae(job: TrainJob) -> tuple[Variant, VAE]:
    """The autoencoder to train: that of --base, or a new one."""
    base, own = job.options.base, job.options.from_scratch
    if base is None:
        if own.decoder_only:
            raise UserError("--decoder-only leaves the encoder as it is: it needs --base, a trained autoencoder")
        variant = described_variant(job)
        assert isinstance(variant.vae, VAEConfig)  # `read_description` sees to it
        vae = job.on_device(VAE(variant.vae))
        init_vae(vae)
        job.check_options(model_size=str(variant.size))
        return variant, vae
    vae = job.on_device(load_vae(base, device=job.world.device, dtype=torch.float32))
    if not isinstance(vae, VAE):
        raise UserError(
            f"--base {base} is TAESD, which is not trained here; give an autoencoder such as SD's", field="base"
        )
    size = job.options.reading.size
    variant = described_variant(job) if own.model else replace(SD1, size=size or size_around(base, vae.config.factor))
    same = isinstance(variant.vae, VAEConfig) and replace(variant.vae, scaling_factor=vae.config.scaling_factor)
    if own.model and same != vae.config:
        raise UserError(f"the autoencoder of --base {base} has other sizes than {own.model} says; leave --model out")
    job.check_options(base_weights=weights_digest(vae), model_size=str(variant.size))
    return variant, vae


def size_around(base: str, factor: int) -> int:
    """The size in pixels of the model that an autoencoder is taken from, or that its own settings say. UserError where
    nothing says it."""
    path = find(base)
    if path.is_file():
        if any(name.startswith(UNET_PREFIX) for name in open_tensors(path).tensors):
            return read_single(path, None, vae=False).variant.size
    for name, scale in (("unet/config.json", factor), ("vae/config.json", 1), ("config.json", 1)):
        side = read_json(path / name).get("sample_size") if (path / name).is_file() else None
        if type(side) is int and side > 0:
            return side * scale
    raise UserError(f"--base {base} does not say how large its pictures are; give --size", field="size")


def train_vae(job: TrainJob) -> None:
    own = job.options.from_scratch
    if job.world.sharded:
        raise UserError("method vae has no --shard: an autoencoder fits on one GPU")
    torch.manual_seed(job.options.pace.seed)  # the networks' first weights
    variant, vae = first_vae(job)
    pictures, heldout = job.data.pictures(variant.size, vae.config)
    if pictures.framing != Framing():
        raise UserError("method vae trains on middle squares; leave out --buckets, --crop and --flip")
    for part in (vae.encoder, vae.quant) if own.decoder_only else ():
        part.requires_grad_(False)
    method = VaeMethod(
        vae, pictures, own.edge_weight, own.kl_weight, own.patch_weight, own.patch_after, own.latent_noise
    )
    shown = heldout or pictures

    def sample(path: Path) -> None:
        pairs: list[tuple[Image.Image, Image.Image]] = []
        for first in range(0, count := min(16, len(shown)), AT_ONCE):
            real = shown.pixels(range(first, min(first + AT_ONCE, count))).to(job.world.device)
            with torch.inference_mode():
                fake = vae.decode(vae.encode(real).mean)
            pairs += zip(to_pil(real), to_pil(fake), strict=True)
        write_png(grid([image for pair in pairs for image in pair], 8), path)

    def write(mark: str | None) -> None:
        if not own.decoder_only:
            vae.config = replace(vae.config, scaling_factor=measure_scaling(vae, pictures))
        save_vae(vae, job.out / "vae" if mark is None else job.result(mark), variant)

    check = (lambda: validate(vae, heldout)) if heldout else None
    with job.data.pixels(pictures) as method.pixels, trained_faster(vae):
        done = job.train(method, pictures, check, sample, save=write)
    if not done or not job.world.first:
        return
    with saving("the autoencoder"):
        write(None)
    job.say(f"autoencoder in {job.out / 'vae'}, scaling factor {vae.config.scaling_factor:.5f}")
    if heldout:
        job.say("held-out pictures: PSNR {psnr:.2f} dB, L1 {l1:.4f}".format(**validate(vae, heldout)))


def train_scratch(job: TrainJob) -> None:
    variant, own = described_variant(job), job.options.from_scratch
    if not own.vae or not own.tokenizer:
        raise UserError("method scratch needs --vae and --tokenizer: train the first with --method vae")
    if missing := [str(file) for file in own.carry if not file.is_file()]:
        raise UserError(f"--carry {missing[0]}: there is no such file; leave it out, or give one that is there")
    torch.manual_seed(job.options.pace.seed)  # the networks' first weights
    vae = job.on_device(load_vae(own.vae, device=job.world.device, dtype=torch.float32))
    sd = frozen(from_scratch(variant, vae, Tokenizer.from_folder(own.tokenizer)))
    if job.options.base is not None:
        begin_as(sd, job.options.base)
    for network in (sd.unet, *sd.text_encoders):
        job.on_device(network)
    weights = {"vae_weights": weights_digest(vae), "first_weights": weights_digest(sd.unet, *sd.text_encoders)}
    job.check_options(**weights, **model_identity(sd, job.options.reading.size))
    job.check_prompts(sd)
    pictures, heldout = job.data.pictures(variant.size, vae.config)
    job.data.count_long_captions(sd, pictures)
    held = job.data.examples(vae, heldout) if heldout else None

    def write(mark: str | None) -> None:
        save(sd, job.result(mark), dtype=job.save_dtype)
        for file in own.carry:
            with written_whole(job.result(mark) / file.name) as draft:
                shutil.copyfile(file, draft)

    with ExitStack() as stack:
        if job.options.reading.live_latents:
            examples = job.data.live_examples(vae, pictures, stack.enter_context(job.data.pixels(pictures)))
        else:
            examples = job.data.examples(vae, pictures)
        method = full(sd, examples, text_encoder=True, objective=job.objective(), chunks=job.options.reading.chunks)
        parts = job.spread(sd)
        check = (lambda: method.validate(held, 64)) if held else None
        stack.enter_context(trained_faster(sd.unet))
        stack.enter_context(checkpointing(sd.unet, job.options.pace.checkpointing))
        done = job.train(method, pictures, check, job.sampler(sd), save=write)
    if not done:
        return
    for network in parts:
        gather(network)
    if not job.world.first:
        return
    with saving("the model"):
        write(None)
    job.say(f"model in {job.result()}")


def begin_as(sd: StableDiffusion, base: str) -> None:
    """Copies text encoder and UNet of another model, such as a run that continues with other options."""
    other = load(base, device="cpu", dtype=torch.float32)
    network: nn.Module
    weights: nn.Module
    for network, weights in zip((sd.unet, *sd.text_encoders), (other.unet, *other.text_encoders), strict=True):
        shapes, given = (
            {name: tuple(tensor.shape) for name, tensor in n.state_dict().items()} for n in (network, weights)
        )
        if shapes != given:
            name = next(name for name in sorted({*shapes, *given}) if shapes.get(name) != given.get(name))
            raise UserError(
                f"--base {base} has other networks than --model describes: {name} is "
                f"{given.get(name, 'missing')}, and should be {shapes.get(name, 'absent')}"
            )
        network.load_state_dict(weights.state_dict())
