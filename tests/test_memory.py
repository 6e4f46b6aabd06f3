"""Less memory, the same picture: the VAE in vae_bands, guidance in two calls, networks that take turns."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import TINY, TINY_REFINER, difference, smooth_picture, tiny_sd
from PIL import Image
from torch import nn

from plainsd.generate import final, image_to_image, inpaint, text_to_image
from plainsd.models import vae_bands
from plainsd.models.vae import VAE, VAEConfig
from plainsd.pictures import memory

CPU = torch.device("cpu")
SIZES = [(64, 64), (72, 40), (104, 24)]  # height and width; bands of 2**9 positions cut all of them


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(vae_bands, "BAND", 2**9)
    monkeypatch.setattr(vae_bands, "QUERIES", 50)


@torch.no_grad()
def random_vae(dtype: torch.dtype) -> VAE:
    """With norms that do something, unlike fresh ones."""
    torch.manual_seed(1)
    vae = VAE(VAEConfig(channels=(16, 32, 32), groups=4, layers=1)).eval()
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return vae.to(dtype)


# --- the VAE in bands ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_bands_are_the_whole_picture(narrow, size, form):
    vae = random_vae(torch.float32).to(memory_format=form)
    pixels = torch.rand(2, 3, *size) * 2 - 1
    whole, banded = vae.encode(pixels), vae_bands.encode_in_bands(vae, pixels)
    torch.testing.assert_close(banded.mean, whole.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(banded.logvar, whole.logvar, rtol=0, atol=1e-5)
    torch.testing.assert_close(vae_bands.decode_in_bands(vae, whole.mean), vae.decode(whole.mean), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_moments_of_groups_are_those_of_the_processors_group_norm(dtype):
    """On other devices GroupNorm takes no float32 weights beside bfloat16 maps."""
    x = (torch.randn(2, 12, 7, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1).to(dtype)
    for ours, its in zip(vae_bands.moments_of_groups(x, 4, 1e-6), vae_bands._moments(x, 4, 1e-6), strict=True):
        assert ours.dtype == torch.float32 and ours.shape == (2, 3)
        torch.testing.assert_close(ours, its, rtol=1e-5, atol=1e-5)
    asked = x.to("meta")
    assert vae_bands._moments(asked, 4, 1e-6)[0].shape == (2, 3)


@torch.no_grad()
def test_bands_agree_to_1_in_255_in_bfloat16(narrow):
    """Where each rounding goes on to the next layer, nothing but the same numbers would."""
    vae, pixels = random_vae(torch.bfloat16), (torch.rand(1, 3, 64, 64) * 2 - 1).bfloat16()
    whole, banded = vae.encode(pixels), vae_bands.encode_in_bands(vae, pixels)
    assert (whole.mean - banded.mean).abs().max() < 1 / 255
    latents = 3 * whole.mean
    assert (
        vae.decode(latents) - vae_bands.decode_in_bands(vae, latents)
    ).abs().max() <= 2 / 255  # pixels are 2 apart in [-1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_bands_of_large_maps_are_the_same_numbers(dtype, monkeypatch):
    """Where a map is larger than its statistics take at once, a few groups at a time; maps lie channels last, as those
    that are drawn do."""
    monkeypatch.setattr(vae_bands, "BAND", 2**6)
    vae = random_vae(dtype)
    pixels = (torch.rand(1, 3, 64, 64) * 2 - 1).to(dtype).contiguous(memory_format=torch.channels_last)
    sizes, whole_norm = [], torch.native_group_norm
    monkeypatch.setattr(torch, "native_group_norm", lambda *given: (sizes.append(given[6]), whole_norm(*given))[1])
    banded = vae_bands.encode_in_bands(vae, pixels)
    assert {1, 2} <= {*sizes}  # of four groups
    tight = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 1 / 64}
    torch.testing.assert_close(banded.mean, vae.encode(pixels).mean, **tight)
    latents = banded.mean.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(vae_bands.decode_in_bands(vae, latents), vae.decode(latents), **tight)


@torch.no_grad()
def test_pieces_decoded_alone_would_show(narrow):
    """What the bands must not do: the test above would see it."""
    vae, latents = random_vae(torch.float32), torch.randn(1, 4, 16, 16)
    alone = torch.cat([vae.decode(latents[:, :, :8]), vae.decode(latents[:, :, 8:])], dim=2)
    assert (alone - vae.decode(latents)).abs().max() > 10 / 255


@torch.no_grad()
def test_nothing_given_is_written_over(narrow):
    vae, pixels, latents = random_vae(torch.float32), torch.rand(1, 3, 64, 64), torch.randn(1, 4, 16, 16)
    kept = pixels.clone(), latents.clone()
    vae_bands.encode_in_bands(vae, pixels)
    vae_bands.decode_in_bands(vae, latents)
    assert torch.equal(pixels, kept[0]) and torch.equal(latents, kept[1])


PEAKS = """
import re, torch
from pathlib import Path
from plainsd.models import vae_bands
from plainsd.models.vae import VAE, VAEConfig

def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

@torch.no_grad()
def peak(run):
    Path("/proc/self/clear_refs").write_text("5")            # the highest mark starts again from what is in use
    before = kilobytes("VmRSS")
    run(latents)
    return kilobytes("VmHWM") - before

vae_bands.BAND = 2**13
vae, latents = VAE(VAEConfig(channels=(16, 32, 32, 32), layers=1, groups=4)).eval(), torch.randn(1, 4, 80, 80)
vae_bands.decode_in_bands(vae, latents[:, :, :16])
print(peak(lambda latents: vae_bands.decode_in_bands(vae, latents)), peak(vae.decode))
"""


@pytest.mark.skipif(not memory.MEMINFO.exists(), reason="peaks are read from /proc")
def test_bands_take_less_memory():
    done = subprocess.run([sys.executable, "-c", PEAKS], stdout=subprocess.PIPE, text=True, check=True)
    banded, whole = map(int, done.stdout.split())
    assert banded < 0.75 * whole


# --- whole pictures --------------------------------------------------------------------------------------------------


OPTIONS = {"size": 64, "steps": 3, "guidance": 4.0, "seed": 5, "count": 2}
MORE = [{}, {"perturbed": 2.0}, {"hires": 2.0, "upscaler": "lanczos"}, {"rescale": 0.7}]


@pytest.mark.parametrize("more", MORE, ids=str)
def test_the_least_memory_gives_the_same_pictures(narrow, more):
    sd = tiny_sd()
    plain = final(text_to_image(sd, "a b", "c", **OPTIONS, **more))
    sd.saving = memory.LEAST
    for a, b in zip(plain, final(text_to_image(sd, "a b", "c", **OPTIONS, **more)), strict=True):
        assert difference(a, b) <= 1


def test_pictures_drawn_over_are_the_same_too(narrow):
    sd, picture = tiny_sd(), smooth_picture(72)
    plain = final(image_to_image(sd, "a", picture, steps=4))
    sd.saving = memory.LEAST
    assert difference(plain[0], final(image_to_image(sd, "a", picture, steps=4))[0]) <= 1


@pytest.mark.parametrize("rows, calls", [(None, [4]), (3, [3, 1]), (2, [2, 2]), (1, [1, 1, 1, 1])])
def test_rows_go_through_the_unet_a_few_at_a_time(rows, calls, monkeypatch):
    sd, seen = tiny_sd(), []
    monkeypatch.setattr(memory, "free", lambda device: 1e12)
    sd.saving = memory.Saving(rows=rows)
    sd.unet.register_forward_pre_hook(lambda unet, args: seen.append(len(args[0])))
    final(text_to_image(sd, "a", **OPTIONS | {"steps": 1}))
    assert seen == calls


# --- what is free, and what is done about it -------------------------------------------------------------------------


def test_one_row_at_a_time_each_picture_is_told_of_its_own_surroundings():
    """Of two pictures of one prompt, what an inpainting model reads beside the latents is all that tells rows apart."""
    photo, mask = smooth_picture(64), Image.new("L", (64, 64), 255)
    sd = tiny_sd(in_channels=9)

    def drawn(seed, count):
        return final(inpaint(sd, "x", photo, mask, seed=seed, count=count, steps=3, sampler="ddim"))

    alone = [*drawn(5, 1), *drawn(6, 1)]
    sd.saving = memory.Saving(rows=1)
    together = drawn(5, 2)
    assert [difference(a, b) <= 1 for a, b in zip(alone, together, strict=True)] == [True, True]
    assert difference(*together) > 50


@pytest.mark.parametrize("more", [{"guidance": 3.0}, {"guidance": 1.0}, {"hires": 2.0, "upscaler": "lanczos"}])
def test_one_row_at_a_time_the_batch_makes_no_difference_in_bfloat16(more, monkeypatch):
    """No network is given more than one row, so none can round it in another way than alone: equal bit for bit."""
    sd, given = tiny_sd().to(dtype=torch.bfloat16), []
    for kind in (type(sd.unet), type(sd.vae.encoder), type(sd.vae.decoder)):
        plain = kind.forward
        monkeypatch.setattr(
            kind,
            "forward",
            lambda self, x, *rest, plain=plain, **others: given.append(len(x)) or plain(self, x, *rest, **others),
        )
    choices = {"steps": 2, "size": 32} | more
    final(text_to_image(sd, "a pear", count=3, **choices))
    assert max(given) > 1
    given.clear()
    sd.saving = memory.Saving(rows=1)
    together = final(text_to_image(sd, "a pear", count=3, **choices))
    assert set(given) == {1}
    for i, picture in enumerate(together):
        (alone,) = final(text_to_image(sd, "a pear", seed=i, **choices))
        assert alone.tobytes() == picture.tobytes()


def test_nothing_is_said_where_there_is_room(recwarn, monkeypatch):
    sd = tiny_sd()
    monkeypatch.setattr(memory, "free", lambda device: 2**40)
    assert not memory.in_bands(sd, 4096**2) and memory.rows_at_once(sd, 512**2, 8) == 8
    monkeypatch.setattr(memory, "free", lambda device: math.inf)  # where it cannot be known
    assert not memory.in_bands(sd, 4096**2) and memory.rows_at_once(sd, 512**2, 8) == 8
    assert not recwarn.list


def test_what_is_done_is_said_in_one_line(monkeypatch):
    sd = tiny_sd()
    monkeypatch.setattr(memory, "free", lambda device: 10e6)
    with pytest.warns(
        UserWarning, match=r"^0.0 GB of memory are free and the VAE would take .* GB: it works in bands$"
    ):
        assert memory.in_bands(sd, 1024**2)
    with pytest.warns(UserWarning, match=r"8 rows at once would take .* GB: the UNet takes 1 at a time$"):
        assert memory.rows_at_once(sd, 512**2, 8) == 1


def test_a_short_memory_changes_no_picture(narrow, monkeypatch):
    sd = tiny_sd()
    plain = final(text_to_image(sd, "a", **OPTIONS))
    monkeypatch.setattr(memory, "free", lambda device: 1000)
    with pytest.warns(UserWarning) as said:
        short = final(text_to_image(sd, "a", **OPTIONS))
    assert len({str(line.message).split(": ")[1] for line in said}) == 2
    assert all(difference(a, b) <= 1 for a, b in zip(plain, short, strict=True))


def test_free_memory_is_read_from_the_machine_and_its_container(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.free(CPU) == float("inf")
    (tmp_path / "meminfo").write_text("MemTotal:  8000 kB\nMemAvailable:  3000 kB\n")
    assert memory.free(CPU) == 3000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free(CPU) == 3000 * 1024
    (tmp_path / "memory.max").write_text("2000000\n")
    (tmp_path / "memory.current").write_text("1500000\n")
    (tmp_path / "memory.stat").write_text("anon 1100000\ninactive_file 400000\n")
    assert memory.free(CPU) == 2000000 - 1500000 + 400000


def test_larger_pictures_need_more():
    config, unet = VAEConfig(), TINY.unet
    assert memory.vae_needs(config, 1024**2, 4) == 8 * memory.vae_needs(config, 512**2, 2)
    assert memory.unet_needs(unet, 128**2, 2) == 4 * memory.unet_needs(unet, 64**2, 2)
    assert memory.unet_needs(replace(unet, channels=(64, 64)), 64, 2) > memory.unet_needs(unet, 64, 2)


# --- networks that take turns ----------------------------------------------------------------------------------------


def moves(monkeypatch) -> list[tuple[str, str]]:
    """Which network goes where, when a real second device is lacking: every move is noted, and its weights stay."""
    seen = []

    def to(self, device=None, dtype=None):
        if seen[-1:] != [(type(self).__name__, str(device))]:
            seen.append((type(self).__name__, str(device)))
        return self

    monkeypatch.setattr(nn.Module, "to", to)
    return seen


def test_networks_have_their_turns(monkeypatch):
    sd = tiny_sd()
    sd.refiner = tiny_sd(TINY_REFINER)
    plain = final(text_to_image(sd, "a", **OPTIONS))
    seen = moves(monkeypatch)
    memory.offload(sd, "cpu:0")  # a device of another name, where numbers are the same
    assert sd.device == sd.refiner.device == torch.device("cpu:0") and {place for _, place in seen} == {"cpu"}
    seen.clear()
    moved = final(text_to_image(sd, "a", **OPTIONS))
    assert all(difference(a, b) == 0 for a, b in zip(plain, moved, strict=True))
    turns = [name for name, place in seen if place == "cpu:0"]
    order = [name for name, before in zip(turns, [None, *turns], strict=False) if name != before]
    assert order == ["TextEncoder", "UNet", "TextEncoder", "UNet", "VAE"]  # the second pair is the refiner's


def test_one_network_is_on_the_device_at_a_time():
    networks = [nn.Linear(1, 1), nn.Linear(1, 1)]
    stage = memory.Stage(torch.device("meta"), networks)
    stage.call(networks[0])
    assert [str(n.weight.device) for n in networks] == ["meta", "cpu"]

    class Moved:
        def to(self, device):
            self.place = str(device)

    networks = [Moved(), Moved(), Moved()]
    stage = memory.Stage(torch.device("meta"), networks)
    for turn in (0, 2, 1):
        stage.call(networks[turn])
        assert [n.place for n in networks] == ["meta" if i == turn else "cpu" for i in range(3)]


def test_a_model_too_large_for_its_device_is_offloaded(monkeypatch):
    asked, gpu = [], torch.device("cuda:0")

    def make(device):
        asked.append(device)
        if device == gpu:
            raise torch.OutOfMemoryError("no room")
        return tiny_sd()

    with pytest.warns(UserWarning, match="the model does not fit on cuda:0: its networks wait on the CPU"):
        sd = memory.placed(make, gpu, least=False)
    assert asked == [gpu, CPU] and sd.device == gpu and sd.saving == memory.Saving()
    asked.clear()
    sd = memory.placed(make, gpu, least=True)
    assert asked == [CPU] and sd.device == gpu and sd.saving == memory.LEAST
    sd = memory.placed(make, CPU, least=True)
    assert sd.stage is None and sd.saving == memory.LEAST
    with pytest.raises(torch.OutOfMemoryError):
        memory.placed(lambda device: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")), CPU, least=False)


@pytest.mark.gpu
def test_offloaded_pictures_are_the_same_on_a_gpu():
    sd = tiny_sd().to("cuda")
    plain = final(text_to_image(sd, "a", **OPTIONS))
    memory.offload(sd, "cuda")
    moved = final(text_to_image(sd, "a", **OPTIONS))
    assert all(difference(a, b) <= 1 for a, b in zip(plain, moved, strict=True))
    assert next(sd.unet.parameters()).device == CPU and next(sd.vae.parameters()).device.type == "cuda"
