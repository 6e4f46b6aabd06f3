"""TAESD: the network beside diffusers', its files in every naming, as a model's autoencoder and for previews."""

from dataclasses import replace

import pytest
import torch
from conftest import difference, seeded, tiny_sd
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from small_models import CPU, FAMILIES

import plainsd
from plainsd.checkpoint import load_vae, save
from plainsd.cli import main
from plainsd.errors import UserError
from plainsd.files.convert import convert
from plainsd.models import vae_bands
from plainsd.models.tiny_vae import TinyVAE, TinyVAEConfig
from plainsd.models.vae import VAEConfig
from plainsd.models.vae_bands import rows_seen
from plainsd.pictures.memory import LEAST
from plainsd.pictures.previews import previewer

SD = replace(FAMILIES["sd1"], vae=VAEConfig(channels=(8, 8, 8, 8), layers=1, groups=4), size=64)


@pytest.fixture(scope="module")
def oracle():
    """diffusers' network at full size, with random weights."""
    torch.manual_seed(0)
    return AutoencoderTiny().eval()


@pytest.fixture(scope="module")
def files(oracle, tmp_path_factory):
    """It as it was published: two halves, both in one file, diffusers' folder and file; and a model beside it."""
    folder = tmp_path_factory.mktemp("taesd")
    sides = {"encoder": 0, "decoder": 1}  # the published decoder counts its clamp
    halves = {
        side: {
            f"{int(n) + shift}.{leaf}": tensor
            for name, tensor in getattr(oracle, side).layers.state_dict().items()
            for n, _, leaf in [name.partition(".")]
        }
        for side, shift in sides.items()
    }
    for side, tensors in halves.items():
        save_file(tensors, folder / f"taesd_{side}.safetensors")
        torch.save(tensors, folder / f"other_{side}.pth")
    save_file(halves["decoder"], folder / "alone.safetensors")
    both = {f"taesd_{side}.{name}": tensor for side, tensors in halves.items() for name, tensor in tensors.items()}
    save_file(both, folder / "both.safetensors")
    oracle.save_pretrained(folder / "folder")
    save_file(oracle.state_dict(), folder / "diffusers.safetensors")
    save(tiny_sd(SD), folder / "model")
    return folder


def test_published_sizes():
    with torch.device("meta"):
        vae = TinyVAE(TinyVAEConfig())
    assert sum(weight.numel() for weight in vae.parameters()) == 2_445_063
    assert sum(weight.numel() for weight in vae.decoder.parameters()) == 1_222_531


@pytest.mark.parametrize(
    "name",
    ["folder", "diffusers.safetensors", "both.safetensors", "taesd_decoder.safetensors", "taesd_encoder.safetensors",
     "other_decoder.pth", "other_encoder.pth"],
)  # fmt: skip
def test_every_file_of_it_equals_diffusers(files, oracle, name):
    vae = load_vae(files / name, device="cpu", dtype="float32")
    pixels, latents = torch.rand(2, 3, 64, 40) * 2 - 1, torch.randn(2, 4, 8, 5) * 3
    with torch.no_grad():
        assert torch.equal(vae.encode(pixels).mean, oracle.encode(pixels).latents)
        assert torch.equal(vae.decode(latents), oracle.decode(latents).sample)
        assert vae.encode(pixels).sample(torch.randn(2, 4, 8, 5)).sub(vae.encode(pixels).mean).abs().max() < 2e-6


def test_bands_see_far_enough(files):
    vae = load_vae(files / "folder", device="cpu", dtype=torch.float64)
    torch.manual_seed(1)
    pixels, latents = torch.rand(1, 3, 1024, 24).double() * 2 - 1, torch.randn(1, 4, 128, 3).double()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(vae_bands, "BAND", 24 * 16)  # 16 rows of latents
        decoded, encoded = vae_bands.decode_in_bands(vae, latents), vae_bands.encode_in_bands(vae, pixels).mean
        assert (decoded - vae.decode(latents)).abs().max() < 1e-12
        assert (encoded - vae.encode(pixels).mean).abs().max() < 1e-12
        patch.setattr(vae_bands, "rows_seen", lambda blocks: 4)  # too little shows
        assert (vae_bands.decode_in_bands(vae, latents) - decoded).abs().max() > 1e-9
        assert (vae_bands.encode_in_bands(vae, pixels).mean - encoded).abs().max() > 1e-9


def test_how_far_convolutions_see(files):
    """What changes a band's rows lies within; the furthest row within, but one, does change them."""
    for blocks in ((3, 3, 3, 1), (1, 2), (4, 1, 1)):
        vae, seen = TinyVAE(TinyVAEConfig(width=8, decoder_blocks=blocks, encoder_blocks=blocks[::-1])).double(), []
        for layer in vae.modules():
            if isinstance(layer, torch.nn.Conv2d):  # nothing cancels
                torch.nn.init.constant_(layer.weight, 0.05)
        latents = torch.full((1, 4, 120, 1), 0.1, dtype=torch.float64)
        with torch.no_grad():
            plain = vae.decode(latents)
            for far in range(120 - 60):
                other = latents.clone()
                other[:, :, 60 + far] += 1
                row = 60 * vae.config.factor
                seen.append(bool((vae.decode(other)[:, :, row] != plain[:, :, row]).any()))
        assert rows_seen(blocks) - 2 <= sum(seen) - 1 <= rows_seen(blocks), blocks


def test_it_draws_as_in_diffusers(files, tmp_path):
    choices = {"steps": 3, "seed": 4, "sampler": "ddim", "size": (64, 96)}
    sd = plainsd.load(files / "model", vae=files / "taesd_decoder.safetensors", **CPU)
    assert isinstance(sd.vae, TinyVAE)
    (ours,) = plainsd.final(plainsd.text_to_image(sd, "a", **choices))
    save(sd, tmp_path / "saved")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.vae, AutoencoderTiny)
    latents = torch.randn(4, 12, 8, generator=torch.Generator().manual_seed(4))[None]
    from diffusers import DDIMScheduler

    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    theirs = pipe("a", num_inference_steps=3, latents=latents, width=64, height=96, guidance_scale=7.5).images[0]
    (again,) = plainsd.final(plainsd.text_to_image(plainsd.load(tmp_path / "saved", **CPU), "a", **choices))
    assert again.tobytes() == ours.tobytes()
    difference = torch.tensor(list(ours.tobytes())) - torch.tensor(list(theirs.tobytes()))
    assert difference.abs().max() <= 1
    sd.saving = LEAST
    (least,) = plainsd.final(plainsd.text_to_image(sd, "a", **choices))
    difference = torch.tensor(list(ours.tobytes())) - torch.tensor(list(least.tobytes()))
    assert difference.abs().max() <= 1


def test_it_encodes_a_picture_to_draw_over(files):
    sd = plainsd.load(files / "model", vae=files / "folder", **CPU)
    photo = Image.new("RGB", (64, 64), "orange")
    (image,) = plainsd.final(plainsd.image_to_image(sd, "a", photo, 0.5, steps=2))
    assert image.size == (64, 64)


def test_a_decoder_alone_draws_from_text_only(files, tmp_path):
    sd = plainsd.load(files / "model", vae=files / "alone.safetensors", **CPU)
    assert len(plainsd.final(plainsd.text_to_image(sd, "a", steps=1, hires=2.0, strength=1.0))) == 1
    for task in (
        lambda: plainsd.image_to_image(sd, "a", Image.new("RGB", (64, 64)), steps=2),
        lambda: plainsd.text_to_image(sd, "a", steps=2, hires=2.0, upscaler="lanczos"),
    ):
        with pytest.raises(UserError, match="put taesd_encoder beside taesd_decoder") as caught:
            task()
        assert caught.value.field == "vae"
    with pytest.raises(UserError, match="its decoder alone; give both halves"):
        save(sd, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("source", ["both.safetensors", "folder"])
def test_convert_puts_it_into_a_folder_and_not_into_a_single_file(files, tmp_path, source):
    convert(files / "model", tmp_path / "m", "diffusers", vae=files / source)
    assert isinstance(plainsd.load(tmp_path / "m", **CPU).vae, TinyVAE)
    with pytest.raises(UserError, match="no place for TAESD"):
        convert(tmp_path / "m", tmp_path / "m.safetensors", "single-file")


def test_what_does_not_fit_is_one_line(files, tmp_path):
    lone = tmp_path / "taesd_encoder.safetensors"
    lone.write_bytes((files / "taesd_encoder.safetensors").read_bytes())
    with pytest.raises(UserError, match="is the encoder of TAESD alone; give taesd_decoder"):
        load_vae(lone)
    AutoencoderTiny(latent_channels=16, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)\
        .save_pretrained(tmp_path / "sixteen")  # fmt: skip
    with pytest.raises(UserError, match="16 channels at 1/8 of the size, and the model's have 4 at 1/8") as caught:
        plainsd.load(files / "model", vae=tmp_path / "sixteen")
    assert caught.value.field == "vae"
    with pytest.raises(UserError, match="it seems to be TAESD; give it with --vae"):
        plainsd.load(files / "both.safetensors")
    cut = {"encoder.layers.0.weight": torch.zeros(64, 3, 3, 3)}
    save_file(cut | {"decoder.layers.2.conv.0.weight": torch.zeros(64, 64, 3, 3)}, tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="lacks the first layer"):
        load_vae(tmp_path / "cut.safetensors")


# --- previews --------------------------------------------------------------------------------------------------------


def test_previews_are_its_pictures(files, oracle):
    sd = plainsd.load(files / "model", **CPU)
    latents = torch.randn(2, 4, 8, 8, generator=seeded(0))
    shown = previewer(sd, load_vae(files / "alone.safetensors", device="cpu", dtype="float32"))(latents)
    with torch.no_grad():
        expected = (oracle.decode(latents).sample / 2 + 0.5).clamp(0, 1).mul(255).round().byte()
    assert [image.size for image in shown] == [(64, 64)] * 2
    assert difference(shown[1], Image.fromarray(expected[1].permute(1, 2, 0).numpy())) <= 1
    assert previewer(sd)(latents)[0].size == (8, 8)  # by the projection
    own = plainsd.load(files / "model", vae=files / "folder", **CPU)
    assert previewer(own)(latents)[0].tobytes() == shown[0].tobytes()
    with pytest.raises(UserError, match="--preview-vae takes TAESD"):
        previewer(sd, sd.vae.__class__(SD.vae))


def test_the_command_line_shows_them(files, tmp_path, capsys):
    command = ["generate", "a", "--model", str(files / "model"), "--steps", "2", "--out", str(tmp_path / "out")]
    command += ["--device", "cpu", "--dtype", "float32"]
    shown = tmp_path / "now.png"
    assert main([*command, "--preview", str(shown), "--preview-vae", str(files / "both.safetensors")]) == 0
    by_taesd = Image.open(shown).convert("RGB")
    assert by_taesd.size == (64, 64) and len({*by_taesd.get_flattened_data()}) > 64  # more than a colour a latent
    assert main([*command, "--preview-vae", str(files / "both.safetensors")]) == 2
    assert "give both" in capsys.readouterr().err
