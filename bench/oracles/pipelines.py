"""diffusers: its pipelines and schedulers, over the networks of a model of ours saved in its layout."""

import tempfile
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import plainsd
from oracles.comparing import noise_share, tests_module
from plainsd.pictures.model import StableDiffusion

SOLVER = ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"})
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "ddim": ("DDIMScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde": SOLVER,
    "dpmpp_2m_sde_heun": (SOLVER[0], SOLVER[1] | {"solver_type": "heun"}),
    "lms": ("LMSDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "sa_solver": ("SASolverScheduler", {}),
}
SPACINGS: dict[str, dict[str, Any]] = {
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "karras": {"timestep_spacing": "linspace", "use_karras_sigmas": True},
    "exponential": {"timestep_spacing": "linspace", "use_exponential_sigmas": True},
}

UNSPACED = ("ddpm", "ddim", "plms", "euler_a")  # whose schedulers know timesteps only


class Pipelines:
    """The library, ready to draw."""

    def __init__(self, sd: StableDiffusion):
        self.folder = tempfile.TemporaryDirectory()
        plainsd.save(sd, f"{self.folder.name}/model")
        self.sd, self.unet = sd, None

    def pipeline(self, kind: str, sampler: str, spacing: str) -> Any:
        name, options = SAMPLERS[sampler]
        pipe = tests_module().pipeline(kind, f"{self.folder.name}/model", name, **options, **SPACINGS[spacing])
        pipe.unet.register_forward_hook(
            lambda network, given, out: (0.1 * out[0] + noise_share(self.sd, given[1]) * given[0],)
        )
        return pipe

    def draw(
        self, prompt: str, negative: str, seed: int, sampler: str, spacing: str, image: Image.Image | None, **more: Any
    ) -> Tensor:
        """Latents (1, L, h, w). `more` is for the pipeline: steps, guidance, strength."""
        kind = "StableDiffusionImg2ImgPipeline" if image else "StableDiffusionPipeline"
        pipe = self.pipeline(kind, sampler, spacing)
        more |= {"image": image} if image else {"height": 64, "width": 64}
        generator = torch.Generator().manual_seed(seed)
        return pipe(prompt, negative_prompt=negative, generator=generator, output_type="latent", **more).images
