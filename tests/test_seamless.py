"""Pictures that repeat: the networks see past an edge, and are as before afterwards."""

import threading
from collections.abc import Callable

import pytest
import torch
from conftest import difference, tiny_sd
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from test_control_pictures import picture_of, tiny_net
from torch import nn

import plainsd
from plainsd.adapters.lora import inject
from plainsd.pictures import sampling
from plainsd.pictures.images import read_settings
from plainsd.pictures.sampling import decode
from plainsd.pictures.seamless import seamless
from plainsd.pictures.settings import Settings
from plainsd.pictures.texts.a1111 import format_settings, parse_settings


def modes(network: nn.Module) -> set[str]:
    return {layer.padding_mode for layer in network.modules() if isinstance(layer, nn.Conv2d)}


def test_a_shifted_latent_gives_a_shifted_picture():
    """No place is an edge: what lies where makes no difference."""
    sd, generator = tiny_sd(), torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 16, 16, generator=generator)
    factor = sd.vae.config.factor
    with torch.no_grad():
        whole = decode(sd, latents, tiling=True)
        shifted = decode(sd, latents.roll((4, 6), (2, 3)), tiling=True)
        assert (shifted - whole.roll((4 * factor, 6 * factor), (2, 3))).abs().max() < 1e-5
        plain = decode(sd, latents.roll((4, 6), (2, 3))) - decode(sd, latents).roll((4 * factor, 6 * factor), (2, 3))
        assert plain.abs().max() > 0.01
        context = torch.randn(1, 5, sd.unet.config.context, generator=generator)
        network = seamless(sd.unet, sd.unet)
        eps, moved = network(latents, 500.0, context), network(latents.roll(8, 3), 500.0, context)
        assert (moved - eps.roll(8, 3)).abs().max() < 1e-5
    assert modes(sd.unet) == modes(sd.vae) == {"zeros"}


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"kind": "loha"}, {"kind": "lokr"}], ids=str)
def test_adapters_of_convolutions_see_past_the_edge_too(options):
    sd, generator = tiny_sd(), torch.Generator().manual_seed(0)
    lora = inject(sd.unet, 2, conv=True, generator=generator, **options)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        latents = torch.randn(1, 4, 16, 16, generator=generator)
        context = torch.randn(1, 5, sd.unet.config.context, generator=generator)
        network = seamless(sd.unet, sd.unet)
        eps, moved = network(latents, 500.0, context), network(latents.roll(8, 3), 500.0, context)
        assert (moved - eps.roll(8, 3)).abs().max() < 1e-5
        lora.merge()
        assert (network(latents, 500.0, context) - eps).abs().max() < 1e-4


def test_a_picture_to_edit_is_encoded_without_edges(monkeypatch):
    sd, seen, real = tiny_sd(in_channels=8), [], sampling.moments_of

    def watched(*given, tiling=False):
        seen.append(tiling)
        return real(*given, tiling=tiling)

    monkeypatch.setattr(sampling, "moments_of", watched)
    for tiling in (True, False):
        seen.clear()
        picture = Image.new("RGB", (64, 64), "red")
        plainsd.final(plainsd.image_to_image(sd, "x", picture, 0.5, steps=2, tiling=tiling))
        assert len(seen) == 2 and {*seen} == {tiling}


def test_as_diffusers_with_circular_convolutions(tmp_path):
    sd = tiny_sd()
    plainsd.save(sd, tmp_path / "m")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "m", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    for network in (pipe.unet, pipe.vae):
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                layer.padding_mode = "circular"
    size = sd.variant.size
    side = size // sd.vae.config.factor
    start = torch.randn(4, side, side, generator=torch.Generator().manual_seed(3))[None]
    theirs = pipe("a", num_inference_steps=3, latents=start, width=size, height=size, output_type="latent").images
    events = plainsd.text_to_image(sd, "a", sampler="ddim", steps=3, seed=3, guidance=7.5, tiling=True)
    *_, last = events
    assert (last.latents - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert modes(sd.unet) == modes(sd.vae) == {"zeros"}


@pytest.mark.parametrize("more", [{}, {"hires": 2.0}, {"hires": 2.0, "upscaler": "lanczos"}, {"cache": 2}])
def test_every_task_takes_it_and_leaves_the_model_as_it_was(more):
    sd = tiny_sd()
    plain, tiled = (
        plainsd.final(plainsd.text_to_image(sd, "a", steps=2, tiling=tiling, **more))[0] for tiling in (False, True)
    )
    assert plain.tobytes() != tiled.tobytes()
    photo = Image.radial_gradient("L").resize((32, 32)).convert("RGB")
    mask = Image.linear_gradient("L").resize((32, 32))
    if not more:
        plainsd.final(plainsd.image_to_image(sd, "a", photo, steps=2, tiling=True))
        plainsd.final(plainsd.inpaint(sd, "a", photo, mask, steps=2, tiling=True))
    assert plainsd.final(plainsd.text_to_image(sd, "a", steps=2, **more))[0].tobytes() == plain.tobytes()
    events = plainsd.text_to_image(sd, "a", steps=2, tiling=True, **more)
    next(events)  # given up on the way
    events.close()
    assert modes(sd.unet) == modes(sd.vae) == {"zeros"}


def test_it_is_written_and_read(generate, tmp_path):
    assert "Tiling: True" in format_settings(Settings("a", tiling=True))
    assert parse_settings(format_settings(Settings("a", steps=3, tiling=True))).tiling is True
    assert generate("a", "--tiling", "--steps", 1)[0] == 0
    (made,) = (tmp_path / "out").glob("*.png")
    assert read_settings(made).tiling is True
    assert generate("--from", made)[0] == 0
    (again,) = {*(tmp_path / "out").glob("*.png")} - {made}
    assert again.read_bytes() == made.read_bytes()


@pytest.mark.parametrize("cache", [None, 2])
def test_packed_layers_see_past_an_edge_too(cache):
    """Maps are doubled by smaller convolutions there; and the same model draws with edges and without, in any order."""
    from plainsd.device import can_pack
    from plainsd.speed.model import faster

    if not can_pack(torch.float32):
        pytest.skip("this PyTorch has no oneDNN")
    plain, fast = tiny_sd(), faster(tiny_sd())
    for tiling in (True, False, True):
        one, other = (
            plainsd.final(plainsd.text_to_image(sd, "a", steps=2, guidance=4.0, tiling=tiling, cache=cache))[0]
            for sd in (plain, fast)
        )
        assert difference(one, other) <= 1
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    factor = fast.vae.config.factor
    with torch.no_grad():
        whole, shifted = decode(fast, latents, tiling=True), decode(fast, latents.roll((4, 6), (2, 3)), tiling=True)
    assert (shifted - whole.roll((4 * factor, 6 * factor), (2, 3))).abs().max() < 1e-4


def assert_threads_wait(draw: Callable[[bool], Image.Image], layer: nn.Module) -> None:
    """`draw` with and without tiling: while one thread is inside the layer with wrapped edges, another's picture must
    not be drawn with them."""
    alone = [draw(tiling) for tiling in (False, True)]
    inside, done = threading.Event(), threading.Event()
    tiled: list[Image.Image] = []

    def hold(module, args):
        if module.padding_mode == "circular" and not inside.is_set():
            inside.set()
            done.wait(1)  # enough for the other thread, if nothing keeps it

    with_hook = layer.register_forward_pre_hook(hold)
    thread = threading.Thread(target=lambda: tiled.append(draw(True)))
    thread.start()
    assert inside.wait(30)
    drawn = draw(False)
    done.set()
    thread.join()
    with_hook.remove()
    assert [difference(*pair) for pair in zip((drawn, *tiled), alone, strict=True)] == [0, 0]


def test_another_thread_of_the_same_model_waits_for_the_step():
    sd = tiny_sd()

    def draw(tiling: bool) -> Image.Image:
        return plainsd.final(plainsd.text_to_image(sd, "a cat", steps=2, size=64, tiling=tiling))[0]

    assert_threads_wait(draw, sd.unet.conv_in)
    assert modes(sd.unet) == modes(sd.vae) == {"zeros"}


def test_another_threads_model_waits_for_a_control_net_that_both_have():
    net, models = tiny_net(tiny_sd()), {tiling: tiny_sd() for tiling in (False, True)}

    def draw(tiling: bool) -> Image.Image:
        control = [plainsd.Control(net, picture_of(0))]
        events = plainsd.text_to_image(models[tiling], "a cat", steps=2, size=64, tiling=tiling, control=control)
        return plainsd.final(events)[0]

    assert_threads_wait(draw, net.conv_in)
    assert modes(net) == {"zeros"}
