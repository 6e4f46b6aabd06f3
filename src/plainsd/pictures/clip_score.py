"""CLIP (Radford et al. 2021, arXiv:2103.00020): pictures and texts as vectors of one space, and CLIPScore.

CLIPScore (Hessel et al. 2021, arXiv:2104.08718, equation 1) = 2.5 * max(cos(picture, text), 0), where the text follows
"A photo depicts". It measures how well a picture fits a text, without reference texts.

Shape letters: B pictures or texts, N tokens, P width of the shared space.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from plainsd.models.clip import TextEncoder
from plainsd.models.vision import VisionTower
from plainsd.pictures.image_prompt import clip_pixels
from plainsd.text.prompts import BREAK, compose, parse, schedule, tagged_loras
from plainsd.text.tokenizer import Tokenizer

SCORE_WEIGHT = 2.5  # w of equation 1
SCORE_PREFIX = "A photo depicts "  # section 3


@dataclass(frozen=True, eq=False)
class Clip:
    """Both encoders, on one device, in one dtype."""

    text: TextEncoder
    tower: VisionTower
    tokenizer: Tokenizer

    @torch.inference_mode()
    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, P), of length 1."""
        weight = self.tower.projection.weight
        pixels = torch.cat([clip_pixels(image, self.tower.config.size) for image in images]).to(weight)
        return torch.nn.functional.normalize(self.tower(pixels).embeds.float(), dim=-1)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(B, P), of length 1. Texts are cut after 75 tokens, as CLIP's own are."""
        ids = torch.tensor([self.ids(text) for text in texts], device=self.text.token.weight.device)
        return torch.nn.functional.normalize(self.text(ids).pooled.float(), dim=-1)

    def ids(self, text: str) -> list[int]:
        """N ids: start, the text's, end, padded."""
        room = self.text.config.positions
        found = [self.tokenizer.start, *self.tokenizer.encode(text)[: room - 2], self.tokenizer.end]
        return found + [self.tokenizer.pad] * (room - len(found))


def clip_scores(
    clip: Clip, images: Sequence[Image.Image], texts: Sequence[str], prefix: str = SCORE_PREFIX
) -> list[float]:
    """CLIPScore of each picture with its text."""
    cosines = (clip.pictures(images) * clip.texts([prefix + text for text in texts])).sum(-1)
    return (SCORE_WEIGHT * cosines.clamp(min=0)).tolist()


def plain_text(prompt: str, steps: int = 20) -> str:
    """What a prompt says without its syntax: no LoRAs, no weights, of prompt editing the last text."""
    parts = [part for part, _ in compose(tagged_loras(prompt)[0])]
    last = [schedule(part, steps)[-1][1] for part in parts]
    said = ["".join(" " if piece is BREAK else piece.text for piece in parse(text)) for text in last]
    return " ".join(" ".join(said).split())
