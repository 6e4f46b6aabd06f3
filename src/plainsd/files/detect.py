"""What a file of tensors is, from its tensors' names and shapes; never from the file's name."""

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from plainsd.diffusion.schedule import EDMSchedule, NoiseSchedule
from plainsd.errors import WITH_NAMES, UserError, shortened, unknown
from plainsd.files.tensorfile import TensorFile
from plainsd.models.layers import timestep_embedding
from plainsd.models.variants import VARIANTS, ScheduleConfig, Variant, check_reads

UNET_PREFIX = "model.diffusion_model."
FIRST = "input_blocks.0.0.weight"  # the UNet's first weight
OF_CHECKPOINTS = (UNET_PREFIX, "first_stage_model.", "cond_stage_model.", "conditioner.", "depth_model.")
ENDS = ("sigma_min", "sigma_max")
ZERO_SNR_SETTINGS: dict[str, Any] = {"schedule": ScheduleConfig(zero_terminal_snr=True), "spacing": "trailing"}
SAID = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}  # in metadata
MARKS = ("v_pred", "ztsnr", "edm_mean", "edm_std", *(f"edm_vpred.{name}" for name in ENDS))  # tensors used as flags

LORA = "a LoRA"
EMBEDDING = "a textual-inversion embedding"
SEEMS = (  # the first pattern that matches any name
    (
        r"lora_(down|up|A|B)\b|lora\.(down|up)\b|_lora\.|\.hada_w|\.lokr_w|\.b?oft_|\.ia3_|\.on_input$|\.w_norm$|\.diff$",
        f"{LORA}; give it with --lora",
    ),
    (r"^(control_model\.|controlnet_cond_embedding\.|input_hint_block\.)", "a ControlNet"),
    (r"^(adapter\.)?body\.\d+\.(in_conv|block1|resnets)", "a T2I-Adapter; give it with --control"),
    (r"^(image_proj|ip_adapter)\.", "an IP-Adapter; give it with --image-prompt"),
    (r"^(vision_model\.)?embeddings\.patch_embedding\.|^visual\.", "a CLIP image encoder; use it as --image-encoder"),
    (r"^(string_to_param|em[bp]_params|clip_[lg])\b|^<.*>$", EMBEDDING),
    (r"joint_blocks\.", "Stable Diffusion 3"),
    (r"double_blocks\.", "FLUX or another rectified-flow transformer"),
    (r"^model\.diffusion_model\.transformer_blocks\.", "a diffusion transformer"),
    (r"motion_modules\.|temporal_", "a video model or a motion module"),
    (r"^depth_model\.|^model\.diffusion_model\..*\.depth", "the depth-conditioned model of SD 2"),
    (r"^conditioner\.embedders\.1\.", "SDXL's base model as a single file"),
    (r"^conditioner\.embedders\.0\.model\.", "SDXL's refiner as a single file"),
    (r"^cond_stage_model\.model\.", "SD 2.x as a single file"),
    (r"^cond_stage_model\.transformer\.", "SD 1.x as a single file"),
    (r"^model\.diffusion_model\.", "a UNet alone, with the names of a single file"),
    (r"^add_embedding\.", "SDXL's UNet in diffusers' names"),
    (r"^(time_embedding|down_blocks\.\d+\.attentions)\.", "a UNet in diffusers' names"),
    (r"^(first_stage_model\.)?(encoder|decoder)\.(down|up)", "a VAE"),
    (r"^(taesd_|taesdxl_)?(encoder|decoder)\.(layers\.)?\d+\.|^[01]\.(conv\.0\.)?weight$", "TAESD; give it with --vae"),
    (r"^(text_model|embeddings|encoder\.layers)\.", "a CLIP text encoder in transformers' names"),
    (r"resblocks\.", "an OpenCLIP text encoder"),
)


def is_checkpoint(names: Container[str]) -> bool:
    """Whether these are of a whole checkpoint; training programs leave adapters in such files."""
    return UNET_PREFIX + FIRST in names


def seems(names: Iterable[str]) -> str:
    names = list(names)
    if is_checkpoint(names):
        names = [name for name in names if name.startswith(OF_CHECKPOINTS)]
    for pattern, what in SEEMS:
        if any(re.search(pattern, name) for name in names):
            return what
    return "no kind of file known here"


Traits = dict[str, int | None]  # what distinguishes the families


def traits(file: TensorFile) -> Traits:
    """The traits of the UNet in a single file."""
    shapes = {
        name.removeprefix(UNET_PREFIX): stored.shape
        for name, stored in file.tensors.items()
        if name.startswith(UNET_PREFIX)
    }
    if FIRST not in shapes:
        lacks = "is not a single-file checkpoint"
        if shapes:
            some = ", ".join(shortened(name, 90) for name in list(shapes)[:5])
            lacks = f"is incomplete: {FIRST} is not among the {len(shapes)} weights of its UNet ({some}, ...)"
        raise UserError(f"{file.path} {lacks}: it seems to be {seems(file.tensors)}", most=WITH_NAMES)
    contexts = [shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")]
    width, channels = (*shapes[FIRST], 0, 0)[:2]
    return {
        "in_channels": channels,
        "channels": width,
        "context": contexts[0] if contexts else None,
        "vector": shapes.get("label_emb.0.0.weight", (None, None))[1],
        "guidance": shapes.get("time_embed.cond_proj.weight", (None, None))[1],
        **structure(shapes),
    }


def structure(names: Iterable[str]) -> Traits:
    """Number of down blocks, most transformer blocks in one of them, and those of the middle (None: no middle)."""
    names = list(names)
    down = {name.split(".")[1] for name in names if name.startswith("input_blocks.")}
    return {
        "blocks": len(down) - 1,  # the first is a convolution
        "depth": transformer_blocks(names, r"input_blocks\.\d+"),
        "middle": transformer_blocks(names, "middle_block") if "middle_block.0.in_layers.0.weight" in names else None,
    }


def transformer_blocks(names: Iterable[str], block: str) -> int:
    pattern = re.compile(rf"{block}\.1\.transformer_blocks\.(\d+)\.")
    return max((int(found[1]) + 1 for name in names if (found := pattern.match(name))), default=0)


def known_traits(variant: Variant) -> Traits:
    unet = variant.unet
    return {
        "in_channels": unet.in_channels,
        "channels": unet.channels[0],
        "context": unet.context,
        "vector": unet.vector,
        "guidance": unet.guidance_dim,
        "blocks": len(unet.channels) * (unet.layers + 1) - 1,
        "depth": max(unet.depth),
        "middle": unet.mid_depth,
    }


def detect(file: TensorFile, family: str | None = None) -> tuple[Variant, bool]:
    """The family of a single file, and whether its prediction type is certain. `family` decides where shapes cannot."""
    found = traits(file)
    if family is not None and family not in VARIANTS:
        raise unknown("model family", family, VARIANTS)
    fitting = [variant for variant in VARIANTS.values() if known_traits(variant) == found]
    if family is not None:
        fitting = [variant for variant in fitting if variant.name == family]
    if not fitting:
        check_reads(found["in_channels"] or 0, 4, str(file.path))
        wanted = f"the family {family}" if family else "any known family"
        has = ", ".join(f"{name} {value}" for name, value in found.items())
        raise UserError(f"{file.path} does not fit {wanted}: its UNet has {has}; it seems to be {seems(file.tensors)}")
    noise = noise_told(file)
    variant = suited(fitting, noise)
    certain = family is not None or "prediction" in noise or variant.unet.guidance_dim is not None
    return variant, certain or len(variant.text) == 1 and variant.unet.vector is not None  # distilled; a refiner


def suited(fitting: Sequence[Variant], noise: dict) -> Variant:
    """The known model with the same networks that fits the file's metadata, with the settings found there."""
    edm = isinstance(noise.get("schedule"), EDMSchedule)
    known = [variant for variant in fitting if isinstance(variant.schedule, EDMSchedule) == edm] or fitting
    vae = noise.pop("vae", {})
    alike = [variant for variant in known if variant.prediction == noise.get("prediction", variant.prediction)]
    variant = (alike or known)[0]
    return replace(variant, vae=replace(variant.vae, **vae), **noise)


def noise_told(file: TensorFile) -> dict[str, Any]:
    """Noise schedule and prediction type as the file gives them, as fields of a Variant: by marker tensors, as ComfyUI
    reads and writes them, or in the metadata."""
    if "edm_mean" in file.tensors and "edm_std" in file.tensors:  # Playground 2.5
        moments = {f"latents_{name}": values_of(file, f"edm_{name}") for name in ("mean", "std")}
        noise: dict[str, Any] = {"schedule": EDMSchedule(), "prediction": "edm", "spacing": "karras"}
        return noise | {"vae": moments | {"scaling_factor": EDMSchedule().sigma_data}}
    if "edm_vpred.sigma_max" in file.tensors:  # CosXL
        ends: dict[str, Any] = {
            name: values_of(file, f"edm_vpred.{name}")[0] for name in ENDS if f"edm_vpred.{name}" in file.tensors
        }
        schedule = EDMSchedule(**ends, sigma_data=1.0)
        return {"schedule": schedule, "prediction": "v_prediction", "spacing": "exponential"}
    prediction = prediction_told(file)
    if prediction == "v_prediction" and "ztsnr" in file.tensors:  # with other predictions it is ignored
        return {"prediction": prediction, **ZERO_SNR_SETTINGS}
    return {} if prediction is None else {"prediction": prediction}


def values_of(file: TensorFile, name: str) -> tuple[float, ...]:
    values = tuple(file.tensors[name].read().double().flatten().tolist())
    if not values or not all(0 < abs(value) < 1e6 for value in values):
        raise UserError(f"{file.path}: {name!r} holds {values}, which cannot be; download the file again")
    return values


def prediction_told(file: TensorFile) -> str | None:
    """The prediction type, where the file gives it: by an empty marker tensor, or in the metadata."""
    if "v_pred" in file.tensors:
        return "v_prediction"
    notes = [file.metadata.get(f"modelspec.{name}", "").lower() for name in ("prediction_type", "predict_key")]
    return next((SAID[note] for note in notes if note in SAID), None)


def predicting(variant: Variant, prediction: str, zero_snr: bool = False) -> Variant:
    """The variant with that prediction: a known one with the same networks if there is one. `zero_snr`: the file has a
    `ztsnr`, which counts for v-prediction only."""
    if prediction == "v_prediction" and zero_snr:
        return replace(predicting(variant, prediction), **ZERO_SNR_SETTINGS)
    if variant.prediction == prediction:
        return variant
    for known in VARIANTS.values():
        edm = isinstance(known.schedule, EDMSchedule)
        if not edm and (known.unet, known.text, known.prediction) == (variant.unet, variant.text, prediction):
            return replace(known, schedule=variant.schedule, spacing=variant.spacing)
    return replace(variant, prediction=prediction)


@torch.no_grad()
def probe(unet: torch.nn.Module) -> str | None:
    """What a trained UNet predicts, found by running it; None where its outputs fit neither epsilon nor v.

    At the last timestep its input is nearly pure noise. A network that predicts the noise returns it; one that predicts
    v = alpha * eps - sigma * x0 returns mostly the picture it expects, which is independent of the noise.
    Where the noise is half gone and the picture is plain grey, v too is a share of the noise: an untrained or broken
    network would not give that.
    """
    if likeness(unet, 999) > 0.5:
        return "epsilon"
    return "v_prediction" if likeness(unet, 250) > 0.5 else None


def likeness(unet: torch.nn.Module, timestep: int) -> float:
    """The correlation of the network's answer with the noise that it sees, on a grey picture without a prompt."""
    config, weight, latents = unet.config, unet.conv_in.weight, unet.config.out_channels
    noise = torch.randn(1, latents, 32, 32, generator=torch.Generator().manual_seed(0))
    beside = torch.zeros(1, config.in_channels - latents, 32, 32)
    if config.in_channels == 2 * latents + 1:
        beside[:, 0] = 1  # the mask: all of it is drawn anew
    alpha_bar = NoiseSchedule.scaled_linear().alphas_cumprod[timestep].item()
    x = torch.cat([noise * (1 - alpha_bar) ** 0.5, beside], dim=1).to(weight)
    told = [torch.zeros(1, 77, config.context).to(weight)]
    if config.vector:
        sizes = timestep_embedding(torch.tensor([1024, 1024, 0, 0, 1024, 1024.0]), 256).flatten()
        told.append(F.pad(sizes, (config.vector - len(sizes), 0))[None].to(weight))
    out = unet(x, timestep, *told).float().flatten().cpu()
    return torch.corrcoef(torch.stack([out, noise.flatten()]))[0, 1].item()
