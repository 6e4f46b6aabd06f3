"""How much memory and time fine-tuning SD 1.5 takes: ours, and diffusers with peft on the same task.

    python bench/train_memory.py [--device cuda] [CASE]...        all cases, minutes each, if none is named

LoRA of rank 16 on the UNet's attention, or all of the UNet; 512x512 pixels, batches of 1, bfloat16 arithmetic, AdamW,
three steps. The model has SD 1.5's shapes and random weights, and lies on the disk in float16, 2.1 GB, as the public
one does. Each case is a process of its own that loads the model, encodes two pictures and their captions, and trains;
what is printed is the largest resident memory of that whole process (VmHWM), mapped files included, or on a GPU the
most that PyTorch had allocated there, and the seconds of its fastest step. Ours is `plainsd train` itself; diffusers
and peft are called as diffusers' own examples call them, with latents and text states made once, as ours are.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

RANK, SIZE, STEPS = 16, 512, 3
CAPTION = "a line drawing of an apple"
LORA, FULL = ("--method", "lora", "--rank", str(RANK)), ("--method", "full")
OURS = {
    "ours": LORA,
    "ours, half base": (*LORA, "--half-base"),
    "ours, checkpointing": (*LORA, "--checkpointing"),
    "ours, half base, checkpointing": (*LORA, "--half-base", "--checkpointing"),
    "ours, all weights": FULL,
    "ours, all weights, checkpointing": (*FULL, "--checkpointing"),
}
THEIRS = {  # the example has frozen weights in the arithmetic's precision; all weights, checkpointing
    "diffusers + peft, half base": (False, False),
    "diffusers + peft, half base, checkpointing": (False, True),
    "diffusers, all weights": (True, False),
    "diffusers, all weights, checkpointing": (True, True),
}


def prepare(folder: Path) -> None:
    """A model of SD 1.5's shapes, and two captioned pictures."""
    from plainsd.reports.rivals import random_folder

    random_folder(folder / "model", torch.float16)
    make_pictures(folder)


def make_pictures(folder: Path, size: int = SIZE) -> None:
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(2):
        pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")
        (folder / "pictures" / f"{i}.txt").write_text(CAPTION)


def train_ours(folder: Path, device: str, options: tuple[str, ...]) -> float:
    """Seconds of the fastest step."""
    from plainsd.cli import main as plainsd
    from plainsd.train.log import read_log

    with tempfile.TemporaryDirectory() as out, Image.open(folder / "pictures" / "0.png") as picture:
        code = plainsd(
            [
                "train",
                *options,
                "--base",
                str(folder / "model"),
                "--data",
                str(folder / "pictures"),
                "--out",
                out,
                "--size",
                str(picture.width),
                "--steps",
                str(STEPS),
                "--accumulate",
                "1",
                "--device",
                device,
                "--dtype",
                "bfloat16",
                "--ema",
                "0",
                "--save-every",
                "1000",
                "--log-every",
                "1",
            ]
        )
        assert code == 0
        return min(1 / line["samples_per_s"] for line in read_log(Path(out) / "log.jsonl") if "samples_per_s" in line)


def train_theirs(folder: Path, device: str, whole: bool, checkpointing: bool) -> float:
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig
    from transformers import CLIPTextModel, CLIPTokenizer

    parts = {"vae": AutoencoderKL, "text_encoder": CLIPTextModel, "unet": UNet2DConditionModel}
    networks = {
        name: kind.from_pretrained(folder / "model" / name, torch_dtype=torch.bfloat16).requires_grad_(False)
        for name, kind in parts.items()
        if not whole or name != "unet"
    }
    if whole:
        networks["unet"] = UNet2DConditionModel.from_pretrained(folder / "model" / "unet", torch_dtype=torch.float32)
    vae, text, unet = (network.to(device) for network in networks.values())
    tokenizer = CLIPTokenizer.from_pretrained(folder / "model" / "tokenizer")
    scheduler = DDPMScheduler.from_pretrained(folder / "model" / "scheduler")
    if not whole:
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    learned = [p for p in unet.parameters() if p.requires_grad]
    for p in learned:
        p.data = p.data.float()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    optimizer = torch.optim.AdamW(learned, lr=1e-5 if whole else 1e-4)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        ids = tokenizer([CAPTION], padding="max_length", return_tensors="pt").input_ids.to(device)
        states = text(ids).last_hidden_state
        latents = []
        for path in sorted((folder / "pictures").glob("*.png")):
            pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] / 127.5 - 1
            latents.append(vae.encode(pixels.bfloat16().to(device)).latent_dist.mean * vae.config.scaling_factor)
    seconds = []
    for step in range(STEPS):
        began = time.perf_counter()
        x0 = latents[step % 2].float()
        noise, timestep = torch.randn_like(x0), torch.tensor([500], device=device)
        with torch.autocast(device, torch.bfloat16):
            noisy = scheduler.add_noise(x0, noise, timestep).to(unet.dtype)
            output = unet(noisy, timestep, states, return_dict=False)[0]
            torch.nn.functional.mse_loss(output.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def peak(device: str) -> int:
    """Not getrusage's, which is no less than the parent's was when this process began."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def child(task: str, folder: Path, device: str) -> None:
    if task == "prepare":
        seconds = prepare(folder)
    elif task in OURS:
        seconds = train_ours(folder, device, OURS[task])
    else:
        seconds = train_theirs(folder, device, *THEIRS[task])
    print(peak(device), seconds)


def in_a_child(*arguments: str) -> list[str]:
    """The peak in bytes of a process that does this alone, and the seconds of a step."""
    done = subprocess.run([sys.executable, __file__, "--child", *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{arguments[0]}: {done.stderr}")
    return done.stdout.split()[-2:]


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2], Path(sys.argv[3]), sys.argv[4])
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(repr(case) for case in (*OURS, *THEIRS)))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    asked = parser.parse_args()
    if unknown := [case for case in asked.cases if case not in (*OURS, *THEIRS)]:
        parser.error(f"unknown case {unknown[0]!r}")
    with tempfile.TemporaryDirectory() as folder:
        in_a_child("prepare", folder, "cpu")
        for case in asked.cases or (*OURS, *THEIRS):
            most, seconds = in_a_child(case, folder, asked.device)
            print(f"{case:<48}{int(most) / 1e9:>6.2f} GB{float(seconds):>8.2f} s a step", flush=True)


if __name__ == "__main__":
    main()
