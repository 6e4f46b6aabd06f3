"""How much memory drawing a picture takes at its peak: as a whole, and with the least memory.

    python bench/memory.py [FAMILY SIZE]...      such as: sd1 512 sd1 1024 sdxl-base 1024

Models are full-size, in bfloat16, with random weights. Each case is a process of its own that draws one picture in one
guided step, which takes no less at its peak than twenty. Told are the largest resident memory beside the weights while
the UNet runs and while the VAE decodes, and that of the whole process.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from plainsd.files.stored import parts
from plainsd.generate import text_to_image
from plainsd.models.variants import VARIANTS
from plainsd.pictures import memory
from plainsd.pictures.model import StableDiffusion, assemble
from plainsd.text.tokenizer import Tokenizer, find_vocabulary

CASES = ("sd1", "512", "sd1", "1024", "sdxl-base", "1024")
WAYS = {"whole": memory.NOTHING, "least": memory.LEAST}
STATUS = Path("/proc/self/status")


def random_model(family: str) -> StableDiffusion:
    """Full-size, in bfloat16, without ever being anything else."""
    variant, networks = VARIANTS[family], {}
    for name, (kind, config) in parts(variant).items():
        with torch.device("meta"):
            network = kind(config).to(torch.bfloat16)
        networks[name] = network.to_empty(device="cpu").eval().requires_grad_(False)
        for tensor in networks[name].state_dict().values():
            tensor.uniform_(-1, 1).mul_(1 / tensor[0].numel() ** 0.5) if tensor.ndim > 1 else tensor.fill_(0.5)
    tokenizers = [Tokenizer.from_vocabulary(find_vocabulary()) for _ in variant.text]
    return assemble(variant, networks, tokenizers)


def gibibytes(name: str) -> float:
    return int(re.search(name + r":\s+(\d+) kB", STATUS.read_text())[1]) / 2**20


def reset() -> float:
    """The highest mark starts again; what is in use now."""
    Path("/proc/self/clear_refs").write_text("5")
    return gibibytes("VmRSS")


def one(family: str, size: int, way: str) -> None:
    """In a process of its own: prints one row."""
    sd = random_model(family)
    sd.saving = WAYS[way]
    began, before = time.perf_counter(), reset()
    events = text_to_image(sd, "a red apple", size=size, steps=1, sampler="euler")
    next(events)
    unet, seconds = gibibytes("VmHWM"), time.perf_counter() - began
    began, between = time.perf_counter(), reset()
    next(events)
    vae, decoding = gibibytes("VmHWM"), time.perf_counter() - began
    row = (unet - before, vae - between, max(unet, vae), seconds, decoding)
    print(
        f"{family:<11}{size:>5} {way:<7}{before:>9.2f}" + "".join(f"{number:>9.2f}" for number in row[:3]), flush=True
    )
    print(f"{family} {size} {way}: step {seconds:.0f} s, decode {decoding:.0f} s", file=sys.stderr, flush=True)


def main() -> None:
    cases = sys.argv[1:] or CASES
    print(f"{'GiB':<11}{'pixels':>5} {'way':<7}{'weights':>9}{'UNet':>9}{'VAE':>9}{'process':>9}", flush=True)
    for family, size in zip(cases[::2], cases[1::2], strict=True):
        for way in WAYS:
            subprocess.run([sys.executable, __file__, "--one", family, size, way], check=True)


if __name__ == "__main__":
    one(sys.argv[2], int(sys.argv[3]), sys.argv[4]) if sys.argv[1:2] == ["--one"] else main()
