"""The flags of `plainsd generate` as a dataclass, which tyro parses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction

from plainsd.arguments import Switch, flag
from plainsd.commands.cluster import ClusterFlags


@dataclass
class GenerateFlags:
    """The flags of `plainsd generate`."""

    prompt: Annotated[Positional[str], flag("PROMPT")] = ""
    """what the picture should show"""
    model: Annotated[str | None, flag("MODEL")] = None
    """folder, single file or Hub id of a model; the embedded model if not given"""
    vae: Annotated[Path | None, flag("PATH")] = None
    """another autoencoder in place of the model's own: a folder, a file, or a whole checkpoint"""
    prediction: Annotated[str | None, flag("NAME")] = None
    """override what the model predicts: epsilon, v_prediction or sample (x0)"""
    zero_snr: Annotated[str | None, flag("on|off")] = None
    """override whether the model has zero terminal SNR"""
    lora: Annotated[UseAppendAction[tuple[str, ...]], flag("FILE:STRENGTH")] = ()
    """a LoRA, such as style.safetensors:0.8; repeatable"""
    lora_folder: Annotated[Path | None, flag("FOLDER")] = None
    """where to look for LoRAs named in prompts, as in <lora:style:0.8>"""
    lora_partial: Switch = False
    """ignore the parts of a LoRA that do not fit the model"""
    embedding: Annotated[UseAppendAction[tuple[str, ...]], flag("FILE:WORD")] = ()
    """a textual-inversion embedding and its word, such as cat.pt:<cat>, or FILE alone; repeatable"""
    control: Annotated[UseAppendAction[tuple[str, ...]], flag("FILE:STRENGTH")] = ()
    """a ControlNet or T2I-Adapter, file or folder, such as canny.safetensors:0.8; repeatable"""
    control_image: Annotated[UseAppendAction[tuple[Path, ...]], flag("FILE")] = ()
    """its control map, one for each --control, except those with --preprocess inpaint; scaled if its size differs.
    Without any, --image is read (with --mask: the map of inpainting nets)"""
    control_range: Annotated[UseAppendAction[tuple[tuple[float, float], ...]], flag("START END")] = ()
    """fractions of the steps between which it acts (default 0 1); one for each --control, or one for all"""
    guess: Switch = False
    """guess mode: control on the cond pass only, weaker at finer levels (0.1 to 1); made for use without a
    prompt, at guidance 3 to 5"""
    control_mode: Annotated[str | None, flag("NAME")] = None
    """balanced, prompt or control: which is more important, weighted as in A1111"""
    preprocess: Annotated[UseAppendAction[tuple[str, ...]], flag("NAME")] = ()
    """preprocessor of --control-image: none, canny, or inpaint (reads --image and --mask instead); one for each
    --control, or one for all"""
    control_kind: Annotated[UseAppendAction[tuple[int, ...]], flag("N")] = ()
    """control type of the map, for a union ControlNet, counted from 0"""
    image_prompt: Annotated[UseAppendAction[tuple[str, ...]], flag("FILE:STRENGTH")] = ()
    """an IP-Adapter, such as ip-adapter_sd15.safetensors:0.6; repeatable"""
    image_prompt_image: Annotated[UseAppendAction[tuple[Path, ...]], flag("FILE")] = ()
    """its picture; several for one adapter, or one for each adapter"""
    image_prompt_mask: Annotated[UseAppendAction[tuple[Path, ...]], flag("FILE")] = ()
    """mask whose light part the picture applies to; one for each picture, or one for all"""
    image_prompt_range: Annotated[UseAppendAction[tuple[tuple[float, float], ...]], flag("START END")] = ()
    """fractions of the steps between which it acts (default 0 1); one for each --image-prompt, or one for all"""
    image_encoder: Annotated[UseAppendAction[tuple[Path, ...]], flag("PATH")] = ()
    """the adapter's CLIP image encoder (default: the folder image_encoder beside the adapter)"""
    refiner: Annotated[str | None, flag("MODEL")] = None
    """folder, file or Hub id of a model for the last steps, such as SDXL's refiner"""
    handover: Annotated[float | None, flag("FRACTION")] = None
    """fraction of the timesteps after which the refiner takes over (default 0.8); with --like comfyui of the steps"""
    negative: Annotated[str | None, flag("TEXT")] = None
    """negative prompt"""
    wildcards: Annotated[Path | None, flag("FOLDER")] = None
    """folder of text files, one choice a line, for prompts with __colours__; {red|blue} needs none"""
    combinations: Switch = False
    """every combination of the prompt's choices instead of random ones"""
    style: Annotated[UseAppendAction[tuple[str, ...]], flag("NAME")] = ()
    """a style to apply to the prompt; repeatable"""
    styles: Annotated[Path, flag("FILE")] = Path("styles.csv")
    """CSV file of styles, in A1111's format: name,prompt,negative_prompt"""
    size: Annotated[tuple[int, int] | None, flag("W H")] = None
    """in pixels, multiples of 8 (16 for the embedded model); with --image any size, the picture is scaled to it"""
    steps: Annotated[int | None, flag("N")] = None
    """sampling steps"""
    guidance: Annotated[float | None, flag("SCALE")] = None
    """guidance scale (CFG); 1 turns it off: twice as fast, and --negative has no effect (so does 0, except with
    --like a1111 and comfyui)"""
    image_guidance: Annotated[float | None, flag("SCALE")] = None
    """image guidance scale of editing models (InstructPix2Pix): how closely to follow --image (default 1.5)"""
    sampler: Annotated[str | None, flag("NAME")] = None
    """ddpm ddim plms euler euler_a heun dpm2 dpm2_a dpmpp_2m dpmpp_2s_a dpmpp_sde dpmpp_2m_sde dpmpp_3m_sde lms unipc
    lcm dpmpp_2m_sde_heun restart dpm_fast dpm_adaptive ddim_cfg_pp euler_cfg_pp euler_a_cfg_pp dpmpp_2m_cfg_pp tcd
    res_multistep res_multistep_a gradient_estimation deis ipndm er_sde sa_solver heunpp2 unipc_bh2"""
    spacing: Annotated[str | None, flag("NAME")] = None
    """spacing of the noise levels: leading trailing linspace karras exponential polyexponential uniform sgm_uniform
    simple ddim_uniform beta beta_a1111 kl_optimal kl_optimal_a1111 align_your_steps align_your_steps_xl"""
    like: Annotated[str | None, flag("PROGRAM")] = None
    """diffusers, a1111 or comfyui: reproduce what that program makes of the same settings (default:
    diffusers; with --from, the program that made the picture)"""
    seed: Annotated[str | None, flag("N")] = None
    """seed of the first picture (default 0; random or -1 picks one); further pictures have the next seeds"""
    noise: Annotated[str | None, flag("NAME")] = None
    """source of the random numbers: cpu, nv (those of an NVIDIA GPU, on any device) or comfyui"""
    ensd: Annotated[int | None, flag("N")] = None
    """A1111's eta noise seed delta (ENSD), added to the seed for ancestral noise"""
    seed_resize: Annotated[tuple[int, int] | None, flag("W H")] = None
    """initial noise of a picture of this size, in the middle of this one's (A1111's resize seed)"""
    count: Annotated[int, flag("N")] = 1
    """pictures per prompt"""
    batch: Annotated[int, flag("N")] = 4
    """batch size; a smaller one needs less memory"""
    prompts: Annotated[Path | None, flag("FILE")] = None
    """text file of prompts, one per line, instead of PROMPT; lines that start with # are comments"""
    out: Annotated[Path, flag("FILE-OR-FOLDER")] = Path("out")
    """where to write; nothing is overwritten, files in a folder are numbered"""
    format: Annotated[str | None, flag("NAME")] = None
    """file format in a folder: png, jpg or webp (default png); for a file, its suffix decides"""
    from_: Annotated[Path | None, flag("FILE", "from")] = None
    """recreate a picture made by plainsd, A1111 or ComfyUI (or a ComfyUI workflow in JSON); other flags override
    its settings"""

    image: Annotated[Path | None, flag("FILE")] = None
    """a picture to start from (image-to-image), or a folder of them"""
    strength: Annotated[float | None, flag("FRACTION")] = None
    """denoising strength: fraction of the steps that run (default 0.75; 0.7 with --hires; 1 with a mask, and for models
    that edit pictures)"""
    mask: Annotated[Path | None, flag("FILE")] = None
    """inpainting mask, of the size of --image; its light part is repainted"""
    mask_blur: Annotated[float | None, flag("PIXELS")] = None
    """blurs the mask"""
    mask_grow: Annotated[int | None, flag("PIXELS")] = None
    """grows the mask; a negative value shrinks it"""
    masked_padding: Annotated[int | None, flag("PIXELS")] = None
    """inpaints only the masked area plus this margin, at --size"""
    masked_content: Annotated[str | None, flag("NAME")] = None
    """initial content under the mask, at a strength below 1: original, fill, noise or nothing"""
    soft_mask: Switch = False
    """grey levels of the mask set how early each pixel starts to change (differential diffusion)"""
    outpaint: Annotated[tuple[int, int, int, int] | None, flag("L T R B")] = None
    """extend --image by this many pixels at the left, top, right and bottom"""
    hires: Annotated[float | None, flag("TIMES")] = None
    """hires fix: a second pass on the picture enlarged by this factor"""
    upscaler: Annotated[str | None, flag("NAME|FILE")] = None
    """hires upscaler: latent, latent-antialiased, latent-bicubic, latent-bicubic-antialiased, latent-nearest,
    latent-nearest-exact, lanczos, or the file of an ESRGAN-type upscaler"""
    hires_steps: Annotated[int | None, flag("N")] = None
    """steps of the second pass (default: --strength times --steps)"""
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
    """variation seed, towards which the noise is interpolated; random or -1 picks one"""
    variation_strength: Annotated[float | None, flag("FRACTION")] = None
    """how far towards the variation seed, 0 to 1"""
    grid: Annotated[UseAppendAction[tuple[str, ...]], flag("NAME=A,B,C")] = ()
    """grid over several values of a setting, as one labelled sheet; give it twice for columns and rows"""

    clip_skip: Annotated[int | None, flag("N")] = None
    """text encoder layer to use: 1 is the last, 2 the one before"""
    eta: Annotated[float | None, flag("FRACTION")] = None
    """fresh noise per step, 0 to 1, for samplers with this option"""
    rescale: Annotated[float | None, flag("FRACTION")] = None
    """guidance rescale, 0 to 1, such as 0.7"""
    interval: Annotated[tuple[float, float] | None, flag("LOW HIGH")] = None
    """guidance interval: guidance only between these noise levels (sigma)"""
    perturbed: Annotated[float | None, flag("SCALE")] = None
    """perturbed-attention guidance, such as 3"""
    threshold: Annotated[float | None, flag("PERCENTILE")] = None
    """dynamic thresholding at this percentile, such as 0.995"""
    apg: Annotated[float | None, flag("LENGTH")] = None
    """adaptive projected guidance, with this limit on the norm of its update, such as 15"""
    apg_parallel: Annotated[float | None, flag("FRACTION")] = None
    """of it, the fraction of the component parallel to the cond estimate that is kept, 0 to 1"""
    apg_momentum: Annotated[float | None, flag("FRACTION")] = None
    """of it, the momentum over steps, such as -0.5"""
    tiling: Switch = False
    """seamless tiling: a picture that repeats without a visible seam"""
    cache: Annotated[int | None, flag("N")] = None
    """DeepCache: run the UNet's deep layers only every N steps; faster, slightly different pictures"""

    preview: Annotated[Path | None, flag("FILE")] = None
    """a PNG file that shows the picture during sampling"""
    preview_vae: Annotated[Path | None, flag("FILE")] = None
    """TAESD, for sharper previews: the file taesd_decoder, or a folder"""
    server: Annotated[str | None, flag("URL")] = None
    """generate on a running `plainsd serve`; give its token with the URL, as ?token=..., or in $PLAINSD_TOKEN"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16"""
    plain: Switch = False
    """do not pack the weights for the processor: slower, the plain forward passes; equal up to rounding"""
    compile: Switch = False
    """use torch.compile too, which takes minutes for each new size"""
    int8: Switch = False
    """8-bit UNet weights: less memory, slightly different pictures; needs torchao"""
    low_memory: Switch = False
    """use the least memory, at the cost of time; switched on by itself, with a note, if memory is short"""
    ray: OmitArgPrefixes[ClusterFlags] = ClusterFlags()
