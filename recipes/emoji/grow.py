"""Grow an autoencoder by one level, the same latents for pictures of twice the side; or widen its latents; or make a
model on wider latents that begins as an old one.

    python recipes/emoji/grow.py OLD_MODEL OUT --description MODEL.json --data FOLDER
    python recipes/emoji/grow.py OLD_MODEL OUT --description MODEL.json --latents 24
    python recipes/emoji/grow.py OLD_MODEL OUT --description MODEL.json --data FOLDER --vae FOLDER --tokenizer FOLDER

A level as wide as the outermost one is put before the encoder's first and after the decoder's last. Its residual blocks
begin as identities, and the two convolutions that join it to the old networks by least squares on pictures of the
data: the encoder's downsampling gives what the old first convolution gives for the halved picture, and the decoder's
last convolution gives the picture. So training (`plainsd train --method vae --base OUT`) begins near the old
autoencoder, and a UNet of the old latents is near one of the new. Growing as in Karras et al. 2017 (arXiv:1710.10196)
and Chen et al. 2015 (arXiv:1511.05641).

With --latents the levels stay, and new latent channels are put behind the old ones (`widened`). With --vae, which is
such an autoencoder trained on, and --tokenizer, OUT is a whole model: see `carried_over`.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plainsd.checkpoint import load, load_vae, save, save_vae
from plainsd.cli import exit_code
from plainsd.errors import UserError
from plainsd.files.described import read_description
from plainsd.models.clip import TextEncoder
from plainsd.models.vae import VAE
from plainsd.models.variants import Variant
from plainsd.pictures.model import StableDiffusion
from plainsd.text.tokenizer import Tokenizer
from plainsd.train.data.pictures import PictureSet, read_pictures
from plainsd.train.data.scenes import SCENE_PREFIX, read_scenes
from plainsd.train.methods.scratch import from_scratch
from plainsd.train.methods.vae import psnr


def grown(old: VAE, pixels: Tensor) -> VAE:
    """`old` with one more level; `pixels`: pictures (B, 3, H, W) in [-1, 1], at the new size, to fit the joins on."""
    new = VAE(replace(old.config, channels=(old.config.channels[0], *old.config.channels)))
    names = new.state_dict()
    for name, weight in old.state_dict().items():
        part, *rest = name.split(".")
        if part == "encoder" and rest[0] == "levels":
            name = ".".join([part, "levels", str(int(rest[1]) + 1), *rest[2:]])
        if name.startswith("encoder.conv_in"):
            continue  # it works at half the size: `Downsample` stands for it
        names[name] = weight
    new.load_state_dict(names)
    for level in (new.encoder.levels[0], new.decoder.levels[-1]):
        for block in level.res:
            nn.init.zeros_(block.conv2.weight)
            nn.init.zeros_(block.conv2.bias)
    down, up = new.encoder.levels[0].resample.conv, new.decoder.levels[-2].resample.conv
    nn.init.dirac_(up.weight)
    nn.init.zeros_(up.bias)
    nn.init.kaiming_normal_(new.encoder.conv_in.weight, nonlinearity="linear")
    nn.init.zeros_(new.encoder.conv_in.bias)
    halved = F.avg_pool2d(pixels, 2)
    fit(down, F.pad(new.encoder.conv_in(pixels), (0, 1, 0, 1)), old.encoder.conv_in(halved))
    latents = old.post_quant(old.encode(halved).mean)
    features = new.decoder.mid(new.decoder.conv_in(latents))
    for level in new.decoder.levels:
        features = level(features)
    fit(new.decoder.conv_out, F.pad(F.silu(new.decoder.norm(features)), (1, 1, 1, 1)), pixels)
    return new


@torch.no_grad()
def widened(old: VAE, latents: int) -> VAE:
    """`old` with more latent channels. It decodes to the same pictures: the new channels are random mixtures of what
    the encoder has, and the decoder's weights for them are zero."""
    before = old.config.latent_channels
    if latents <= before:
        raise UserError(f"--latents {latents} is no more than the {before} channels that there are; give more")
    new = VAE(replace(old.config, latent_channels=latents, latents_mean=None, latents_std=None))
    weights = new.state_dict()
    same = {name: weight for name, weight in old.state_dict().items() if weight.shape == weights[name].shape}
    new.load_state_dict(same, strict=False)
    for conv in (new.quant, new.post_quant):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    nn.init.kaiming_normal_(new.encoder.conv_out.weight, nonlinearity="linear")
    nn.init.zeros_(new.encoder.conv_out.bias)
    new.encoder.conv_out.weight[latents:] = 0
    new.quant.bias[latents:] = old.quant.bias[before:].mean()
    both = [*range(before), *range(latents, latents + before)]  # means and log variances
    width = old.config.channels[-1]
    put_part(new.encoder.conv_out, old.encoder.conv_out, both, list(range(width)))
    put_part(new.quant, old.quant, both, both)
    put_part(new.post_quant, old.post_quant, both[:before], both[:before])
    put_part(new.decoder.conv_in, old.decoder.conv_in, list(range(width)), both[:before])
    return new


def put_part(new: nn.Conv2d, old: nn.Conv2d, outputs: list[int], inputs: list[int]) -> None:
    """Makes these outputs of a convolution what the old one gives for these inputs."""
    new.weight[outputs] = 0
    new.weight[torch.tensor(outputs)[:, None], torch.tensor(inputs)] = old.weight
    new.bias[outputs] = old.bias


@torch.no_grad()
def nearness(old: VAE, new: VAE, pixels: Tensor) -> str:
    """On pictures at the new size: how far the latents are from the old ones, and the PSNR of both reconstructions."""
    latents, own = old.encode(F.avg_pool2d(pixels, 2)).mean, new.encode(pixels).mean
    enlarged = F.interpolate(old.decode(latents), scale_factor=2, mode="bicubic")
    apart = ((own - latents).norm() / latents.norm()).item()
    before, after = (psnr(rebuilt, pixels).mean().item() for rebuilt in (enlarged, new.decode(own)))
    return f"latents {apart:.1%} from the old ones; {after:.2f} dB, the old one's pictures enlarged {before:.2f} dB"


def fit(conv: nn.Conv2d, x: Tensor, wanted: Tensor) -> None:
    """Sets a convolution's weight and bias by least squares: `x` (B, C, H, W) is already padded."""
    columns = F.unfold(x, conv.kernel_size, stride=conv.stride).transpose(1, 2).flatten(0, 1)  # (B*N, C*k*k)
    columns = torch.cat([columns, torch.ones_like(columns[:, :1])], dim=1).double()
    target = wanted.flatten(2).transpose(1, 2).flatten(0, 1).double()  # (B*N, C')
    square = columns.T @ columns
    square += 1e-6 * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
    solved = torch.linalg.solve(square, columns.T @ target)
    conv.weight.copy_(solved[:-1].T.reshape(conv.weight.shape))
    conv.bias.copy_(solved[-1])


ON_LATENTS = {"conv_in.weight", "conv_out.weight", "conv_out.bias"}


@torch.no_grad()
def carried_over(
    old: StableDiffusion, vae: VAE, tokenizer: Tokenizer, variant: Variant, pixels: Tensor
) -> StableDiffusion:
    """A model on wider latents and another vocabulary that begins near the old one: its UNet reads and writes what, of
    these pictures (B, 3, H, W), is linear in both models' latents; a new token is the mean of the old tokens that its
    text had; and further transformer blocks add nothing yet."""
    new = from_scratch(variant, vae, tokenizer)
    weights, before = new.unet.state_dict(), old.unet.state_dict()
    given = {name: w for name, w in before.items() if name in weights and w.shape == weights[name].shape}
    new.unet.load_state_dict(given, strict=False)
    for name in sorted((weights.keys() | before.keys()) - given.keys() - ON_LATENTS):
        if name in before or ".blocks." not in name:
            raise UserError(f"the UNet differs from the old model's in more than its latents and depth: {name}")
        if name.rpartition(".")[0].endswith((".self_attn.out", ".cross_attn.out", ".ff.down")):
            nn.init.zeros_(new.unet.get_parameter(name))
    latents = [sd.vae.config.scaled(sd.vae.encode(pixels).mean).movedim(1, -1).flatten(0, -2) for sd in (old, new)]
    inward, outward = linear_map(latents[1], latents[0]), linear_map(latents[0], latents[1])
    new.unet.conv_in.weight.copy_(torch.einsum("oikl,in->onkl", old.unet.conv_in.weight, inward))
    new.unet.conv_in.bias.copy_(old.unet.conv_in.bias)
    new.unet.conv_out.weight.copy_(torch.einsum("no,oikl->nikl", outward, old.unet.conv_out.weight))
    new.unet.conv_out.bias.copy_(outward @ old.unet.conv_out.bias)
    take_text(new.text_encoders[0], old.text_encoders[0], tokenizer, old.tokenizers[0])
    return new


def linear_map(x: Tensor, y: Tensor) -> Tensor:
    """The matrix (M, N) of the affine map that takes rows x (B, N) nearest to rows y (B, M)."""
    x, y = (x - x.mean(0)).double(), (y - y.mean(0)).double()
    return torch.linalg.lstsq(x, y).solution.T.float()


def take_text(new: TextEncoder, old: TextEncoder, tokenizer: Tokenizer, before: Tokenizer) -> None:
    """The old text encoder with a token table for another vocabulary, and more positions, which begin as the last."""
    free = {"vocab": 0, "eos": 0, "positions": 0}
    if replace(new.config, **free) != replace(old.config, **free):
        raise UserError("the text encoder differs from the old model's in more than its vocabulary and positions")
    table, places = new.token.weight, new.position.weight
    for symbol, row in tokenizer.vocabulary.items():
        if symbol in before.vocabulary:
            table[row] = old.token.weight[before.vocabulary[symbol]]
        elif pieces := before.encode(symbol.removesuffix("</w>")):
            table[row] = old.token.weight[pieces].mean(0)
    for i in range(len(places)):
        places[i] = old.position.weight[min(i, len(old.position.weight) - 1)]
    kept = new.state_dict().keys() - {"token.weight", "position.weight"}
    new.load_state_dict({name: old.state_dict()[name] for name in kept}, strict=False)  # without the two tables


def with_level(old: VAE, options: argparse.Namespace) -> VAE:
    if not options.data:
        raise UserError("--data is missing: a new level is fitted on pictures")
    with torch.no_grad():
        return grown(old, some_pixels(options))


def some_pixels(options: argparse.Namespace) -> Tensor:
    if options.data.startswith(SCENE_PREFIX):
        pictures = PictureSet(read_scenes(options.data, heldout=False), options.size)
    else:
        pictures = read_pictures(options.data, options.size)
    step = max(len(pictures) // options.count, 1)
    return pictures.pixels(range(0, len(pictures), step)[: options.count])


def save_model_on(variant: Variant, options: argparse.Namespace) -> None:
    if not (options.vae and options.tokenizer and options.data):
        raise UserError("--vae, --tokenizer and --data belong together: a model on other latents needs all three")
    torch.manual_seed(0)
    old = load(options.model, device="cpu", dtype="float32")
    vae = load_vae(options.vae, device="cpu", dtype="float32")
    tokenizer = Tokenizer.from_folder(options.tokenizer)
    save(carried_over(old, vae, tokenizer, variant, some_pixels(options)), options.out)


def check_use(options: argparse.Namespace) -> None:
    """UserError for what would be ignored."""
    kinds = {"vae": ("latents", "heldout"), "tokenizer": ("latents", "heldout"), "latents": ("data", "heldout")}
    for kind, others in kinds.items():
        for other in others if getattr(options, kind) is not None else ():
            if getattr(options, other) is not None:
                raise UserError(f"--{other} has no effect with --{kind}; leave it out")


def grow(options: argparse.Namespace) -> None:
    if options.count < 1:
        raise UserError(f"--count {options.count}: give at least 1")
    check_use(options)
    variant = read_description(options.description)
    if options.vae or options.tokenizer:
        save_model_on(variant, options)
        return
    old = load_vae(options.model, device="cpu", dtype="float32")
    torch.manual_seed(0)
    new = widened(old, options.latents) if options.latents is not None else with_level(old, options)
    if replace(new.config, scaling_factor=variant.vae.scaling_factor) != variant.vae:
        raise UserError(
            f"the grown autoencoder has channels {new.config.channels}, {new.config.layers} ResBlocks a level and "
            f"latents of {new.config.latent_channels}: {options.description} describes another one"
        )
    save_vae(new, options.out, variant)
    if options.heldout and options.latents is None:
        pictures = read_pictures(options.heldout, options.size)
        print(nearness(old, new, pictures.pixels(range(min(options.count, len(pictures))))))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="folder of the model whose autoencoder is grown")
    parser.add_argument("out", type=Path, help="folder for the new autoencoder")
    parser.add_argument("--data", help="folder of pictures, or emoji:SET.json, for a new level or a model")
    parser.add_argument("--heldout", type=Path, help="folder of other pictures: prints how near the new one is on them")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels")
    parser.add_argument("--count", type=int, default=64, help="how many pictures the joins are fitted on")
    parser.add_argument("--vae", type=Path, help="an autoencoder with wider latents: makes a model on them")
    parser.add_argument("--tokenizer", type=Path, help="folder of that model's tokenizer")
    parser.add_argument("--latents", type=int, help="widen the latents to so many channels, and keep the levels")
    parser.add_argument("--description", type=Path, required=True, help="JSON file that describes the new model")
    options = parser.parse_args(argv)
    return exit_code(lambda: grow(options), "grow.py")


if __name__ == "__main__":
    sys.exit(main())
