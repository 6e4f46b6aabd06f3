"""Merging models, a tensor at a time: `plainsd merge`.

    A (1 - s) + B s      weighted sum
    A + s (B - C)        add difference: what B learned on top of C

for every tensor of the UNet and the text encoders, in at least float32, as in A1111's checkpoint merger. Autoencoder,
tokenizers and settings are A's (A1111 merges autoencoders too). A may be an inpainting model where the others are not:
its UNet's first convolution then keeps the weights of the mask and masked-picture channels.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from plainsd.diffusion.schedule import EDMSchedule
from plainsd.errors import UserError
from plainsd.files.convert import convert, read
from plainsd.files.hub import find
from plainsd.files.recipe import digits_of, narrowed, with_recipe
from plainsd.files.stored import Contents, at_least_single, parts
from plainsd.files.tensorfile import Stored
from plainsd.models.variants import Variant

MERGE_HASH_KEYS = ("primary_model_hash", "secondary_model_hash", "tertiary_model_hash")
METHODS = {False: "Weighted sum", True: "Add difference"}  # as A1111 calls them


def merge_models(
    models: Sequence[str | Path],
    target: str | Path,
    share: float,
    *,
    difference: bool = False,
    layout: str | None = None,
    dtype: str | torch.dtype | None = None,
    variant_file: str | None = None,
    family: str | None = None,
) -> None:
    """Writes A (1 - share) + B share, or with `difference` A + share (B - C). `layout`, `dtype`: as in `convert`. B and
    C need no autoencoder if they are single files."""
    check_recipe(len(models), share, difference=difference)
    paths = [find(model, variant_file) for model in models]
    others = [
        (str(model), read(path, variant_file, family, vae=False))
        for model, path in zip(models[1:], paths[1:], strict=True)
    ]

    def change(contents: Contents) -> Contents:
        made = merged_models(contents, others, share)
        digits = {digits_of(path): path.name for path in paths}
        recipe = {"type": "plainsd", "interp_method": METHODS[difference], "multiplier": share}
        recipe |= dict(zip(MERGE_HASH_KEYS, map(digits_of, paths), strict=False))
        return with_recipe(made, recipe, digits)

    convert(models[0], target, layout, dtype=dtype, variant_file=variant_file, family=family, change=change)


def check_recipe(count: int, share: float, *, difference: bool) -> None:
    if count != 2 + difference:
        wanted = "three models with --difference, A + share (B - C)" if difference else "two models, A and B"
        remedy = "give C too" if difference else "give two, or --difference with three"
        raise UserError(f"{count} models to merge: it takes {wanted}; {remedy}")
    if not difference and not 0 <= share <= 1:
        raise UserError(f"--share {share:g} is out of range; give B's share of the sum, from 0 to 1")
    if difference and not abs(share) <= 10:  # NaN included
        raise UserError(f"--share {share:g} is out of range; give how much of the difference is added, such as 1")


def merged_models(first: Contents, others: Sequence[tuple[str, Contents]], share: float) -> Contents:
    """The first model with the others (one: B; two: B and C) merged into it. `names` are for error messages."""
    (_, b), (name, c) = others[0], others[-1]
    for other_name, other in others:
        check_alike(first, other, other_name, inpainting=True, noise=len(others) == 1)
    if said := noise_differences(b.variant, c.variant):
        raise UserError(f"{name} {' and '.join(said)} as B; take the difference of two models that were trained alike")
    if b.variant.unet.in_channels != c.variant.unet.in_channels:
        raise UserError(
            f"{name}: its UNet reads {c.variant.unet.in_channels} channels and B's {b.variant.unet.in_channels}; "
            "take the difference of two inpainting models, or of two that are none"
        )
    networks = {}
    for part, network in first.networks.items():
        if part != "vae":
            rest = [other.networks[part].tensors for _, other in others]
            tensors = {
                name: mixed(f"{part}.{name}", stored, [tensors[name] for tensors in rest], share)
                for name, stored in network.tensors.items()
            }
            network = replace(network, tensors=tensors)
        networks[part] = network
    return replace(first, networks=networks)


def mixed(name: str, first: Stored, others: Sequence[Stored], share: float) -> Stored:
    """One merged tensor, computed when it is read."""

    def whole(dtype: torch.dtype | None = None) -> torch.Tensor:
        wide = at_least_single(first.dtype)
        out = first.read(wide)
        part = out[:, : others[0].shape[1]] if others[0].shape != first.shape else out  # of conv_in, without the mask's
        if len(others) == 1:
            part.mul_(1 - share).add_(others[0].read(wide), alpha=share)
        else:
            part.add_(others[0].read(wide).sub_(others[1].read(wide)), alpha=share)
        return narrowed(out, dtype or first.dtype, name)

    return Stored(first.dtype, first.shape, whole)


def noise_differences(mine: Variant, theirs: Variant) -> list[str]:
    """How the other's prediction and kind of noise differ."""
    edm = isinstance(theirs.schedule, EDMSchedule)
    found = [f"predicts {theirs.prediction}, not {mine.prediction}"] if theirs.prediction != mine.prediction else []
    if edm != isinstance(mine.schedule, EDMSchedule):
        levels = ("at all noise levels (EDM)", "at a table's noise levels")
        found.append(f"was trained {levels[not edm]}, not {levels[edm]}")
    return found


def check_alike(first: Contents, other: Contents, name: str, *, inpainting: bool = False, noise: bool = False) -> None:
    """UserError unless the networks (except autoencoders) are the same; with `noise`, what they predict too. With
    `inpainting`, the first may be an inpainting model and the other not."""
    mine, theirs = first.variant, other.variant
    differences = noise_differences(mine, theirs) if noise else []
    if inpainting and (mine.unet.in_channels, theirs.unet.in_channels) == (9, 4):
        theirs = replace(theirs, unet=replace(theirs.unet, in_channels=9))
    pairs = dict(parts(mine)), dict(parts(theirs))
    for part in [part for part in pairs[0] if part != "vae"]:
        if part not in pairs[1]:
            differences.append(f"has no {part}")
            continue
        own, its = (asdict(pair[part][1]) for pair in pairs)
        differences += [f"{part}: {key} {its[key]}, not {own[key]}" for key in own if own[key] != its[key]]
    differences += [f"has a {part}" for part in pairs[1] if part not in pairs[0]]
    if differences:
        raise UserError(
            f"{name} ({other.variant.name}) does not match the first model ({first.variant.name}): "
            f"{'; '.join(differences[:3]).replace(';', ',')}; take models of one family"
        )
