"""`plainsd train`: one command, one method each time."""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes

from plainsd.train import options


@dataclass
class Train:
    """Train on captioned pictures. Started again with the same --out, it goes on where it was."""

    method: Literal["vae", "scratch", "full", "lora", "inversion"]
    """vae: an autoencoder from nothing. scratch: text encoder and UNet from nothing, on a trained autoencoder. full:
    all weights of a model's UNet. lora: low-rank changes to a model. inversion: a new word for prompts"""
    data: tuple[str, ...]
    """folders of captioned pictures (metadata.jsonl, or pairs name.png and name.txt), parquet files, tar shards, or
    datasets on the hub (owner/name); cats:10 is shown ten times an epoch"""
    out: Path
    """folder of the run: log, curve, samples, states, and at the end the result"""
    base: str | None = None
    """the model to fine-tune: a folder, a file or a name on the hub; the embedded one if not given. Methods vae and
    scratch begin with its weights, where it is given, and not from nothing"""
    reading: OmitArgPrefixes[options.Data] = field(default_factory=options.Data)
    pace: OmitArgPrefixes[options.Steps] = field(default_factory=options.Steps)
    loss: OmitArgPrefixes[options.Loss] = field(default_factory=options.Loss)
    lora: OmitArgPrefixes[options.Lora] = field(default_factory=options.Lora)
    inversion: OmitArgPrefixes[options.Inversion] = field(default_factory=options.Inversion)
    prior: OmitArgPrefixes[options.Prior] = field(default_factory=options.Prior)
    telling: OmitArgPrefixes[options.Telling] = field(default_factory=options.Telling)
    nothing: OmitArgPrefixes[options.FromNothing] = field(default_factory=options.FromNothing)

    def run(self) -> int:
        from plainsd.device import choose_device, choose_dtype
        from plainsd.train.from_nothing import train_scratch, train_vae
        from plainsd.train.checkpoints import SaveError, checkpoints
        from plainsd.train.job import Job
        from plainsd.train.from_model import train_full, train_inversion, train_lora
        from plainsd.train.processes import world_of_torchrun

        task = {
            "vae": train_vae,
            "scratch": train_scratch,
            "full": train_full,
            "lora": train_lora,
            "inversion": train_inversion,
        }[self.method]
        filled = replace(self, pace=options.with_defaults(self.method, self.pace))
        device = choose_device(self.pace.device)
        with world_of_torchrun(device, self.pace.shard) as world:
            try:
                task(Job(filled, world, choose_dtype(self.pace.dtype, world.device)))
            except SaveError as error:
                states = checkpoints(self.out / "checkpoints")
                kept = f"the state of step {int(states[-1].name[5:])} is kept" if states else "nothing was saved before"
                print(f"plainsd: {error}; {kept}; make room, and the same command goes on from there", file=sys.stderr)
                return 1
        return 0
