"""What tests share: tiny models with random weights, diffusers' pipelines over them, marks for what a machine lacks."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

import plainsd
from plainsd.cli import main
from plainsd.models.clip import TextConfig, TextEncoder
from plainsd.models.unet import UNet, UNetConfig
from plainsd.models.vae import VAE, VAEConfig
from plainsd.models.variants import ScheduleConfig, Variant, encoder_names
from plainsd.pictures.model import StableDiffusion, assemble
from plainsd.speed import kernels
from plainsd.text.tokenizer import WORD_END, Tokenizer, byte_symbols

os.environ["PLAINSD_KEEP_MEMORY"] = "0"  # commands that tests run in this process leave its allocator alone
settings.register_profile(  # tests hold on any machine, however slow
    "plainsd", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("plainsd")

MEANT = ("PLAINSD_KEEP_MEMORY", "PLAINSD_PICTURES")  # of the environment: what tests set and read
STRAY = ("RAY_ADDRESS", "RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID")
LOCAL = "127.0.0.1,localhost,::1"

BYTES = byte_symbols()
VOCABULARY = [*BYTES, *(symbol + WORD_END for symbol in BYTES), "<|startoftext|>", "<|endoftext|>"]

TINY = Variant(
    "tiny",
    unet=UNetConfig(channels=(32, 64), depth=(1, 1), heads=(2, 4), layers=1, context=32),
    vae=VAEConfig(channels=(8, 8, 16, 16), layers=1, groups=4),
    text=(TextConfig(vocab=len(VOCABULARY), width=32, layers=2, heads=2, mlp=64, eos=len(VOCABULARY) - 1),),
    schedule=ScheduleConfig(),
    size=64,
    sampler="ddim",
    steps=4,
)

TEXT = TINY.text[0]
TINY_REFINER = replace(
    TINY,
    name="tiny-refiner",
    unet=replace(TINY.unet, context=32, vector=16 + 5 * 256),
    text=(replace(TEXT, activation="gelu", projection=16),),
    context="penultimate",
    conv_projections=False,
)
TINY_XL = replace(
    TINY_REFINER,
    name="tiny-xl",
    unet=replace(TINY.unet, depth=(0, 2), mid_depth=2, context=64, vector=16 + 6 * 256),
    text=(TEXT, *TINY_REFINER.text),
)


@torch.no_grad()
def tiny_sd(variant: Variant = TINY, seed: int = 0, **unet) -> StableDiffusion:
    """A model of a million weights. Its last layers are scaled so that pictures have contrast, and depend on the
    prompt. `unet` changes single numbers of the UNet's configuration."""
    variant = replace(variant, unet=replace(variant.unet, **unet))
    torch.manual_seed(seed)
    encoders = {name: TextEncoder(text).eval() for name, text in zip(encoder_names(variant), variant.text, strict=True)}
    networks = {**encoders, "unet": UNet(variant.unet).eval(), "vae": VAE(variant.vae).eval()}
    tokenizers = [Tokenizer({word: i for i, word in enumerate(VOCABULARY)}, []) for _ in variant.text]
    sd = assemble(variant, networks, tokenizers)
    latents = torch.randn(2, variant.vae.latent_channels, 8, 8)
    for block in [*sd.unet.down, *sd.unet.up]:
        if block.attn is not None:
            for transformer in block.attn.blocks:
                transformer.cross_attn.out.weight *= 20
    context = torch.randn(2, 5, variant.unet.context)
    vector = torch.randn(2, variant.unet.vector) if variant.unet.vector else None
    noisy = torch.randn(2, variant.unet.in_channels, 8, 8)
    sd.unet.conv_out.weight /= sd.unet(noisy, 500.0, context, vector).std()
    sd.vae.decoder.conv_out.weight *= 0.5 / sd.vae.decode(latents / variant.vae.scaling_factor).std()
    return sd


# --- against diffusers -----------------------------------------------------------------------------------------------


def pipeline(name: str, folder, scheduler: str, controlnet=None, **options):
    import diffusers

    unsafe = {} if "XL" in name else {"safety_checker": None, "requires_safety_checker": False}
    more = {} if controlnet is None else {"controlnet": controlnet}
    made = getattr(diffusers, name).from_pretrained(folder, **unsafe, **more)
    made.set_progress_bar_config(disable=True)
    made.scheduler = getattr(diffusers, scheduler).from_config(made.scheduler.config, **options)
    return made


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def difference(a: Image.Image, b: Image.Image) -> int:
    """Largest difference of any pixel, in 1/255."""
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


def noise_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of noise. Pillow's own `effect_noise` is another one at each call."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth_picture(size: int) -> Image.Image:
    """Smooth shapes, square."""
    y, x = np.mgrid[:size, :size] / size
    return Image.fromarray((np.stack([x, y, (x - y) ** 2], axis=-1) * 255).astype(np.uint8))


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny"
    plainsd.save(tiny_sd(), path)
    return str(path)


def with_variant(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """A model's folder with plain files and, of other weights, those of the variant fp16; and one with these alone, as
    plain files."""
    both, alone = folder / f"both-{seed}", folder / f"alone-{seed}"
    plainsd.save(tiny_sd(seed=seed), both)
    plainsd.save(tiny_sd(seed=seed + 100), alone, dtype="float16")
    for path in alone.glob("*/*.safetensors"):
        shutil.copy(path, (both / path.relative_to(alone)).with_suffix(".fp16.safetensors"))
    return both, alone


@pytest.fixture
def small_families(monkeypatch):
    """The table of known models, in sizes for a test: for files without notes of ours."""
    from small_models import FAMILIES  # which imports this module

    monkeypatch.setattr("plainsd.files.detect.VARIANTS", FAMILIES)


@pytest.fixture
def generate(model, tmp_path, capsys):
    """`plainsd generate` of the tiny model into tmp_path/out: (exit code, stdout, stderr)."""

    def run(*arguments):
        common = ["--model", model, "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path / "out")]
        code = main(["generate", *common, *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """The folder where kernels are kept: an empty one, as if nobody had asked for them yet."""

    kept = kernels.library, kernels.have_kernels
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in kept:
        cached.cache_clear()
    yield tmp_path / "plainsd"
    for cached in kept:
        cached.cache_clear()


@pytest.fixture
def photo(tmp_path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 52, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def pytest_configure():
    """What a shell has set for plainsd, Ray or torchrun is not for tests, and no proxy stands before their servers. Not
    at import: processes under torchrun import this module too."""
    for name in [*os.environ]:
        if name in STRAY or (name.startswith("PLAINSD_") and name not in MEANT):
            del os.environ[name]
    direct = {os.environ.get(name) for name in ("NO_PROXY", "no_proxy")} - {None, "", LOCAL}
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join([*sorted(direct), LOCAL])


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
