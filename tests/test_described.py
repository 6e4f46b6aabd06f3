"""A model described by its own fields, as `plainsd train --model model.json` takes it: read strictly."""

import copy
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import TINY, TINY_XL, main

from plainsd.errors import UserError
from plainsd.files.described import read_description
from plainsd.files.stored import empties
from plainsd.models.vae import VAEConfig
from plainsd.models.variants import VARIANTS, ScheduleConfig

PLAIN = json.loads(json.dumps(asdict(TINY)))
ODD = (None, "", "two", -1, 0, 3, 1.5, 10**12, 1e999, float("nan"), True, [], [7], [[1]], [None] * 3, {}, {"a": 1})
XL_LIKE = json.loads(json.dumps(asdict(TINY_XL)))


def described(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def places(table: dict) -> list[tuple]:
    """The way to each value, those within tables and lists too."""
    found = []
    for key, value in table.items() if isinstance(table, dict) else enumerate(table):
        found.append((key,))
        found += [(key, *more) for more in (places(value) if isinstance(value, dict | list) else [])]
    return found


def changed(place: tuple, value, table: dict = PLAIN) -> dict:
    table = inner = copy.deepcopy(table)
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return table


@pytest.mark.parametrize("name", VARIANTS)
def test_every_known_model_can_be_described(tmp_path, name):
    assert read_description(described(tmp_path / "m.json", asdict(VARIANTS[name]))) == VARIANTS[name]


def test_what_is_left_out_has_its_default(tmp_path):
    short = {"name": "x", "unet": {"groups": 16}, "vae": {}, "text": [{"vocab": 9}], "guidance": 3}
    read = read_description(described(tmp_path / "m.json", short))
    assert (read.vae, read.schedule, read.text[0].vocab, read.unet.groups) == (VAEConfig(), ScheduleConfig(), 9, 16)
    assert isinstance(read.guidance, float)


WRONG = [
    (("unet", "layers"), "two", "unet.layers is 'two', and must be a whole number"),
    (("unet", "layers"), True, "unet.layers is True, and must be a whole number"),
    (("unet", "layers"), 2.0, "unet.layers is 2.0, and must be a whole number"),
    (("unet", "layers"), 101, "unet.layers is 101, and must be a whole number from 1 to 100"),
    (("unet", "layer"), 2, "unknown setting 'unet.layer'; did you mean 'unet.layers'?"),
    (("unet", ""), 2, "unknown setting 'unet.'; did you mean 'unet.heads'? choose from unet."),
    (("",), 2, "unknown setting ''; choose from name, "),
    (("unet", "depth", 1), "one", "unet.depth[1] is 'one', and must be a whole number"),
    (("unet", "depth"), 1, "unet.depth is 1, and must be a list"),
    (("unet", "depth"), [1], "unet.depth is (1,), and must be a list of one entry a level; unet.channels has 2"),
    (("unet", "heads"), [2, 5], "and must be a multiple of unet.heads[1], 5"),
    (("unet", "groups"), 7, "and must be a multiple of unet.groups, 7"),
    (("unet", "up_depth"), [[1], [1]], "unet.up_depth[0] is (1,), and must be a list of"),
    (("unet", "context"), 33, "unet.context is 33, and must be 32, the width of what the text encoders give"),
    (("unet", "in_channels"), 5, "5 input channels"),
    (("unet", "out_channels"), 8, "unet.out_channels is 8, and must be 4, the autoencoder's channels"),
    (("unet",), [], "unet is [], and must be a table of settings"),
    (("vae", "scaling_factor"), float("nan"), "vae.scaling_factor is nan, and must be a number from 1e-09 to 1000"),
    (("vae", "scaling_factor"), "1", "vae.scaling_factor is '1', and must be a number"),
    (("vae", "channels"), [], "vae.channels is (), and must be a list of one entry a level"),
    (("vae", "latents_mean"), [0, 0, 0, 0], "vae.latents_mean and vae.latents_std go together"),
    (("text",), {"width": 32}, "text is {'width': 32}, and must be a list"),
    (("text",), [], "text describes 0 text encoders"),
    (("text", 0, "activation"), "gleu", "unknown text[0].activation 'gleu'; did you mean 'gelu'?"),
    (("text", 0, "heads"), 3, "text[0].width is 32, and must be a multiple of its heads, 3"),
    (("text", 0, "wide"), 3, "unknown setting 'text[0].wide'; did you mean 'text[0].width'?"),
    (("schedule", "beta_end"), 1, "schedule.beta_end is 1, and must be a number from 1e-09 to 0.999"),
    (("schedule", "curve"), "cosin", "unknown schedule.curve 'cosin'; did you mean 'cosine'?"),
    (("schedule",), {"sigma_min": 3, "sigma_max": 2}, "schedule.sigma_min is 3.0, and must be below schedule.sigma_m"),
    (("unet", "depth"), [1, 3], "the middle's count must be that of the last level"),
    (("schedule",), {"sigma_max": 9, "curve": "linear"}, "unknown setting 'schedule."),
    (("prediction",), "eps", "unknown prediction 'eps'"),
    (("prediction",), "edm", "unknown prediction 'edm'"),
    (("context",), "last", "unknown context 'last'"),
    (("sampler",), "eular", "unknown sampler 'eular'; did you mean 'euler'?"),
    (("spacing",), "karas", "unknown spacing 'karas'; did you mean 'karras'?"),
    (("zero_snr",), True, "unknown setting 'zero_snr'"),
    (("size",), "512", "size is '512', and must be a whole number"),
    (("guidance",), float("inf"), "guidance is inf, and must be a number from 0 to 100"),
]  # fmt: skip


@pytest.mark.parametrize(
    "place, value, message", WRONG, ids=lambda one: "-".join(map(str, one)) if isinstance(one, tuple) else ""
)
def test_what_is_wrong_is_one_line(tmp_path, place, value, message):
    path = described(tmp_path / "m.json", changed(place, value))
    with pytest.raises(UserError) as told:
        read_description(path)
    assert str(told.value).startswith(f"{path}: ") and message in str(told.value) and "\n" not in str(told.value)


def test_what_must_be_given(tmp_path):
    for name in ("name", "unet", "vae", "text"):
        short = {key: value for key, value in PLAIN.items() if key != name}
        with pytest.raises(UserError, match=f"the setting '{name}' is missing; give it"):
            read_description(described(tmp_path / "m.json", short))
    for text in ("{", '{"size": 1' + 5000 * "0" + "}", '{"a": ' + 100_000 * "["):
        with pytest.raises(UserError, match="not JSON"):
            read_description(described(tmp_path / "m.json", text))


@pytest.mark.parametrize("table", (PLAIN, XL_LIKE), ids=("sd", "sdxl"))
def test_any_setting_of_any_value(tmp_path, table):
    """Each either describes networks that can be made, or is refused in one line."""
    refused = made = 0
    for place in places(table):
        for value in ODD:
            try:
                variant = read_description(described(tmp_path / "m.json", changed(place, value, table)))
            except UserError as error:
                assert re.fullmatch(r".*m\.json: .*[,;:] .*", str(error)), error
                refused += 1
                continue
            empties(variant)
            variant.schedule.build()
            made += 1
    assert refused > 900 and made > 30


def test_the_command_line_says_it_in_one_line(tmp_path, capsys):
    path = described(tmp_path / "m.json", changed(("unet", "layers"), "two"))
    command = [
        "train",
        "--method",
        "vae",
        "--model",
        str(path),
        "--data",
        str(tmp_path),
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(command) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == [f"plainsd: {path}: unet.layers is 'two', and must be a whole number"]
    assert not (tmp_path / "run").exists()
