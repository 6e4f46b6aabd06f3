"""AUTOMATIC1111's web UI: its own prompts, noise, schedules, samplers and passes, over the networks of a model of ours.

Its modules are loaded from a checkout; what stands in for the rest is data: its options with their own defaults, a
device that is the CPU, and a model whose `apply_model` is our UNet.
"""

import contextlib
import types
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from oracles.standins import stand_in
from plainsd.pictures.model import StableDiffusion

COMMIT = "82a973c04367123ae98bd9abdf80d9eda9b910e2"  # v1.10.1
OWN = (  # modules of the program that run; the rest stand in
    *("sd_samplers", "sd_samplers_kdiffusion", "sd_samplers_timesteps", "sd_samplers_timesteps_impl"),
    *("sd_samplers_extra", "sd_samplers_lcm", "sd_samplers_common", "sd_samplers_cfg_denoiser", "sd_schedulers"),
    *("rng", "rng_philox", "prompt_parser", "sd_emphasis", "sd_hijack_clip", "processing", "masking"),
    *("infotext_utils", "infotext_versions"),
    *("torch_utils", "options", "shared_options", "script_callbacks", "models.diffusion.uni_pc"),
)
LATENT_UPSCALERS = {
    f"Latent{name}": {"mode": mode, "antialias": "antialias" in name}
    for name, mode in {
        "": "bilinear",
        " (antialiased)": "bilinear",
        " (bicubic)": "bicubic",
        " (bicubic antialiased)": "bicubic",
        " (nearest)": "nearest",
        " (nearest-exact)": "nearest-exact",
    }.items()
}
ABSENT = ("gradio", "cv2", "skimage", "blendmodes", "ldm", "sgm", "torchvision", "launch", "fastapi")


def wanted(name: str) -> bool:
    top, _, rest = name.partition(".")
    if top == "modules":
        return not any(rest == own or rest.startswith(own + ".") for own in OWN)
    return top in ABSENT


class Tokens:
    """Our tokenizer with the face of transformers' one."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.bos_token_id, self.eos_token_id = tokenizer.start, tokenizer.end

    def get_vocab(self) -> dict[str, int]:
        return self.tokenizer.vocabulary

    def __call__(self, texts, **_):
        return {"input_ids": [[key for unit in self.tokenizer.units(text) for key in unit] for text in texts]}


class Transformer(torch.nn.Module):
    """Our text encoder with the face of transformers' one."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.text_model = types.SimpleNamespace(final_layer_norm=encoder.norm)

    def forward(self, input_ids, **_):
        states = self.encoder(input_ids)
        return types.SimpleNamespace(hidden_states=states.hidden, last_hidden_state=states.final)


@dataclass
class Model:
    """The face of a latent diffusion model over our networks."""

    sd: StableDiffusion
    device: torch.device = torch.device("cpu")
    is_sdxl: bool = False
    is_sdxl_inpaint: bool = False
    cond_stage_key: str = "txt"
    latent_channels: int = 4
    model: Any = field(default_factory=lambda: types.SimpleNamespace(conditioning_key="crossattn"))
    sd_checkpoint_info: Any = None
    first_stage_model: Any = None
    cond_stage_model: Any = None
    cond_stage_model_empty_prompt: Any = None

    def __post_init__(self):
        self.alphas_cumprod = self.sd.schedule.alphas_cumprod.float()
        self.parameterization = "v" if self.sd.prediction == "v_prediction" else "eps"
        self.first_stage_model = types.SimpleNamespace(to=lambda *_: None)

    def apply_model(self, x: Tensor, t: Tensor, cond: dict) -> Tensor:
        context = torch.cat(cond["c_crossattn"], dim=1)
        rows = [self.sd.unet(x[i : i + 1], t[i].item(), context[i : i + 1]) for i in range(len(x))]
        return torch.cat(rows)

    def get_learned_conditioning(self, texts) -> Tensor:
        return self.cond_stage_model(texts)

    def encode_first_stage(self, pixels: Tensor) -> Any:
        return self.sd.vae.encode(pixels)

    def get_first_stage_encoding(self, gaussian: Any) -> Tensor:
        """The mean. The program adds noise of no seed at all here, which no second run of its own has again."""
        return self.sd.vae.config.scaled(gaussian.mean)


def resized(mode: int, image: Image.Image, width: int, height: int, **_: Any) -> Image.Image:
    """The program's upscaler named Lanczos; there a picture is enlarged and cut to the wanted size."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


class A1111:
    """The program, ready to draw."""

    def __init__(self, folder: Path, k_diffusion: Path, sd: StableDiffusion):
        cpu: dict[str, Any] = dict.fromkeys(("device", "cpu"), torch.device("cpu")) | {
            "unet_needs_upcast": False,
            "fp8": False,
        }
        cpu |= dict.fromkeys(("dtype", "dtype_vae", "dtype_unet", "dtype_inference"), torch.float32)
        cpu |= dict.fromkeys(("autocast", "without_autocast"), contextlib.nullcontext)
        state = types.SimpleNamespace(interrupted=False, skipped=False, sampling_step=0, nextjob=lambda: None)
        state.processing_has_refined_job_count = True
        as_it_is = types.SimpleNamespace(
            apply_styles_to_prompt=lambda text, _: text, apply_negative_styles_to_prompt=lambda text, _: text
        )
        self.model = Model(sd)
        shared = {"state": state, "device": cpu["device"], "parallel_processing_allowed": True, "sd_model": self.model}
        shared |= {"prompt_styles": as_it_is, "latent_upscale_modes": LATENT_UPSCALERS}
        pictures = {"flatten": lambda image, _: image, "resize_image": resized}
        models = {
            f"modules.models{end}": str(folder / "modules" / f"models{end}".replace(".", "/"))
            for end in ("", ".diffusion")
        }
        stand_in(
            wanted,
            {
                "modules.devices": cpu,
                "modules.shared": shared,
                "modules.images": pictures,
                "ldm.models.diffusion.ddpm": {"LatentDepth2ImageDiffusion": type("Other", (), {})},
                "launch": {"git_tag": lambda: "v1.10.1"},
                "modules.extra_networks": {"parse_prompts": lambda prompts: (prompts, {})},
            },
            {"modules": str(folder / "modules"), "k_diffusion": str(k_diffusion / "k_diffusion"), **models},
        )
        import_module("k_diffusion.external")
        import modules.shared
        from modules import shared_options

        defaults = {name: option.default for name, option in shared_options.options_templates.items()}
        self.options = modules.shared.opts = types.SimpleNamespace(**defaults | {"live_previews_enable": False})
        from modules import processing, sd_hijack_clip, sd_samplers, sd_schedulers

        self.processing, self.samplers, self.schedulers = processing, sd_samplers, sd_schedulers.schedulers
        hijack = types.SimpleNamespace(fixes=None, extra_generation_params={})
        hijack.embedding_db = types.SimpleNamespace(find_embedding_at_position=lambda *_: (None, None))
        wrapped = types.SimpleNamespace(
            tokenizer=Tokens(sd.tokenizers[0]), transformer=Transformer(sd.text_encoders[0])
        )
        self.model.cond_stage_model = sd_hijack_clip.FrozenCLIPEmbedderWithCustomWords(wrapped, hijack)
        self.model.cond_stage_model_empty_prompt = self.model.cond_stage_model([""])
        processing.decode_latent_batch = self._decoded

    def _decoded(self, model: Model, latents: Tensor, **_: Any) -> list[Tensor]:
        """In place of decoding: the latents are what is compared. Only a pass that enlarges a picture needs the VAE."""
        self.latents = latents
        return list(model.sd.vae.decode(model.sd.vae.config.unscaled(latents)))

    @torch.no_grad()
    def draw(self, image: Image.Image | None = None, **choices: Any) -> Tensor:
        """Latents (B, L, h, w) of one batch; `text` is then what it writes into the first picture.

        `choices` are fields of the program's own processing classes, and any of its options under `options`; `image`
        makes it image to image.
        """
        options, before = choices.pop("options", {}), vars(self.options).copy()
        vars(self.options).update(options)
        try:
            return self._draw(image, choices)
        finally:
            vars(self.options).update(before)

    def _draw(self, image: Image.Image | None, choices: dict[str, Any]) -> Tensor:
        kind = (
            self.processing.StableDiffusionProcessingImg2Img
            if image
            else self.processing.StableDiffusionProcessingTxt2Img
        )
        p = kind(**choices, **({"init_images": [image]} if image else {}))
        p.cached_c, p.cached_uc, p.cached_hr_c, p.cached_hr_uc = ([None, None] for _ in range(4))
        p.fill_fields_from_opts()
        p.setup_prompts()
        p.all_seeds = [p.seed + (i if p.subseed_strength == 0 else 0) for i in range(p.batch_size)]
        p.all_subseeds = [p.subseed + i for i in range(p.batch_size)]
        p.prompts, p.negative_prompts, p.seeds, p.subseeds = (
            p.all_prompts,
            p.all_negative_prompts,
            p.all_seeds,
            p.all_subseeds,
        )
        p.init(p.all_prompts, p.all_seeds, p.all_subseeds)
        shape = (self.model.latent_channels, p.height // 8, p.width // 8)
        p.rng = self.processing.rng.ImageRNG(shape, p.seeds, subseeds=p.subseeds, subseed_strength=p.subseed_strength)
        p.parse_extra_network_prompts()
        p.setup_conds()
        p.sd_model_name, p.sd_model_hash, p.sd_vae_name, self.latents = self.model.sd.variant.name, None, None, None
        samples = p.sample(p.c, p.uc, p.seeds, p.subseeds, p.subseed_strength, p.prompts)
        self.text = self.processing.create_infotext(p, p.all_prompts, p.all_seeds, p.all_subseeds)
        return samples if self.latents is None else self.latents
