"""The methods that begin from nothing, as jobs: `vae`, then `scratch` on the autoencoder that it made."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from plainsd.checkpoint import load_vae, save, save_vae
from plainsd.errors import UserError
from plainsd.images import grid, to_pil, write_png
from plainsd.models.vae import VAE
from plainsd.speed import trained_faster
from plainsd.tokenizer import Tokenizer
from plainsd.train.checkpoints import saving
from plainsd.train.full import full
from plainsd.train.jobs import Job
from plainsd.train.scratch import from_scratch, read_variant
from plainsd.train.shard import gather
from plainsd.train.vae import VaeMethod, init_vae, measure_scaling, validate
from plainsd.train.views import Framing
from plainsd.variants import Variant


def described_variant(job: Job) -> Variant:
    """The networks that --model describes."""
    if job.options.nothing.model is None:
        raise UserError(f"method {job.options.method} needs --model, a JSON file that describes the networks")
    variant = read_variant(job.options.nothing.model)
    return replace(variant, size=job.options.reading.size or variant.size)


def train_vae(job: Job) -> None:
    variant, own = described_variant(job), job.options.nothing
    if job.world.sharded:
        raise UserError("method vae has no --shard: an autoencoder fits on one GPU")
    torch.manual_seed(job.options.pace.seed)            # the networks' first weights
    job.keep_options()
    pictures, heldout = job.pictures(variant.size)
    if pictures.framing != Framing():
        raise UserError("method vae trains on middle squares; leave out --buckets, --crop and --flip")
    vae = job.on_device(VAE(variant.vae))
    init_vae(vae)
    method = VaeMethod(vae, pictures, own.edge_weight, own.kl_weight, own.patch_weight, own.patch_after)
    shown = heldout or pictures

    def sample(path: Path) -> None:
        real = shown.pixels(range(min(16, len(shown)))).to(job.world.device)
        with torch.inference_mode():
            fake = vae.decode(vae.encode(real).mean)
        write_png(grid([i for pair in zip(to_pil(real), to_pil(fake), strict=True) for i in pair], 8), path)

    check = (lambda: validate(vae, heldout)) if heldout else None
    with trained_faster(vae):
        done = job.train(method, pictures, check, sample)
    if not done or not job.world.first:
        return
    vae.config = replace(vae.config, scaling_factor=measure_scaling(vae, pictures))
    with saving("the autoencoder"):
        save_vae(vae, job.out / "vae", variant)
    job.say(f"autoencoder in {job.out / 'vae'}, scaling factor {vae.config.scaling_factor:.5f}")
    if heldout:
        job.say("held-out pictures: PSNR {psnr:.2f} dB, L1 {l1:.4f}".format(**validate(vae, heldout)))


def train_scratch(job: Job) -> None:
    variant, own = described_variant(job), job.options.nothing
    if not own.vae or not own.tokenizer:
        raise UserError("method scratch needs --vae and --tokenizer: train the first with --method vae")
    torch.manual_seed(job.options.pace.seed)            # the networks' first weights
    job.keep_options()
    pictures, heldout = job.pictures(variant.size)
    vae = load_vae(own.vae, device=job.world.device, dtype=torch.float32).to(memory_format=torch.channels_last)
    sd = from_scratch(variant, vae, Tokenizer.from_folder(own.tokenizer))
    for network in (sd.unet, *sd.text_encoders):
        job.on_device(network)
    vae.requires_grad_(False)
    job.count_long_captions(sd, pictures)
    method = full(sd, job.examples(vae, pictures), text_encoder=True, objective=job.objective(),
                  chunks=job.options.reading.chunks)
    held = job.examples(vae, heldout) if heldout else None
    parts = job.spread(sd)
    check = (lambda: method.validate(held, 64)) if held else None
    with trained_faster(sd.unet):
        done = job.train(method, pictures, check, job.sampler(sd))
    if not done:
        return
    for network in parts:
        gather(network)
    if not job.world.first:
        return
    with saving("the model"):
        save(sd, job.out / "model", dtype=job.save_dtype)
        for file in own.carry:
            shutil.copy(file, job.out / "model" / file.name)
    job.say(f"model in {job.out / 'model'}")
