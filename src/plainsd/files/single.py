"""The original single file: all networks in one .safetensors or .ckpt, each under its own prefix.

Files that we write have the settings in their metadata; the family of other files is detected from shapes.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from plainsd.diffusion.schedule import EDMSchedule
from plainsd.disk import written_whole
from plainsd.errors import UserError
from plainsd.files.configs import read_variant
from plainsd.files.configs_out import write_variant
from plainsd.files.detect import MARKS, UNET_PREFIX, ZERO_SNR_SETTINGS, detect, predicting, seems
from plainsd.files.distilled import X0, with_distilled_settings
from plainsd.files.folder import spelling
from plainsd.files.names import TensorPlace
from plainsd.files.renumbered import without_gaps
from plainsd.files.stored import (
    Contents,
    StoredNetwork,
    blueprint,
    check_tensor_names,
    fragments,
    packed_tensors,
    parts,
    places_of,
    unpack,
)
from plainsd.files.tensorfile import Stored, TensorFile, open_tensors, stored, write_safetensors
from plainsd.files.unusable import damaged
from plainsd.json_reader import BadJSON, parsed_json
from plainsd.listing import suffix_of
from plainsd.models.variants import Variant

FILES_KEY = "plainsd.files"  # in the metadata, as JSON: the settings files of a folder
SPELLINGS_KEY = "plainsd.spellings"  # and how its tensor names differ from the tables
OWN_NOTES = {
    FILES_KEY,
    SPELLINGS_KEY,
    "format",
    "modelspec.prediction_type",
    "modelspec.predict_key",  # ComfyUI's
    "modelspec.hash_sha256",
}  # written anew
Note = TypeVar("Note", dict, list)
LEFTOVER_PREFIX = "leftovers."  # prefix of a folder's tensors that single files do not have

PATH = re.compile(r"(model_index|preview|(unet|vae|scheduler|(text_encoder|tokenizer)(_2)?)/\w[\w.-]*)\.(json|txt)")

# Names besides the networks' own: EMA copies, buffers, training losses, parts not needed for sampling, and adapters
# that training programs left.
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
            *(f"{re.escape(mark)}$" for mark in MARKS),
            r"first_stage_model\.loss\.",
            r"(cond_stage_model|conditioner\.embedders\.0)\.(logit_scale|text_projection)",
            r"embedding_manager\.",
            r"lora_(te|unet)_",
            r"control_model\.",
            r".*\.position_ids$",
            r".*\.logit_scale$",
            re.escape(LEFTOVER_PREFIX),
            r"cond_stage_model\.transformer\.text_projection\.weight$",
            r"conditioner\.embedders\.0\.transformer\.text_projection\.weight$",
            r"(cond_stage_model|conditioner\.embedders\.0)\.model\."
            r"(text_projection$|visual\.|transformer\.resblocks\.23\.)",  # SD 2 stops before it; a refiner does not
        )
    )
)


def prefixes(variant: Variant) -> dict[str, tuple[str, str]]:
    """The prefix of each network in a single file, and the column of its names in the tables."""
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


def read_single(path: Path, family: str | None = None, *, vae: bool = True, prediction: str | None = None) -> Contents:
    """`family`: a name in VARIANTS, where shapes are ambiguous. `vae` False: leave out the autoencoder. `prediction`:
    what the network predicts, overriding the file."""
    file, remarks = without_gaps(open_tensors(path)), []
    variant, certain = variant_in(file, family, prediction)
    networks = read_networks(file, variant, [name for name in parts(variant) if vae or name != "vae"])
    texts, spellings = note_in(file, FILES_KEY, {}), note_in(file, SPELLINGS_KEY, [])
    if not texts and family is None:
        variant, remark = by_name(file, variant)
        remarks += [remark] if remark else []
    extras = {name for part in networks for name in extra_names(file, part, *prefixes(variant)[part])}
    known = {*extras, *MARKS} if texts else extras  # in a file of ours these say what its settings say
    leftovers = {name: file.tensors[name] for name in known_beside(file, variant) if name not in known}
    for part, network in networks.items():
        prefix, layout = prefixes(variant)[part]
        found = fragments(blueprint(network.kind, network.config), layout, file.tensors, prefix)
        spellings += [f"single-file {part} {fragment}" for fragment in found]
    texts = texts or write_variant(variant)
    notes = {name: text for name, text in file.metadata.items() if name not in OWN_NOTES}
    return Contents(
        variant, networks, texts, leftovers, tuple(spellings), notes, remarks=tuple(remarks), certain=certain
    )


def by_name(file: TensorFile, variant: Variant) -> tuple[Variant, str | None]:
    """The variant with the settings of a distillation named in the file's title or name, and a remark about it."""
    return with_distilled_settings(variant, names_of(file))


def names_of(file: TensorFile) -> tuple[str, str]:
    return file.metadata.get("modelspec.title", ""), file.path.stem


def variant_in(file: TensorFile, family: str | None = None, prediction: str | None = None) -> tuple[Variant, bool]:
    """The model in a file, by our metadata or by its shapes, and whether its prediction type is certain."""
    texts = note_in(file, FILES_KEY, {})
    if strange := [name for name, text in texts.items() if not PATH.fullmatch(name) or not isinstance(text, str)]:
        raise damaged(file.path, f"its metadata names the file {strange[0]!r}, which no model has")

    def get(name: str) -> dict:
        try:
            return parsed_json(texts[name])
        except (KeyError, TypeError, BadJSON) as error:
            raise damaged(file.path, f"the settings {name!r} in its metadata are incomplete") from error

    variant, certain = (read_variant(get, str(file.path)), True) if texts else detect(file, family)
    if not certain and prediction is None and any(map(X0.search, names_of(file))):
        prediction = "sample"
    if not certain and prediction is not None:
        variant, certain = predicting(variant, prediction, "ztsnr" in file.tensors), True
    elif (
        prediction == "v_prediction" and not texts and "ztsnr" in file.tensors
    ):  # the family is told, and keeps its size
        variant = replace(variant, prediction=prediction, **ZERO_SNR_SETTINGS)
    return replace(variant, conv_projections=has_convolutions(file)), certain


def read_networks(file: TensorFile, variant: Variant, names: list[str]) -> dict[str, StoredNetwork]:
    """The named networks; every other tensor of the file must be known by name."""
    wanted = {name: places_in(file, variant, name) for name in names}
    for name, its in wanted.items():
        if not any(place.name in file.tensors for place in its):
            raise lacking(file, name)
    known = known_beside(file, variant)
    if "vae" not in names:
        known += [name for name in file.tensors if name.startswith(prefixes(variant)["vae"][0])]
    check_tensor_names({place.name: None for its in wanted.values() for place in its} | dict.fromkeys(known), file)
    networks = {}
    for name in names:
        network = blueprint(*parts(variant)[name])
        shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}
        extras = {
            theirs: file.tensors[key] for key, theirs in extra_names(file, name, *prefixes(variant)[name]).items()
        }
        networks[name] = StoredNetwork(*parts(variant)[name], unpack(file, wanted[name], shapes), extras)
    return networks


def places_in(file: TensorFile, variant: Variant, name: str) -> list[TensorPlace]:
    """The places of one network's tensors in the file."""
    prefix, layout = prefixes(variant)[name]
    network = blueprint(*parts(variant)[name])
    return places_of(network, layout, file.tensors, conv=variant.conv_projections, prefix=prefix)


def known_beside(file: TensorFile, variant: Variant) -> list[str]:
    """Known names in the file that belong to no network."""
    used = {place.name for name in parts(variant) for place in places_in(file, variant, name)}
    return [name for name in file.tensors if BESIDE.match(name) and name not in used]


def lacking(file: TensorFile, name: str) -> UserError:
    if name == "vae":
        return UserError(
            f"{file.path} holds no autoencoder (VAE); give one with --vae, or put one in by plainsd convert --vae"
        )
    what = {"unet": "UNet", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}[name]
    return UserError(
        f"{file.path} holds no {what}, and seems to be {seems(file.tensors)}; give a whole checkpoint, or a folder in "
        "diffusers' layout with this file in it"
    )


def extra_names(file: TensorFile, part: str, prefix: str, layout: str) -> dict[str, str]:
    """Names of tensors that a network's file in a folder has besides weights (`position_ids`): here -> there."""
    kept = f"{LEFTOVER_PREFIX}{part}."
    public = [
        name
        for name in file.tensors
        if layout == "transformers" and name.startswith(prefix) and name.endswith(".position_ids")
    ]
    return {name: name.removeprefix(kept) for name in file.tensors if name.startswith(kept)} | {
        name: name.removeprefix(prefix) for name in public
    }


def note_in(file: TensorFile, name: str, default: Note) -> Note:
    try:
        content = parsed_json(file.metadata.get(name, "null"))
    except BadJSON as error:
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
    """`contents.texts` go into the metadata. The file is written whole or not at all."""
    if suffix_of(target) != ".safetensors":
        raise UserError(f"{target}: a single file is written as .safetensors; give it that ending")
    words = marks(contents.variant)
    left = {name: stored for name, stored in contents.leftovers.items() if name not in MARKS or name in words}
    tensors = words | left
    for name, network in contents.networks.items():
        prefix, layout = prefixes(contents.variant)[name]
        tensors |= packed_tensors(
            network,
            layout,
            conv=contents.variant.conv_projections,
            prefix=prefix,
            dtype=dtype,
            spelling=spelling(contents, "single-file", name),
        )
        before = prefix if layout == "transformers" else f"{LEFTOVER_PREFIX}{name}."
        tensors |= {before + key: stored for key, stored in network.extras.items()}
    others = [note for note in contents.spellings if not note.startswith("single-file ")]
    metadata = contents.notes | {FILES_KEY: json.dumps(contents.texts)}
    if others:
        metadata[SPELLINGS_KEY] = json.dumps(others)
    if said := {"epsilon": "epsilon", "v_prediction": "v"}.get(contents.variant.prediction):
        metadata["modelspec.prediction_type"] = said
    with written_whole(target) as draft:
        write_safetensors(draft, tensors, metadata)


def marks(variant: Variant) -> dict[str, Stored]:
    """The marker tensors of prediction type and noise schedule for other programs; ComfyUI and reForge read `ztsnr`
    only together with `v_pred`."""
    schedule, vae, words = variant.schedule, variant.vae, {}
    if variant.prediction == "edm" and vae.latents_mean:
        words = {"edm_mean": torch.tensor(vae.latents_mean), "edm_std": torch.tensor(vae.latents_std)}
        words = {name: values.view(1, -1, 1, 1) for name, values in words.items()}
    elif isinstance(schedule, EDMSchedule) and variant.prediction == "v_prediction" and schedule.sigma_data == 1:
        ends = {"sigma_min": schedule.sigma_min, "sigma_max": schedule.sigma_max}
        words = {f"edm_vpred.{name}": torch.tensor(value) for name, value in ends.items()}
    elif variant.prediction == "v_prediction" and not isinstance(schedule, EDMSchedule):
        words = {"v_pred": torch.empty(0)} | ({"ztsnr": torch.empty(0)} if schedule.zero_terminal_snr else {})
    return {name: stored(tensor) for name, tensor in words.items()}
