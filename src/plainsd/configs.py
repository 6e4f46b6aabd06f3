"""A model's settings as diffusers keeps them: the config.json files of a folder, read and written.

They are read strictly: a setting that changes what a network computes, and that this package has no code for, is an
error and is named.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from plainsd.errors import UserError
from plainsd.models.clip import ACTIVATIONS, TextConfig
from plainsd.models.unet import UNetConfig
from plainsd.models.vae import VAEConfig
from plainsd.variants import ScheduleConfig, Variant, encoder_names, nearest

Config = Mapping[str, Any]            # one config.json

NOTE = "_plainsd"                     # our entry in model_index.json; diffusers passes over names that begin with _
NOTED = ("name", "context", "size", "guidance", "sampler", "steps", "spacing")   # the fields of a Variant kept there

UNET_FIXED = {                        # settings with one value that our UNet computes; absent means that value
    "act_fn": "silu", "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1,
    "mid_block_scale_factor": 1, "norm_eps": 1e-5, "only_cross_attention": False, "dual_cross_attention": False,
    "class_embed_type": None, "num_class_embeds": None, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
    "resnet_time_scale_shift": "default", "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional", "time_embedding_dim": None, "time_embedding_act_fn": None,
    "timestep_post_act": None, "conv_in_kernel": 3, "conv_out_kernel": 3, "attention_type": "default",
    "reverse_transformer_layers_per_block": None, "cross_attention_norm": None, "num_attention_heads": None,
    "mid_block_only_cross_attention": None, "addition_embed_type_num_heads": 64,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
}
VAE_FIXED = {
    "act_fn": "silu", "shift_factor": None, "latents_mean": None, "latents_std": None, "use_quant_conv": True,
    "use_post_quant_conv": True, "mid_block_add_attention": True,
}
LEGACY_EOS = 2                        # older CLIP configs say 2 and mean the largest id


def _check(config: Config, fixed: Config, where: str) -> None:
    for name, value in fixed.items():
        found = config.get(name, value)
        if found != value and not (found in (None, False) and value in (None, False)):
            raise UserError(f"{where}: {name} is {found!r}, and only {value!r} is supported")


def _need(config: Config, name: str, where: str) -> Any:
    if name not in config:
        raise UserError(f"{where}: the setting {name!r} is missing; fetch the file again")
    return config[name]


def _levels(value: Any, count: int, where: str) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * count
    if len(values) != count or not all(isinstance(v, int) and v > 0 for v in values):
        raise UserError(f"{where}: {value!r} is not a positive whole number a level, of which there are {count}")
    return values


def read_unet(config: Config, where: str) -> tuple[UNetConfig, bool]:
    """The UNet that a diffusers config.json describes, and whether its files hold convolutions as projections."""
    _check(config, UNET_FIXED, where)
    channels = tuple(_need(config, "block_out_channels", where))
    count = len(channels)
    kinds = tuple(_need(config, "down_block_types", where))
    known = {"DownBlock2D": 0, "CrossAttnDownBlock2D": 1}
    mirrored = tuple(kind.replace("Down", "Up") for kind in reversed(kinds))
    if len(kinds) != count or not set(kinds) <= set(known) or tuple(config.get("up_block_types", mirrored)) != mirrored:
        up = config.get("up_block_types")
        raise UserError(f"{where}: blocks {kinds} going down and {up} going up are not supported")
    depth = _levels(config.get("transformer_layers_per_block", 1), count, f"{where}: transformer_layers_per_block")
    layers = set(_levels(config.get("layers_per_block", 2), count, f"{where}: layers_per_block"))
    context = set(_levels(config.get("cross_attention_dim", 1280), count, f"{where}: cross_attention_dim"))
    if len(layers) > 1 or len(context) > 1:
        raise UserError(f"{where}: layers_per_block and cross_attention_dim must be the same at all levels")
    addition = config.get("addition_embed_type")
    if addition not in (None, "text_time"):
        raise UserError(f"{where}: addition_embed_type {addition!r} is not supported")
    unet = UNetConfig(
        channels=channels,
        depth=tuple(d * known[kind] for d, kind in zip(depth, kinds, strict=True)),
        heads=_levels(config.get("attention_head_dim", 8), count, f"{where}: attention_head_dim"),   # heads, in truth
        mid_depth=depth[-1],
        layers=layers.pop(),
        context=context.pop(),
        in_channels=config.get("in_channels", 4),
        out_channels=config.get("out_channels", 4),
        groups=config.get("norm_num_groups", 32),
        vector=_need(config, "projection_class_embeddings_input_dim", where) if addition else None,
        guidance_dim=config.get("time_cond_proj_dim"),
    )
    return unet, not config.get("use_linear_projection", False)


def write_unet(variant: Variant) -> dict[str, Any]:
    unet, count = variant.unet, len(variant.unet.channels)
    kinds = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in unet.depth]
    if not unet.mid_depth or unet.depth[-1] not in (0, unet.mid_depth):
        raise UserError(f"diffusers has no config for {unet.mid_depth} transformer blocks in the middle after "
                        f"{unet.depth[-1]} at the last level; the middle's count must be that of the last level")
    depth = [d or 1 for d in unet.depth[:-1]] + [unet.mid_depth]
    size_vector = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": unet.vector,
    }
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": unet.heads[0] if len(set(unet.heads)) == 1 else list(unet.heads),
        "block_out_channels": list(unet.channels),
        "center_input_sample": False,
        "cross_attention_dim": unet.context,
        "down_block_types": kinds,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": unet.in_channels,
        "layers_per_block": unet.layers,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5,
        "norm_num_groups": unet.groups,
        "out_channels": unet.out_channels,
        "sample_size": variant.size // variant.vae.factor,
        "time_cond_proj_dim": unet.guidance_dim,
        "transformer_layers_per_block": depth[0] if depth == depth[:1] * count else depth,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)],
        "use_linear_projection": not variant.conv_projections,
    } | (size_vector if unet.vector else {})


def read_vae(config: Config, where: str) -> VAEConfig:
    _check(config, VAE_FIXED, where)
    return VAEConfig(
        channels=tuple(_need(config, "block_out_channels", where)),
        layers=config.get("layers_per_block", 1),
        latent_channels=config.get("latent_channels", 4),
        groups=config.get("norm_num_groups", 32),
        scaling_factor=config.get("scaling_factor", 0.18215),
        pixel_channels=config.get("in_channels", 3),
    )


def write_vae(variant: Variant) -> dict[str, Any]:
    vae = variant.vae
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(vae.channels),
        "down_block_types": ["DownEncoderBlock2D"] * len(vae.channels),
        "in_channels": vae.pixel_channels,
        "latent_channels": vae.latent_channels,
        "layers_per_block": vae.layers,
        "norm_num_groups": vae.groups,
        "out_channels": vae.pixel_channels,
        "sample_size": variant.size,
        "scaling_factor": vae.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * len(vae.channels),
    }


def read_text(config: Config, where: str) -> TextConfig:
    activation = config.get("hidden_act", "quick_gelu")
    if activation not in ACTIVATIONS:
        raise UserError(f"{where}: hidden_act {activation!r} is not supported, only {', '.join(ACTIVATIONS)}")
    vocab, eos = config.get("vocab_size", 49_408), config.get("eos_token_id", 49_407)
    projected = "CLIPTextModelWithProjection" in config.get("architectures", [])
    return TextConfig(
        vocab=vocab,
        width=_need(config, "hidden_size", where),
        layers=_need(config, "num_hidden_layers", where),
        heads=_need(config, "num_attention_heads", where),
        mlp=_need(config, "intermediate_size", where),
        positions=config.get("max_position_embeddings", 77),
        activation=activation,
        projection=config.get("projection_dim", 512) if projected else None,
        eos=min(vocab, 49_408) - 1 if eos == LEGACY_EOS else eos,
        eps=config.get("layer_norm_eps", 1e-5),
    )


def write_text(text: TextConfig) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModelWithProjection" if text.projection else "CLIPTextModel"],
        "bos_token_id": text.eos - 1,
        "eos_token_id": text.eos,
        "hidden_act": text.activation,
        "hidden_size": text.width,
        "intermediate_size": text.mlp,
        "layer_norm_eps": text.eps,
        "max_position_embeddings": text.positions,
        "model_type": "clip_text_model",
        "num_attention_heads": text.heads,
        "num_hidden_layers": text.layers,
        "pad_token_id": 1,
        "projection_dim": text.projection or text.width,
        "vocab_size": text.vocab,
    }


def read_schedule(config: Config, where: str) -> tuple[ScheduleConfig, str, str | None]:
    """The noise schedule, what the network predicts, and the spacing of timesteps if the file gives one."""
    curve = config.get("beta_schedule", "linear")
    curves = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}
    if curve not in curves or config.get("trained_betas") is not None:
        raise UserError(f"{where}: beta_schedule {curve!r} with trained_betas {config.get('trained_betas')!r} is not "
                        f"supported, only {', '.join(curves)} without")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise UserError(f"{where}: prediction_type {prediction!r} is not supported, only epsilon and v_prediction")
    schedule = ScheduleConfig(
        curve=curves[curve],
        beta_start=config.get("beta_start", 0.0001),
        beta_end=config.get("beta_end", 0.02),
        count=config.get("num_train_timesteps", 1000),
        zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
    )
    return schedule, prediction, config.get("timestep_spacing")


def write_schedule(variant: Variant) -> dict[str, Any]:
    """As a DDIMScheduler, the one that knows every setting; diffusers' other schedulers read the same file."""
    schedule = variant.schedule
    spacing = variant.spacing if variant.spacing in ("leading", "trailing", "linspace") else "leading"
    return {
        "_class_name": "DDIMScheduler",
        "beta_end": schedule.beta_end,
        "beta_schedule": "squaredcos_cap_v2" if schedule.curve == "cosine" else schedule.curve,
        "beta_start": schedule.beta_start,
        "clip_sample": False,
        "num_train_timesteps": schedule.count,
        "prediction_type": variant.prediction,
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": spacing,
        "trained_betas": None,
    }


# --- a whole model ---------------------------------------------------------------------------------------------------

def read_variant(get: Callable[[str], Config], where: str) -> Variant:
    """The model that the files of a diffusers folder describe; `get` reads one, by its path within the folder."""
    index, at = get("model_index.json"), lambda path: (get(path), f"{where}: {path}")
    unet, conv = read_unet(*at("unet/config.json"))
    vae = read_vae(*at("vae/config.json"))
    names = [name for name in ("text_encoder", "text_encoder_2") if None not in (index.get(name) or [None])]
    schedule, prediction, spacing = read_schedule(*at("scheduler/scheduler_config.json"))
    side = get("unet/config.json").get("sample_size") or 64
    variant = Variant(
        "custom", unet, vae, tuple(read_text(*at(f"{name}/config.json")) for name in names), schedule, prediction,
        context="penultimate" if unet.vector else "final", conv_projections=conv,
        size=(max(side) if isinstance(side, list) else side) * vae.factor,
        spacing="trailing" if spacing == "trailing" else None,      # the others are habits of samplers, not of models
    )
    if not names or names != encoder_names(variant):
        raise UserError(f"{where}: model_index.json lists the text encoders {names}, which fit no known kind of model")
    if known := nearest(variant):
        variant = replace(variant, name=known.name, guidance=known.guidance, sampler=known.sampler, steps=known.steps)
    noted = index.get(NOTE) or {}
    return replace(variant, **{name: noted[name] for name in NOTED if name in noted})


def write_variant(variant: Variant) -> dict[str, str]:
    """The settings files of a diffusers folder, by their paths within it."""
    index = {
        "_class_name": pipeline(variant),
        "_diffusers_version": "0.42.1",          # whose layout this is; its inpainting classes refuse a folder without
        NOTE: {name: value for name, value in asdict(variant).items() if name in NOTED},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if not variant.unet.vector:
        index |= {"feature_extractor": [None, None], "safety_checker": [None, None], "requires_safety_checker": False}
    elif len(variant.text) == 1:
        index |= {"text_encoder": [None, None], "tokenizer": [None, None], "requires_aesthetics_score": True,
                  "force_zeros_for_empty_prompt": False}
    files = {"unet/config.json": write_unet(variant), "vae/config.json": write_vae(variant),
             "scheduler/scheduler_config.json": write_schedule(variant)}
    for name, text in zip(encoder_names(variant), variant.text, strict=True):
        files[f"{name}/config.json"] = write_text(text)
        index[name] = ["transformers", files[f"{name}/config.json"]["architectures"][0]]
        index[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    files["model_index.json"] = index
    return {path: json.dumps(content, indent=2, sort_keys=True) + "\n" for path, content in files.items()}


def pipeline(variant: Variant) -> str:
    """The name of diffusers' class for this kind of model."""
    if not variant.unet.vector:
        return "StableDiffusionInpaintPipeline" if variant.unet.in_channels == 9 else "StableDiffusionPipeline"
    if variant.unet.in_channels == 9:
        return "StableDiffusionXLInpaintPipeline"
    return "StableDiffusionXLImg2ImgPipeline" if len(variant.text) == 1 else "StableDiffusionXLPipeline"
