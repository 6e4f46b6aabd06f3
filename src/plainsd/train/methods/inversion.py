"""Method `inversion`: learns a new word, as one or more vectors, for a frozen model (Gal et al. 2022,
arXiv:2208.01618). Only the new vectors are parameters, so that no others change, decay or use optimizer memory."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from plainsd.adapters.embeddings import add_word, write_rows
from plainsd.errors import UserError
from plainsd.models.clip import TextEncoder
from plainsd.pictures.model import StableDiffusion
from plainsd.train.data.captions import Reader
from plainsd.train.data.examples import Examples
from plainsd.train.methods.finetune import FineTune, frozen
from plainsd.train.objective import PLAIN_OBJECTIVE, Objective


class Taught(nn.Embedding):
    """A token table with N trainable rows in a separate parameter, `rows` (N, D), from id `first` on."""

    rows: nn.Parameter
    first: int

    def forward(self, ids: Tensor) -> Tensor:
        place = ids - self.first
        new = (place >= 0) & (place < len(self.rows))
        known = super().forward(ids)
        return torch.where(new[..., None], self.rows[place.clamp(0, len(self.rows) - 1)].to(known.dtype), known)


def teach(encoder: TextEncoder, ids: Sequence[int]) -> nn.Parameter:
    """Turns the rows of these consecutive ids into a parameter."""
    table = encoder.token
    rows = table.weight[list(ids)].detach()
    table.rows = nn.Parameter(rows.to(torch.promote_types(rows.dtype, torch.float32)))
    table.first, table.__class__ = ids[0], Taught
    return table.rows


def written_down(sd: StableDiffusion) -> StableDiffusion:
    """Copies the current vectors into the tables, for saving; training continues."""
    for encoder in sd.text_encoders:
        table = encoder.token
        if isinstance(table, Taught):
            write_rows(encoder, range(table.first, table.first + len(table.rows)), table.rows.detach())
    return sd


def settle(sd: StableDiffusion) -> StableDiffusion:
    """Writes the learned vectors into the tables, and makes them ordinary tables again."""
    for encoder in written_down(sd).text_encoders:
        table = encoder.token
        if isinstance(table, Taught):
            del table.rows, table.first
            table.__class__ = nn.Embedding
    return sd


def first_rows(sd: StableDiffusion, initial: str | None, vectors: int, seed: int) -> list[Tensor]:
    """Initial vectors (N, D) for each text encoder: those of a known word, repeated, or random ones of typical norm."""
    found = []
    for tokenizer, encoder in zip(sd.tokenizers, sd.text_encoders, strict=True):
        table = encoder.token.weight.detach()
        if initial is None:
            noise = torch.randn(vectors, table.shape[1], generator=torch.Generator().manual_seed(seed))
            found.append((noise * table.float().std().cpu()).to(table))
            continue
        ids = tokenizer.encode(initial)
        if not ids:
            raise UserError(f"the word {initial!r} to begin from is empty; give one such as 'cat', or leave it out")
        if len(ids) > vectors:
            raise UserError(
                f"the word {initial!r} to begin from is {len(ids)} tokens, and the new word {vectors}; give "
                f"--vectors {len(ids)}, or a word of {vectors}"
            )
        found.append(table[[ids[i % len(ids)] for i in range(vectors)]])
    return found


def inversion(
    sd: StableDiffusion,
    examples: Examples,
    token: str,
    *,
    vectors: int = 1,
    initial: str | None = None,
    seed: int = 0,
    objective: Objective = PLAIN_OBJECTIVE,
    chunks: int = 1,
    prior: Examples | None = None,
    prior_weight: float = 1.0,
) -> FineTune:
    """The model's tokenizers learn the word `token`, which captions should have. After training call `settle`;
    `plainsd.adapters.embeddings.save_embedding` then writes the word."""
    ids = add_word(frozen(sd), token, first_rows(sd, initial, vectors, seed))
    rows = nn.ParameterList(teach(encoder, range(ids[0], ids[-1] + 1)) for encoder in sd.text_encoders)
    modules = nn.ModuleDict({"words": rows})
    return FineTune(sd, examples, modules, Reader(sd, learns=True, chunks=chunks), objective, prior, prior_weight)
