"""Image prompts in files: IP-Adapters as they are published, and the CLIP image encoders that they read.

    adapter       `image_proj.proj.weight`, `ip_adapter.1.to_k_ip.weight`; or a pickle of two groups of these names
    tower         a folder of transformers' (config.json, model.safetensors), a file of a known size in its names or
                  OpenCLIP's; a whole CLIP will do, whose text half is left

Both are told by their contents. An adapter alone finds its tower in a folder `image_encoder` beside it, as in the
published repository.
"""

import re
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from plainsd.disk import read_json
from plainsd.errors import UserError
from plainsd.files.config_values import Config, divides, one_of, real_number, whole_number
from plainsd.files.detect import seems
from plainsd.files.folder import open_part, read_network
from plainsd.files.stored import StoredNetwork
from plainsd.files.tensorfile import TensorFile, open_tensors
from plainsd.files.unusable import damaged
from plainsd.models.clip import ACTIVATIONS
from plainsd.models.image_prompt import ImageAdapter, ImageAdapterConfig, tower_fits
from plainsd.models.vision import VISION_TOWERS, VisionConfig, VisionTower

TOWER_FOLDER = "image_encoder"  # where a tower lies beside its adapters
KEY_NAME = re.compile(r"ip_adapter\.(\d+)\.to_k_ip\.weight")
HEAD = 64  # width of a head of the resampler
OF_TOWER = re.compile(
    r"(vision_model\.|visual_projection\.|visual\.|embeddings\.|pre_layrnorm|encoder\.|post_layernorm)"
)
PATCHES = {  # the first weight in each naming
    "diffusers": ("vision_model.embeddings.patch_embedding.weight", "embeddings.patch_embedding.weight"),
    "openclip": ("visual.conv1.weight",),
}


POSITIONS = re.compile(r"position(al)?_embedding")
OF_BOTH = ("ViT-B/32", "ViT-B/16", "ViT-L/14")  # towers that OpenAI and LAION trained, with another activation


# --- the tower -------------------------------------------------------------------------------------------------------


def naming_of_tower(names: Iterable[str]) -> str | None:
    """Which naming an image encoder has among these names; None: there is none."""
    names = set(names)
    return next((naming for naming, first in PATCHES.items() if names & set(first)), None)


def is_tower(folder: Path) -> bool:
    """Whether a folder holds an image encoder, or a whole CLIP."""
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}
    return "vision_config" in config or config.get("model_type") == "clip_vision_model"


def open_tower(path: Path) -> StoredNetwork:
    """An image encoder, or that of a whole CLIP."""
    file = open_part(path) if path.is_dir() else open_tensors(path)
    naming = naming_of_tower(file.tensors)
    if naming is None:
        raise UserError(
            f"{path} is not a CLIP image encoder: it seems to be {seems(file.tensors)}; give one with --image-encoder, "
            f"such as the folder {TOWER_FOLDER!r} that is published beside IP-Adapters",
            field="image_encoder",
        )
    own = {name: stored for name, stored in file.tensors.items() if OF_TOWER.match(name) and "position_ids" not in name}
    file = TensorFile(file.path, own, file.metadata)
    beside = path / "config.json"
    config = read_vision(read_json(beside), str(beside)) if path.is_dir() else known_tower(file, naming)
    return read_network(file, VisionTower, config, conv=False, layout=naming)


def read_vision(config: Config, where: str) -> VisionConfig:
    """The tower that a config.json of transformers' describes: of a tower alone, or of a whole CLIP."""
    if isinstance(config.get("vision_config"), dict):
        config = config["vision_config"] | {"projection_dim": config.get("projection_dim", 512)}
    tower = VisionConfig(
        width=whole_number(config, "hidden_size", where, 768),
        layers=whole_number(config, "num_hidden_layers", where, 12, most=200),
        heads=whole_number(config, "num_attention_heads", where, 12),
        mlp=whole_number(config, "intermediate_size", where, 3072),
        patch=whole_number(config, "patch_size", where, 32),
        size=whole_number(config, "image_size", where, 224),
        activation=one_of(config, "hidden_act", where, "quick_gelu", ACTIVATIONS),
        projection=whole_number(config, "projection_dim", where, 512),
        eps=real_number(config, "layer_norm_eps", where, 1e-5),
    )
    divides(tower.heads, (tower.width,), "attention heads", where)
    return tower


def known_tower(file: TensorFile, naming: str) -> VisionConfig:
    """Of the known towers the one with these shapes. LAION's differ from OpenAI's of the same size in their activation
    alone: OpenAI's is assumed, with a warning."""
    shapes = {name: stored.shape for name, stored in file.tensors.items()}
    patches = next(shapes[name] for name in PATCHES[naming] if name in shapes)
    places = next((shape[0] for name, shape in shapes.items() if shape and POSITIONS.search(name)), 0)
    if len(patches) != 4 or not places:
        raise damaged(file.path, "its image encoder lacks its embeddings")
    layers = {found[1] for name in shapes if (found := re.search(r"(?:layers|resblocks)\.(\d+)\.", name))}
    size = round((places - 1) ** 0.5) * patches[-1]
    for name, known in VISION_TOWERS.items():
        if (known.width, known.patch, known.size, known.layers) == (patches[0], patches[-1], size, len(layers)):
            if name in OF_BOTH:
                warnings.warn(
                    f"{file.path}: taken for OpenAI's {name}; for LAION's, which has another activation, give a folder "
                    "with its config.json",
                    stacklevel=4,
                )
            return known
    raise UserError(
        f"{file.path} is an image encoder of an unknown size (width {patches[0]}, {len(layers)} layers); "
        f"give it as a folder with config.json, or choose from {', '.join(VISION_TOWERS)}",
        field="image_encoder",
    )


# --- the adapter -----------------------------------------------------------------------------------------------------


def holds_image_adapter(names: Iterable[str]) -> bool:
    return any(name.startswith(("image_proj.", "ip_adapter.")) for name in names)


def open_image_adapter(path: Path) -> StoredNetwork:
    """An IP-Adapter's file."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the file of an IP-Adapter in it", field="image_prompt")
    file = open_tensors(path)
    if not holds_image_adapter(file.tensors):
        raise UserError(f"{path} is not an IP-Adapter: it seems to be {seems(file.tensors)}", field="image_prompt")
    if kind := of_faces(file.tensors):
        raise UserError(
            f"{path} is {kind}, which reads a face recognition network (InsightFace) and is not supported; choose "
            "ip-adapter-plus-face, which reads a CLIP image encoder",
            field="image_prompt",
        )
    return read_network(file, ImageAdapter, read_image_adapter(file), conv=False)


def of_faces(names: Iterable[str]) -> str | None:
    """The FaceID kinds: by their LoRA, their resampler, or an MLP before a norm of its own."""
    names = set(names)
    if any(name.startswith("image_proj.perceiver_resampler.") for name in names):
        return "an IP-Adapter FaceID Plus"
    if {"image_proj.proj.0.weight", "image_proj.norm.weight"} <= names or any("_lora." in name for name in names):
        return "an IP-Adapter FaceID"
    return None


def read_image_adapter(file: TensorFile) -> ImageAdapterConfig:
    """The sizes of an adapter, by its shapes."""
    shapes = {name: stored.shape for name, stored in file.tensors.items()}
    keys = sorted((int(found[1]), shape) for name, shape in shapes.items() if (found := KEY_NAME.fullmatch(name)))
    if not keys or any(len(shape) != 2 or 0 in shape for _, shape in keys):
        raise UserError(f"{file.path} lacks its projections ip_adapter.1.to_k_ip.weight, ...; download the file again",
                        field="image_prompt")  # fmt: skip
    context = keys[0][1][1]
    config = ImageAdapterConfig(widths=tuple(shape[0] for _, shape in keys), context=context)

    def shape(name: str) -> tuple[int, ...]:
        return (*shapes.get(f"image_proj.{name}", ()), 0, 0, 0)

    if "image_proj.proj.weight" in shapes:
        rows, states, *_ = shape("proj.weight")
        return replace(config, states=states, tokens=rows // context)
    if "image_proj.proj.3.weight" in shapes:
        return replace(config, kind="full", states=shape("proj.0.weight")[1])
    layers = {name.split(".")[2] for name in shapes if name.startswith("image_proj.layers.")}
    _, tokens, inner, *_ = shape("latents")
    return replace(
        config,
        kind="plus",
        states=shape("proj_in.weight")[1],
        tokens=tokens,
        inner=inner,
        layers=len(layers),
        heads=max(inner // HEAD, 1),
    )


def tower_beside(path: Path) -> Path | None:
    """The folder of a tower next to an adapter's file, or that of the other models, as SDXL's ViT-H adapters read: the
    first that fits, else the first."""
    places = (path.parent / TOWER_FOLDER, path.parent.parent / "models" / TOWER_FOLDER)
    found = {place / "config.json": place for place in places if (place / "config.json").is_file()}
    adapter = read_image_adapter(open_tensors(path)) if len(found) > 1 else None
    for file, place in found.items():
        if adapter is None or tower_fits(read_vision(read_json(file), str(file)), adapter):
            return place
    return next(iter(found.values()), None)
