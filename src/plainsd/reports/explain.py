"""One drawing, with all that can be seen on the way: levels, latents, estimates, guidance, and where each word acts.

Hooks read the networks (watching.py), and the picture is the same to the bit. Maps of cross-attention, averaged over
heads and layers, say which words each place read: DAAM (Tang et al. 2022, arXiv:2210.04885).

Shape letters: S steps, L latent channels, h w latent height and width, M tokens (of all chunks), N positions of a map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from plainsd.diffusion.denoiser import spread_of, x0_from
from plainsd.diffusion.samplers import Step
from plainsd.diffusion.schedule import EDMSchedule, NoiseSchedule
from plainsd.errors import UserError, unknown
from plainsd.generate import text_to_image
from plainsd.pictures.conditioning import as_weighted, cut, framed
from plainsd.pictures.drawing import Pictures
from plainsd.pictures.images import to_pil
from plainsd.pictures.model import StableDiffusion
from plainsd.pictures.plan import by_steps
from plainsd.pictures.previews import latent_rgb
from plainsd.pictures.sampling import decode, levels_of
from plainsd.pictures.settings import Resolved
from plainsd.reports.watching import MapSize, Seen, watched
from plainsd.text.prompts import compose
from plainsd.text.tokenizer import WORD_END


@dataclass(frozen=True)
class Token:
    """One position of what the UNet reads."""

    text: str  # as the tokenizer shows it, `</w>` at the end of a word
    ids: tuple[int, ...]  # one a text encoder
    weight: float
    word: int | None  # which of the words; None for start, end and padding


@dataclass(frozen=True)
class Explanation:
    """A drawing and what was seen of it. Tensors are float32 on the CPU.

    settings         nothing left open; `image` is the picture
    tokens           M of them; `words` are the prompt's, each made of one or several tokens
    sigmas           S + 1 levels, falling; `timesteps` S, as the network is told them where each step begins
    noisy            (S + 1, L, h, w) the latents at each level, x = x0 + sigma * noise
    denoised         (S, L, h, w) the estimate of the clean latents that each step aims at
    cond, uncond     (S, L, h, w) the two estimates of guidance where each step begins; `uncond` None where there is one
                     alone
    cross_attention  height and width of a map -> (S, M, height, width): how much each place reads of each token; mean
                     over heads and layers, adds up to 1 over the tokens
    self_attention   height and width of a map -> (S, N, N), N = height * width: how much each place reads of each
                     (last), adds up to 1; of at most 1024 places
    layers           height and width of a map -> how many layers attend at that size
    latent_rgb       (L + 1, 3) rough colours of a latent, see pictures/previews.py
    schedule         (T,) all levels of the noise table, rising; empty for models without a table
    decoded          "denoised", "cond", "uncond" -> S pictures; empty where they were not asked for
    spread           standard deviation of clean latents: the network is shown x / sqrt(spread^2 + sigma^2)
    """

    settings: Resolved
    image: Image.Image
    tokens: list[Token]
    words: list[str]
    sigmas: list[float]
    timesteps: list[float]
    noisy: Tensor
    denoised: Tensor
    cond: Tensor
    uncond: Tensor | None
    cross_attention: dict[MapSize, Tensor]
    self_attention: dict[MapSize, Tensor]
    layers: dict[MapSize, int]
    latent_rgb: Tensor
    schedule: Tensor
    decoded: dict[str, list[Image.Image]]
    spread: float = 1.0

    def positions(self, word: str) -> list[int]:
        """Where the word's tokens stand, at each of its places in the prompt. UserError for a word not in it."""
        if word not in self.words:
            raise unknown("word", word, dict.fromkeys(self.words))
        return [at for at, token in enumerate(self.tokens) if token.word is not None and self.words[token.word] == word]

    def heat(
        self, positions: str | Sequence[int], size: MapSize | None = None, steps: slice | int = slice(None)
    ) -> Tensor:
        """DAAM's heat map of a word, or of the tokens at these positions: (height, width) of `size`, the latents' if
        none is given. Maps of all sizes are enlarged and averaged over layers and steps; a word's tokens are added."""
        at = self.positions(positions) if isinstance(positions, str) else list(positions)
        size, steps = (
            size or self.noisy.shape[-2:],
            slice(steps, steps + 1 or None) if isinstance(steps, int) else steps,
        )
        total = torch.zeros(size)
        for place, maps in self.cross_attention.items():
            mean = maps[steps][:, at].sum(1).mean(0)  # (height, width)
            total += self.layers[place] * F.interpolate(mean[None, None], size, mode="bilinear")[0, 0]
        return total / sum(self.layers.values())


# --- the whole -------------------------------------------------------------------------------------------------------


def explain(
    sd: StableDiffusion,
    prompt: str,
    negative: str = "",
    *,
    size: tuple[int, int] | int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    spacing: str | None = None,
    seed: int = 0,
    decoded: bool = True,
    show: Callable[[Step], None] = lambda step: None,
) -> Explanation:
    """Draws one picture, the same as `text_to_image` with these choices, and keeps what is seen on the way.

    Without `decoded` the estimates of the steps are not decoded, which takes about as long as the drawing. `show` is
    told each step. UserError for prompts that change on the way or are joined by AND, and for models with a refiner.
    """
    if sd.refiner is not None:
        raise UserError("explain watches one model, and this one has a refiner; leave the refiner out", field="refiner")
    run = text_to_image(
        sd, prompt, negative, size=size, steps=steps, guidance=guidance, sampler=sampler, spacing=spacing, seed=seed
    )
    settings = run.settings[0]
    tokens, words = read_prompt(sd, settings.prompt, settings.steps)
    seen: list[Seen] = []
    events: list[Step] = []
    pictures = None
    with watched(sd) as watch:
        for event in run:
            if isinstance(event, Pictures):
                pictures = event
                continue
            seen.append(watch.take())
            events.append(event)
            show(event)
    assert pictures is not None  # every task ends with them
    return explanation_of(sd, settings, tokens, words, seen, events, pictures, decoded)


def read_prompt(sd: StableDiffusion, prompt: str, steps: int) -> tuple[list[Token], list[str]]:
    """The tokens of a prompt, with start, end and padding of each chunk, and its words."""
    if len(compose(prompt)) > 1 or len(set(by_steps(prompt, steps, None))) > 1:
        raise UserError(
            f"the prompt {prompt!r} changes on the way or has parts joined by AND; explain one of its texts",
            field="prompt",
        )
    text, tokenizer = by_steps(prompt, steps, None)[0], sd.tokenizers[0]
    cuts = [chunks for (chunks,) in cut(sd, [as_weighted(text)])]  # a text encoder each
    count, plain = max(map(len, cuts)), set(tokenizer.vocabulary.values())
    rows = [
        [framed(own, chunk, encoder.config.positions) for chunk in [*chunks, *[[]] * (count - len(chunks))]]
        for own, encoder, chunks in zip(sd.tokenizers, sd.text_encoders, cuts, strict=True)
    ]
    tokens: list[Token] = []
    words: list[str] = []
    for number, chunk in enumerate(zip(*rows, strict=True)):
        inside, begun = len(cuts[0][number]) if number < len(cuts[0]) else 0, list[int]()
        for at, places in enumerate(zip(*chunk, strict=True)):
            ids = tuple(key for key, _ in places)
            piece = tokenizer.pieces(ids[:1])[0]
            spoken = 1 <= at <= inside
            tokens.append(Token(piece, ids, places[0][1], len(words) if spoken else None))
            if spoken:
                begun.append(ids[0])
                text, whole = tokenizer.text_of(begun)
                if (whole and (piece.endswith(WORD_END) or ids[0] not in plain)) or at == inside:
                    words.append(text)
                    begun = []
    return tokens, words


def explanation_of(
    sd: StableDiffusion,
    settings: Resolved,
    tokens: list[Token],
    words: list[str],
    seen: list[Seen],
    events: list[Step],
    pictures: Pictures,
    decoded: bool,
) -> Explanation:
    """What the hooks saw and the sampler yielded, as one `Explanation`."""
    spread = spread_of(sd.schedule)
    sigmas = [float(levels_of(sd, settings).sigmas[0]), *(event.sigma for event in events)]
    asked = [asked_at(sd.schedule, one, sigma) for one, sigma in zip(seen, sigmas, strict=False)]
    starts = [one.x.float() * math.sqrt(spread**2 + sigma**2) for one, sigma in zip(seen, asked, strict=True)]

    def estimates(row: int) -> Tensor:
        rows = zip(seen, starts, asked, strict=True)
        return torch.cat([x0_from(sd.prediction, x, one.outputs[row], sigma, spread) for one, x, sigma in rows])

    latents = {"denoised": torch.cat([event.denoised for event in events]).float(), "cond": estimates(0)}
    if all(len(one.outputs) > 1 for one in seen):
        latents["uncond"] = estimates(1)
    with torch.inference_mode():
        shown = {name: to_pil(decode(sd, each)) for name, each in latents.items()} if decoded else {}
    return Explanation(
        settings=settings,
        image=pictures.images[0],
        tokens=tokens,
        words=words,
        sigmas=[float(sigma) for sigma in sigmas],
        timesteps=[one.timestep for one in seen],
        noisy=torch.cat([starts[0], *(event.x for event in events)]).float().cpu(),
        denoised=latents["denoised"].cpu(),
        cond=latents["cond"].cpu(),
        uncond=latents["uncond"].cpu() if "uncond" in latents else None,
        cross_attention=over_steps([one.means("cross") for one in seen]),
        self_attention=over_steps([one.means("self") for one in seen]),
        layers={size: seen[0].layers["cross", size] for size in seen[0].cross},
        spread=spread,
        latent_rgb=latent_rgb(sd).float().cpu(),
        schedule=sd.schedule.sigmas if isinstance(sd.schedule, NoiseSchedule) else torch.empty(0),
        decoded=shown,
    )


def asked_at(schedule: NoiseSchedule | EDMSchedule, seen: Seen, sigma: float) -> float:
    """The level of an evaluation: where the step before ended, unless noise was added first, as in `restart`."""
    near = 0.51 if isinstance(schedule, NoiseSchedule) else 1e-4  # some samplers round timesteps
    there = sigma > 0 and abs(schedule.timestep(sigma) - seen.timestep) <= near
    return sigma if there else schedule.sigma(seen.timestep)


def over_steps(steps: Sequence[dict[MapSize, Tensor]]) -> dict[MapSize, Tensor]:
    """The maps of all steps in one tensor."""
    return {size: torch.stack([one[size] for one in steps]) for size in steps[0]}
