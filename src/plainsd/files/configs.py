"""Reads the config.json files of a folder, as diffusers and transformers write them.

Reading is strict: a setting that changes what a network computes and is not supported here is an error that names it;
so is an impossible value.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_type_hints

from plainsd.errors import UserError
from plainsd.files.checked import MOST, read_value
from plainsd.files.config_noise import read_schedule
from plainsd.files.config_vae import read_vae
from plainsd.files.config_values import Config, check_fixed, divides, one_of, real_number, whole_number, wholes
from plainsd.models.clip import ACTIVATIONS, TextConfig
from plainsd.models.control import ControlConfig, way_down
from plainsd.models.tiny_vae import AnyVAEConfig
from plainsd.models.unet import UNetConfig
from plainsd.models.variants import Variant, check_reads, edits, encoder_names, nearest

NOTE = "_plainsd"  # our entry in model_index.json; diffusers ignores names that begin with _
FORCE_ZEROS = "force_zeros_for_empty_prompt"  # in model_index.json of SDXL; diffusers' default is true
NOTED = ("name", "context", "size", "guidance", "sampler", "steps", "spacing")  # the fields of a Variant kept there

UNET_FIXED = {  # settings with one supported value; a missing one means that value
    "act_fn": "silu",
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "only_cross_attention": False,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "cross_attention_norm": None,
    "num_attention_heads": None,
    "mid_block_only_cross_attention": None,
    "addition_embed_type_num_heads": 64,
}
MIDDLES = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)  # with attention; one ResBlock; none
XL_FIXED = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
CONTROL_CLASSES = {  # and whether they are for several kinds of maps
    "ControlNetModel": False,
    "ControlNetUnionModel": True,
    "ControlNetModel_Union": True,
}
HINT = "conditioning_embedding_out_channels"
UNION_FIXED = {"num_trans_head": 8, "num_trans_layer": 1}
PIX2PIX = ("StableDiffusionInstructPix2PixPipeline", "StableDiffusionXLInstructPix2PixPipeline")
TEXT_CLASSES = {"CLIPTextModel": None, "CLIPTextModelWithProjection": None}
LEGACY_EOS = 2  # older CLIP configs have 2, which stands for the largest id


# --- the networks ----------------------------------------------------------------------------------------------------


def read_unet(config: Config, where: str) -> tuple[UNetConfig, bool]:
    """The UNet of a diffusers config.json, and whether its projections are stored as convolutions."""
    xl = config.get("addition_embed_type") is not None
    check_fixed(config, UNET_FIXED | (XL_FIXED if xl else {}), where)
    channels = wholes(config, "block_out_channels", where)
    count, attends = len(channels), attention_levels(config, len(channels), where)
    layers = wholes(config, "layers_per_block", where, count, 2, MOST)
    context = wholes(config, "cross_attention_dim", where, count, 1280)
    if len({*layers}) > 1 or len({*context}) > 1:
        raise UserError(f"{where}: layers_per_block and cross_attention_dim must be the same at all levels")
    down, up = depths(config, attends, layers[0], where)
    middle = config.get("mid_block_type", MIDDLES[0])
    if middle not in MIDDLES:
        raise UserError(f"{where}: mid_block_type {middle!r} is not supported, only {', '.join(map(str, MIDDLES))}")
    unet = UNetConfig(
        channels=channels,
        depth=tuple(blocks[0] for blocks in down),
        up_depth=up,
        heads=wholes(config, "attention_head_dim", where, count, 8),  # the name is an old mistake: it means heads
        mid_depth=None if middle is None else middle_depth(config, where) if middle == MIDDLES[0] else 0,
        layers=layers[0],
        context=context[0],
        in_channels=whole_number(config, "in_channels", where, 4),
        out_channels=whole_number(config, "out_channels", where, 4),
        groups=whole_number(config, "norm_num_groups", where, 32),
        vector=whole_number(config, "projection_class_embeddings_input_dim", where) if xl else None,
        guidance_dim=whole_number(config, "time_cond_proj_dim", where) if config.get("time_cond_proj_dim") else None,
    )
    divides(unet.groups, channels, "groups of the norms", where)
    for heads, width, attending in zip(
        unet.heads, channels, (*attends[:-1], attends[-1] or unet.mid_depth), strict=True
    ):
        if attending:
            divides(heads, (width,), "attention heads", where)
    return unet, config.get("use_linear_projection") is not True


def read_control(config: Config, where: str) -> tuple[ControlConfig, bool]:
    """The ControlNet that a diffusers config.json describes; likewise whether its files hold convolutions."""
    told = one_of(config, "_class_name", where, "ControlNetModel", CONTROL_CLASSES)
    union = CONTROL_CLASSES[told] or "num_control_type" in config
    unet, conv = read_unet(config, where)
    order = one_of(config, "controlnet_conditioning_channel_order", where, "rgb", {"rgb": False, "bgr": True})
    if union:
        wide = dict.fromkeys(("num_trans_channel", "num_proj_channel"), unet.channels[0])
        check_fixed(config, UNION_FIXED | wide, where)
    control = ControlConfig(
        way_down(unet),
        wholes({HINT: config.get(HINT, (48, 96, 192, 384) if union else (16, 32, 96, 256))}, HINT, where),
        whole_number(config, "conditioning_channels", where, 3, MOST),
        bgr=order == "bgr",
        pooled=config.get("global_pool_conditions") is True,
        kinds=whole_number(config, "num_control_type", where, 6, MOST) if union else 0,
    )
    return control, conv


def attention_levels(config: Config, count: int, where: str) -> list[bool]:
    """Which levels have cross-attention; the same on the way up as on the way down."""
    known = {"DownBlock2D": "UpBlock2D", "CrossAttnDownBlock2D": "CrossAttnUpBlock2D"}
    down: Any = config.get("down_block_types")
    fits = isinstance(down, (list, tuple)) and len(down) == count and all(str(kind) in known for kind in down)
    mirrored = [known[kind] for kind in reversed(down)] if fits else []
    up = config.get("up_block_types", mirrored)
    if not fits or up not in (mirrored, tuple(mirrored)):
        raise UserError(f"{where}: blocks {down} going down and {up} going up are not supported for {count} levels")
    return [kind == "CrossAttnDownBlock2D" for kind in down]


Depths = tuple[tuple[int, ...], ...]  # a level, a ResBlock


def depths(config: Config, attends: list[bool], layers: int, where: str) -> tuple[Depths, Depths | None]:
    """Transformer blocks after each ResBlock, by level, on the way down and up; None: up as down."""
    name, reverse = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
    down = depths_of(config.get(name, 1), attends, layers, f"{where}: {name}")
    if any(len({*blocks}) > 1 for blocks in down):
        raise UserError(f"{where}: {name} {config[name]} has different numbers within a level, which is not supported")
    if config.get(reverse) is None:
        return down, None
    up = depths_of(config[reverse], attends[::-1], layers + 1, f"{where}: {reverse}")[::-1]
    return down, None if up == tuple(blocks[:1] * (layers + 1) for blocks in down) else up


def depths_of(value: Any, attends: list[bool], layers: int, where: str) -> Depths:
    """One number for all, one a level, or a list with one a ResBlock; a level without attention has 0."""
    values = value if isinstance(value, (list, tuple)) else [value] * len(attends)
    found = []
    for one, attending in zip(values, attends, strict=False):
        each = tuple(one) if isinstance(one, (list, tuple)) else (one,) * layers
        good = len(each) == layers and all(type(number) is int and 0 < number <= MOST for number in each)
        found.append(each if good and attending else (0,) * layers)
        if attending and not good:
            raise UserError(f"{where} is {value!r}: {one!r} must be a number from 1 to {MOST}, or {layers} of them")
    if len(values) != len(attends):
        raise UserError(f"{where} is {value!r}, and must be a number a level, of which there are {len(attends)}")
    return tuple(found)


def middle_depth(config: Config, where: str) -> int:
    """Transformer blocks in the middle: as many as at the last level, even if that level has no attention."""
    blocks = config.get("transformer_layers_per_block", 1)
    blocks = blocks[-1] if isinstance(blocks, (list, tuple)) else blocks
    return whole_number({"transformer_layers_per_block": blocks}, "transformer_layers_per_block", where, most=MOST)


def read_text(config: Config, where: str) -> TextConfig:
    vocab = whole_number(config, "vocab_size", where, 49_408)
    eos = whole_number(config, "eos_token_id", where, 49_407, least=0)
    projected = "CLIPTextModelWithProjection" in (config.get("architectures") or [])
    text = TextConfig(
        vocab=vocab,
        width=whole_number(config, "hidden_size", where),
        layers=whole_number(config, "num_hidden_layers", where, most=MOST),
        heads=whole_number(config, "num_attention_heads", where),
        mlp=whole_number(config, "intermediate_size", where),
        positions=whole_number(config, "max_position_embeddings", where, 77),
        activation=one_of(config, "hidden_act", where, "quick_gelu", ACTIVATIONS),
        projection=whole_number(config, "projection_dim", where, 512) if projected else None,
        eos=min(vocab, 49_408) - 1 if eos == LEGACY_EOS else eos,
        eps=real_number(config, "layer_norm_eps", where, 1e-5),
    )
    divides(text.heads, (text.width,), "attention heads", where)
    return text


def check_end(eos: int) -> None:
    """UserError where a config.json cannot say this end token."""
    if eos == LEGACY_EOS:
        raise UserError(
            f"the tokenizer's end token has the id {LEGACY_EOS}, which CLIP's config.json reads as the largest id of "
            "all; give the end token another id"
        )


# --- a whole model ---------------------------------------------------------------------------------------------------


def read_variant(get: Callable[[str], Config], where: str) -> Variant:
    """The Variant of a diffusers folder; `get` reads one of its files, by its path within the folder."""
    index, at = get("model_index.json"), lambda path: (get(path), f"{where}: {path}")
    check_index(index, where)
    latents = whole_number(get("vae/config.json"), "latent_channels", f"{where}: vae/config.json", 4)
    check_reads(whole_number(get("unet/config.json"), "in_channels", f"{where}: unet/config.json", 4), latents, where)
    unet, conv = read_unet(*at("unet/config.json"))
    vae = read_vae(*at("vae/config.json"))
    classes = text_classes(index, where)
    texts = tuple(
        read_text({**get(f"{name}/config.json"), "architectures": [kind]}, f"{where}: {name}/config.json")
        for name, kind in classes.items()
    )
    check_pipeline(index, edits(unet, vae), where)
    check_joints(unet, vae, texts, where)
    noise = read_schedule(*at("scheduler/scheduler_config.json"), scheduler_class(index))
    side = wholes({"sample_size": get("unet/config.json").get("sample_size") or 64}, "sample_size", where)
    variant = Variant(
        "custom",
        unet,
        vae,
        texts,
        context="penultimate" if unet.vector else "final",
        conv_projections=conv,
        size=max(side) * vae.factor,
        force_zeros=force_zeros(index, where) if unet.vector and len(texts) == 2 else True,
        **noise,
    )
    if list(classes) != encoder_names(variant):
        raise UserError(f"{where}: model_index.json lists the text encoders {list(classes)}, which fit no known model")
    if known := nearest(variant, scheduler_class(index)):
        variant = replace(variant, name=known.name, guidance=known.guidance, steps=known.steps)
        variant = replace(variant, sampler=noise.get("sampler", known.sampler))
    return replace(variant, **our_notes(index, where))


def check_joints(unet: UNetConfig, vae: AnyVAEConfig, texts: Sequence[TextConfig], where: str) -> None:
    """UserError where the parts are of different models."""
    if unet.context != (width := sum(text.width for text in texts)):
        what = f"its UNet reads texts of width {unet.context}, and its text encoders give {width}"
    elif unet.out_channels != vae.latent_channels:
        what = f"its UNet gives {unet.out_channels} channels, and its VAE's latents have {vae.latent_channels}"
    else:
        return
    raise UserError(f"{where}: {what}; put the parts of one model together")


def force_zeros(index: Config, where: str) -> bool:
    return read_value(bool, index.get(FORCE_ZEROS, True), f"{where}: model_index.json", FORCE_ZEROS)


def scheduler_class(index: Config) -> str:
    entry = index.get("scheduler")
    return entry[1] if isinstance(entry, list) and len(entry) == 2 and entry[1] else "DDIMScheduler"


def check_pipeline(index: Config, edits: bool, where: str) -> None:
    """UserError where a UNet with twice the latent channels is not for editing; the pipeline's class says so."""
    kind = index.get("_class_name")
    if edits and kind not in (None, *PIX2PIX):
        raise UserError(
            f"{where}: its UNet reads two latents, for {kind}, which is not supported; choose a model for {PIX2PIX[0]}"
        )


def check_index(index: Config, where: str) -> None:
    """UserError unless model_index.json lists the parts that every Stable Diffusion has."""
    for name in ("unet", "vae", "text_encoder"):
        entries = [index.get(key) for key in (name, f"{name}_2")]  # a refiner has only the second text encoder
        if not any(isinstance(entry, list) and any(entry) for entry in entries):
            kind = index.get("_class_name") or "a pipeline without a name"
            raise UserError(
                f"{where}: model_index.json ({kind}) lists no {name}, which Stable Diffusion needs; download the whole "
                "model, or add the entry where the folder has that part"
            )


def text_classes(index: Config, where: str) -> dict[str, str]:
    """The class of each of the model's text encoders: with or without a projection."""
    found = {}
    for name in ("text_encoder", "text_encoder_2"):
        entry = index.get(name) or [None, None]
        if not isinstance(entry, list) or len(entry) != 2:
            raise UserError(f"{where}: model_index.json says {entry!r} for {name}; download it again")
        if entry[1] is not None:
            found[name] = one_of({name: entry[1]}, name, f"{where}: model_index.json", "", TEXT_CLASSES)
    return found


def our_notes(index: Config, where: str) -> dict[str, Any]:
    """Our own entry in model_index.json."""
    noted = index.get(NOTE) or {}
    if not isinstance(noted, dict):
        raise UserError(f"{where}: model_index.json: {NOTE} is {noted!r}, and must be a table")
    hints, place = get_type_hints(Variant), f"{where}: model_index.json: {NOTE}"
    return {name: read_value(hints[name], noted[name], place, name) for name in NOTED if name in noted}
