"""A whole CLIP in files: text encoder, image encoder and tokenizer.

folder      of transformers' CLIPModel: config.json, weights, tokenizer files; without these CLIP's own vocabulary
file        of a known size, in transformers' names or OpenCLIP's
"""

from pathlib import Path
from typing import NamedTuple

from plainsd.disk import read_json, read_text_file
from plainsd.errors import UserError
from plainsd.files.configs import read_text
from plainsd.files.detect import seems
from plainsd.files.folder import open_part, read_network
from plainsd.files.image_prompt import naming_of_tower, open_tower
from plainsd.files.stored import StoredNetwork
from plainsd.files.tensorfile import TensorFile, open_tensors
from plainsd.models.clip import TextConfig, TextEncoder
from plainsd.models.vision import VISION_TOWERS
from plainsd.text.tokenizer import CLIP, Tokenizer

CLIP_TEXTS = {  # the text encoders of the known image encoders
    "ViT-B/32": TextConfig(width=512, heads=8, mlp=2048, projection=512),
    "ViT-B/16": TextConfig(width=512, heads=8, mlp=2048, projection=512),
    "ViT-L/14": TextConfig(projection=768),
    "ViT-L/14@336": TextConfig(projection=768),
    "ViT-H/14": TextConfig(width=1024, layers=24, heads=16, mlp=4096, activation="gelu", projection=1024),
    "ViT-bigG/14": TextConfig(width=1280, layers=32, heads=20, mlp=5120, activation="gelu", projection=1280),
}
CLIP_DEFAULTS = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
OF_TEXT = {  # how the names of a text encoder begin, in each naming
    "diffusers": ("text_model.", "text_projection."),
    "openclip": ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection"),
}
FIRST_OF_TEXT = {"diffusers": "text_model.embeddings.token_embedding.weight", "openclip": "token_embedding.weight"}
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json")  # fmt: skip


class StoredClip(NamedTuple):
    text: StoredNetwork
    tower: StoredNetwork
    tokenizer: Tokenizer


def open_clip(path: Path) -> StoredClip:
    """UserError for anything but a whole CLIP."""
    file = open_part(path) if path.is_dir() else open_tensors(path)
    naming = naming_of_tower(file.tensors)
    if naming is None or FIRST_OF_TEXT[naming] not in file.tensors:
        half = "the image encoder of a CLIP alone" if naming else seems(file.tensors)
        raise UserError(
            f"{path} is no whole CLIP: it seems to be {half}; give a folder or file with both encoders, such as "
            "openai/clip-vit-large-patch14",
            field="clip",
        )
    tower = open_tower(path)
    config = (
        config_in(path) if path.is_dir() else CLIP_TEXTS[next(n for n, v in VISION_TOWERS.items() if v == tower.config)]
    )
    own = {
        name: stored
        for name, stored in file.tensors.items()
        if name.startswith(OF_TEXT[naming]) and "position_ids" not in name
    }
    text = read_network(TensorFile(file.path, own, file.metadata), TextEncoder, config, conv=False, layout=naming)
    if config.projection != tower.config.projection:
        raise UserError(
            f"{path}: its texts have {config.projection} numbers and its pictures {tower.config.projection}; "
            "download it again",
            field="clip",
        )
    return StoredClip(text, tower, tokenizer_in(path))


def config_in(folder: Path) -> TextConfig:
    """The text encoder that a config.json of transformers' CLIPModel describes."""
    config, where = read_json(folder / "config.json"), f"{folder}: config.json"
    own = config.get("text_config")
    if not isinstance(own, dict):
        raise UserError(f"{where} has no text_config; give a folder of a whole CLIP", field="clip")
    whole = {"projection_dim": config.get("projection_dim", 512), "architectures": ["CLIPTextModelWithProjection"]}
    return read_text(CLIP_DEFAULTS | own | whole, where)


def tokenizer_in(path: Path) -> Tokenizer:
    """The folder's own; CLIP's, where it has none. Padding does not matter: the pooled state precedes it."""
    names = [name for name in TOKENIZER_FILES if (path / name).is_file()]
    if "tokenizer.json" in names or "vocab.json" in names:
        return Tokenizer.from_texts({name: read_text_file(path / name) for name in names}, path)
    return Tokenizer.from_vocabulary(CLIP)
