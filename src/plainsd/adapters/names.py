"""Names of a LoRA's modules and tensors in files: kohya, diffusers (three generations), PEFT, ComfyUI.

A tensor's name is a module's name and an ending. The ending is the factor of the change (layers.py); the module's name
is one of the columns of files/names.py, with a prefix for the network, in the spelling of the dialect:

    kohya      lora_unet_down_blocks_0_attentions_0_proj_in     dots are underscores; SDXL by the original's names
    LyCORIS    lycoris_down_blocks_0_attentions_0_proj_in       by its own trainer, without the network's name
    dotted     unet.down_blocks.0.attentions.0.proj_in          diffusers, PEFT
    ComfyUI    diffusion_model.input_blocks.1.1.proj_in         and text_encoders.clip_l.transformer.text_model...
    OneTrainer unet.input_blocks.1.1.proj_in                    and clip_l.text_model...
"""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import nn

from plainsd.files.names import NAME_ROWS
from plainsd.models.clip import TextEncoder
from plainsd.models.unet import UNet
from plainsd.models.variants import encoder_names
from plainsd.pictures.model import StableDiffusion

Adaptable = StableDiffusion | UNet | TextEncoder
ModulePlace = tuple[str, str]  # a network's name and a module's, ours

ENDINGS = {  # part: endings of its tensor's name
    "down": (
        ".lora_down.weight",
        ".lora_A.weight",
        ".lora.down.weight",
        "_lora.down.weight",
        ".lora_linear_layer.down.weight",
    ),
    "up": (".lora_up.weight", ".lora_B.weight", ".lora.up.weight", "_lora.up.weight", ".lora_linear_layer.up.weight"),
    "mid": (".lora_mid.weight",),
    "alpha": (".alpha",),
    "dora_scale": (".dora_scale",),
    "magnitude": (".lora_magnitude_vector.weight", ".lora_magnitude_vector"),
    "diff": (".diff", ".w_norm"),  # LyCORIS' full and norm, ComfyUI
    "diff_b": (".diff_b", ".b_norm"),
    **{
        part: (f".{part}",)
        for part in (  # LyCORIS: LoHa, LoKr
            "hada_w1_a",
            "hada_w1_b",
            "hada_t1",
            "hada_w2_a",
            "hada_w2_b",
            "hada_t2",
            "lokr_w1",
            "lokr_w1_a",
            "lokr_w1_b",
            "lokr_w2",
            "lokr_w2_a",
            "lokr_w2_b",
            "lokr_t2",
        )
    },
    **{part: (f".{part}.weight",) for part in ("a1", "a2", "b1", "b2")},  # LyCORIS' GLoRA
    **{part: (f".{part}",) for part in ("oft_blocks", "rescale", "on_input")},  # LyCORIS' OFT, BOFT, IA3
    "oft_R": (".oft_R.weight",),  # PEFT's OFT, BOFT, IA3
    **{part: (f".{part}",) for part in ("boft_R", "boft_s", "ia3_l")},
}
FLAT_WEIGHT = re.compile(r"((?:lora_(?:unet|te\d?)|lycoris)_\w+)\.weight")  # of LyCORIS' IA3
ADAPTER = re.compile(  # PEFT's adapter name
    r"(\.(?:lora_[AB]|lora_magnitude_vector|hada_\w+|lokr_\w+|oft_R|boft_[Rs]|ia3_l))\.default(?:_\d+)?(?=\.|$)"
)
BUNDLE = "bundle_emb."  # prefix of a learned word's vectors; see embeddings.py
UNUSED = re.compile(r"(text_encoders\.)?clip_l\.(transformer\.)?text_projection\.")  # which no model here has

KOHYA = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
COMFY = {"text_encoder": ("clip_l.", "clip_h."), "text_encoder_2": ("clip_g.",)}  # OneTrainer's too
LORA_SPELLINGS = (  # as files/names.py has it, as some files have it
    (".to_out.0", ".to_out"),  # diffusers in 2023
    (".q_proj", ".to_q"),
    (".k_proj", ".to_k"),
    (".v_proj", ".to_v"),
    (".out_proj", ".to_out"),
    ("text_model.", ""),  # transformers 5.6 and later
)


ADAPTABLE = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm, nn.Embedding)


class ModuleNames(NamedTuple):
    """All names of one module that a LoRA can change. `mark` as in files/names.py."""

    ours: str
    diffusers: str
    original: str
    mark: str


def adaptable_networks(model: Adaptable) -> dict[str, nn.Module]:
    """The networks that a LoRA can change, by their folders' names; of a whole model, or one network alone."""
    if isinstance(model, UNet):
        return {"unet": model}
    if isinstance(model, TextEncoder):
        return {"text_encoder": model}
    return {"unet": model.unet, **dict(zip(encoder_names(model.variant), model.text_encoders, strict=True))}


def modules_of(network: nn.Module) -> dict[str, ModuleNames]:
    """All linear layers and convolutions of a network, by our names."""
    return modules_by_name(network, (nn.Linear, nn.Conv2d))


def modules_by_name(network: nn.Module, kinds: tuple[type[nn.Module], ...] = ADAPTABLE) -> dict[str, ModuleNames]:
    """All modules of these kinds, by our names."""
    rows = {row[0]: row for row in NAME_ROWS[type(network)](network)}
    found = {}
    for ours, module in network.named_modules():
        if isinstance(module, kinds):
            (diffusers, _, mark), (original, _, _) = (name.partition(":") for name in rows[ours][1:])
            found[ours] = ModuleNames(ours, diffusers, original, mark)
    return found


def spellings(name: str) -> set[str]:
    """A module's dotted name in the spellings of old and new diffusers."""
    found = {name}
    for ours, theirs in LORA_SPELLINGS:
        found |= {other.replace(ours, theirs, 1) for other in found}
    return found


def known_names(model: Adaptable) -> dict[str, tuple[str, str]]:
    """Every dialect's name of every module -> our names of network and module."""
    parts = adaptable_networks(model)
    known: dict[str, tuple[str, str]] = {}
    for part, network in parts.items():
        alone = part == "unet" or len(parts) <= 2  # then a name without a prefix is unambiguous
        for module in modules_by_name(network).values():
            dotted = spellings(module.diffusers)
            names = {f"{part}.{name}" for name in dotted} | (dotted if alone else set())
            flat = dotted
            if part == "unet":
                flat = dotted | {module.original}
                names |= {f"diffusion_model.{module.original}", f"unet.{module.original}"}
            for clip in COMFY.get(part, ()):
                names |= {clip + name for name in dotted} | {
                    f"text_encoders.{clip}transformer.{name}" for name in dotted
                }
            prefixes = KOHYA[part] + (("lycoris_",) if alone else ())
            names |= {prefix + name.replace(".", "_") for prefix in prefixes for name in flat}
            known |= dict.fromkeys(names, (part, module.ours))
    return known


def split_name(name: str) -> tuple[str, str] | None:
    """A tensor's name split into module and part; None where it is no part of a LoRA."""
    plain = ADAPTER.sub(r"\1", name).removeprefix("base_model.model.").replace(".processor.", ".")
    for part, endings in ENDINGS.items():
        for ending in endings:
            if plain.endswith(ending):
                return plain.removesuffix(ending), part
    flat = FLAT_WEIGHT.fullmatch(name)
    return (flat[1], "gain") if flat else None


# --- writing ---------------------------------------------------------------------------------------------------------


def kohya_name(part: str, named: ModuleNames, *, xl: bool) -> str:
    """The name as kohya's trainer writes it: for SDXL with the original UNet's names, else with diffusers'."""
    prefix = "lora_te1_" if xl and part == "text_encoder" else KOHYA[part][0]
    return prefix + (named.original if xl and part == "unet" else named.diffusers).replace(".", "_")


def dotted_name(part: str, named: ModuleNames) -> str:
    return f"{part}.{named.diffusers}"
