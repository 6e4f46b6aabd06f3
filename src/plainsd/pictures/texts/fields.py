"""The numbers and names of A1111's text: its key, our field, and how a value is read and written."""

from plainsd.pictures.settings import plain_number
from plainsd.pictures.texts.labels import upscaler_label, upscaler_named


def _interval(text: str) -> tuple[float, float]:
    low, high = text.split(" to ")
    return float(low), float(high)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


def _whole(text: str) -> int:
    if len(text) > 25:
        raise ValueError(f"{text[:25]!r}... is not a whole number in range")
    return int(text)


def read_size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    if max(len(width), len(height)) > 9:
        raise ValueError(f"{text[:40]!r} is not a size")
    return int(width), int(height)


def _sides(text: str) -> tuple[int, ...]:
    left, top, right, bottom = text.split()
    return int(left), int(top), int(right), int(bottom)


def read_switch(text: str) -> bool:
    """As typed: true, on, false or off. (In the text of a picture, anything but True is off.)"""
    if text.lower() not in ("true", "on", "false", "off"):
        raise ValueError(f"{text[:25]!r} is not true or false")
    return text.lower() in ("true", "on")


NOISE_LABELS = {"cpu": "CPU", "nv": "NV", "comfyui": "ComfyUI"}


def _rng(text: str) -> str:
    """A1111's GPU is NVIDIA's."""
    return {label: ours for ours, label in NOISE_LABELS.items()}.get(text, "nv" if text == "GPU" else text)


def _rng_label(noise: str) -> str:
    return NOISE_LABELS.get(noise, noise)


def _content(text: str) -> str:
    return text.removeprefix("latent ")


def _content_label(content: str) -> str:
    return f"latent {content}" if content in ("noise", "nothing") else content


# A1111's key, our field, text -> value, value -> text; in the order in which they are written
FIELDS = (
    ("Steps", "steps", _whole, str),
    ("CFG scale", "guidance", float, plain_number),
    ("Image CFG scale", "image_guidance", float, plain_number),
    ("Seed", "seed", _whole, str),
    ("Size", "size", read_size, lambda size: f"{size[0]}x{size[1]}"),
    ("Model", "model", str, str),
    ("VAE", "vae", str, str),
    ("Prediction", "prediction", str, str),
    ("Noise Schedule", "zero_snr", lambda text: text == ZERO_SNR_KEY, lambda on: ZERO_SNR_KEY if on else "Default"),
    ("Denoising strength", "strength", float, plain_number),
    ("Mask", "masked", lambda text: text == "given", lambda masked: "given"),
    ("Mask blur", "mask_blur", float, plain_number),
    ("Mask grow", "mask_grow", int, str),
    ("Masked area padding", "masked_padding", int, str),
    ("Masked content", "masked_content", _content, _content_label),
    ("Soft mask", "soft_mask", lambda text: text == "True", str),
    ("Outpaint", "outpaint", _sides, lambda sides: " ".join(map(str, sides))),
    ("Clip skip", "clip_skip", _whole, str),
    ("Eta", "eta", float, plain_number),
    ("Variation seed", "variation_seed", _whole, str),
    ("Variation seed strength", "variation_strength", float, plain_number),
    ("Seed resize from", "seed_resize", read_size, lambda size: f"{size[0]}x{size[1]}"),
    ("RNG", "noise", _rng, _rng_label),
    ("ENSD", "ensd", int, str),
    ("Noise batch index", "batch_index", int, str),
    ("Noise batch size", "batch_size", int, str),
    ("Hires upscale", "hires", float, plain_number),
    ("Hires upscaler", "upscaler", upscaler_named, upscaler_label),
    ("Hires steps", "hires_steps", _whole, str),
    ("Hires prompt", "hires_prompt", str, str),
    ("Hires negative prompt", "hires_negative", str, str),
    ("Hires CFG Scale", "hires_guidance", float, plain_number),
    ("Refiner", "refiner", str, str),
    ("Refiner switch at", "handover", float, plain_number),
    ("CFG rescale", "rescale", float, plain_number),
    ("CFG interval", "interval", _interval, lambda pair: f"{plain_number(pair[0])} to {plain_number(pair[1])}"),
    ("PAG scale", "perturbed", float, plain_number),
    ("Threshold percentile", "threshold", float, plain_number),
    ("APG norm threshold", "apg", float, plain_number),
    ("APG eta", "apg_parallel", float, plain_number),
    ("APG momentum", "apg_momentum", float, plain_number),
    ("Tiling", "tiling", lambda text: text == "True", str),
    ("Deep cache", "cache", _whole, str),
    ("Embeddings", "embeddings", _words, ", ".join),
    ("Like", "like", str, str),
)
ZERO_SNR_KEY = "Zero Terminal SNR"  # A1111's word for it
