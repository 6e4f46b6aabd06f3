"""One sound file or folder of every kind that is read, made here, and the function that reads it."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from conftest import TINY, smooth_picture, tiny_sd
from serving import embedding_file
from torch import nn

import plainsd
from plainsd.adapters.embeddings import read_vectors
from plainsd.adapters.lora import add_lora, inject, save_lora
from plainsd.checkpoint import load_control, save_control
from plainsd.disk import read_cache
from plainsd.files.described import read_description
from plainsd.listing import read_prompts
from plainsd.models.control import control_of
from plainsd.models.variants import VARIANTS
from plainsd.pictures.images import open_picture, read_settings, write_new_picture
from plainsd.pictures.settings import Settings
from plainsd.text.styles import read_styles
from plainsd.text.tokenizer import Tokenizer
from plainsd.text.wildcards import settled
from plainsd.train.checkpoints import restore, save_checkpoint
from plainsd.train.config import read_config
from plainsd.train.data.pictures import read_pictures
from plainsd.train.log import read_log
from plainsd.train.options import FitOptions
from plainsd.train.trainer import Trainer

VARIANTS[TINY.name] = TINY  # so that pickles of it are known by their shapes
CPU = {"device": "cpu", "dtype": "float32"}


class Line:
    """A training method of one layer."""

    def __init__(self):
        self.modules = nn.ModuleDict({"line": nn.Linear(8, 8)})

    def loss(self, picks):
        raise NotImplementedError("nothing is trained here")


def read_model(path: Path) -> None:
    plainsd.load(path, **CPU)


def read_lora(path: Path) -> None:
    add_lora(tiny_sd(), path)


def read_state(path: Path) -> None:
    restore(Trainer(Line(), FitOptions(steps=9)), path)


def read_picture(path: Path) -> None:
    """Its settings, where it has any, and its pixels."""
    error = None
    for read in (read_settings, open_picture):
        try:
            read(path)
        except plainsd.UserError as one:
            error = one
    if error:
        raise error


def read_run(path: Path) -> None:
    read_log(path / "log.jsonl", warn=True)
    read_cache(path / "digests.json")
    read_config(path / "run.toml")


READERS: dict[str, Callable[[Path], object]] = {
    "model folder": read_model,
    "single file": read_model,
    "pickle": read_model,
    "old pickle": read_model,
    "LoRA": read_lora,
    "PEFT": read_lora,
    "embedding": read_vectors,
    "pickled embedding": read_vectors,
    "control net": lambda path: load_control(path, **CPU),
    "PNG": read_picture,
    "JPEG": read_picture,
    "WebP": read_picture,
    "workflow": read_settings,
    "settings": read_settings,
    "description": read_description,
    "tokenizer": Tokenizer.from_folder,
    "styles": read_styles,
    "wildcards": lambda path: settled("__a__ {__b__|c}", 1, path),
    "prompts": read_prompts,
    "pictures": lambda path: read_pictures(path, 16, bad_share=1.0, say=lambda text: None),
    "state": read_state,
    "run": read_run,
}
WEIGHTS = {"model folder": 6, "LoRA": 4, "PEFT": 4, "single file": 2, "pickle": 3}  # of the draw; others 1
WORKFLOW = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "a.safetensors"}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a (red:1.2) apple", "clip": ["1", 1]}},
    "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    "4": {"class_type": "KSampler", "inputs": {
        "seed": 7, "steps": 4, "cfg": 5.5, "sampler_name": "euler", "scheduler": "karras", "denoise": 1.0,
        "model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0]}},
    "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
    "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0]}},
}  # fmt: skip


def make_samples(folder: Path) -> dict[str, Path]:
    """Of each kind the file or folder that its reader takes."""
    torch.manual_seed(0)
    sd = tiny_sd()
    found = {kind: folder / kind.replace(" ", "-") for kind in READERS}
    plainsd.save(sd, found["model folder"])
    for kind, ending in (("single file", ".safetensors"), ("LoRA", ".safetensors"), ("embedding", ".safetensors"),
                         ("pickle", ".ckpt"), ("old pickle", ".ckpt"), ("pickled embedding", ".pt"), ("PNG", ".png"),
                         ("JPEG", ".jpg"), ("WebP", ".webp"), ("workflow", ".json"), ("settings", ".txt"),
                         ("description", ".json"), ("styles", ".csv"), ("prompts", ".txt")):  # fmt: skip
        found[kind] = folder / kind.replace(" ", "-") / f"a{ending}"
        found[kind].parent.mkdir()
    plainsd.save(sd, found["single file"], layout="single-file")
    weights = dict(plainsd.files.tensorfile.open_tensors(found["single file"]).tensors)
    state = {"state_dict": {name: stored.read() for name, stored in weights.items()}, "epoch": 3}
    torch.save(state, found["pickle"])
    torch.save(state, found["old pickle"], _use_new_zipfile_serialization=False)
    embedding_file(found["embedding"], 0)
    torch.save({"string_to_param": {"*": torch.ones(2, 32)}, "name": "a"}, found["pickled embedding"])
    net = control_of(sd.unet, (8, 8, 8, 8))
    save_control(net, found["control net"])
    inject(sd, rank=2)
    save_lora(sd, found["LoRA"])
    found["PEFT"].mkdir()
    save_lora(sd, found["PEFT"] / "adapter_model.safetensors", "peft")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "rank_pattern": {r".*\.to_q": 2, "to_k": 2},
                "target_modules": ["to_q", "to_k"], "init_lora_weights": True}  # fmt: skip
    (found["PEFT"] / "adapter_config.json").write_text(json.dumps(settings, indent=1))
    asked = Settings(
        prompt="a (red:1.2) apple, [b:c:0.5]", negative="x", seed=7, steps=4, guidance=5.5, sampler="euler"
    )
    for kind in ("PNG", "JPEG", "WebP"):
        write_new_picture(smooth_picture(32), found[kind], asked)
    found["workflow"].write_text(json.dumps(WORKFLOW))
    text = "a (red:1.2) apple\nNegative prompt: x\nSteps: 4, Sampler: Euler, CFG scale: 5.5, Seed: 7, Size: 64x64"
    found["settings"].write_text(text)
    found["description"].write_text(json.dumps(asdict(TINY)))
    sd.tokenizers[0].save(found["tokenizer"])
    found["styles"].write_text('name,prompt,negative_prompt\na,"{prompt}, oil","bad, worse"\nb,c,d\n')
    found["prompts"].write_text("# prompts\na red apple\na {green|blue} pear\n")
    found["wildcards"].mkdir()
    (found["wildcards"] / "a.txt").write_text("# colours\nred\n2::green\n{dark|light} blue\n__b__\n")
    (found["wildcards"] / "b.txt").write_text("one\ntwo\n")
    found["pictures"].mkdir()
    for i in range(2):
        smooth_picture(16).save(found["pictures"] / f"{i}.png")
    lines = [{"file_name": f"{i}.png", "text": [f"colour {i}", "b"]} for i in range(2)]
    (found["pictures"] / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    trainer = Trainer(Line(), FitOptions(steps=9))
    trainer.step = 3
    save_checkpoint(trainer, found["state"])
    found["run"].mkdir()
    (found["run"] / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null}\n')
    (found["run"] / "digests.json").write_text('{"a 1 2": "0123456789abcdef"}')
    (found["run"] / "run.toml").write_text('method = "lora"\ndata = ["a"]\nrank = 8\n')
    return found
