"""Every known model as data: the sizes of its networks, and its default settings.

SD 1.x and 2.x: Rombach et al. 2022 (arXiv:2112.10752). SDXL: Podell et al. 2023 (arXiv:2307.01952). Distillations:
Turbo, Sauer et al. 2023 (arXiv:2311.17042); LCM, Luo et al. 2023 (arXiv:2310.04378).
"""

from dataclasses import dataclass, replace
from typing import Any

from plainsd.diffusion.schedule import EDMSchedule, NoiseSchedule
from plainsd.errors import UserError
from plainsd.models.clip import TextConfig
from plainsd.models.tiny_vae import AnyVAEConfig
from plainsd.models.unet import UNetConfig
from plainsd.models.vae import VAEConfig


@dataclass(frozen=True)
class ScheduleConfig:
    """The numbers behind a NoiseSchedule; those of SD 1.x and 2.x and SDXL by default."""

    curve: str = "scaled_linear"  # or "linear", "cosine"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    count: int = 1000
    zero_terminal_snr: bool = False  # Lin et al. 2023 (arXiv:2305.08891)

    def build(self) -> NoiseSchedule:
        if self.curve == "cosine":
            schedule = NoiseSchedule.cosine(count=self.count)
        else:
            make = {"scaled_linear": NoiseSchedule.scaled_linear, "linear": NoiseSchedule.linear}[self.curve]
            schedule = make(self.beta_start, self.beta_end, self.count)
        return schedule.zero_terminal_snr() if self.zero_terminal_snr else schedule


@dataclass(frozen=True)
class Variant:
    """One kind of model: the configs of its networks, and its default settings."""

    name: str
    unet: UNetConfig
    vae: AnyVAEConfig
    text: tuple[TextConfig, ...]
    schedule: ScheduleConfig | EDMSchedule = ScheduleConfig()
    prediction: str = "epsilon"  # or "v_prediction", "sample"; "edm" with an EDMSchedule
    context: str = "final"  # which text states the UNet reads: "final", or "penultimate" (not normalised)
    conv_projections: bool = True  # public files store the UNet's attention projections as 1x1 convolutions
    size: int = 512  # pixels, width and height
    guidance: float = 7.5
    sampler: str = "dpmpp_2m"
    steps: int = 20
    spacing: str | None = None  # None: the sampler's own
    force_zeros: bool = True  # an empty negative prompt is all zeros; only of SDXL's base model


# --- the parts that models share -------------------------------------------------------------------------------------

VIT_L = TextConfig()
VIT_H = TextConfig(width=1024, layers=23, heads=16, mlp=4096, activation="gelu")  # of 24: SD 2 stops before the last
VIT_BIGG = TextConfig(width=1280, layers=32, heads=20, mlp=5120, activation="gelu", projection=1280)

SD_VAE = VAEConfig()
XL_VAE = VAEConfig(scaling_factor=0.13025)

SD1_UNET = UNetConfig()
SD2_UNET = UNetConfig(heads=(5, 10, 20, 20), context=1024)
XL_UNET = UNetConfig(
    channels=(320, 640, 1280), depth=(0, 2, 10), heads=(5, 10, 20), mid_depth=10, context=2048, vector=2816
)
REFINER_UNET = UNetConfig(
    channels=(384, 768, 1536, 1536), depth=(0, 4, 4, 0), heads=(6, 12, 24, 24), mid_depth=4, context=1280, vector=2560
)

# Distilled: BK-SDM, Kim et al. 2023 (arXiv:2305.15798), of SD 1.4 and 2.1; SSD-1B and Vega, Gupta et al. 2024
# (arXiv:2401.02677), and KOALA, Lee et al. 2023 (arXiv:2312.04005), of SDXL.
BK_BASE: dict[str, Any] = {"layers": 1}
BK_SMALL = BK_BASE | {"mid_depth": None}
BK_TINY = BK_SMALL | {"channels": (320, 640, 1280), "depth": (1, 1, 1)}
SSD_UNET = replace(XL_UNET, depth=(0, 2, 4), up_depth=((0, 0, 0), (2, 1, 1), (4, 4, 10)), mid_depth=0)
VEGA_UNET = replace(XL_UNET, depth=(0, 1, 2), mid_depth=0)
KOALA_700M_UNET = replace(XL_UNET, layers=1, depth=(0, 2, 5), mid_depth=None)
KOALA_1B_UNET = replace(XL_UNET, layers=1, depth=(0, 2, 6), mid_depth=6)

# --- the models ------------------------------------------------------------------------------------------------------

SD1 = Variant("sd1", SD1_UNET, SD_VAE, (VIT_L,))
SD2 = Variant("sd2-base", SD2_UNET, SD_VAE, (VIT_H,), conv_projections=False)
XL = Variant(
    "sdxl-base",
    XL_UNET,
    XL_VAE,
    (VIT_L, VIT_BIGG),
    context="penultimate",
    conv_projections=False,
    size=1024,
    guidance=5.0,
)
TURBO: dict[str, Any] = {"size": 512, "guidance": 1.0, "sampler": "euler_a", "steps": 1, "spacing": "trailing"}
LCM: dict[str, Any] = {"guidance": 8.5, "sampler": "lcm", "steps": 4}
PLAYGROUND_VAE = replace(
    XL_VAE,
    scaling_factor=0.5,
    latents_mean=(-1.6574, 1.886, -1.383, 2.5155),
    latents_std=(8.4927, 5.9022, 6.5498, 5.2299),
)
COSXL: dict[str, Any] = {
    "schedule": EDMSchedule(sigma_max=120.0, sigma_data=1.0),
    "prediction": "v_prediction",
    "sampler": "euler",
    "spacing": "exponential",
}


def inpainting_unet(unet: UNetConfig) -> UNetConfig:
    """Nine channels: the latent, the mask, and the latent of the picture without what the mask covers."""
    return replace(unet, in_channels=9)


def editing(unet: UNetConfig) -> UNetConfig:
    """Eight channels: the latent, and that of the picture to be edited (Brooks et al. 2023, arXiv:2211.09800)."""
    return replace(unet, in_channels=8)


# Of several with the same sizes, the first is assumed for a file without metadata.
VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        SD1,
        replace(SD1, name="sd1-inpainting", unet=inpainting_unet(SD1_UNET)),
        replace(SD1, name="sd1-pix2pix", unet=editing(SD1_UNET)),
        replace(SD1, name="sd1-lcm", unet=replace(SD1_UNET, guidance_dim=256), **LCM),
        SD2,
        replace(SD2, name="sd2-768", prediction="v_prediction", size=768),
        replace(SD2, name="sd2-inpainting", unet=inpainting_unet(SD2_UNET)),
        replace(SD2, name="sd2-turbo", **TURBO),
        XL,
        replace(
            XL,
            name="playground-v2.5",
            vae=PLAYGROUND_VAE,
            schedule=EDMSchedule(),
            prediction="edm",
            guidance=3.0,
            spacing="karras",
        ),
        replace(XL, name="cosxl", **COSXL),
        replace(XL, name="sdxl-pix2pix", unet=editing(XL_UNET)),
        replace(XL, name="cosxl-edit", unet=editing(XL_UNET), **COSXL),
        replace(XL, name="sdxl-inpainting", unet=inpainting_unet(XL_UNET)),
        replace(XL, name="sdxl-turbo", **TURBO),
        replace(XL, name="sdxl-lcm", unet=replace(XL_UNET, guidance_dim=256), **LCM),
        replace(XL, name="sdxl-refiner", unet=REFINER_UNET, text=(VIT_BIGG,)),
        replace(SD1, name="bk-sdm-base", unet=replace(SD1_UNET, **BK_BASE)),
        replace(SD1, name="bk-sdm-small", unet=replace(SD1_UNET, **BK_SMALL)),
        replace(SD1, name="bk-sdm-tiny", unet=replace(SD1_UNET, **BK_TINY, heads=(8, 8, 8))),
        replace(SD2, name="bk-sdm-v2-base", unet=replace(SD2_UNET, **BK_BASE)),
        replace(SD2, name="bk-sdm-v2-small", unet=replace(SD2_UNET, **BK_SMALL)),
        replace(SD2, name="bk-sdm-v2-tiny", unet=replace(SD2_UNET, **BK_TINY, heads=(5, 10, 20))),
        replace(XL, name="ssd-1b", unet=SSD_UNET, guidance=9.0),
        replace(XL, name="vega", unet=VEGA_UNET, guidance=9.0),
        replace(XL, name="koala-700m", unet=KOALA_700M_UNET),
        replace(XL, name="koala-1b", unet=KOALA_1B_UNET),
    )
}


READS = {  # channels beside the latents: what the network reads there, in models that are not supported
    1: "a depth map (depth2img)",
    3: "a small picture (the x4 upscaler)",
}


def check_reads(channels: int, latents: int, where: str) -> None:
    """UserError for a UNet with inputs that no task here provides."""
    if channels in (latents, 2 * latents, 2 * latents + 1):
        return
    reads = READS.get(channels - latents, "something unknown")
    raise UserError(
        f"{where}: its UNet has {channels} input channels: beside {latents} of latents it reads {reads}, which is not "
        f"supported; choose a model with {latents}, {2 * latents} (edits pictures) or {2 * latents + 1} (inpainting)"
    )


def edits(unet: UNetConfig, vae: AnyVAEConfig) -> bool:
    """Whether the UNet reads a picture to edit, as InstructPix2Pix does."""
    return unet.in_channels == 2 * vae.latent_channels


def nearest(variant: Variant, scheduler: str) -> Variant | None:
    """The known model with the same networks and kind of schedule; of several, the one with the same prediction, then
    the same spacing. Of what the Turbo models have alone, all must be there: other models have trailing spacing too.

    `scheduler`: the class in the model's folder.
    """
    wanted = ("epsilon", TURBO["spacing"], TURBO["size"])
    turbo = (variant.prediction, variant.spacing, variant.size) == wanted and scheduler.startswith("Euler")
    same = [
        known
        for known in VARIANTS.values()
        if (known.unet, known.text) == (variant.unet, variant.text)
        and isinstance(known.schedule, EDMSchedule) == isinstance(variant.schedule, EDMSchedule)
        and (turbo or not known.name.endswith("-turbo"))
    ]
    agree = [(known.prediction == variant.prediction) * 2 + (known.spacing == variant.spacing) for known in same]
    return same[agree.index(max(agree))] if same else None


def encoder_names(variant: Variant) -> list[str]:
    """The folder of each text encoder. SDXL's refiner has the second alone."""
    names = ["text_encoder", "text_encoder_2"]
    return names[1:] if variant.unet.vector and len(variant.text) == 1 else names[: len(variant.text)]
