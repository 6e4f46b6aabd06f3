"""Writes the config.json files of a folder, as diffusers and transformers read them."""

import json
from dataclasses import asdict
from typing import Any

from plainsd.diffusion.schedule import EDMSchedule
from plainsd.errors import UserError
from plainsd.files.config_noise import OF_LEVELS
from plainsd.files.config_vae import TINY
from plainsd.files.configs import FORCE_ZEROS, MIDDLES, NOTE, NOTED, check_end
from plainsd.models.clip import TextConfig
from plainsd.models.control import ControlConfig
from plainsd.models.tiny_vae import TinyVAEConfig
from plainsd.models.vae import VAEConfig
from plainsd.models.variants import Variant, edits, encoder_names


def write_unet(variant: Variant) -> dict[str, Any]:
    unet, count = variant.unet, len(variant.unet.channels)
    kinds = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in unet.depth]
    if unet.mid_depth and unet.depth[-1] not in (0, unet.mid_depth):
        raise UserError(
            f"diffusers has no config for {unet.mid_depth} transformer blocks in the middle after "
            f"{unet.depth[-1]} at the last level; the middle's count must be that of the last level"
        )
    depth = [d or 1 for d in unet.depth[:-1]] + [unet.mid_depth or unet.depth[-1] or 1]
    size_vector = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": unet.vector,
    }
    more = size_vector if unet.vector else {}
    if unet.up_depth:
        more["reverse_transformer_layers_per_block"] = [upward(blocks) for blocks in reversed(unet.up_depth)]
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
        "mid_block_type": None if unet.mid_depth is None else MIDDLES[0] if unet.mid_depth else MIDDLES[1],
        "norm_eps": 1e-5,
        "norm_num_groups": unet.groups,
        "out_channels": unet.out_channels,
        "sample_size": variant.size // variant.vae.factor,
        "time_cond_proj_dim": unet.guidance_dim,
        "transformer_layers_per_block": depth[0] if depth == depth[:1] * count else depth,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)],
        "use_linear_projection": not variant.conv_projections,
    } | more


def write_control(control: ControlConfig, conv: bool) -> dict[str, Any]:
    """Of a ControlNet in a folder of its own."""
    unet = control.unet
    config = write_unet(Variant("control", unet, VAEConfig(), (), conv_projections=conv))
    beside = ("out_channels", "sample_size", "time_cond_proj_dim", "up_block_types", "center_input_sample")
    config = {name: value for name, value in config.items() if name not in beside}
    union = {
        "_class_name": "ControlNetUnionModel",
        "addition_time_embed_dim": 256,
        "num_control_type": control.kinds,
        "num_trans_channel": unet.channels[0],
        "num_proj_channel": unet.channels[0],
        "num_trans_head": 8,
        "num_trans_layer": 1,
    }
    if control.kinds:  # diffusers' union nets always have attention in the middle
        del config["mid_block_type"]
    return (
        config
        | {
            "_class_name": "ControlNetModel",
            "conditioning_channels": control.hint_channels,
            "conditioning_embedding_out_channels": list(control.hint),
            "controlnet_conditioning_channel_order": "bgr" if control.bgr else "rgb",
            "global_pool_conditions": control.pooled,
        }
        | (union if control.kinds else {})
    )


def upward(blocks: tuple[int, ...]) -> int | list[int]:
    """Transformer blocks of one level: a number where all are the same (diffusers has no 0 here)."""
    return list(blocks) if len({*blocks}) > 1 else blocks[0] or 1


def write_tiny_vae(vae: TinyVAEConfig) -> dict[str, Any]:
    return {
        "_class_name": TINY,
        "act_fn": "relu",
        "decoder_block_out_channels": [vae.width] * len(vae.decoder_blocks),
        "encoder_block_out_channels": [vae.width] * len(vae.encoder_blocks),
        "in_channels": vae.pixel_channels,
        "latent_channels": vae.latent_channels,
        "num_decoder_blocks": list(vae.decoder_blocks),
        "num_encoder_blocks": list(vae.encoder_blocks),
        "out_channels": vae.pixel_channels,
    }


def write_vae(variant: Variant) -> dict[str, Any]:
    vae = variant.vae
    if isinstance(vae, TinyVAEConfig):
        return write_tiny_vae(vae)
    moments = (
        {"latents_mean": list(vae.latents_mean), "latents_std": list(vae.latents_std)}
        if vae.latents_mean and vae.latents_std
        else {}
    )
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
    } | moments


def write_text(text: TextConfig) -> dict[str, Any]:
    check_end(text.eos)
    return {
        "architectures": ["CLIPTextModelWithProjection" if text.projection else "CLIPTextModel"],
        "bos_token_id": max(0, text.eos - 1),
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
        "torch_dtype": "float32",  # diffusers' default dtype for the other parts, whatever is stored
        "vocab_size": text.vocab,
    }


def write_schedule(variant: Variant) -> dict[str, Any]:
    """As a DDIMScheduler, which has every setting, or for a consistency model as an LCMScheduler; diffusers' other
    schedulers read the same file."""
    schedule = variant.schedule
    if isinstance(schedule, EDMSchedule):
        return write_edm(variant, schedule)
    spacing = variant.spacing if variant.spacing in ("leading", "trailing", "linspace") else "leading"
    consistency = {"_class_name": "LCMScheduler", "original_inference_steps": 50}
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
    } | (consistency if variant.sampler == "lcm" else {})


def write_edm(variant: Variant, schedule: EDMSchedule) -> dict[str, Any]:
    return {
        "_class_name": "EDMEulerScheduler" if variant.sampler == "euler" else "EDMDPMSolverMultistepScheduler",
        "num_train_timesteps": schedule.count,
        "prediction_type": "epsilon" if variant.prediction == "edm" else variant.prediction,
        "rho": schedule.rho,
        "sigma_data": schedule.sigma_data,
        "sigma_max": schedule.sigma_max,
        "sigma_min": schedule.sigma_min,
        "sigma_schedule": variant.spacing if variant.spacing in OF_LEVELS else "karras",
    }


def write_variant(variant: Variant) -> dict[str, str]:
    """The settings files of a diffusers folder, by their paths within it."""
    noise = write_schedule(variant)
    index: dict[str, Any] = {
        "_class_name": pipeline(variant),
        "_diffusers_version": "0.42.1",  # the version of this layout; its inpainting classes require it
        NOTE: {name: value for name, value in asdict(variant).items() if name in NOTED},
        "scheduler": ["diffusers", noise["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", write_vae(variant)["_class_name"]],
    }
    if not variant.unet.vector:
        index |= {"feature_extractor": [None, None], "safety_checker": [None, None], "requires_safety_checker": False}
    elif len(variant.text) == 1:
        index |= {
            "text_encoder": [None, None],
            "tokenizer": [None, None],
            "requires_aesthetics_score": True,
            FORCE_ZEROS: False,
        }
    else:
        index[FORCE_ZEROS] = variant.force_zeros
    if edits(variant.unet, variant.vae) and isinstance(variant.schedule, EDMSchedule):
        index["is_cosxl_edit"] = True
    files = {
        "unet/config.json": write_unet(variant),
        "vae/config.json": write_vae(variant),
        "scheduler/scheduler_config.json": noise,
    }
    for name, text in zip(encoder_names(variant), variant.text, strict=True):
        files[f"{name}/config.json"] = write_text(text)
        index[name] = ["transformers", files[f"{name}/config.json"]["architectures"][0]]
        index[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    files["model_index.json"] = index
    return {path: json.dumps(content, indent=2, sort_keys=True) + "\n" for path, content in files.items()}


def pipeline(variant: Variant) -> str:
    """The name of diffusers' class for this kind of model."""
    if edits(variant.unet, variant.vae):
        return f"StableDiffusion{'XL' if variant.unet.vector else ''}InstructPix2PixPipeline"
    if not variant.unet.vector:
        return "StableDiffusionInpaintPipeline" if variant.unet.in_channels == 9 else "StableDiffusionPipeline"
    if variant.unet.in_channels == 9:
        return "StableDiffusionXLInpaintPipeline"
    return "StableDiffusionXLImg2ImgPipeline" if len(variant.text) == 1 else "StableDiffusionXLPipeline"
