"""`plainsd verify`: every family passes beside diffusers, in both layouts; a changed weight, token or setting fails."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY, tiny_sd
from small_models import FAMILIES, model, without_notes

import plainsd
from plainsd.checkpoint import save
from plainsd.cli import main
from plainsd.errors import UserError
from plainsd.files.stored import StoredNetwork
from plainsd.models.tiny_vae import TinyVAE, TinyVAEConfig
from plainsd.reports.verify import Comparison, error, lines, picture_size, verify
from plainsd.text.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = {"tokenizer", "text encoder", "vae, encode", "vae, decode", "unet", "latents after 5 steps", "pixels, in 1/255"}
XL_NAMES = NAMES | {"tokenizer 2", "text encoder 2"}


def rows(path, **more) -> dict[str, Comparison]:
    return {row.name: row for row in verify(path, device="cpu", **more)}


def names_of(name: str) -> set[str]:
    if name == "sdxl-refiner":
        return XL_NAMES - {"tokenizer", "text encoder"}
    return XL_NAMES if FAMILIES[name].unet.vector else NAMES


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "sd1"
    save(model("sd1"), path)
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_as_a_folder(tmp_path, name):
    save(model(name), tmp_path / "m")
    found = rows(tmp_path / "m")
    assert found.keys() == names_of(name)
    assert all(row.passed for row in found.values()), found
    assert found["unet"].error < 1e-5 and found["vae, decode"].error < 5e-5  # flat maps make rounding larger


@pytest.mark.parametrize("factor", [8, 16, 32])
@pytest.mark.parametrize("size", [32, 96, 128, 160, 224])
def test_the_picture_is_of_whole_latents(size, factor):
    channels = (8,) * (factor.bit_length())
    variant = replace(TINY, size=size, vae=replace(TINY.vae, channels=channels))
    assert variant.vae.factor == factor
    width, height = picture_size(variant)
    assert width % factor == height % factor == 0 < height <= width <= max(size, factor)


def test_a_model_with_taesd_is_compared_with_diffusers_tiny_autoencoder(tmp_path):
    sd = tiny_sd()
    torch.manual_seed(0)
    sd.vae = TinyVAE(TinyVAEConfig(16, (1, 1, 1, 1), (1, 1, 1, 1))).eval()
    sd.variant = replace(sd.variant, vae=sd.vae.config)
    plainsd.save(sd, tmp_path / "model")
    found = {row.name: row for row in verify(tmp_path / "model", device="cpu")}
    assert {"vae, encode", "vae, decode"} <= found.keys() and all(row.passed for row in found.values())


def test_a_wrong_epsilon_in_the_autoencoder_is_found(monkeypatch):
    """With the embedded model's weights, not random ones: 1e-5 for 1e-6, as other ports have it."""
    monkeypatch.setattr("plainsd.models.vae.EPS", 1e-5)
    monkeypatch.setattr("plainsd.files.stored._shelf", {})  # networks made before, and after it those made here
    found = rows(None)
    assert {name for name, row in found.items() if not row.passed} == {"vae, encode", "vae, decode"}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "odd"])
def test_every_family_as_a_single_file_of_others(tmp_path, small_families, name):
    """Through diffusers' own conversion. What is known of the file are its names and shapes."""
    save(model(name), tmp_path / "m.safetensors", layout="single-file")
    path = without_notes(tmp_path / "m.safetensors")
    import plainsd.checkpoint
    import plainsd.reports.references
    import plainsd.reports.verify

    own = model(name).tokenizers
    with pytest.MonkeyPatch.context() as patch:  # such files have no tokenizer, and these are not CLIP's
        patch.setattr(plainsd.checkpoint, "tokenizers", lambda contents, path: own)
        patch.setattr(plainsd.reports.verify, "tokenizers", lambda contents, path: own)
        patch.setattr(plainsd.reports.references, "tokenizers", lambda contents, path: own)
        found = rows(path, family=name)
    assert found.keys() == names_of(name)
    assert all(row.passed for row in found.values()), found


def perturbed(monkeypatch, kind: str, weight: str, amount: float = 0.01) -> None:
    """What we build has one weight that is not the file's."""
    build = StoredNetwork.build

    def changed(self, device, dtype):
        network = build(self, device, dtype)
        if type(network).__name__ == kind:
            with torch.no_grad():
                network.get_parameter(weight).view(-1)[0] += amount
        return network

    monkeypatch.setattr(StoredNetwork, "build", changed)


@pytest.mark.parametrize(
    ("kind", "weight", "wrong"),
    [
        ("UNet", "mid.res1.conv1.bias", {"unet"}),
        ("VAE", "encoder.conv_in.weight", {"vae, encode"}),
        ("VAE", "decoder.conv_in.bias", {"vae, decode"}),
        ("TextEncoder", "position.weight", {"text encoder"}),
    ],
)
def test_a_perturbed_weight_fails(sd1, monkeypatch, kind, weight, wrong):
    perturbed(monkeypatch, kind, weight)
    failed = {row.name for row in rows(sd1).values() if not row.passed}
    assert failed - {"latents after 5 steps", "pixels, in 1/255"} == wrong


def test_another_schedule_shows_in_the_picture_alone(sd1, monkeypatch):
    from plainsd.diffusion.schedule import NoiseSchedule

    monkeypatch.setattr(NoiseSchedule, "scaled_linear", NoiseSchedule.linear)
    failed = {row.name for row in rows(sd1).values() if not row.passed}
    assert "latents after 5 steps" in failed and failed <= {"latents after 5 steps", "pixels, in 1/255"}


def test_another_tokenizer_fails(sd1, monkeypatch):
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: encode(self, text + "!"))
    found = rows(sd1)
    assert found["tokenizer"].error > 3 and not found["tokenizer"].passed


def test_the_command(sd1, monkeypatch, capsys):
    assert main(["verify", str(sd1), "--device", "cpu"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 + len(NAMES) and all(line.endswith("PASS") for line in said[1:])
    perturbed(monkeypatch, "UNet", "conv_in.bias")
    assert main(["verify", str(sd1), "--device", "cpu"]) == 1
    assert "unet" in next(line for line in capsys.readouterr().out.splitlines() if line.endswith("FAIL"))


def test_a_broken_model_is_one_line(sd1, tmp_path, capsys):
    assert main(["verify", str(sd1 / "unet")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1


def test_without_diffusers_it_says_what_to_install(sd1, monkeypatch, capsys):
    import plainsd.reports.verify

    def missing(name):
        if name == "diffusers":
            raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")

    monkeypatch.setattr(plainsd.reports.verify, "import_module", missing)
    assert main(["verify", str(sd1)]) == 2
    said = capsys.readouterr()
    assert said.err == (
        "plainsd: verify compares with diffusers, transformers, accelerate, and diffusers is not "
        "installed; pip install 'plainsd[verify]'\n"
    )
    assert said.out == ""


def test_what_is_not_finite_fails():
    nan = Comparison("x", error(torch.tensor([float("nan"), 1.0]), torch.ones(2)), 1.0)
    assert not nan.passed
    assert error(torch.ones(2), torch.ones(3)) == float("inf")
    failed = []
    assert list(lines([nan, Comparison("y", 0, 0), Comparison("z", 0.0, 1e-4)], failed))[1].endswith(
        "FAIL"
    ) and failed == [nan]


def test_a_broken_part_is_named(tmp_path):
    """Numbers that are not finite, of one output of several."""
    sd = model("sdxl-base")
    sd.text_encoders[1].projection.weight.data[0, 0] = float("nan")
    save(sd, tmp_path / "m")
    found = {}
    with pytest.raises(UserError, match="not finite"):  # of the picture
        for one in verify(tmp_path / "m", device="cpu"):
            found[one.name] = one.passed
    assert found["text encoder"] and not found["text encoder 2"]


def test_v_prediction_matters(tmp_path):
    """A folder that says the wrong thing to diffusers: the networks agree, the picture does not."""
    save(model("sd2-768"), tmp_path / "m")
    path = tmp_path / "m" / "scheduler" / "scheduler_config.json"
    settings = json.loads(path.read_text())
    import plainsd.reports.verify

    real = plainsd.reports.verify.read

    def told_otherwise(*arguments, **more):
        contents = real(*arguments, **more)
        contents.texts["scheduler/scheduler_config.json"] = json.dumps(settings | {"prediction_type": "epsilon"})
        return contents

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plainsd.reports.verify, "read", told_otherwise)
        failed = {row.name for row in rows(tmp_path / "m").values() if not row.passed}
    assert "latents after 5 steps" in failed and "unet" not in failed
