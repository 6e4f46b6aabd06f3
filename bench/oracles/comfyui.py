"""ComfyUI: its own KSampler, samplers, schedulers, noise and text weights, over the networks of a model of ours.

Its packages are loaded from a checkout, with `--cpu`; only networks of other families and torchvision stand in.
"""

import logging
import sys
import types
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from oracles.standins import stand_in
from plainsd.pictures.images import to_tensor
from plainsd.pictures.model import StableDiffusion

COMMIT = "3cd7b32f1b7e7e90395cefe7d9f9b1f89276d8ce"  # January 2026, after v0.8.0
OWN = ("modules", "util")  # of comfy.ldm


def wanted(name: str) -> bool:
    top, *rest = name.split(".")
    if top == "comfy" and rest[:1] == ["ldm"] and len(rest) > 1:
        return rest[1] not in OWN
    return top in ("torchvision", "comfy_aimdo", "comfy_kitchen", "av")


class Network(nn.Module):
    """Our UNet as the program calls one."""

    dtype = torch.float32

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, **_: Any) -> Tensor:
        rows = [self.unet(x[i : i + 1], timesteps[i].item(), context[i : i + 1]) for i in range(len(x))]
        return torch.cat(rows)


class Tokens:
    """Our tokenizer with the face of transformers' one."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def get_vocab(self) -> dict[str, int]:
        return self.tokenizer.vocabulary

    def __call__(self, text: str) -> dict[str, list[int]]:
        inner = [key for unit in self.tokenizer.units(text) for key in unit]
        return {"input_ids": [self.tokenizer.start, *inner, self.tokenizer.end]}


class ComfyUI:
    """The program, ready to draw."""

    def __init__(self, folder: Path, sd: StableDiffusion):
        stand_in(wanted, {}, {})
        sys.path.insert(0, str(folder))
        logging.getLogger().setLevel(logging.WARNING)
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
        import comfy.model_base
        import comfy.model_patcher
        import comfy.sample
        import comfy.sd1_clip
        import comfy.supported_models

        self.comfy, self.sd = comfy, sd
        config = comfy.supported_models.SD15({"in_channels": 4, "dtype": torch.float32})
        kind = comfy.model_base.ModelType[{"epsilon": "EPS", "v_prediction": "V_PREDICTION"}[sd.prediction]]
        base = comfy.model_base.BaseModel(config, kind, unet_model=lambda **_: Network(sd.unet))
        cpu = torch.device("cpu")
        self.model = comfy.model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu)
        tokens = types.SimpleNamespace(from_pretrained=lambda *_, **__: Tokens(sd.tokenizers[0]))
        self.tokenizer = comfy.sd1_clip.SDTokenizer(tokenizer_class=tokens)

    @torch.no_grad()
    def encode(self, text: str) -> Tensor:
        """A prompt's states (1, M, D)."""
        names = {name: getattr(self.tokenizer, f"{name}_token") for name in ("start", "end", "pad")}
        encoder = self.comfy.sd1_clip.ClipTokenWeightEncoder()
        encoder.special_tokens = names
        encoder.encode = lambda rows: (self.sd.text_encoders[0](torch.tensor(rows)).final, None)
        return encoder.encode_token_weights(self.tokenizer.tokenize_with_weights(text))[0]

    @torch.no_grad()
    def latent(self, image: Image.Image | None, size: tuple[int, int], count: int) -> Tensor:
        """An empty latent of this size in pixels, or a picture's, unscaled as its VAE gives it: the encoder's mean. The
        program adds noise of no seed there."""
        if image is None:
            return torch.zeros(count, 4, size[1] // 8, size[0] // 8)
        return self.sd.vae.encode(to_tensor(image)).mean.repeat(count, 1, 1, 1)

    @torch.no_grad()
    def draw(
        self,
        prompt: str,
        negative: str,
        seed: int,
        steps: int,
        cfg: float,
        sampler: str,
        scheduler: str,
        latent: Tensor,
        denoise: float = 1.0,
    ) -> Tensor:
        """Latents (B, L, h, w), as the node KSampler draws them."""
        noise = self.comfy.sample.prepare_noise(latent, seed)
        conds = [[[self.encode(text), {}]] for text in (prompt, negative)]
        options = {"denoise": denoise, "seed": seed, "disable_pbar": True}
        samples = self.comfy.sample.sample(self.model, noise, steps, cfg, sampler, scheduler, *conds, latent, **options)
        return self.model.model.process_latent_in(samples)
