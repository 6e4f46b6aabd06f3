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
    """The flags of `plainsd generate`."""

    prompt: Annotated[Positional[str], flag("PROMPT")] = ""
    """what to draw"""
    model: Annotated[str | None, flag("MODEL")] = None
    """folder, single file or hub name of a model; the embedded one if not given"""
    vae: Annotated[Path | None, flag("PATH")] = None
    """another autoencoder, a folder or a file, in place of the model's own"""
    prediction: Annotated[str | None, flag("NAME")] = None
    """override what the model predicts: epsilon or v_prediction"""
    zero_snr: Annotated[str | None, flag("on|off")] = None
    """override whether the model has zero terminal SNR"""
    lora: Annotated[UseAppendAction[tuple[str, ...]], flag("FILE:STRENGTH")] = ()
    """a LoRA, such as style.safetensors:0.8; more than once for several"""
    lora_folder: Annotated[Path | None, flag("FOLDER")] = None
    """folder of the LoRAs that prompts name, as in <lora:style:0.8>"""
    lora_partial: bool = False
    """ignore the parts of a LoRA that do not fit the model"""
    embedding: Annotated[UseAppendAction[tuple[str, ...]], flag("FILE:WORD")] = ()
    """a learned word (textual inversion), such as cat.pt:<cat>, or FILE alone; more than once for several"""
    control: Annotated[UseAppendAction[tuple[str, ...]], flag("FILE:STRENGTH")] = ()
    """a control net, such as canny.safetensors:0.8, folder or file; more than once for several"""
    control_image: Annotated[UseAppendAction[tuple[Path, ...]], flag("FILE")] = ()
    """the map that it follows; as many as --control. Another size is scaled"""
    control_range: Annotated[UseAppendAction[tuple[tuple[float, float], ...]], flag("START END")] = ()
    """between which shares of the steps it acts (default 0 1); one for each --control, or one for all"""
    guess: bool = False
    """guess mode: prompted rows only, less for finer parts (0.1 to 1); for maps without a prompt, guidance 3 to 5"""
    control_mode: Annotated[str | None, flag("NAME")] = None
    """balanced, prompt or control: which is more important, as A1111 weighs them"""
    preprocess: Annotated[UseAppendAction[tuple[str, ...]], flag("NAME")] = ()
    """what makes the map of --control-image: none or canny; one for each --control, or one for all"""
    control_kind: Annotated[UseAppendAction[tuple[int, ...]], flag("N")] = ()
    """of the map, for a net of several kinds (union), counted from 0"""
    image_prompt: Annotated[UseAppendAction[tuple[str, ...]], flag("FILE:STRENGTH")] = ()
    """an IP-Adapter's file, such as ip-adapter_sd15.safetensors:0.6; more than once for several"""
    image_prompt_image: Annotated[UseAppendAction[tuple[Path, ...]], flag("FILE")] = ()
    """a picture to take after; several for one adapter, or one for each"""
    image_prompt_mask: Annotated[UseAppendAction[tuple[Path, ...]], flag("FILE")] = ()
    """where it counts, in the light parts; one for each picture, or one for all"""
    image_encoder: Annotated[UseAppendAction[tuple[Path, ...]], flag("PATH")] = ()
    """the CLIP vision tower that reads it (default: the folder image_encoder beside the adapter)"""
    refiner: Annotated[str | None, flag("MODEL")] = None
    """folder, file or hub name of a model for the last steps, such as SDXL's refiner"""
    handover: Annotated[float | None, flag("SHARE")] = None
    """share of the timesteps after which the refiner takes over (default 0.8)"""
    negative: Annotated[str | None, flag("TEXT")] = None
    """negative prompt"""
    wildcards: Annotated[Path | None, flag("FOLDER")] = None
    """folder of text files, one choice a line, for prompts with __colours__; {red|blue} needs none"""
    combinations: bool = False
    """every combination of the prompt's choices instead of random ones"""
    style: Annotated[UseAppendAction[tuple[str, ...]], flag("NAME")] = ()
    """a style around the prompt; more than once for several"""
    styles: Annotated[Path, flag("FILE")] = Path("styles.csv")
    """CSV file of styles, in A1111's format: name,prompt,negative_prompt"""
    size: Annotated[tuple[int, int] | None, flag("W H"), several(int, 2)] = None
    """in pixels, multiples of 8; with --image any size, to which the picture is scaled"""
    steps: Annotated[int | None, flag("N")] = None
    """sampling steps"""
    guidance: Annotated[float | None, flag("SCALE")] = None
    """guidance scale (CFG); 1 turns it off (so does 0, but for --like a1111 and comfyui): twice as fast, and --negative
    has no effect"""
    image_guidance: Annotated[float | None, flag("SCALE")] = None
    """image guidance scale of models that edit pictures: how closely to follow --image (default 1.5)"""
    sampler: Annotated[str | None, flag("NAME")] = None
    """ddpm ddim plms euler euler_a heun dpm2 dpm2_a dpmpp_2m dpmpp_2s_a dpmpp_sde dpmpp_2m_sde dpmpp_3m_sde lms unipc
    lcm dpmpp_2m_sde_heun restart dpm_fast dpm_adaptive ddim_cfg_pp euler_cfg_pp euler_a_cfg_pp dpmpp_2m_cfg_pp tcd
    res_multistep res_multistep_a gradient_estimation deis ipndm er_sde sa_solver heunpp2 unipc_bh2"""
    spacing: Annotated[str | None, flag("NAME")] = None
    """spacing of the noise levels: leading trailing linspace karras exponential polyexponential uniform sgm_uniform
    simple ddim_uniform beta beta_a1111 kl_optimal kl_optimal_a1111 align_your_steps align_your_steps_xl"""
    like: Annotated[str | None, flag("PROGRAM")] = None
    """diffusers, a1111 or comfyui: draw what that program draws of the same settings (with --from: the one it is of)"""
    seed: Annotated[str | None, flag("N")] = None
    """seed of the first picture (default 0; random or -1 draws one); further pictures have the next seeds"""
    noise: Annotated[str | None, flag("NAME")] = None
    """whose random numbers: cpu, nv (those of an NVIDIA GPU, on any device), comfyui"""
    ensd: Annotated[int | None, flag("N")] = None
    """A1111's eta noise seed delta, added to the seed for the noise on the way"""
    seed_resize: Annotated[tuple[int, int] | None, flag("W H"), several(int, 2)] = None
    """the first noise is that of a picture of this size, in the middle of this one's"""
    count: Annotated[int, flag("N")] = 1
    """pictures per prompt"""
    batch: Annotated[int, flag("N")] = 4
    """batch size; smaller needs less memory"""
    prompts: Annotated[Path | None, flag("FILE")] = None
    """text file of prompts, one a line, instead of PROMPT; lines that start with # are comments"""
    out: Annotated[Path, flag("FILE-OR-FOLDER")] = Path("out")
    """where pictures go; nothing is overwritten, files are numbered"""
    format: Annotated[str | None, flag("NAME")] = None
    """of pictures in a folder: png, jpg or webp (default png); a file's is what its name ends with"""
    from_: Annotated[Path | None, flag("FILE", "from")] = None
    """recreate this picture of plainsd, A1111 or ComfyUI (its workflow in JSON, too); other flags override single
    settings"""

    image: Annotated[Path | None, flag("FILE")] = None
    """a picture to start from, or a folder of them, each of which is drawn over"""
    strength: Annotated[float | None, flag("SHARE")] = None
    """denoising strength: the share of the steps that run (default 0.75; 1 with a mask)"""
    mask: Annotated[Path | None, flag("FILE")] = None
    """inpainting mask, of the same size; the light part of --image is redrawn"""
    mask_blur: Annotated[float | None, flag("PIXELS")] = None
    """softness of the mask's edge"""
    mask_grow: Annotated[int | None, flag("PIXELS")] = None
    """widens the mask; below 0 narrows it"""
    masked_padding: Annotated[int | None, flag("PIXELS")] = None
    """draws the masked part alone, with so much around it, at --size"""
    masked_content: Annotated[str | None, flag("NAME")] = None
    """what lies under the mask at the start: original, fill, noise or nothing"""
    soft_mask: bool = False
    """grey levels of the mask say how early each place begins to change"""
    outpaint: Annotated[tuple[int, int, int, int] | None, flag("L T R B"), several(int, 4)] = None
    """extend --image by so many pixels at its left, top, right, bottom"""
    hires: Annotated[float | None, flag("TIMES")] = None
    """hires fix: a second pass on the picture enlarged by this factor"""
    upscaler: Annotated[str | None, flag("NAME|FILE")] = None
    """how to enlarge it: latent, latent-antialiased, latent-bicubic, latent-bicubic-antialiased, latent-nearest,
    latent-nearest-exact, lanczos, or the file of a network of ESRGAN's kind"""
    hires_steps: Annotated[int | None, flag("N")] = None
    """steps that the second pass runs (default: the share --strength of --steps)"""
    hires_sampler: Annotated[str | None, flag("NAME")] = None
    """sampler of the second pass"""
    hires_spacing: Annotated[str | None, flag("NAME")] = None
    """spacing of the second pass"""
    hires_prompt: Annotated[str | None, flag("TEXT")] = None
    """prompt of the second pass"""
    hires_negative: Annotated[str | None, flag("TEXT")] = None
    """negative prompt of the second pass"""
    hires_guidance: Annotated[float | None, flag("SCALE")] = None
    """guidance scale of the second pass"""
    variation_seed: Annotated[str | None, flag("N")] = None
    """a second seed, to vary a picture; random or -1 for any"""
    variation_strength: Annotated[float | None, flag("SHARE")] = None
    """how far towards the second seed, 0 to 1"""
    grid: Annotated[UseAppendAction[tuple[str, ...]], flag("NAME=A,B,C")] = ()
    """contact sheet over several values of a setting; twice for columns and rows"""

    clip_skip: Annotated[int | None, flag("N")] = None
    """text-encoder layer to read: 1 is the last, 2 the one before"""
    eta: Annotated[float | None, flag("SHARE")] = None
    """fresh noise per step, 0 to 1, for samplers with this option"""
    rescale: Annotated[float | None, flag("SHARE")] = None
    """guidance rescale, such as 0.7"""
    interval: Annotated[tuple[float, float] | None, flag("LOW HIGH"), several(float, 2)] = None
    """guidance interval: only between these noise levels (sigma)"""
    perturbed: Annotated[float | None, flag("SCALE")] = None
    """perturbed-attention guidance, such as 3"""
    threshold: Annotated[float | None, flag("PERCENTILE")] = None
    """dynamic thresholding at this percentile, such as 0.995"""
    apg: Annotated[float | None, flag("LENGTH")] = None
    """adaptive projected guidance with steps of at most this length, such as 15"""
    apg_parallel: Annotated[float | None, flag("SHARE")] = None
    """of it, the part along the prompted estimate that stays, 0 to 1"""
    apg_momentum: Annotated[float | None, flag("SHARE")] = None
    """of it, what earlier steps count, such as -0.5"""
    tiling: bool = False
    """a picture that repeats without a seam"""
    cache: Annotated[int | None, flag("N")] = None
    """DeepCache: run the UNet's deep layers at every N-th step only; faster, slightly different pictures"""

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
