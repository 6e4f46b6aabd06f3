"""The autoencoder in bands of rows: the same picture in a fraction of the memory.

Decoding tile by tile leaves seams: in each tile GroupNorm has other statistics, and attention sees only the tile. Here
each layer passes over the whole map before the next one starts, a band of rows at a time: statistics are those of the
whole map, attention reads all positions, and a convolution reads one row beyond its band. At most three maps and the
workspace of one band are in memory. The result equals a plain pass up to the order of summation, and on the CPUs
that were tried, with bands of this size, bit for bit.

TAESD has neither norms nor attention: its bands go through all layers at once, with as many rows beyond them as its
convolutions see.

Inference only: maps are overwritten. Shape letters: B batch, C channels, H W height and width, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plainsd.models.layers import ResBlock
from plainsd.models.tiny_vae import CERTAIN, AnyVAE, TinyVAE
from plainsd.models.vae import Gaussian, SpatialAttention, VAELevel, VAEMiddle

BAND = 2**15  # positions in a band: at 256 channels in float32, 32 MB a map
QUERIES = 2**12  # queries of one attention call

Run = Callable[[Tensor], Tensor]


def bands(height: int, width: int) -> Iterator[tuple[int, int]]:
    """(first row, end row) of each band; both even, except at the end of the map."""
    rows = max(2, BAND // width // 2 * 2)
    for top in range(0, height, rows):
        yield top, min(top + rows, height)


def by_bands(run: Run, x: Tensor, *, halo: int = 0, up: int = 1, onto: Tensor | None = None) -> Tensor:
    """run(x), computed from bands of x that overlap by `halo` rows. `run` upsamples rows by `up`.

    At the edge of the map `run` pads as usual; rows that are wrong at the edges of a band are cut off. With `onto`, the
    result is added to it.
    """
    out = onto
    for top, bottom in bands(x.shape[2], up * x.shape[3]):
        first = max(top - halo, 0)
        y = run(x[:, :, first : bottom + halo])
        form = torch.channels_last if y.stride(1) == 1 else torch.contiguous_format
        y = y[:, :, up * (top - first) :][:, :, : up * (bottom - top)]  # (B, C, rows, W)
        if out is None:
            shape = (*y.shape[:2], up * x.shape[2], y.shape[3])
            out = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=form)
        rows = out[:, :, up * top : up * bottom]
        rows.copy_(y) if onto is None else rows.add_(y)
    return out


def halved(downsample: nn.Module, x: Tensor) -> Tensor:
    """The VAE's Downsample: each output row reads two rows and the one below."""
    parts = [downsample(x[:, :, top : bottom + 1])[:, :, : (bottom - top) // 2] for top, bottom in bands(*x.shape[2:])]
    return torch.cat(parts, dim=2)


def activated(norm: nn.GroupNorm, x: Tensor) -> Run:
    """silu(norm(x)) as a function of any part of x, with the statistics of the whole map.

    Statistics are torch's, a few groups at a time, and are applied as torch does: (x - mean) / deviation * weight +
    bias as one multiply-add in float32, with the same rounding.
    """
    width = norm.num_channels // norm.num_groups  # C / G
    some = max(1, 256 * BAND // (width * x.shape[2] * x.shape[3]))  # groups
    moments = [_moments(x[:, i * width : (i + some) * width], width, norm.eps) for i in range(0, norm.num_groups, some)]
    mean, inverse = (  # (B, C)
        torch.cat(part, dim=1).repeat_interleave(width, dim=1) for part in zip(*moments, strict=True)
    )
    scale = inverse * norm.weight.float()
    shift = torch.addcmul(norm.bias.float(), -scale, mean)[:, :, None, None]
    scale = scale[:, :, None, None]
    return lambda part: F.silu(torch.addcmul(shift, part.float(), scale).to(part.dtype), inplace=True)


def _moments(x: Tensor, width: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation of each group of `width` channels, float32: (B, channels / width)."""
    if x.device.type != "cpu":  # whose GroupNorm alone takes float32 weights beside half-precision maps
        return moments_of_groups(x, width, eps)
    count, channels, height, columns = x.shape
    unit = x.new_ones(channels, dtype=torch.float32)  # float32 weights: moments come in float32
    groups = channels // width
    x = x.contiguous(memory_format=torch.channels_last if x.stride(1) == 1 else torch.contiguous_format)  # some of them
    return torch.native_group_norm(x, unit, 0 * unit, count, channels, height * columns, groups, eps)[1:]


def moments_of_groups(x: Tensor, width: int, eps: float) -> tuple[Tensor, Tensor]:
    """The same by their definition, on any device."""
    variance, mean = torch.var_mean(x.unflatten(1, (-1, width)).float(), (2, 3, 4), correction=0)
    return mean, (variance + eps).rsqrt()


def resblock(block: ResBlock, x: Tensor) -> Tensor:
    """ResBlock.forward in bands; without a skip convolution the result overwrites x."""
    first = activated(block.norm1, x)
    h = by_bands(lambda part: block.conv1(first(part)), x, halo=1)
    out = x if isinstance(block.skip, nn.Identity) else by_bands(block.skip, x)
    second = activated(block.norm2, h)
    return by_bands(lambda part: block.conv2(second(part)), h, halo=1, onto=out)


def banded_attention(block: SpatialAttention, x: Tensor) -> Tensor:
    """SpatialAttention.forward, some queries at a time."""
    h = block.norm(x).flatten(2).transpose(1, 2)  # (B, H*W, C)
    out = torch.cat([block.attn(queries, h) for queries in h.split(QUERIES, dim=1)], dim=1)
    return x + out.transpose(1, 2).unflatten(2, x.shape[2:])


def middle(block: VAEMiddle, x: Tensor) -> Tensor:
    return resblock(block.res2, banded_attention(block.attn, resblock(block.res1, x)))


def levels(through: nn.ModuleList, x: Tensor, resample: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
    level: VAELevel
    for level in through:
        for block in level.res:
            x = resblock(block, x)
        if level.resample is not None:
            x = resample(level.resample, x)
    return x


@torch.no_grad()
def decode_in_bands(vae: AnyVAE, latents: Tensor) -> Tensor:
    """VAE.decode in bands: latents (B, L, H/f, W/f) -> pixels (B, 3, H, W)."""
    if isinstance(vae, TinyVAE):
        return by_bands(vae.decode, latents, halo=rows_seen(vae.config.decoder_blocks), up=vae.config.factor)
    decoder = vae.decoder
    x = middle(decoder.mid, decoder.conv_in(vae.post_quant(latents)))
    x = levels(decoder.levels, x, lambda upsample, x: by_bands(upsample, x, halo=1, up=2))
    last = activated(decoder.norm, x)
    return by_bands(lambda part: decoder.conv_out(last(part)), x, halo=1)


@torch.no_grad()
def encode_in_bands(vae: AnyVAE, pixels: Tensor) -> Gaussian:
    """VAE.encode in bands: pixels (B, 3, H, W) -> a Gaussian over (B, L, H/f, W/f)."""
    if isinstance(vae, TinyVAE):
        return tiny_encoded(vae, pixels)
    encoder = vae.encoder
    x = by_bands(encoder.conv_in, pixels, halo=1)
    x = middle(encoder.mid, levels(encoder.levels, x, halved))
    return vae.gaussian(encoder.conv_out(activated(encoder.norm, x)(x)))


def rows_seen(blocks: Sequence[int]) -> int:
    """Rows of latents beyond a band that TAESD's convolutions see, rounded up. `blocks`: of each level, the latents'
    first; one has three convolutions, each level one more, and the last of them a second."""
    levels = sum((3 * count + 1) / 2**level for level, count in enumerate(blocks))
    return math.ceil(levels + 2 / 2 ** len(blocks)) + 1


def tiny_encoded(vae: TinyVAE, pixels: Tensor) -> Gaussian:
    """TAESD's encoding, a band of latents at a time."""
    factor, halo, means = vae.config.factor, rows_seen(vae.config.encoder_blocks[::-1]), []
    for top, bottom in bands(pixels.shape[2] // factor, pixels.shape[3]):
        first = max(top - halo, 0)
        mean = vae.encode(pixels[:, :, factor * first : factor * (bottom + halo)]).mean
        means.append(mean[:, :, top - first :][:, :, : bottom - top])
    mean = torch.cat(means, dim=2)
    return Gaussian(mean, torch.full_like(mean, CERTAIN))
