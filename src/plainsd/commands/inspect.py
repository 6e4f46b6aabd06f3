"""Commands about models and prompts: info, convert, tokens, verify."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, UseAppendAction

from plainsd.arguments import Switch
from plainsd.commands.flags import flag


@dataclass
class Info:
    """Shows family, networks, sizes and metadata of a model or an adapter, without reading its weights."""

    model: Annotated[Positional[str | None], flag("MODEL")] = None
    """folder, file or Hub id; the embedded model if not given"""
    variant_file: Annotated[str | None, flag("NAME")] = None
    """fp16 reads the files *.fp16.safetensors of a folder"""
    prediction: Annotated[str | None, flag("NAME")] = None
    """override what it predicts: epsilon, v_prediction or sample (x0)"""
    zero_snr: Annotated[str | None, flag("on|off")] = None
    """override whether it has zero terminal SNR"""

    def run(self) -> None:
        from plainsd.files.predicted import on_or_off
        from plainsd.reports.info import info

        print(info(self.model, self.variant_file, self.prediction, on_or_off(self.zero_snr)))


@dataclass
class Convert:
    """Converts a model to another file layout, one tensor at a time; a round trip is bit-identical. With --lora,
    adapters are merged into the weights."""

    source: Annotated[Positional[str], flag("SRC")]
    """folder, file or Hub id of a model"""
    target: Annotated[Positional[Path], flag("DST")]
    """where to write it"""
    layout: Annotated[str | None, flag("NAME")] = None
    """diffusers (a folder) or single-file; if not given, single-file where DST ends in .safetensors"""
    dtype: Annotated[str | None, flag("NAME")] = None
    """float32, bfloat16 or float16; unchanged if not given"""
    variant_file: Annotated[str | None, flag("NAME")] = None
    """fp16 reads the files *.fp16.safetensors of a folder"""
    family: Annotated[str | None, flag("NAME")] = None
    """model family of a single file, if its tensor shapes are ambiguous"""
    lora: Annotated[UseAppendAction[tuple[str, ...]], flag("FILE:STRENGTH")] = ()
    """LoRA, LoHa or LoKr to merge into the weights; repeatable"""
    lora_partial: Switch = False
    """ignore the parts of a LoRA that do not fit the model"""
    prediction: Annotated[str | None, flag("NAME")] = None
    """override what it predicts: epsilon, v_prediction or sample (x0)"""
    zero_snr: Annotated[str | None, flag("on|off")] = None
    """override whether it has zero terminal SNR"""
    vae: Annotated[Path | None, flag("PATH")] = None
    """another autoencoder: a folder, a file, or a whole checkpoint"""

    def run(self) -> None:
        from functools import partial

        from plainsd.adapters.baking import baked
        from plainsd.commands.adapters import chosen_loras
        from plainsd.files.convert import convert
        from plainsd.files.predicted import on_or_off

        check_family(self.family)
        where: dict[str, Any] = {"variant_file": self.variant_file, "family": self.family, "vae": self.vae}
        where |= {"prediction": self.prediction, "zero_snr": on_or_off(self.zero_snr)}
        if self.lora:
            loras = [(file, one.strength) for file, one in chosen_loras(self.lora, {}, None)]
            where["change"] = partial(baked, loras=loras, partial_fit=self.lora_partial)
        convert(self.source, self.target, self.layout, dtype=self.dtype, **where)
        print(self.target)


@dataclass
class Tokens:
    """Shows a prompt's tokens, with their weights, in the chunks that the text encoder reads (75 in CLIP)."""

    prompt: Annotated[Positional[str], flag("PROMPT")]
    model: Annotated[str | None, flag("MODEL")] = None
    """model whose tokenizer to use: folder, file or Hub id; the embedded model if not given"""
    steps: int = 20
    """number of steps, for prompts with editing or alternation"""
    like: Annotated[str | None, flag("PROGRAM")] = None
    """diffusers, a1111 or comfyui: read the prompt as that program does (default: diffusers)"""

    def run(self) -> None:
        from plainsd.commands.tokens import describe
        from plainsd.files.convert import read
        from plainsd.files.hub import find
        from plainsd.files.stored import empties
        from plainsd.files.tokenizers import tokenizers
        from plainsd.pictures.model import assemble
        from plainsd.pictures.settings import Settings

        Settings(steps=self.steps).check()
        path = find(self.model)
        contents = read(path, vae=False, ask=False)
        sd = assemble(contents.variant, empties(contents.variant), tokenizers(contents, path), path)  # reads no weights
        print(describe(sd, self.prompt, self.steps, self.like))


@dataclass
class Verify:
    """Compares each network, and a picture of five steps, with diffusers and transformers on the same weights.

    Prints errors and tolerances; exit code 1 if one is exceeded. Needs pip install 'plainsd[verify]'.
    """

    model: Annotated[Positional[str | None], flag("MODEL")] = None
    """folder, file or Hub id; the embedded model if not given"""
    variant_file: Annotated[str | None, flag("NAME")] = None
    """fp16 reads the files *.fp16.safetensors of a folder"""
    family: Annotated[str | None, flag("NAME")] = None
    """model family of a single file, if its tensor shapes are ambiguous"""
    prediction: Annotated[str | None, flag("NAME")] = None
    """override what it predicts: epsilon, v_prediction or sample (x0)"""
    zero_snr: Annotated[str | None, flag("on|off")] = None
    """override whether it has zero terminal SNR"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ...; always in float32"""

    def run(self) -> int:
        from plainsd.files.predicted import on_or_off
        from plainsd.reports.verify import check_packages, lines, verify

        check_packages()
        check_family(self.family)
        failed: list = []
        rows = verify(
            self.model,
            variant_file=self.variant_file,
            family=self.family,
            device=self.device,
            prediction=self.prediction,
            zero_snr=on_or_off(self.zero_snr),
        )
        for line in lines(rows, failed):
            print(line, flush=True)
        return 1 if failed else 0


def check_family(name: str | None) -> None:
    from plainsd.errors import unknown
    from plainsd.models.variants import VARIANTS

    if name not in (None, *VARIANTS):
        raise unknown("model family", name, VARIANTS, field="family")
