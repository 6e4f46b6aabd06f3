"""Training a ControlNet: gradients equal to diffusers', data with maps, resuming, the command."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_XL, tiny_sd
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image
from test_control_pictures import picture_of, tiny_net

import plainsd
from plainsd.cli import main
from plainsd.errors import UserError
from plainsd.models.control import ControlConfig, ControlNet
from plainsd.train.data.examples import ExampleBatch, Examples
from plainsd.train.data.folders import Reading
from plainsd.train.data.latents import cache_latents
from plainsd.train.data.pictures import read_pictures
from plainsd.train.data.sources import read_source
from plainsd.train.gradient_checkpointing import checkpointing
from plainsd.train.loop import fit
from plainsd.train.methods.controlnet import controlnet
from plainsd.train.methods.full import full
from plainsd.train.objective import NoisyLatents, Objective
from plainsd.train.options import FitOptions
from plainsd.train.order import Pick
from plainsd.train.trainer import Trainer

CAPTIONS, TIMESTEPS = ["a red <cat>", "", "two apples"], torch.tensor([3, 512, 990])
SIZES = torch.tensor([[64.0, 80, 0, 8, 64, 64], [64, 64, 0, 0, 64, 64], [500, 300, 40, 0, 64, 64]])
OPTIONS = FitOptions(steps=6, batch=2, lr=1e-3, warmup=0, cosine=False, ema=0.9, save_every=3)


@dataclass
class Given:
    """Instead of examples drawn at random, these."""

    mapped: bool = False

    def __post_init__(self):
        generator = torch.Generator().manual_seed(7)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        x0, noise, maps = draw(3, 4, 8, 8), draw(3, 4, 8, 8), draw(3, 3, 64, 64).sigmoid()
        self.batch = ExampleBatch(CAPTIONS, TIMESTEPS, x0, NoisyLatents(noise, noise), None, SIZES, maps)
        self.pictures = type("Pictures", (), {"items": ()})()

    def draw(self, picks, steps, objective):
        return self.batch


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("variant", [TINY, TINY_XL], ids=["sd1", "xl"])
def test_gradients_equal_diffusers(variant, checkpointed, tmp_path):
    """Of a net that has learned something already: from a new one's zeros most gradients would be zero."""
    sd = tiny_sd(variant).to(dtype=torch.float64)
    net = tiny_net(sd).double()
    plainsd.save(sd, tmp_path / "sd", dtype="float32")
    plainsd.save_control(net, tmp_path / "net", dtype="float32")
    sd.unet.load_state_dict(plainsd.load(tmp_path / "sd", device="cpu", dtype="float32").unet.double().state_dict())
    net.load_state_dict(plainsd.load_control(tmp_path / "net", device="cpu", dtype="float32").double().state_dict())
    examples = Given()
    method = controlnet(sd, examples, net)
    with checkpointing(net, checkpointed), checkpointing(sd.unet, checkpointed):
        loss, _ = method.loss([Pick(i, i, torch.Generator()) for i in range(3)])
        loss.backward()

    unet = UNet2DConditionModel.from_pretrained(tmp_path / "sd" / "unet").double().requires_grad_(False)
    theirs = ControlNetModel.from_pretrained(tmp_path / "net").double().train()
    batch, alpha = examples.batch, sd.schedule.alphas_cumprod[TIMESTEPS].view(-1, 1, 1, 1)
    noise = batch.noise.target
    x = alpha.sqrt() * batch.x0 + (1 - alpha).sqrt() * noise
    context, vector = method.reader(CAPTIONS, SIZES)
    more = {}
    if vector is not None:
        pooled = variant.unet.vector - 6 * 256
        more = {"added_cond_kwargs": {"text_embeds": vector[:, :pooled], "time_ids": SIZES}}
        sizes = vector[:, pooled:]
        assert torch.isfinite(sizes).all()
    down, middle = theirs(x, TIMESTEPS, context, batch.maps, return_dict=False, **more)
    output = unet(x, TIMESTEPS, context, down_block_additional_residuals=down, mid_block_additional_residual=middle,
                  **more).sample  # fmt: skip
    its = (output - noise).square().mean()
    its.backward()
    assert loss.item() == pytest.approx(its.item(), rel=1e-6 if vector is not None else 1e-12)
    with torch.no_grad():  # as a net of gradients, in diffusers' names
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path / "gradients")
    expected = plainsd.load_control(tmp_path / "gradients", device="cpu", dtype=torch.float64)
    tolerance = 1e-5 if vector is not None else 1e-10  # sizes as sinusoids are float32 in diffusers
    for (name, own), other in zip(net.named_parameters(), expected.parameters(), strict=True):
        assert (own.grad - other).abs().max() <= tolerance * max(1e-3, other.abs().max()), name
    assert all(p.grad is None for network in (sd.unet, sd.vae, *sd.text_encoders) for p in network.parameters())


def write_pictures(place, count: int = 6, side: int = 64):
    place.mkdir(parents=True)
    for i in range(count):
        picture_of(i, (side, side)).save(place / f"{i}.png")
        picture_of(100 + i, (side, side)).save(place / f"{i}.cond.png")
        (place / f"{i}.txt").write_text(f"colour {i}")
    return place


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def examples(folder, tmp_path_factory):
    pictures = read_pictures(folder, 64)
    return Examples(pictures, cache_latents(tiny_sd().vae, pictures, tmp_path_factory.mktemp("cache")))


def weights(module):
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def test_a_new_net_begins_as_the_model_and_alone_moves(examples):
    sd = tiny_sd()
    before = weights(sd.unet)
    method = controlnet(sd, examples)
    net = method.modules["net"]
    assert all(not p.any() for p in net.zero.parameters()) and torch.equal(
        net.mid.res1.conv1.weight, sd.unet.mid.res1.conv1.weight
    )
    first = weights(net)
    list(fit(method, 6, OPTIONS))
    assert not torch.equal(first, weights(net)) and torch.equal(before, weights(sd.unet))


def test_resumed_training_is_the_same_bit_for_bit(examples, tmp_path):
    whole = controlnet(tiny_sd(), examples)
    losses = [report.loss for report in fit(whole, 6, OPTIONS)]
    for report in fit(controlnet(tiny_sd(), examples), 6, OPTIONS, tmp_path):
        if report.step == 4:
            break
    second = controlnet(tiny_sd(), examples, seed=9)
    assert [report.loss for report in fit(second, 6, OPTIONS, tmp_path)] == losses[3:]
    assert torch.equal(weights(whole.modules), weights(second.modules))


def test_objectives_count_as_in_other_methods(examples):
    picks = [Pick(i, i, torch.Generator().manual_seed(i)) for i in range(2)]
    one = controlnet(tiny_sd(), examples).loss(picks)[0]
    picks = [Pick(i, i, torch.Generator().manual_seed(i)) for i in range(2)]
    assert controlnet(tiny_sd(), examples, objective=Objective(min_snr=5.0)).loss(picks)[0] != one


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pairs", "metadata", "conditioning_image", "parquet"])
def test_maps_come_with_their_pictures(tmp_path, form):
    place = write_pictures(tmp_path / "x", 3, side=40)
    expected = [np.asarray(Image.open(place / f"{i}.cond.png")) for i in range(3)]
    if form in ("metadata", "conditioning_image"):
        key = "cond" if form == "metadata" else form
        lines = [{"file_name": f"{i}.png", "text": f"colour {i}", key: f"{i}.cond.png"} for i in range(3)]
        (place / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        [path.unlink() for path in place.glob("*.txt")]
    elif form == "parquet":
        datasets = pytest.importorskip("datasets")
        rows = {"image": [str(place / f"{i}.png") for i in range(3)], "text": ["a", "b", "c"],
                "conditioning_image": [str(place / f"{i}.cond.png") for i in range(3)]}  # fmt: skip
        kinds = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string"),
                                   "conditioning_image": datasets.Image()})  # fmt: skip
        place = tmp_path / "table"
        place.mkdir()
        datasets.Dataset.from_dict(rows, features=kinds).to_parquet(str(place / "a.parquet"))
    pictures = read_source(str(place), 40, tmp_path / "cache", Reading(), say=lambda _: None)
    assert len(pictures) == 3 and all(item.mapped and not item.masked for item in pictures.items)
    maps = pictures.maps(range(3), [0] * 3)
    assert maps.shape == (3, 3, 40, 40)
    for own, other in zip(maps, expected, strict=True):
        assert np.allclose(own.permute(1, 2, 0) * 255, other, atol=1e-3)


def test_maps_are_cut_as_their_pictures_are(tmp_path):
    place = tmp_path / "x"
    place.mkdir()
    wide = picture_of(0, (96, 64))
    wide.save(place / "a.png")
    wide.save(place / "a.cond.png")
    (place / "a.txt").write_text("a")
    from plainsd.train.data.crops import Framing

    pictures = replace(read_pictures(place, 64), framing=Framing(crop="random", flip=True))
    for view in range(pictures.framing.count):
        from plainsd.train.data.crops import cut_out

        own = cut_out(wide, pictures.views(0)[view])
        assert np.array_equal(np.asarray(pictures.map(0, view)), np.asarray(own))


@pytest.mark.parametrize(
    "files, says",
    [
        ({"a.png": 64, "a.txt": 0}, None),
        ({"a.png": 64, "a.cond.png": 32, "a.txt": 0}, "its map is of another size than its 64x64 pixels"),
        ({"a.png": 64, "a.cond.png": 64, "a.cond.webp": 64, "a.txt": 0}, "it has 2 maps (a.cond.png, a.cond.webp)"),
    ],
    ids=["none", "size", "two"],
)
def test_pictures_without_a_fitting_map_are_named(tmp_path, files, says):
    for name, side in files.items():
        picture_of(0, (side, side)).save(tmp_path / name) if side else (tmp_path / name).write_text("a")
    if says:
        with pytest.raises(UserError, match=says.replace("(", r"\(").replace(")", r"\)")):
            read_pictures(tmp_path, 64, say=lambda _: None)
        return
    pictures = read_pictures(tmp_path, 64)
    examples = Examples(pictures, cache_latents(tiny_sd().vae, pictures, tmp_path / "cache"))
    with pytest.raises(UserError, match="1 of 1 pictures have no map; put one beside each, cat.cond.png for cat.png"):
        controlnet(tiny_sd(), examples)


def test_a_map_without_a_picture_is_said(tmp_path):
    place, said = write_pictures(tmp_path / "x", 2), []
    picture_of(0).save(place / "z.cond.png")
    assert len(read_pictures(place, 64, say=said.append)) == 2
    assert any("1 not used, maps without a picture: z.cond.png" in line for line in said)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command(model, folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red apple\n")
    out = tmp_path / "edges"
    flags = ["train", "--method", "controlnet", "--base", model, "--data", str(folder), "--out", str(out), "--size",
             "64", "--device", "cpu", "--dtype", "float32", "--batch", "2", "--accumulate", "1", "--lr", "1e-3",
             "--prompts", str(tmp_path / "prompts.txt"), "--save-dtype", "float32", "--hold-out", "0.2"]  # fmt: skip
    assert main([*flags, "--steps", "2"]) == 0, capsys.readouterr().err
    assert (out / "samples").is_dir() and "ControlNet in" in capsys.readouterr().out
    one, other = (
        plainsd.load_control(out / name, device="cpu", dtype="float32") for name in ("edges", "edges.safetensors")
    )
    assert torch.equal(weights(one), weights(other)) and any(p.any() for p in one.zero.parameters())
    assert main([*flags, "--steps", "4"]) == 0, capsys.readouterr().err
    again = plainsd.load_control(out / "edges", device="cpu", dtype="float32")
    assert not torch.equal(weights(one), weights(again))
    more = [*flags[:8], str(tmp_path / "more"), *flags[9:], "--steps", "1", "--control", str(out / "edges")]
    assert main(more) == 0, capsys.readouterr().err
    assert (tmp_path / "more" / "more.safetensors").is_file()


@pytest.mark.parametrize(
    "flags, says",
    [
        (
            ["--prior-prompt", "a dog"],
            "--prior-prompt is for methods full, lora and inversion, and method controlnet does",
        ),
        (["--control", "nowhere"], "there is no model at 'nowhere'"),
        (["--control", "OTHER"], "the ControlNet to go on from does not fit the model"),
    ],
    ids=str,
)
def test_wrong_options_are_one_line(model, folder, tmp_path, capsys, flags, says):
    sd = tiny_sd()
    narrow = replace(sd.unet.config, channels=(32, 32))
    plainsd.save_control(ControlNet(ControlConfig(narrow, (4, 4, 8, 8))), tmp_path / "other")
    flags = [str(tmp_path / "other") if flag == "OTHER" else flag for flag in flags]
    code = main(["train", "--method", "controlnet", "--base", model, "--data", str(folder), "--out",
                 str(tmp_path / "o"), "--size", "64", "--device", "cpu", "--dtype", "float32", "--steps", "1",
                 *flags])  # fmt: skip
    err = capsys.readouterr().err
    assert code == 2 and says in err and not (tmp_path / "o" / "o").exists()


@pytest.mark.parametrize("more", [[], ["--checkpointing"]], ids=["plain", "checkpointing"])
def test_samples_on_half_a_base_leave_the_net_in_float32(model, folder, tmp_path, capsys, more):
    (tmp_path / "prompts.txt").write_text("a red apple\n")
    out = tmp_path / "edges"
    flags = ["train", "--method", "controlnet", "--base", model, "--data", str(folder), "--out", str(out), "--size",
             "64", "--device", "cpu", "--half-base", "--batch", "2", "--accumulate", "1", "--lr", "1e-3", "--prompts",
             str(tmp_path / "prompts.txt"), "--sample-every", "1", "--save-dtype", "float32", "--ema", "0",
             "--steps", "2", *more]  # fmt: skip
    assert main(flags) == 0, capsys.readouterr().err
    assert len(list((out / "samples").iterdir())) == 3
    net = plainsd.load_control(out / "edges", device="cpu", dtype="float32")
    assert any((p != p.bfloat16()).any() for p in net.parameters())


@pytest.mark.parametrize("name", ["cache", "results", "samples"])
def test_a_net_is_not_called_as_a_part_of_a_run(model, folder, tmp_path, capsys, name):
    flags = ["--base", model, "--data", str(folder), "--size", "64", "--device", "cpu", "--steps", "1", "--out"]
    assert main(["train", "--method", "controlnet", *flags, str(tmp_path / name)]) == 2
    assert f"{name!r} is a part of every run; give another" in capsys.readouterr().err
    assert not (tmp_path / name).exists()
    (tmp_path / "o" / "o").mkdir(parents=True)
    assert main(["train", "--method", "controlnet", *flags, str(tmp_path / "o")]) == 2
    assert "is in the way: the result is to be written there" in capsys.readouterr().err


@pytest.mark.parametrize("held", [False, True], ids=["data", "heldout"])
def test_pictures_without_a_map_are_refused_before_a_folder_is_claimed(model, folder, tmp_path, capsys, held):
    plain = write_pictures(tmp_path / "plain", 3)
    (plain / "1.cond.png").unlink()
    data, more = (folder, ["--heldout", str(plain)]) if held else (plain, [])
    code = main(["train", "--method", "controlnet", "--base", model, "--data", str(data), "--out", str(tmp_path / "o"),
                 "--size", "64", "--device", "cpu", "--dtype", "float32", "--steps", "1", *more])  # fmt: skip
    said = f"1 of 3 {'held-out pictures' if held else 'pictures'} have no map; put one beside each"
    assert code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "o" / "options.json").exists() and not list(tmp_path.glob("o/cache/latents-*"))


@pytest.mark.parametrize("bare", [0, 1, 2])
def test_maps_are_read_only_for_what_wants_them(tmp_path, bare):
    """Other methods take pictures with and without a map, whichever comes first."""
    place = write_pictures(tmp_path / "x", 3)
    (place / f"{bare}.cond.png").unlink()
    pictures = read_pictures(place, 64)
    examples = Examples(pictures, cache_latents(tiny_sd().vae, pictures, tmp_path / "cache"))
    method = full(tiny_sd(), examples)
    picks = [Pick(i, i, torch.Generator().manual_seed(i)) for i in range(3)]
    assert examples.draw(picks, 1000).maps is None and method.loss(picks)[0].isfinite()
    assert np.isfinite(method.validate(examples)["validation"])


def test_trainer_counts_only_the_net(examples):
    method = controlnet(tiny_sd(), examples)
    counted = sum(p.numel() for p in Trainer(method, OPTIONS).parameters)
    assert counted == sum(p.numel() for p in method.modules["net"].parameters())
