"""Programs that write A1111's form of text with words of their own, put into A1111's."""

import re
from pathlib import PurePosixPath

from plainsd.pictures.settings import plain_number, ratio_to
from plainsd.pictures.texts.entries import entries
from plainsd.pictures.texts.fields import read_size
from plainsd.pictures.texts.labels import UPSCALER_NAMES, folded

SAME = ("use same sampler", "use same scheduler", "use same checkpoint")  # what A1111 and Forge call no choice
SDCPP_RNG = {"cuda": "NV", "cpu": "CPU"}  # of stable-diffusion.cpp; its std_default is nobody else's
SD_NEXT = {
    "Hires scale": "Hires upscale", "Hires strength": "Denoising strength", "Hires CFG scale": "Hires CFG Scale",
    "Variation strength": "Variation seed strength", "Sampler eta delta": "ENSD",
}  # fmt: skip


def written_by(said: dict[str, str]) -> tuple[str, tuple[int, int]]:
    """Program and version of a text: ("A1111", (1, 10)). Where it does not say, it is taken for A1111's latest."""
    version = said.get("Version", "")
    if said.get("App") == "SD.Next":
        return "SD.Next", (0, 0)
    if version.startswith("stable-diffusion.cpp"):
        return "stable-diffusion.cpp", (0, 0)
    numbers = re.match(r"(plainsd |v)(\d{1,4})\.(\d{1,4})", version)
    if numbers is None:
        return "unknown", (0, 0)
    return "plainsd" if numbers[1] == "plainsd " else "A1111", (int(numbers[2]), int(numbers[3]))


def as_a1111(said: dict[str, str], line: str) -> dict[str, str]:
    """The entries of a text's last line, as A1111's latest version would write them."""
    program, _ = written_by(said)
    if program == "plainsd":
        return said
    if program == "stable-diffusion.cpp" or "SDCPP" in said:
        said = from_sdcpp(line)
    if program == "SD.Next":
        said = {SD_NEXT.get(key, key): value for key, value in said.items()}
    said = {key: value for key, value in said.items() if value.lower() not in SAME}
    for key in ("Hires steps", "Hires CFG Scale"):  # as in the first pass
        if re.fullmatch(r"0(\.0*)?", said.get(key, "")):
            del said[key]
    for key in ("Hires prompt", "Hires negative prompt"):  # likewise
        if said.get(key) == "":
            del said[key]
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", said.get("Seed resize from", "1x1")):
        del said["Seed resize from"]  # "-1x-1", which A1111's API wrote for none
    if said.get("RNG") == "GPU":
        said["RNG"] = "NV"
    if "Refiner" in said:
        said["Refiner"] = said["Refiner"].partition(" [")[0]  # its hash
    _first_pass(said)
    _resized(said)
    return said


def from_sdcpp(line: str) -> dict[str, str]:
    """stable-diffusion.cpp: all of it once more as JSON at the end, and defaults written as numbers out of range."""
    said = dict(entries(line.partition(", SDCPP: {")[0]))
    said.pop("SDCPP", None)
    if "Eta" in said and not re.match(r"\d", said["Eta"]):  # inf, -inf, nan: the sampler's own
        del said["Eta"]
    if re.fullmatch(r"0|-\d+", said.get("Clip skip", "")):
        del said["Clip skip"]
    said["RNG"] = SDCPP_RNG.get(said.get("RNG", ""), said.get("RNG", "cuda"))
    if folded(said.get("Hires upscale", "")) in UPSCALER_NAMES:
        said["Hires upscaler"] = said.pop("Hires upscale")
        said["Hires upscale"] = said.pop("Hires scale", "2")
    if said.get("Hires resize") == "0x0":
        del said["Hires resize"]
    said["Model"] = said.get("Model") or said.pop("Unet", "")
    for key in ("Model", "VAE"):
        if key in said:
            said[key] = re.sub(r"\.(safetensors|ckpt|gguf|sft)$", "", PurePosixPath(said[key]).name)
    return {key: value for key, value in said.items() if value}


def _first_pass(said: dict[str, str]) -> None:
    """A1111 before 2023: "Size" was that of the second pass, "First pass size" that of the first; 0x0 chose one of
    about 512 x 512 pixels, in multiples of 64."""
    try:
        width, height = read_size(said["Size"])
        first = read_size(said["First pass size"])
    except (KeyError, ValueError):
        return
    if not all(first) and width and height:
        scale = (512 * 512 / (width * height)) ** 0.5
        first = (int(-(-scale * width // 64)) * 64, int(-(-scale * height // 64)) * 64)
    del said["First pass size"]
    said["Hires resize"] = said["Size"]
    said["Size"] = f"{first[0]}x{first[1]}"


def _resized(said: dict[str, str]) -> None:
    """A1111's "Hires resize: 1024x1024", one side perhaps 0, as the times that the picture is enlarged."""
    try:
        times = ratio_to(*map(read_size, (said["Hires resize"], said["Size"])))
    except (KeyError, ValueError):
        return
    if times is not None:  # another shape stays among what has no meaning here
        said["Hires upscale"] = plain_number(times)
        del said["Hires resize"]
