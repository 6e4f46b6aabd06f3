"""The original single file: all networks in one .safetensors or .ckpt, each under a prefix of its own.

What we write carries the settings in the file's metadata; a file from elsewhere has its family told by its shapes.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import torch

from plainsd.errors import UserError
from plainsd.files.configs import read_variant
from plainsd.files.configs_out import write_variant
from plainsd.files.detect import UNET_PREFIX, detect, predicting, probe
from plainsd.files.folder import spelling
from plainsd.files.stored import Contents, Network, blueprint, check_names, fragments, located, pack, parts, unpack
from plainsd.files.tensorfile import TensorFile, damaged, open_tensors, write_whole
from plainsd.listing import suffix_of
from plainsd.models.variants import Variant

FILES, SPELLED = "plainsd.files", "plainsd.spellings"  # in the metadata, as JSON: a folder's settings; our notes
KEPT = "leftovers."  # before a folder's tensors that single files do not have

PATH = re.compile(r"(model_index|preview|(unet|vae|scheduler|(text_encoder|tokenizer)(_2)?)/\w[\w.-]*)\.(json|txt)")

# Names beside the networks' own: averaged copies, buffers, training losses, and parts that no picture needs.
BESIDE = re.compile(
    "|".join(
        (
            r"model_ema\.",
            r"(sqrt_|log_)?(one_minus_)?(recip(m1)?_)?alphas_cumprod(_prev)?$",
            r"sqrt_recipm1_alphas_cumprod$",
            r"betas$",
            r"posterior_",
            r"logvar$",
            r"scale_factor$",
            r"denoiser\.",
            r"v_pred$",
            r"ztsnr$",
            r"first_stage_model\.loss\.",
            r"cond_stage_model\.(logit_scale|text_projection)",
            r".*\.position_ids$",
            r".*\.logit_scale$",
            re.escape(KEPT),
            r"cond_stage_model\.transformer\.text_projection\.weight$",
            r"conditioner\.embedders\.0\.transformer\.text_projection\.weight$",
            r"cond_stage_model\.model\.(text_projection$|visual\.|transformer\.resblocks\.23\.)",  # SD 2 stops before it
        )
    )
)


def prefixes(variant: Variant) -> dict[str, tuple[str, str]]:
    """Where each network lies in a single file, and in which column of the tables its names are."""
    if not variant.unet.vector:
        quick = variant.text[0].activation == "quick_gelu"
        text = ("cond_stage_model.transformer.", "transformers") if quick else ("cond_stage_model.model.", "openclip")
        texts = {"text_encoder": text}
    else:
        texts = {"text_encoder_2": (f"conditioner.embedders.{len(variant.text) - 1}.model.", "openclip")}
        if len(variant.text) == 2:
            texts["text_encoder"] = ("conditioner.embedders.0.transformer.", "transformers")
    return {"unet": (UNET_PREFIX, "original"), "vae": ("first_stage_model.", "original"), **texts}


# --- reading ---------------------------------------------------------------------------------------------------------


def read_single(path: Path, family: str | None = None, *, vae: bool = True) -> Contents:
    """`family`: a name in VARIANTS, where shapes cannot tell. `vae` False: the file's own is not wanted."""
    file = open_tensors(path)
    variant, certain = told(file, family)
    networks = read_networks(file, variant, [name for name in parts(variant) if vae or name != "vae"])
    if not certain:
        asked = probe(networks["unet"].build(torch.device("cpu"), torch.bfloat16))
        variant = predicting(variant, asked)
    texts, spellings = noted(file, FILES, {}), noted(file, SPELLED, [])
    extras = {name for part in networks for name in extra_names(file, part, *prefixes(variant)[part])}
    leftovers = {name: stored for name, stored in file.tensors.items() if BESIDE.match(name) and name not in extras}
    for part, network in networks.items():
        prefix, layout = prefixes(variant)[part]
        found = fragments(blueprint(network.kind, network.config), layout, file.tensors, prefix)
        spellings += [f"single-file {part} {fragment}" for fragment in found]
    return Contents(variant, networks, texts or write_variant(variant), leftovers, tuple(spellings))


def told(file: TensorFile, family: str | None = None) -> tuple[Variant, bool]:
    """What model is in a file, by our notes or by its shapes, and whether what it predicts is certain."""
    texts = noted(file, FILES, {})
    if strange := [name for name, text in texts.items() if not PATH.fullmatch(name) or not isinstance(text, str)]:
        raise damaged(file.path, f"its metadata names the file {strange[0]!r}, which no model has")

    def get(name: str) -> dict:
        try:
            return json.loads(texts[name])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise damaged(file.path, f"the settings {name!r} in its metadata are incomplete") from error

    variant, certain = (read_variant(get, str(file.path)), True) if texts else detect(file, family)
    return replace(variant, conv_projections=has_convolutions(file)), certain


def read_networks(file: TensorFile, variant: Variant, names: list[str]) -> dict[str, Network]:
    """The networks of those names; whatever else is in the file must be known by name."""
    bare = {name: blueprint(*parts(variant)[name]) for name in names}
    wanted = {
        name: located(
            network,
            prefixes(variant)[name][1],
            file.tensors,
            conv=variant.conv_projections,
            prefix=prefixes(variant)[name][0],
        )
        for name, network in bare.items()
    }
    beside = [name for name in file.tensors if BESIDE.match(name)]
    if "vae" not in names:
        beside += [name for name in file.tensors if name.startswith(prefixes(variant)["vae"][0])]
    check_names({place.name: None for places in wanted.values() for place in places} | dict.fromkeys(beside), file)
    networks = {}
    for name, network in bare.items():
        shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}
        extras = {
            theirs: file.tensors[key] for key, theirs in extra_names(file, name, *prefixes(variant)[name]).items()
        }
        networks[name] = Network(*parts(variant)[name], unpack(file, wanted[name], shapes), extras)
    return networks


def extra_names(file: TensorFile, part: str, prefix: str, layout: str) -> dict[str, str]:
    """What a network's own file in a folder would hold beside its weights, `position_ids`: the names here and there."""
    kept = f"{KEPT}{part}."
    public = [
        name
        for name in file.tensors
        if layout == "transformers" and name.startswith(prefix) and name.endswith(".position_ids")
    ]
    return {name: name.removeprefix(kept) for name in file.tensors if name.startswith(kept)} | {
        name: name.removeprefix(prefix) for name in public
    }


def noted(file: TensorFile, name: str, default: dict | list) -> dict | list:
    try:
        content = json.loads(file.metadata.get(name, "null"))
    except json.JSONDecodeError as error:
        raise damaged(file.path, f"the note {name!r} in its metadata is not JSON") from error
    if content is not None and type(content) is not type(default):
        raise damaged(file.path, f"the note {name!r} in its metadata is a {type(content).__name__}")
    return default if content is None else content


def has_convolutions(file: TensorFile) -> bool:
    """Whether the UNet's attention projections are 1x1 convolutions in this file."""
    shapes = (
        stored.shape
        for name, stored in file.tensors.items()
        if name.startswith(UNET_PREFIX) and name.endswith("proj_in.weight")
    )
    return len(next(shapes, ())) == 4


# --- writing ---------------------------------------------------------------------------------------------------------


def write_single(contents: Contents, target: Path, dtype: torch.dtype | None = None) -> None:
    """`contents.texts` go into the metadata. The file is whole or absent."""
    if suffix_of(target) != ".safetensors":
        raise UserError(f"{target}: a single file is written as .safetensors; give it that ending")
    tensors = dict(contents.leftovers)
    for name, network in contents.networks.items():
        prefix, layout = prefixes(contents.variant)[name]
        tensors |= pack(
            network,
            layout,
            conv=contents.variant.conv_projections,
            prefix=prefix,
            dtype=dtype,
            spelling=spelling(contents, "single-file", name),
        )
        before = prefix if layout == "transformers" else f"{KEPT}{name}."
        tensors |= {before + key: stored for key, stored in network.extras.items()}
    others = [note for note in contents.spellings if not note.startswith("single-file ")]
    metadata = contents.notes | {FILES: json.dumps(contents.texts)} | ({SPELLED: json.dumps(others)} if others else {})
    write_whole(target, tensors, metadata)
