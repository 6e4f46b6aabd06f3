"""Finds a model: the embedded one, a path, or a Hugging Face hub repository, downloaded once and cached.

huggingface_hub is imported on demand: importing it takes as long as the rest of plainsd.
"""

import re
from functools import partial
from importlib.resources import files
from pathlib import Path

from plainsd.disk import recover
from plainsd.errors import UserError

SETTINGS_PATTERNS = ("model_index.json", "*/config.json", "scheduler/*.json", "tokenizer*/*", "*.index*.json")
PART_SETTINGS = (
    "config.json",
    "preprocessor_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer*.json",
    "special_tokens_map.json",
)  # of a repository that is one part: a CLIP, a VAE, a ControlNet
PART_WEIGHTS = ("model", "diffusion_pytorch_model", "pytorch_model")  # whole checkpoints lie beside models, too
MODEL_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
NAME = re.compile(r"\w[\w.-]*/[\w.-]+")  # owner/name
FILE = re.compile(r"(\w[\w.-]*/[\w.-]+)/(.+\.(?i:safetensors|ckpt))")


def find(source: str | Path | None, variant_file: str | None = None) -> Path:
    """The file or folder that `source` names; None is the embedded model."""
    if source is None:
        embedded = Path(str(files("plainsd") / "assets" / "emoji"))
        if not embedded.is_dir():
            raise UserError("this installation of plainsd lacks the embedded model; reinstall it, or give a model")
        return embedded
    recover(Path(source))
    if Path(source).exists():
        return Path(source)
    name = str(source)
    if NAME.fullmatch(name):
        return snapshot(name, variant_file)
    if file := FILE.fullmatch(name):
        from huggingface_hub import hf_hub_download

        return Path(fetched(name, lambda: hf_hub_download(*file.groups())))
    raise UserError(
        f"there is no model at {name!r}; give a model's folder, a .safetensors or .ckpt file, or a Hub "
        "repository id such as stable-diffusion-v1-5/stable-diffusion-v1-5"
    )


def snapshot(name: str, variant_file: str | None) -> Path:
    """The folder of a repository, with one kind of weights only: safetensors, or pickles where there are no others."""
    from huggingface_hub import snapshot_download

    for variant in [variant_file] if variant_file else [None, "fp16", "bf16"]:  # full precision before half precision
        middle = f".{variant}" if variant else ""
        for ending in ("safetensors", "bin"):
            weights = [
                f"{part}/*model{middle}{shard}.{ending}" for part in MODEL_PARTS for shard in ("", "-?????-of-?????")
            ]
            weights += [f"{part}/*model-?????-of-?????{middle}.{ending}" for part in MODEL_PARTS if middle]
            alone = [f"{part}{middle}{shard}.{ending}" for part in PART_WEIGHTS for shard in ("", "-?????-of-?????")]
            patterns = [*SETTINGS_PATTERNS, *PART_SETTINGS, *weights, *alone]
            folder = Path(fetched(name, partial(snapshot_download, name, allow_patterns=patterns)))
            if any(any(folder.glob(pattern)) for pattern in (f"unet/*.{ending}", *alone)):
                return folder
    return folder


def fetched(name: str, fetch) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return fetch()
    except GatedRepoError as error:
        raise UserError(
            f"{name} asks for an agreement: accept it on the Hub, then log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"there is no folder {name!r} here, and no public repository of that name on the Hub"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UserError(
            f"there is no folder {name!r} here, the Hub's cache does not hold it, and the Hub cannot be "
            "reached; connect, or copy the model here"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"cannot download {name!r} from the Hub: {str(error).splitlines()[0]}") from error
