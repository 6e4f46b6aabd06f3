"""Flags, as tyro reads them off a dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg
from tyro.constructors import PrimitiveConstructorSpec


def flag(metavar: str, name: str | None = None):
    return arg(metavar=metavar, name=name, help_behavior_hint=default_hint)


def several(kind: type, count: int):
    """Exactly so many numbers, or None. tyro by itself takes whatever follows, and with it the prompt."""
    return PrimitiveConstructorSpec(
        nargs=count,
        metavar="",
        instance_from_str=lambda texts: tuple(map(kind, texts)),
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: [] if value is None else list(map(str, value)),
    )


def default_hint(default: str) -> str:
    return "" if default in ("", "None", "''") else f"(default: {default})"


@dataclass
class GenerateFlags:
    """Those of `plainsd generate`."""

    prompt: Annotated[Positional[str], flag("PROMPT")] = ""
    """what to draw"""
    model: Annotated[str | None, flag("MODEL")] = None
    """folder, single file or hub name of a model; the embedded one if not given"""
    vae: Annotated[Path | None, flag("PATH")] = None
    """another autoencoder, a folder or a file, in place of the model's own"""
    prediction: Annotated[str | None, flag("NAME")] = None
    """what the model's network predicts, epsilon or v_prediction, where its files say it wrong or not at all"""
    zero_snr: Annotated[str | None, flag("on|off")] = None
    """whether the model's noise ends at zero SNR, likewise"""
    lora: Annotated[UseAppendAction[tuple[str, ...]], flag("FILE:STRENGTH")] = ()
    """a LoRA, such as style.safetensors:0.8; more than once for several"""
    lora_folder: Annotated[Path | None, flag("FOLDER")] = None
    """where the LoRAs lie that a prompt names as <lora:style:0.8>"""
    lora_partial: bool = False
    """leave out what of a LoRA does not fit the model"""
    embedding: Annotated[UseAppendAction[tuple[str, ...]], flag("FILE:WORD")] = ()
    """a learned word (textual inversion), such as cat.pt:<cat>, or FILE alone; more than once for several"""
    refiner: Annotated[str | None, flag("MODEL")] = None
    """folder, file or hub name of a model that draws the last part, such as SDXL's refiner"""
    handover: Annotated[float | None, flag("SHARE")] = None
    """of the timesteps, after which the refiner draws (default 0.8)"""
    negative: Annotated[str | None, flag("TEXT")] = None
    """what to keep away from"""
    wildcards: Annotated[Path | None, flag("FOLDER")] = None
    """text files, a choice a line, that a prompt names as __colours__; {red|blue} needs none"""
    combinations: bool = False
    """every combination of the prompt's choices, in place of random ones"""
    style: Annotated[UseAppendAction[tuple[str, ...]], flag("NAME")] = ()
    """a style around the prompt; more than once for several"""
    styles: Annotated[Path, flag("FILE")] = Path("styles.csv")
    """where they are, in A1111's form: name,prompt,negative_prompt"""
    size: Annotated[tuple[int, int] | None, flag("W H"), several(int, 2)] = None
    """pixels, multiples of 8; with --image any, and the picture is scaled"""
    steps: Annotated[int | None, flag("N")] = None
    """steps of the sampler"""
    guidance: Annotated[float | None, flag("SCALE")] = None
    """how strictly the prompt is followed; 1 is plainly, ignores --negative and is twice as fast, and 0 the same"""
    image_guidance: Annotated[float | None, flag("SCALE")] = None
    """how much of --image stays, with a model that edits pictures (default 1.5)"""
    sampler: Annotated[str | None, flag("NAME")] = None
    """ddpm ddim plms euler euler_a heun dpm2 dpm2_a dpmpp_2m dpmpp_2s_a dpmpp_sde dpmpp_2m_sde dpmpp_3m_sde lms unipc
    lcm"""
    spacing: Annotated[str | None, flag("NAME")] = None
    """of the noise levels: leading trailing linspace karras exponential polyexponential uniform sgm_uniform simple
    ddim_uniform beta beta_a1111 kl_optimal kl_optimal_a1111 align_your_steps align_your_steps_xl"""
    seed: Annotated[str | None, flag("N")] = None
    """of the first picture (default 0), random or -1 for any; the following ones have the next seeds"""
    noise: Annotated[str | None, flag("NAME")] = None
    """whose random numbers: cpu, nv (those of an NVIDIA GPU, on any device), comfyui"""
    ensd: Annotated[int | None, flag("N")] = None
    """A1111's eta noise seed delta, added to the seed for the noise on the way"""
    seed_resize: Annotated[tuple[int, int] | None, flag("W H"), several(int, 2)] = None
    """the first noise is that of a picture of this size, in the middle of this one's"""
    count: Annotated[int, flag("N")] = 1
    """pictures a prompt"""
    batch: Annotated[int, flag("N")] = 4
    """pictures at once; fewer need less memory"""
    prompts: Annotated[Path | None, flag("FILE")] = None
    """a text file with one prompt a line, in place of PROMPT; lines that begin with # are comments"""
    out: Annotated[Path, flag("FILE-OR-FOLDER")] = Path("out")
    """where pictures go; nothing is overwritten, files are numbered"""
    from_: Annotated[Path | None, flag("PNG", "from")] = None
    """make this picture again; other flags change single settings"""

    image: Annotated[Path | None, flag("FILE")] = None
    """a picture to start from"""
    strength: Annotated[float | None, flag("SHARE")] = None
    """how far from it: the share of the steps that run (default 0.75; 1 with a mask)"""
    mask: Annotated[Path | None, flag("FILE")] = None
    """a picture of the same size; only where it is light is --image drawn anew"""
    outpaint: Annotated[tuple[int, int, int, int] | None, flag("L T R B"), several(int, 4)] = None
    """continue --image by so many pixels at its left, top, right, bottom"""
    hires: Annotated[float | None, flag("TIMES")] = None
    """a second pass on the picture enlarged so many times"""
    upscaler: Annotated[str | None, flag("NAME|FILE")] = None
    """how it is enlarged: latent, latent-antialiased, latent-bicubic, latent-bicubic-antialiased, latent-nearest,
    latent-nearest-exact, lanczos, or the file of a network of ESRGAN's kind"""
    hires_steps: Annotated[int | None, flag("N")] = None
    """steps of the second pass, all of which run (by default the share --strength of --steps)"""
    hires_sampler: Annotated[str | None, flag("NAME")] = None
    """another sampler for the second pass; likewise the following"""
    hires_spacing: Annotated[str | None, flag("NAME")] = None
    """of its noise levels"""
    hires_prompt: Annotated[str | None, flag("TEXT")] = None
    """of the second pass"""
    hires_negative: Annotated[str | None, flag("TEXT")] = None
    """of the second pass"""
    hires_guidance: Annotated[float | None, flag("SCALE")] = None
    """of the second pass"""
    variation_seed: Annotated[str | None, flag("N")] = None
    """a second seed, to vary a picture; random or -1 for any"""
    variation_strength: Annotated[float | None, flag("SHARE")] = None
    """how far towards the second seed, 0 to 1"""
    grid: Annotated[UseAppendAction[tuple[str, ...]], flag("NAME=A,B,C")] = ()
    """one sheet over several values of a setting; twice for columns and rows"""

    clip_skip: Annotated[int | None, flag("N")] = None
    """layer of the text encoder that is read: 1 the last, 2 the one before"""
    eta: Annotated[float | None, flag("SHARE")] = None
    """fresh noise a step, 0 to 1, for samplers that have the choice"""
    rescale: Annotated[float | None, flag("SHARE")] = None
    """guidance keeps the contrast of the prompted estimate by this share, such as 0.7"""
    interval: Annotated[tuple[float, float] | None, flag("LOW HIGH"), several(float, 2)] = None
    """noise levels (sigma) between which guidance acts"""
    perturbed: Annotated[float | None, flag("SCALE")] = None
    """perturbed-attention guidance, such as 3"""
    threshold: Annotated[float | None, flag("PERCENTILE")] = None
    """dynamic thresholding, such as 0.995"""
    tiling: bool = False
    """a picture that repeats without a seam"""
    cache: Annotated[int | None, flag("N")] = None
    """run the UNet's deep layers at every N-th step only: faster, and not quite the same picture"""

    preview: Annotated[Path | None, flag("FILE")] = None
    """a PNG file that shows the picture while it is drawn"""
    preview_vae: Annotated[Path | None, flag("FILE")] = None
    """TAESD, which shows it sharper: taesd_decoder, or a folder"""
    server: Annotated[str | None, flag("URL")] = None
    """draw on a running `plainsd serve`; its token comes with the URL, as ?token=..., or from $PLAINSD_TOKEN"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16"""
    fast: bool = False
    """weights packed for the processor: a second more at the start, less at every step; the same but for rounding"""
    compile: bool = False
    """torch.compile too, which takes minutes the first time that a size is drawn"""
    int8: bool = False
    """the UNet's weights in 8 bits: less memory, and not quite the same picture; needs torchao"""
    low_memory: bool = False
    """the least memory, for more time: done by itself, and said, where memory is short"""
