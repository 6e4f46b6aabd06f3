"""Commands that combine models: merge, extract-lora."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from plainsd.commands.inspect import check_family


@dataclass
class Merge:
    """Merges two models, A (1 - share) + B share; or with --difference three, A + share (B - C).

    UNets and text encoders are merged; autoencoder, tokenizers and settings are A's. The difference adds to A what B
    learned on top of C.
    """

    models: Annotated[Positional[tuple[str, ...]], arg(metavar="A B [C]")]
    """folders, files or hub names of models of one family; A may be an inpainting model where the others are not"""
    out: Annotated[Path, arg(metavar="DST")]
    """where to write it"""
    share: float = 0.5
    """weight of B, 0 to 1; with --difference the weight of the difference, such as 1"""
    difference: bool = False
    """add the difference of B and C"""
    layout: Annotated[str | None, arg(metavar="NAME")] = None
    """diffusers (a folder) or single-file; if not given, single-file where DST ends in .safetensors"""
    dtype: Annotated[str | None, arg(metavar="NAME")] = None
    """float32, bfloat16 or float16; as in A if not given"""
    variant_file: Annotated[str | None, arg(metavar="NAME")] = None
    """fp16 reads the files *.fp16.safetensors of folders"""
    family: Annotated[str | None, arg(metavar="NAME")] = None
    """family of single files, where shapes are ambiguous"""

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
    """Extracts a LoRA from a tuned model and its base: UNet and text encoders, convolutions too.

    Prints how much of the difference's norm it keeps."""

    tuned: Annotated[Positional[str], arg(metavar="TUNED")]
    """folder, file or hub name of the tuned model"""
    base: Annotated[Positional[str], arg(metavar="BASE")]
    """folder, file or hub name of the base model"""
    rank: int
    """rank of the LoRA: higher is closer, and a larger file; 16 to 128 are usual"""
    out: Annotated[Path | None, arg(metavar="FILE")] = None
    """where to write it; TUNED-lora.safetensors if not given"""
    naming: Literal["kohya", "peft", "diffusers"] = "kohya"
    """naming: kohya's (for A1111, ComfyUI and diffusers), PEFT's or diffusers'"""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    variant_file: Annotated[str | None, arg(metavar="NAME")] = None
    """fp16 reads the files *.fp16.safetensors of folders"""
    family: Annotated[str | None, arg(metavar="NAME")] = None
    """family of single files, where shapes are ambiguous"""

    def run(self) -> None:
        from plainsd.adapters.extracting import extract_lora
        from plainsd.device import DTYPES

        check_family(self.family)
        out = self.out or Path(f"{Path(self.tuned).name.removesuffix('.safetensors')}-lora.safetensors")
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
