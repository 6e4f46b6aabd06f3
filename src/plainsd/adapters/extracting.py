"""Extracts a LoRA from a fine-tuned model: the best low-rank approximation of its difference to the base.

Of each layer's difference D the best change of rank r is U U^T D, with U the r leading left singular vectors of D
(Eckart and Young 1936, doi:10.1007/BF02288367); for a convolution D is a matrix of outputs by inputs times kernel.
Changes of norms, biases and embeddings are lost; the report says how much that is. (`plainsd extract-lora`)
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from plainsd.adapters.baking import without_weights
from plainsd.adapters.layers import LowRank
from plainsd.adapters.names import adaptable_networks, modules_of
from plainsd.adapters.writing import check_lora_file, write_lora
from plainsd.errors import UserError
from plainsd.files.convert import read
from plainsd.files.hub import find
from plainsd.files.merging import check_alike
from plainsd.files.tensorfile import Stored


@dataclass
class NormShares:
    """Squared norms of one network's difference: all of it, the part in the LoRA, the part that no LoRA can
    represent."""

    whole: float = 0.0
    kept: float = 0.0
    beside: float = 0.0
    layers: int = 0
    others: list[str] = field(default_factory=list)  # differing tensors that are no layer's weight

    def __str__(self) -> str:
        text = f"{(self.kept / self.whole) ** 0.5:.1%} of the difference's norm in {self.layers} layers"
        if self.others:
            lost = f"{(self.beside / self.whole) ** 0.5:.1%}"
            text += f", {lost} in {len(self.others)} norms, biases and embeddings, which are left out"
        return text


def extract_lora(
    tuned: str | Path,
    base: str | Path,
    target: str | Path,
    rank: int,
    *,
    naming: str = "kohya",
    dtype: torch.dtype | None = torch.float16,
    variant_file: str | None = None,
    family: str | None = None,
) -> dict[str, NormShares]:
    """Writes the LoRA from `base` to `tuned`; returns how much of the difference it keeps, for each network that
    differs.

    Every layer has rank and alpha `rank`, padded with zeros where it is smaller: other readers expect the same rank
    everywhere. `dtype` None: float32 or wider, as computed.
    """
    if rank < 1:
        raise UserError(f"--rank {rank} is out of range; give 1 or more, such as 32")
    check_lora_file(Path(target))
    theirs, ours = (
        read(find(model, variant_file), variant_file, family, vae=False, ask=False) for model in (base, tuned)
    )
    check_alike(theirs, ours, str(tuned))
    bare, adapters, shares = without_weights(theirs), {}, {}
    for part, network in adaptable_networks(bare).items():
        layers, share = modules_of(network), NormShares()
        for name, stored in theirs.networks[part].tensors.items():
            change = difference(ours.networks[part].tensors[name], stored)
            norm = float(change.norm()) ** 2
            module, _, leaf = name.rpartition(".")
            share.whole += norm
            if norm and leaf == "weight" and module in layers:
                adapters[part, module], kept = low_rank(change, rank)
                share.kept, share.layers = share.kept + kept, share.layers + 1
            elif norm:
                share.beside += norm
                share.others.append(name)
        if share.whole:
            shares[part] = share
    if not adapters:
        raise UserError(f"{tuned} and {base} do not differ in any layer; there is no LoRA to be made of that")
    told = "; ".join(f"{part}: {share}" for part, share in shares.items())
    notes = {"ss_training_comment": f"rank {rank} of {Path(tuned).name} less {Path(base).name}; {told}"}
    write_lora(bare, adapters, Path(target), naming, notes, dtype)
    return shares


def difference(tuned: Stored, base: Stored) -> Tensor:
    """The difference of two stored tensors, in float64. UserError where it is not finite."""
    change = tuned.read(torch.float64).sub_(base.read(torch.float64))
    if not change.isfinite().all():
        raise UserError("one of the models has weights that are not finite numbers; take another copy of it")
    return change


def low_rank(change: Tensor, rank: int) -> tuple[LowRank, float]:
    """The nearest change of that rank, and its squared norm. change: (o, i) or (o, i, k, k), float64."""
    flat = change.flatten(1)
    wide = flat if flat.shape[0] <= flat.shape[1] else flat.T
    vectors = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -rank:].flip(1)  # the squared singular values ascend
    near, far = vectors, vectors.T @ wide  # (n, r), (r, m)
    lengths = far.norm(dim=1)  # the singular values
    root = lengths.sqrt()
    near, far = near * root, far / root.clamp_min(torch.finfo(far.dtype).tiny)[:, None]
    up, down = (near, far) if wide is flat else (far.T, near.T)
    spare = rank - up.shape[1]
    up, down = torch.nn.functional.pad(up, (0, spare)), torch.nn.functional.pad(down, (0, 0, 0, spare))
    down, up = down.reshape(rank, *change.shape[1:]).float(), up.reshape(-1, rank, *[1] * (change.ndim - 2)).float()
    return LowRank(down, up, float(rank)), float((lengths**2).sum())
