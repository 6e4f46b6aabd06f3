"""What a file of tensors is, from the names and shapes in it; a file's own name is never asked."""

import re
from collections.abc import Iterable
from dataclasses import replace

import torch

from plainsd.errors import UserError, unknown
from plainsd.files.tensorfile import TensorFile
from plainsd.models.variants import VARIANTS, ScheduleConfig, Variant

UNET_PREFIX = "model.diffusion_model."
FIRST = "input_blocks.0.0.weight"  # the UNet's first weight, whose shape tells most

LORA = "a LoRA"
EMBEDDING = "a textual-inversion embedding"
SEEMS = (  # the first pattern that fits any name tells what the file seems to be
    (
        r"lora_(down|up|A|B)\b|lora\.(down|up)\b|_lora\.|\.hada_w|\.lokr_w|\.b?oft_|\.ia3_|\.on_input$|\.w_norm$|\.diff$",
        f"{LORA}; give it with --lora",
    ),
    (r"^(control_model\.|controlnet_cond_embedding\.|input_hint_block\.)", "a ControlNet"),
    (r"^(string_to_param|emb_params|clip_[lg])\b|^<.*>$", EMBEDDING),
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
    (r"^(text_model|embeddings|encoder\.layers)\.", "a CLIP text encoder in transformers' names"),
    (r"resblocks\.", "an OpenCLIP text encoder"),
)


def seems(names: Iterable[str]) -> str:
    names = list(names)
    for pattern, what in SEEMS:
        if any(re.search(pattern, name) for name in names):
            return what
    return "no kind of file known here"


Traits = dict[str, int | None]  # what tells the families apart


def traits(file: TensorFile) -> Traits:
    """Of the UNet in a single file."""
    shapes = {
        name.removeprefix(UNET_PREFIX): stored.shape
        for name, stored in file.tensors.items()
        if name.startswith(UNET_PREFIX)
    }
    if FIRST not in shapes:
        lacks = "is no single-file checkpoint"
        if shapes:
            some = ", ".join(list(shapes)[:5])
            lacks = f"is incomplete: {FIRST} is not among the {len(shapes)} weights of its UNet ({some}, ...)"
        raise UserError(f"{file.path} {lacks}: it seems to be {seems(file.tensors)}")
    contexts = [shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")]
    width, channels = (*shapes[FIRST], 0, 0)[:2]
    return {
        "in_channels": channels,
        "channels": width,
        "context": contexts[0] if contexts else None,
        "vector": shapes.get("label_emb.0.0.weight", (None, None))[1],
        "guidance": shapes.get("time_embed.cond_proj.weight", (None, None))[1],
    }


def known_traits(variant: Variant) -> Traits:
    unet = variant.unet
    return {
        "in_channels": unet.in_channels,
        "channels": unet.channels[0],
        "context": unet.context,
        "vector": unet.vector,
        "guidance": unet.guidance_dim,
    }


def detect(file: TensorFile, family: str | None = None) -> tuple[Variant, bool]:
    """The family of a single file, and whether what it predicts is certain. `family` settles what shapes cannot."""
    found = traits(file)
    if family is not None and family not in VARIANTS:
        raise unknown("model family", family, VARIANTS)
    fitting = [variant for variant in VARIANTS.values() if known_traits(variant) == found]
    if family is not None:
        fitting = [variant for variant in fitting if variant.name == family]
    if not fitting:
        wanted = f"the family {family}" if family else "any known family"
        has = ", ".join(f"{name} {value}" for name, value in found.items())
        raise UserError(f"{file.path} does not fit {wanted}: its UNet has {has}; it seems to be {seems(file.tensors)}")
    variant, told = fitting[0], prediction_told(file)
    if "ztsnr" in file.tensors:
        variant = replace(variant, schedule=ScheduleConfig(zero_terminal_snr=True), spacing="trailing")
    if told is not None:
        variant = predicting(variant, told)
    certain = family is not None or told is not None or len({variant.prediction for variant in fitting}) == 1
    return variant, certain


def prediction_told(file: TensorFile) -> str | None:
    """What the network predicts, where the file says so: by an empty tensor, or by a note in the metadata."""
    if "v_pred" in file.tensors:
        return "v_prediction"
    note = file.metadata.get("modelspec.prediction_type", "").lower()
    return {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}.get(note)


def predicting(variant: Variant, prediction: str) -> Variant:
    """The variant with that prediction: the known one with the same networks where there is one."""
    if variant.prediction == prediction:
        return variant
    for known in VARIANTS.values():
        if (known.unet, known.text, known.prediction) == (variant.unet, variant.text, prediction):
            return replace(known, schedule=variant.schedule, spacing=variant.spacing)
    return replace(variant, prediction=prediction)


@torch.no_grad()
def probe(unet: torch.nn.Module) -> str:
    """What a trained UNet predicts, by asking it.

    At the last timestep its input is nearly pure noise. A network that predicts the noise gives it back; one that
    predicts v = alpha * eps - sigma * x0 gives mostly the picture it expects, which has nothing to do with the noise.
    """
    config, weight = unet.config, unet.conv_in.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, config.in_channels, 32, 32, generator=generator).to(weight)
    out = unet(x, 999, torch.zeros(1, 77, config.context).to(weight)).float().flatten()
    noise = x[:, : config.out_channels].float().flatten()
    return "epsilon" if torch.corrcoef(torch.stack([out, noise]))[0, 1] > 0.5 else "v_prediction"
