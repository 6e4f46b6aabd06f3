"""Which model a file holds, from its names, shapes, notes and settings."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import CPU, model, without_notes

from plainsd.checkpoint import load, save
from plainsd.diffusion.schedule import NoiseSchedule
from plainsd.errors import UserError
from plainsd.files.configs import read_unet, read_variant
from plainsd.files.configs_out import write_variant
from plainsd.files.detect import detect, probe
from plainsd.files.names import places
from plainsd.files.single import prefixes
from plainsd.files.stored import empty, parts, place_shape
from plainsd.files.tensorfile import Stored, TensorFile
from plainsd.models.unet import UNetConfig
from plainsd.models.variants import VARIANTS, Variant


def header_of(variant: Variant) -> TensorFile:
    """A single file of a full-size model, without its numbers."""
    tensors = {}
    for name, (kind, config) in parts(variant).items():
        bare = empty(kind, config)
        shapes = {key: tensor.shape for key, tensor in bare.state_dict().items()}
        prefix, layout = prefixes(variant)[name]
        for place in places(bare, layout, conv=variant.conv_projections):
            tensors[prefix + place.name] = Stored(torch.float16, tuple(place_shape(place, shapes)), None)
    return TensorFile(Path("any-name.safetensors"), tensors, {})


@pytest.mark.parametrize(
    "name",
    ["sd1", "sd1-inpainting", "sd1-lcm", "sd2-inpainting", "sdxl-base", "sdxl-inpainting", "sdxl-lcm", "sdxl-refiner"]
    + ["bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny", "ssd-1b", "vega", "koala-700m", "koala-1b"]
    + ["bk-sdm-v2-base", "bk-sdm-v2-small", "bk-sdm-v2-tiny"],
)
def test_family_by_shapes(name):
    certain = name in ("sd1-lcm", "sdxl-lcm", "sdxl-refiner")  # all of which predict epsilon
    assert detect(header_of(VARIANTS[name])) == (VARIANTS[name], certain)
    assert detect(header_of(VARIANTS[name]), name) == (VARIANTS[name], True)


def test_family_where_shapes_cannot_tell():
    file = header_of(VARIANTS["sd2-768"])
    variant, certain = detect(file)
    assert variant.name == "sd2-base" and not certain
    assert detect(file, "sd2-768") == (VARIANTS["sd2-768"], True)
    assert detect(file, "sd2-turbo")[0].steps == 1
    noted = replace(file, metadata={"modelspec.prediction_type": "v"})
    assert detect(noted) == (VARIANTS["sd2-768"], True)
    with pytest.raises(UserError, match="does not fit the family sdxl-base.*seems to be SD 2.x"):
        detect(file, "sdxl-base")
    with pytest.raises(UserError, match="unknown model family 'sd3'; .*choose from sd1"):
        detect(file, "sd3")


def test_sdxl_with_v_prediction_says_so_by_empty_tensors():
    file = header_of(VARIANTS["sdxl-base"])
    marked = replace(file, tensors=file.tensors | {"v_pred": None, "ztsnr": None})
    variant, certain = detect(marked)
    assert certain and variant.prediction == "v_prediction" and variant.schedule.zero_terminal_snr
    assert variant.spacing == "trailing" and variant.name == "sdxl-base"
    variant, _ = detect(replace(file, tensors=file.tensors | {"v_pred": None}))  # the two say different things
    assert variant.prediction == "v_prediction" and not variant.schedule.zero_terminal_snr
    assert variant.spacing == VARIANTS["sdxl-base"].spacing


def test_a_ztsnr_alone_means_nothing():
    file = header_of(VARIANTS["sdxl-base"])
    assert detect(replace(file, tensors=file.tensors | {"ztsnr": None})) == (VARIANTS["sdxl-base"], False)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", None])
def test_what_a_network_predicts_is_asked_of_it(prediction):
    """The embedded model predicts v; eps = alpha v + sigma x makes a network of it that predicts epsilon."""
    unet = load(**CPU).unet
    alpha_bar = NoiseSchedule.scaled_linear().alphas_cumprod

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.conv_in = unet.config, unet.conv_in

        def forward(self, x, timestep, context):
            v = unet(x, timestep, context)
            if prediction is None:
                return v.flip(-1)
            a = alpha_bar[timestep].item()
            return v if prediction == "v_prediction" else a**0.5 * v + (1 - a) ** 0.5 * x

    assert probe(Network()) == prediction


def test_an_unmarked_sd2_file_is_asked_what_it_predicts(tmp_path, small_families, monkeypatch):
    sd = model("sd2-768")
    save(sd, tmp_path / "a.safetensors", layout="single-file")
    monkeypatch.setattr("plainsd.checkpoint.tokenizers", lambda *_: sd.tokenizers)
    monkeypatch.setattr("plainsd.files.predicted.probe", lambda unet: "v_prediction")
    file = without_notes(tmp_path / "a.safetensors")
    with pytest.warns(
        UserWarning, match="bare-a.safetensors does not say .*: a trial says v_prediction; .*--prediction"
    ):
        again = load(file, **CPU)
    assert again.variant == sd.variant and again.prediction == "v_prediction"


PUBLIC = {
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "sample_size": 64,
}


@pytest.mark.parametrize(
    "setting,value",
    [
        ("act_fn", "gelu"),
        ("class_embed_type", "timestep"),
        ("dual_cross_attention", True),
        ("conv_in_kernel", 5),
        ("layers_per_block", [1, 2, 2, 2]),
        ("block_out_channels", [320]),
        ("addition_embed_type", "image"),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("mid_block_type", ["UNetMidBlock2D"]),
        ("down_block_types", ["AttnDownBlock2D"] * 4),
        ("transformer_layers_per_block", [[1], 2]),
        ("transformer_layers_per_block", [[1, 2], 1, 1, 1]),
        ("transformer_layers_per_block", [0, 1, 1, 1]),
        ("transformer_layers_per_block", None),
        ("reverse_transformer_layers_per_block", [1, 1, 1, [1, 2]]),
        ("reverse_transformer_layers_per_block", "x"),
        ("cross_attention_dim", [768, 1, 1, 1]),
        ("attention_head_dim", 0),
        ("reverse_transformer_layers_per_block", [1, 2]),
    ],
)
def test_settings_that_we_cannot_compute_are_refused(setting, value):
    assert read_unet(PUBLIC, "x")[0] == UNetConfig()
    with pytest.raises(UserError) as error:
        read_unet(PUBLIC | {setting: value}, "x/config.json")
    assert str(error.value).startswith("x/config.json: ") and "\n" not in str(error.value)


def test_public_settings_are_known_by_name():
    """The settings files of public folders, as far as they matter, give the table's own entries."""
    for name, variant in VARIANTS.items():
        files = {path: json.loads(text) for path, text in write_variant(variant).items()}
        del files["model_index.json"]["_plainsd"]
        if name.endswith("-turbo"):
            files["model_index.json"]["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
        for path in files:
            if "text_encoder" in path:
                files[path] |= {"eos_token_id": 2, "bos_token_id": 0}  # as in the public files
        assert read_variant(files.__getitem__, "x") == replace(variant, spacing=variant.spacing), name
