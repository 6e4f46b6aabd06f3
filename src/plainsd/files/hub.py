"""Finds a model: the embedded one, a path, or a Hugging Face hub repository, downloaded once and cached.

huggingface_hub is imported on demand: importing it takes as long as the rest of plainsd.
"""

import re
from functools import partial
from importlib.resources import files
from itertools import chain, product
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


def find(source: str | Path | None, variant_file: str | None = None, *, local: bool = False) -> Path:
    """The file or folder that `source` names; None is the embedded model. `local`: of the Hub only what is cached."""
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
        return snapshot(name, variant_file, local=local)
    if file := FILE.fullmatch(name):
        from huggingface_hub import hf_hub_download

        return Path(fetched(name, lambda: hf_hub_download(*file.groups(), local_files_only=local)))
    raise UserError(
        f"there is no model at {name!r}; give a model's folder, a .safetensors or .ckpt file, or a Hub "
        "repository id such as stable-diffusion-v1-5/stable-diffusion-v1-5"
    )


def snapshot(name: str, variant_file: str | None, *, local: bool = False) -> Path:
    """The folder of a repository, each part with one kind of weights only: safetensors, or pickles where there are no
    others."""
    from huggingface_hub import snapshot_download

    lacking, found = [*MODEL_PARTS], False
    variants = [variant_file] if variant_file else [None, "fp16", "bf16"]  # full precision before half precision
    for variant, ending in product(variants, ("safetensors", "bin")):
        weights = {part: weight_files(f"{part}/*model", variant, ending) for part in lacking}
        alone = [pattern for stem in PART_WEIGHTS for pattern in weight_files(stem, variant, ending)]
        patterns = [*SETTINGS_PATTERNS, *PART_SETTINGS, *chain(*weights.values()), *alone]
        download = partial(snapshot_download, name, allow_patterns=patterns, local_files_only=local)
        folder = Path(fetched(name, download))
        there = [part for part, its in {**weights, "": alone}.items() if any(any(folder.glob(one)) for one in its)]
        found = found or bool(there)
        lacking = [part for part in lacking if part not in there and (folder / part / "config.json").is_file()]
        if found and not lacking:
            return folder
    if not any((folder / settings).is_file() for settings in ("model_index.json", "config.json")):
        raise UserError(
            f"the repository {name} holds no model in diffusers' layout; name a single file in it, as "
            f"{name}/FILE.safetensors"
        )
    return folder


def weight_files(stem: str, variant: str | None, ending: str) -> list[str]:
    """The names that one network's weights may have: whole, or in shards."""
    middle, shard = f".{variant}" if variant else "", "-?????-of-?????"
    return [f"{stem}{end}.{ending}" for end in (middle, middle + shard, shard + middle)]


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
