"""Models saved and loaded: both layouts, diffusers reading ours, whole or not at all; where models lie."""

import importlib.util
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from small_models import CPU, EACH, model, same_networks, same_tensors, weights

from plainsd.checkpoint import load, save
from plainsd.device import choose_device, choose_dtype
from plainsd.errors import UserError
from plainsd.files.detect import probe
from plainsd.files.hashes import weights_hash
from plainsd.files.hub import snapshot
from plainsd.files.tensorfile import write_safetensors
from plainsd.generate import final, text_to_image
from plainsd.pictures.conditioning import size_vector

# --- saved and loaded ------------------------------------------------------------------------------------------------


@EACH
def test_a_folder_holds_the_whole_model(tmp_path, name):
    sd = model(name)
    save(sd, tmp_path / "m")
    again = load(tmp_path / "m", **CPU)
    assert again.variant == sd.variant and again.prediction == sd.prediction and again.path == tmp_path / "m"
    assert same_networks(sd, again)
    assert torch.equal(sd.schedule.alphas_cumprod, again.schedule.alphas_cumprod)
    assert [t.encode("Hello, world") for t in again.tokenizers] == [t.encode("Hello, world") for t in sd.tokenizers]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


@EACH
def test_a_single_file_holds_the_whole_model(tmp_path, name):
    sd = model(name)
    save(sd, tmp_path / "m.safetensors", layout="single-file")
    again = load(tmp_path / "m.safetensors", **CPU)
    assert again.variant == sd.variant and same_networks(sd, again)
    assert [t.encode("Hello, world") for t in again.tokenizers] == [t.encode("Hello, world") for t in sd.tokenizers]
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("name", ["sd1", "sd2-base", "odd"])
@torch.no_grad()
def test_diffusers_opens_what_we_save(tmp_path, name, caplog):
    """And its networks compute the same."""
    sd = model(name)
    save(sd, tmp_path / "m")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "m", safety_checker=None)
    assert "not expected" not in caplog.text
    x, context = torch.randn(2, sd.unet.config.in_channels, 8, 8), torch.randn(2, 7, sd.unet.config.context)
    timesteps = torch.tensor([7, 700])
    theirs = pipeline.unet(x, timesteps, context).sample
    assert torch.allclose(sd.unet(x, timesteps, context), theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max())
    latents = x[:, : sd.vae.config.latent_channels]
    assert torch.allclose(sd.vae.decode(latents), pipeline.vae.decode(latents).sample, rtol=1e-4, atol=1e-5)
    ids = pipeline.tokenizer("hello a", padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.shape[1] == sd.text_encoders[0].config.positions
    assert torch.allclose(sd.text_encoders[0](ids).final, pipeline.text_encoder(ids)[0], rtol=1e-4, atol=1e-5)
    assert pipeline.vae.config.scaling_factor == sd.vae.config.scaling_factor
    assert pipeline.scheduler.config.prediction_type == sd.prediction
    assert pipeline.scheduler.config.rescale_betas_zero_snr == sd.variant.schedule.zero_terminal_snr
    assert torch.allclose(pipeline.scheduler.alphas_cumprod[:-1].double(), sd.schedule.alphas_cumprod[:-1], rtol=1e-4)


@torch.no_grad()
def test_diffusers_opens_sdxl(tmp_path):
    sd = model("sdxl-base")
    save(sd, tmp_path / "m")
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "m")
    ids = torch.tensor([[512, 5, 9, 513] + [513] * 73])
    first, second = (
        pipeline.text_encoder(ids, output_hidden_states=True),
        pipeline.text_encoder_2(ids, output_hidden_states=True),
    )
    mine = [encoder(ids) for encoder in sd.text_encoders]
    assert torch.allclose(mine[0].hidden[-2], first.hidden_states[-2], atol=1e-5)
    assert torch.allclose(mine[1].hidden[-2], second.hidden_states[-2], atol=1e-5)
    assert torch.allclose(mine[1].pooled, second.text_embeds, atol=1e-5)
    x, context, pooled = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 40), torch.randn(1, 24)
    ids = torch.tensor([[64, 64, 0, 0, 64, 64]])
    theirs = pipeline.unet(x, 5, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}).sample
    assert torch.allclose(sd.unet(x, 5, context, size_vector(pooled, ids.float())), theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "name,sampler,scheduler",
    [
        ("sd1", "plms", PNDMScheduler),
        ("sd1", "ddim", DDIMScheduler),
        ("sd2-768", "ddim", DDIMScheduler),
        ("odd", "ddim", DDIMScheduler),
    ],
)
def test_diffusers_draws_the_same_picture(tmp_path, name, sampler, scheduler):
    """From the folder that we saved, by the same noise: to one step of 255."""
    sd = model(name)
    save(sd, tmp_path / "m")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "m", safety_checker=None)
    config = pipeline.scheduler.config
    pipeline.scheduler = scheduler.from_config(config, **({"skip_prk_steps": True} if sampler == "plms" else {}))
    side = sd.variant.size // sd.vae.config.factor
    noise = torch.randn(1, sd.vae.config.latent_channels, side, side, generator=torch.Generator().manual_seed(7))
    prompts = {"prompt": "hello", "negative_prompt": "bad"}
    theirs = pipeline(
        **prompts,
        latents=noise,
        num_inference_steps=10,
        guidance_scale=6.0,
        height=sd.variant.size,
        width=sd.variant.size,
        output_type="np",
    ).images[0]
    spacing = "trailing" if config.timestep_spacing == "trailing" else "leading"
    (mine,) = final(
        text_to_image(
            load(tmp_path / "m", **CPU),
            "hello",
            "bad",
            steps=10,
            guidance=6.0,
            sampler=sampler,
            spacing=spacing,
            seed=7,
        )
    )
    difference = np.abs(np.asarray(mine, dtype=float) - 255 * theirs)
    assert theirs.std() > 0.05 and difference.max() < 1.5


def test_types_are_kept_or_cast(tmp_path):
    sd = model("sd1")
    save(sd, tmp_path / "half", dtype="float16")
    assert {t.dtype for t in weights(tmp_path / "half").values()} == {torch.float16}
    assert load(tmp_path / "half", device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    sd.to(dtype=torch.bfloat16)
    save(sd, tmp_path / "own.safetensors", layout="single-file")
    assert {t.dtype for t in load_file(tmp_path / "own.safetensors").values()} == {torch.bfloat16}


def test_loras_at_load(tmp_path):
    """With their strengths, and an error where they do not fit."""
    sd = model("sd1")
    save(sd, tmp_path / "m")
    weight = sd.unet.mid.attn.proj_in.weight
    down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    name = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "l.safetensors")
    again = load(tmp_path / "m", loras=[(tmp_path / "l.safetensors", 0.5)], **CPU)
    x = torch.randn(3, weight.shape[1])
    expected = torch.nn.functional.linear(x, weight + 0.5 * (1 / 2) * up @ down, sd.unet.mid.attn.proj_in.bias)
    assert torch.allclose(again.unet.mid.attn.proj_in(x), expected, atol=1e-4)
    save_file(tensors | {"lora_unet_x.lora_down.weight": down.clone()}, tmp_path / "n.safetensors")
    with pytest.raises(UserError, match="lora_unet_x"):
        load(tmp_path / "m", loras=[(tmp_path / "n.safetensors", 1.0)], **CPU)
    load(tmp_path / "m", loras=[(tmp_path / "n.safetensors", 1.0)], lora_partial=True, **CPU)


def test_a_model_with_something_attached_is_not_saved_without_it(tmp_path):
    sd = model("sd1")
    sd.unet.mid.attn.proj_in.adapters = torch.nn.ModuleDict({"style": torch.nn.Linear(2, 3)})
    with pytest.raises(UserError, match="carries 2 tensors that no layout has a place for .mid.attn.proj_in.adapters"):
        save(sd, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_saving_replaces_a_model_whole(tmp_path):
    save(model("sd1"), tmp_path / "m")
    (tmp_path / "m" / "unet" / "old.txt").write_text("x")
    save(model("odd"), tmp_path / "m")
    assert load(tmp_path / "m", **CPU).variant.name == "odd" and not (tmp_path / "m" / "unet" / "old.txt").exists()


def test_a_failed_save_leaves_things_as_they_were(tmp_path, monkeypatch):
    save(model("sd1"), tmp_path / "m")
    before = weights(tmp_path / "m")
    calls = []

    def fail(*args, **named):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return write_safetensors(*args, **named)

    monkeypatch.setattr("plainsd.files.folder.write_safetensors", fail)
    monkeypatch.setattr("plainsd.files.single.write_safetensors", fail)
    for target in ("m", "new"):
        calls.clear()
        with pytest.raises(UserError, match="No space left"):
            save(model("odd"), tmp_path / target)
    calls[:] = [None, None]
    with pytest.raises(UserError, match="No space left"):
        save(model("odd"), tmp_path / "m.safetensors", layout="single-file")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert same_tensors(weights(tmp_path / "m"), before)


@torch.no_grad()
def test_the_embedded_model():
    """It is found without a name, opened by diffusers, and answers rightly what it predicts."""
    sd = load(**CPU)
    assert (sd.path / "concepts.json").is_file() and sd.variant.name == "emoji"
    assert probe(sd.unet) == sd.prediction == "v_prediction"
    pipeline = StableDiffusionPipeline.from_pretrained(sd.path, safety_checker=None, dtype=torch.float32)
    x, context = torch.randn(1, sd.unet.config.in_channels, 8, 8), torch.randn(1, 5, sd.unet.config.context)
    theirs = pipeline.unet(x, 500, context).sample
    assert (sd.unet(x, 500, context) - theirs).abs().max() < 1e-5 * theirs.abs().max()


# --- where models lie ------------------------------------------------------------------------------------------------


def in_cache(folder: Path, name: str, sd) -> Path:
    """A hub cache that holds a model."""
    repository = folder / f"models--{name.replace('/', '--')}"
    save(sd, repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    return repository / "snapshots" / "0123abcd"


def test_hub_name_from_the_cache_without_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    sd = model("sd1")
    where = in_cache(tmp_path, "somebody/small-model", sd)
    again = load("somebody/small-model", **CPU)
    assert same_networks(again, sd) and again.path == where
    with pytest.raises(UserError, match="cache does not hold it, and the Hub cannot be reached"):
        load("somebody/another-model", **CPU)
    save(sd, where / "one.safetensors", layout="single-file")
    assert same_networks(load("somebody/small-model/one.safetensors", **CPU), sd)
    assert weights_hash(Path("somebody/small-model"), "vae") == weights_hash(where, "vae") is not None


def on_hub(monkeypatch, folder: Path, there: list[str]) -> list[bool]:
    """A repository of these files, fetched into a folder. Returns for each request whether it is to the cache alone."""
    asked = []

    def fetch(name, allow_patterns, local_files_only):
        asked.append(local_files_only)
        for path in there:
            if any(fnmatch(path, pattern) for pattern in allow_patterns):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).touch()
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    return asked


@pytest.mark.parametrize(
    "middle,ending", [("", "safetensors"), ("", "bin"), (".fp16", "safetensors"), (".bf16", "bin")]
)
def test_of_a_repository_one_kind_of_weights_is_fetched(tmp_path, monkeypatch, middle, ending):
    """Plain safetensors, then plain pickles, then half precision; never the larger ones beside those that are used."""
    there = [f"unet/diffusion_pytorch_model{middle}.{ending}", "unet/config.json", "model_index.json"]
    asked = on_hub(monkeypatch, tmp_path, there)
    assert snapshot("a/b", None) == tmp_path and (tmp_path / there[0]).is_file()
    assert len(asked) == [".", "", ".fp16", ".bf16"].index(middle) * 2 - (ending == "safetensors")


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors"])
def test_of_a_repository_that_is_one_part_that_is_fetched(tmp_path, monkeypatch, weights):
    """A CLIP, a ControlNet, a VAE: its files lie at the top. Whole checkpoints there are left."""
    there = [
        weights,
        "config.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.json",
        "v1-5-pruned.safetensors",
        "tf_model.h5",
    ]
    on_hub(monkeypatch, tmp_path, there)
    assert snapshot("a/b", None) == tmp_path
    assert {path.name for path in tmp_path.iterdir()} == {*there[:5]}


def test_parts_without_safetensors_come_as_pickles(tmp_path, monkeypatch):
    """And of each part the best that there is of it, no more."""
    wanted = [
        *("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json"),
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.bin",
        "text_encoder/model.fp16.safetensors",
    ]
    on_hub(monkeypatch, tmp_path, [*wanted, "unet/diffusion_pytorch_model.bin", "unet/model.fp16.safetensors"])
    snapshot("a/b", None)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")} == {*wanted}


def test_a_repository_of_single_files_is_told_how_to_name_one(tmp_path, monkeypatch):
    on_hub(monkeypatch, tmp_path / "never made", ["Deliberate_v6.safetensors"])
    with pytest.raises(UserError, match="a/b holds no model in diffusers' layout; .* as a/b/FILE.safetensors"):
        load("a/b", **CPU)


def test_a_hash_of_what_came_from_the_hub_asks_only_the_cache(tmp_path, monkeypatch):
    asked = on_hub(monkeypatch, tmp_path, ["config.json", "diffusion_pytorch_model.safetensors"])
    assert weights_hash(Path("a/b"), "vae") and asked == [True]


@pytest.mark.parametrize("name", ["no-such-folder", "a/b/c", "/no/such/place", "../x/y", "what ever/it is"])
def test_no_model_there(name):
    with pytest.raises(UserError, match="there is no model at") as error:
        load(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "found, chosen",
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, torch.bfloat16),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False}, torch.float32),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, torch.float32),
        ({"architecture": "arm64", "bf16": True}, torch.bfloat16),
        ({"architecture": "arm64"}, torch.float32),
    ],
    ids=str,
)
def test_the_faster_dtype_of_each_processor(monkeypatch, found, chosen):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert choose_dtype("auto", torch.device("cpu")) == chosen
    assert choose_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


def test_devices_and_types():
    assert choose_dtype("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)
    assert choose_dtype("float16", torch.device("cpu")) == torch.float16
    assert choose_dtype("auto", torch.device("meta")) == torch.float32
    with pytest.raises(UserError, match="unknown dtype 'floot16'; did you mean 'float16'"):
        choose_dtype("floot16", torch.device("cpu"))
    with pytest.raises(UserError, match="unknown device 'gpu'"):
        choose_device("gpu")
    assert choose_device("cpu") == torch.device("cpu")


# --- full size -------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_memory_while_loading():
    """SD 1.x in float32 loaded as bfloat16: the networks, a small share on top, and one tensor as the file has it."""
    spec = importlib.util.spec_from_file_location("load_memory", Path(__file__).parents[1] / "bench" / "load_memory.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    peak, size, largest = bench.measure("sd1", "float32", "bfloat16")
    assert size == 2 * (859_520_964 + 83_653_863 + 123_060_480)
    assert size < peak < 1.15 * size + largest


def test_loading_imports_nothing_that_takes_long():
    """PyTorch's compiler, 1.5 s, and the hub's library, 0.2 s, are for those who need them."""
    code = (
        "import sys, plainsd; plainsd.load(device='cpu'); "
        "unasked = 'torch._dynamo', 'torch._inductor', 'huggingface_hub', 'diffusers'; "
        "print([name for name in unasked if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
