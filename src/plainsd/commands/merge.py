"""Commands that combine models: merge, extract-lora."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from plainsd.arguments import Switch
from plainsd.commands.flags import flag
from plainsd.commands.inspect import check_family


@dataclass
class Merge:
    """Merges two models as (1 - share) A + share B, or with --difference three as A + share (B - C).

    UNets and text encoders are merged; autoencoder, tokenizers and configs are A's. --difference adds to A what
    B learned on top of C.
    """

    models: Annotated[Positional[tuple[str, ...]], flag("A B [C]")]
    """models of one family: folders, files or Hub ids; A may be an inpainting model if the others are not"""
    out: Annotated[Path, flag("DST")]
    """where to write it"""
    share: float = 0.5
    """weight of B, 0 to 1; with --difference the weight of the difference, usually 1"""
    difference: Switch = False
    """add the difference B - C to A"""
    layout: Annotated[str | None, flag("NAME")] = None
    """diffusers (a folder) or single-file; if not given, single-file where DST ends in .safetensors"""
    dtype: Annotated[str | None, flag("NAME")] = None
    """float32, bfloat16 or float16; as in A if not given"""
    variant_file: Annotated[str | None, flag("NAME")] = None
    """fp16 reads the files *.fp16.safetensors of folders"""
    family: Annotated[str | None, flag("NAME")] = None
    """model family of single files, if their tensor shapes are ambiguous"""

    def run(self) -> None:
        from plainsd.files.merging import merge_models

        check_family(self.family)
        merge_models(
            self.models,
            self.out,
            self.share,
            difference=self.difference,
            layout=self.layout,
            dtype=self.dtype,
            variant_file=self.variant_file,
            family=self.family,
        )
        print(self.out)


@dataclass
class ExtractLora:
    """Extracts a LoRA from a fine-tuned model and its base, for UNet and text encoders, convolutions included.

    Prints how much of the norm of the difference the LoRA keeps."""

    tuned: Annotated[Positional[str], flag("TUNED")]
    """folder, file or Hub id of the fine-tuned model"""
    base: Annotated[Positional[str], flag("BASE")]
    """folder, file or Hub id of the base model"""
    rank: int
    """rank of the LoRA: a higher one is more exact and makes a larger file; 16 to 128 are usual"""
    out: Annotated[Path | None, flag("FILE")] = None
    """where to write it; TUNED-lora.safetensors if not given"""
    naming: Literal["kohya", "peft", "diffusers"] = "kohya"
    """names of the tensors: kohya's (for A1111, ComfyUI and diffusers), PEFT's or diffusers'"""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    variant_file: Annotated[str | None, flag("NAME")] = None
    """fp16 reads the files *.fp16.safetensors of folders"""
    family: Annotated[str | None, flag("NAME")] = None
    """model family of single files, if their tensor shapes are ambiguous"""

    def run(self) -> None:
        from plainsd.adapters.extracting import extract_lora
        from plainsd.commands.output import check_writable
        from plainsd.device import DTYPES

        check_family(self.family)
        out = self.out or Path(f"{Path(self.tuned).name.removesuffix('.safetensors')}-lora.safetensors")
        check_writable(out.parent)
        shares = extract_lora(
            self.tuned,
            self.base,
            out,
            self.rank,
            naming=self.naming,
            dtype=DTYPES[self.dtype],
            variant_file=self.variant_file,
            family=self.family,
        )
        for part, share in shares.items():
            print(f"{part}: {share}")
        print(out)
