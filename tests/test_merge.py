"""LoRAs baked in, models merged, LoRAs extracted: each number by hand, or by the library that is asked for it."""

import json
import re
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY, TINY_XL, pixels, tiny_sd, with_variant
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import CPU, FAMILIES, model, same_tensors, weights
from test_lora import differ, ours, randn, same, theirs

from plainsd.adapters.baking import baked
from plainsd.adapters.extracting import extract_lora, low_rank
from plainsd.adapters.lora import add_lora, inject, merge, save_lora
from plainsd.checkpoint import load, save
from plainsd.cli import main
from plainsd.diffusion.schedule import EDMSchedule
from plainsd.errors import UserError
from plainsd.files.convert import convert
from plainsd.files.hashes import file_hash
from plainsd.files.merging import merge_models
from plainsd.files.tensorfile import _Pages, open_tensors


def run(capsys, *arguments):
    code = main([*map(str, arguments)])
    return code, *capsys.readouterr()


def moved(sd, path, seed=0, **options):
    """A file of a LoRA of that model, which itself stays as it was."""
    lora = inject(sd, **{"rank": 3, "alpha": 1.5, "targets": "all", "text": True} | options)
    for number, parameter in enumerate(lora.parameters()):
        parameter.data += 0.1 * randn(*parameter.shape, seed=100 * seed + number).to(parameter)
    save_lora(sd, path)
    lora.remove()
    return path


KINDS = {"LoRA": {}, "DoRA": {"dora": True}, "LoHa": {"kind": "loha"}, "LoKr": {"kind": "lokr"}}


# --- baking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["diffusers", "single-file"])
@pytest.mark.parametrize("kind", KINDS)
def test_baked_is_added_and_merged(tmp_path, kind, layout):
    """Of any kind, into either layout, in float64; two at once."""
    sd = tiny_sd().to(dtype=torch.float64)
    save(sd, tmp_path / "model")
    loras = [
        (moved(sd, tmp_path / "a.safetensors", 1, **KINDS[kind]), 0.8),
        (moved(sd, tmp_path / "b.safetensors", 2), -0.3),
    ]
    target = tmp_path / ("baked" if layout == "diffusers" else "baked.safetensors")
    convert(tmp_path / "model", target, change=lambda contents: baked(contents, loras))
    bare, beside = ours(sd), [add_lora(sd, *lora) for lora in loras]
    once = ours(load(target, device="cpu", dtype=torch.float64))
    same(once, ours(sd), 1e-11) if kind != "DoRA" else None
    differ(once, bare)
    merge(beside)
    assert all(torch.equal(a, b) for a, b in zip(once, ours(sd), strict=True))


@pytest.mark.parametrize("name", ["sd", "xl"])
def test_baked_is_what_diffusers_fuses(tmp_path, name):
    xl = name == "xl"
    sd = tiny_sd(TINY_XL if xl else TINY).to(dtype=torch.float64)
    save(sd, tmp_path / "model")
    moved(sd, tmp_path / "a.safetensors", targets="attention")
    kind, unsafe = (StableDiffusionXLPipeline, {}) if xl else (StableDiffusionPipeline, {"safety_checker": None})
    pipe = kind.from_pretrained(tmp_path / "model", dtype=torch.float64, **unsafe)
    bare = theirs(pipe)
    pipe.load_lora_weights(tmp_path / "a.safetensors")
    pipe.fuse_lora(lora_scale=0.8)
    pipe.unload_lora_weights()
    assert (
        main(["convert", str(tmp_path / "model"), str(tmp_path / "b"), "--lora", f"{tmp_path / 'a.safetensors'}:0.8"])
        == 0
    )
    same(ours(load(tmp_path / "b", device="cpu", dtype=torch.float64)), theirs(pipe), 1e-11)
    differ(theirs(pipe), bare)


def test_the_picture_is_the_same(tmp_path, capsys):
    """generate --lora, and generate of the baked model."""
    sd = tiny_sd()
    save(sd, tmp_path / "model")
    lora = f"{moved(sd, tmp_path / 'a.safetensors')}:0.8"
    assert run(capsys, "convert", tmp_path / "model", tmp_path / "b.safetensors", "--lora", lora)[0] == 0
    common = ["generate", "a", "--device", "cpu", "--dtype", "float32"]
    for out, more in {
        "x": ["--model", tmp_path / "model", "--lora", lora],
        "y": ["--model", tmp_path / "b.safetensors"],
        "z": ["--model", tmp_path / "model"],
    }.items():
        code, _, said = run(capsys, *common, *more, "--out", tmp_path / f"{out}.png")
        assert code == 0, said
    x, y, z = (pixels(tmp_path / f"{out}.png") for out in "xyz")
    assert abs(x - y).max() <= 1 < 10 < abs(x - z).max()


def test_types_stay_and_the_rest_too(tmp_path):
    """float16 stays float16, rounded once from float32; what no LoRA touches is bit-identical."""
    sd = tiny_sd()
    save(sd, tmp_path / "model", dtype="float16")
    lora = moved(sd, tmp_path / "a.safetensors", targets="attention", text=False)
    convert(tmp_path / "model", tmp_path / "b", change=lambda contents: baked(contents, [(lora, 0.8)]))
    before, after = weights(tmp_path / "model"), weights(tmp_path / "b")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert {t.dtype for t in after.values()} == {torch.float16} and before.keys() == after.keys()
    assert changed and all(".attn" in name and name.startswith("unet/") and name.endswith("weight") for name in changed)
    half = load(tmp_path / "model", **CPU)
    merge([add_lora(half, lora, 0.8)])
    save(half, tmp_path / "c", dtype="float16")
    assert all(torch.equal(after[name], tensor) for name, tensor in weights(tmp_path / "c").items())


def test_a_lora_that_has_no_place(tmp_path, capsys):
    save(tiny_sd(), tmp_path / "model")
    other = moved(tiny_sd(TINY_XL), tmp_path / "xl.safetensors")
    code, out, said = run(capsys, "convert", tmp_path / "model", tmp_path / "b", "--lora", other)
    assert code == 2 and "does not fit this model" in said and said.count("\n") == 1 and not (tmp_path / "b").exists()
    tensors = load_file(moved(tiny_sd(), tmp_path / "a.safetensors")) | {
        "lora_unet_x.lora_up.weight": torch.zeros(2, 2)
    }
    save_file(tensors, tmp_path / "a.safetensors")
    code, _, said = run(capsys, "convert", tmp_path / "model", tmp_path / "b", "--lora", tmp_path / "a.safetensors")
    assert code == 2 and "accept that (--lora-partial)" in said
    more = ["--lora", tmp_path / "a.safetensors", "--lora-partial"]
    assert run(capsys, "convert", tmp_path / "model", tmp_path / "b", *more)[0] == 0
    code, _, said = run(capsys, "convert", tmp_path / "model", tmp_path / "c", "--lora", "none.safetensors:x")
    assert code == 2 and "write FILE or FILE:0.8" in said


def test_too_large_for_float16(tmp_path, capsys):
    """Nothing is written, in either layout."""
    sd = tiny_sd()
    save(sd, tmp_path / "model", dtype="float16")
    lora = moved(sd, tmp_path / "a.safetensors")
    save_file({k: t * 1e4 if "lora_up" in k else t for k, t in load_file(lora).items()}, lora)
    before = sorted(tmp_path.iterdir())
    for target in ("b", "b.safetensors"):
        code, _, said = run(capsys, "convert", tmp_path / "model", tmp_path / target, "--lora", f"{lora}:9000")
        assert code == 2 and "numbers that float16 cannot" in said and "--dtype float32" in said
    assert sorted(tmp_path.iterdir()) == before


# --- merging ---------------------------------------------------------------------------------------------------------


def three(folder, name="sd1", layouts=("diffusers",) * 3, dtype="float16"):
    """Models A, B and C of one family, and where they lie."""
    paths = []
    for seed, layout in enumerate(layouts):
        sd = model(name) if seed == 0 else tiny_sd(FAMILIES[name], seed=seed)
        for tokenizer, text in zip(sd.tokenizers, sd.variant.text, strict=True):
            tokenizer.max_length = text.positions
        paths.append(folder / (f"{seed}.safetensors" if layout == "single-file" else f"{seed}"))
        save(sd, paths[-1], layout, dtype=dtype)
    return paths


def a1111(a, b, c, share):
    """The two formulas of its extras, on float32."""
    return (1 - share) * a + share * b if c is None else a + share * (b - c)


FOLDERS, SINGLES, MIXED = ("diffusers",) * 3, ("single-file",) * 3, ("single-file", "diffusers", "single-file")


@pytest.mark.parametrize(
    "name, layouts, difference",
    [
        ("sd1", FOLDERS, False),
        ("sd1", SINGLES, True),
        ("sd2-768", MIXED, True),
        ("sdxl-base", SINGLES, False),
        ("sdxl-base", FOLDERS, True),
        ("sdxl-refiner", MIXED, False),
    ],
)
def test_merged_is_its_formula(tmp_path, capsys, name, layouts, difference):
    """Every tensor, whatever the layouts; the types are A's, and the autoencoder."""
    paths = three(tmp_path, name, layouts)[: 2 + difference]
    out = tmp_path / ("out" if layouts[0] == "diffusers" else "out.safetensors")
    more = ["--difference"] if difference else []
    assert run(capsys, "merge", *paths, "--out", out, "--share", 0.3, *more) == (0, f"{out}\n", "")
    a, b, c = [*(load(path, **CPU) for path in paths), None][:3]
    made = load(out, **CPU)
    for network in ("unet", "vae", *range(len(a.text_encoders))):
        states = [
            None
            if sd is None
            else (sd.text_encoders[network] if isinstance(network, int) else getattr(sd, network)).state_dict()
            for sd in (a, b, c, made)
        ]
        for key, tensor in states[0].items():
            right = tensor if network == "vae" else a1111(tensor, states[1][key], states[2] and states[2][key], 0.3)
            torch.testing.assert_close(
                states[3][key], right.half().float(), rtol=1e-3, atol=1e-7
            )  # a half's last digit
            assert network == "vae" or not torch.equal(states[3][key], tensor) or torch.equal(tensor, states[1][key])
    stored = load_file(out) if out.is_file() else weights(out)
    assert {tensor.dtype for tensor in stored.values() if tensor.numel()} == {torch.float16}  # `v_pred` is empty
    assert made.variant == a.variant


def test_the_ends_are_the_models(tmp_path):
    a, b, c = three(tmp_path, dtype="float32")
    for share, whole in ((0, a), (1, b)):
        merge_models([a, b], tmp_path / "out", share)
        for name, tensor in weights(tmp_path / "out").items():
            assert torch.equal(tensor, weights(a if name.startswith("vae") else whole)[name]), name
    merge_models([a, b, b], tmp_path / "out", 0.7, difference=True)
    assert all(torch.equal(tensor, weights(a)[name]) for name, tensor in weights(tmp_path / "out").items())
    merge_models([a, c], tmp_path / "out", 0.5, dtype="bfloat16")
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}


@pytest.mark.parametrize("noted", [True, False], ids=["with our notes", "a stranger's"])
def test_only_the_first_needs_an_autoencoder(tmp_path, small_families, noted):
    paths = three(tmp_path, layouts=SINGLES)
    merge_models(paths, tmp_path / "whole.safetensors", 0.4, difference=True)
    for path in paths[1:]:
        with safe_open(path, "pt") as file:
            notes = file.metadata() if noted else None
        save_file(
            {key: t for key, t in load_file(path).items() if not key.startswith("first_stage_model.")}, path, notes
        )
    merge_models(paths, tmp_path / "out.safetensors", 0.4, difference=True)
    whole, out = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "out.safetensors")
    assert whole.keys() == out.keys() and all(torch.equal(tensor, out[key]) for key, tensor in whole.items())
    with pytest.raises(UserError, match="holds no autoencoder"):
        merge_models(paths[1:], tmp_path / "none.safetensors", 0.4)


def test_an_inpainting_model_takes_up_a_difference(tmp_path, capsys):
    """As people make them: A inpaints, B is a tuned model, C its base. The first convolution's surplus inputs stay."""
    (a,), (_, b, c) = three(tmp_path / "i", "sd1-inpainting", ("diffusers",)), three(tmp_path / "p")
    merge_models([a, b, c], tmp_path / "out", 1, difference=True)
    key = "unet/conv_in.weight"
    one, two, three_, made = (weights(path)[key].float() for path in (a, b, c, tmp_path / "out"))
    assert torch.equal(made[:, 4:], one[:, 4:]) and made.shape[1] == 9
    torch.testing.assert_close(made[:, :4], (one[:, :4] + (two - three_)).half().float(), rtol=1e-3, atol=1e-7)
    assert load(tmp_path / "out", **CPU).variant.unet.in_channels == 9
    code, _, said = run(capsys, "merge", b, a, "--out", tmp_path / "no", "--share", 0.5)
    assert code == 2 and "unet: in_channels 9, not 4" in said and not (tmp_path / "no").exists()


def test_what_was_merged_is_written(tmp_path, capsys):
    a, b, _ = three(tmp_path, layouts=("single-file", "single-file", "diffusers"))
    averaged = load_file(a) | {"model_ema.decay": torch.tensor(0.5)}
    with safe_open(a, "pt") as file:
        save_file(averaged, a, file.metadata())
    merge_models([a, b], tmp_path / "out.safetensors", 0.25)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        notes, names = file.metadata(), file.keys()
    assert "model_ema.decay" not in names  # the average of a training is not one of the merged model
    recipe, models = json.loads(notes["sd_merge_recipe"]), json.loads(notes["sd_merge_models"])
    assert recipe == {
        "type": "plainsd",
        "interp_method": "Weighted sum",
        "multiplier": 0.25,
        "primary_model_hash": file_hash(a),
        "secondary_model_hash": file_hash(b),
    }
    assert models == {file_hash(a): {"name": a.name}, file_hash(b): {"name": b.name}}
    code, told, _ = run(capsys, "info", tmp_path / "out.safetensors")
    assert code == 0 and "Weighted sum" in told
    convert(tmp_path / "out.safetensors", tmp_path / "folder")
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    assert index["_plainsd"]["recipe"] == recipe
    StableDiffusionPipeline.from_pretrained(tmp_path / "folder", safety_checker=None)


def test_one_tensor_at_a_time(tmp_path, monkeypatch):
    """Of what was read from the files, no more than a tensor of each model is in memory at once."""
    paths = three(tmp_path, dtype="float32")
    sizes = [tensor.nbytes for tensor in weights(paths[0]).values()]
    read, living, most = _Pages.read, [], []

    def watched(*arguments):
        tensor = read(*arguments)
        living[:] = [*(ref for ref in living if ref() is not None), weakref.ref(tensor)]
        most.append(sum(ref().nbytes for ref in living))
        return tensor

    monkeypatch.setattr(_Pages, "read", watched)
    merge_models(paths, tmp_path / "out", 0.5, difference=True)
    assert len(most) >= 2 * len(sizes) and max(most) <= 3 * max(sizes) < sum(sizes) / 2


WRONG = {
    "one model": (["{a}"], "1 models to merge"),
    "three without difference": (["{a}", "{b}", "{c}"], "3 models to merge: it takes two models"),
    "two with difference": (["{a}", "{b}", "--difference"], "three models with --difference"),
    "a share above 1": (["{a}", "{b}", "--share", "1.5"], "--share 1.5 is out of range"),
    "no share": (["{a}", "{b}", "--share", "nan"], "--share nan is out of range"),
    "a share of no bounds": (["{a}", "{b}", "{c}", "--difference", "--share", "inf"], "--share inf is out of range"),
    "another family": (["{a}", "{xl}"], "does not match the first model .sd1.: .*take models of one family"),
    "another prediction": (["{a}", "{v}"], "predicts v_prediction, not epsilon"),
    "another kind of noise": (["{v}", "{edm}"], "was trained at all noise levels .EDM., not at a table's noise levels"),
    "a difference of two kinds": (["{a}", "{b}", "{v}", "--difference"], "v predicts v_prediction, not epsilon as B"),
    "other sizes": (["{a}", "{wide}"], "unet: channels .16, 64., not .16, 32."),
    "no model": (["{a}", "nowhere/at/all.safetensors"], "nowhere/at/all.safetensors"),
    "an unknown layout": (["{a}", "{b}", "--layout", "x"], "unknown layout 'x'"),
    "an unknown type": (["{a}", "{b}", "--dtype", "float8"], "unknown dtype 'float8'"),
    "an unknown family": (["{a}", "{b}", "--family", "sd7"], "unknown model family 'sd7'"),
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    a, b, c = three(folder)
    (xl,) = three(folder / "xl", "sdxl-base", ("diffusers",))
    others = {
        "v": {"prediction": "v_prediction"},
        "edm": {"prediction": "v_prediction", "schedule": EDMSchedule(sigma_data=1.0), "spacing": "karras"},
        "wide": {"unet": replace(FAMILIES["sd1"].unet, channels=(16, 64))},
    }
    for name, change in others.items():
        save(tiny_sd(replace(FAMILIES["sd1"], **change)), folder / name)
    return {"a": a, "b": b, "c": c, "xl": xl} | {name: folder / name for name in others}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_merges(zoo, tmp_path, capsys, case):
    arguments, said = WRONG[case]
    code, _, err = run(capsys, "merge", *(text.format(**zoo) for text in arguments), "--out", tmp_path / "out")
    assert code == 2 and err.count("\n") == 1 and re.search(said, err), err
    assert not list(tmp_path.iterdir())


def test_a_difference_may_go_to_a_model_that_predicts_otherwise(zoo, tmp_path):
    """As people gave CosXL what they had taught SDXL."""
    merge_models([zoo["edm"], zoo["b"], zoo["c"]], tmp_path / "out", 1.0, difference=True)
    made, own = (load(path, **CPU) for path in (tmp_path / "out", zoo["edm"]))
    assert made.variant == own.variant and not torch.equal(made.unet.conv_in.weight, own.unet.conv_in.weight)


def test_a_difference_is_of_models_that_read_the_same(tmp_path):
    plain, inpainting = FAMILIES["sd1"], replace(FAMILIES["sd1"], unet=replace(FAMILIES["sd1"].unet, in_channels=9))
    for name, variant in (("a", inpainting), ("b", inpainting), ("c", plain)):
        save(tiny_sd(variant), tmp_path / name)
    for others in ("bc", "cb"):
        with pytest.raises(UserError, match="take the difference of two inpainting models, or of two that are none"):
            merge_models([tmp_path / name for name in "a" + others], tmp_path / "out", 1.0, difference=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["merged", "baked"])
def test_weights_of_8_bits_are_read(tmp_path, what):
    """As ComfyUI's float8 checkpoints have them."""
    sd = tiny_sd()
    save(sd, tmp_path / "b")
    save(sd, tmp_path / "a.safetensors", layout="single-file")
    file = open_tensors(tmp_path / "a.safetensors")
    eight = {name: stored.read() for name, stored in file.tensors.items()}
    eight = {name: t.to(torch.float8_e4m3fn) if "diffusion_model" in name else t for name, t in eight.items()}
    save_file(eight, tmp_path / "a.safetensors", dict(file.metadata))
    if what == "merged":
        merge_models([tmp_path / "a.safetensors", tmp_path / "b"], tmp_path / "out", 0.5, dtype="float32")
    else:
        lora = moved(sd, tmp_path / "l.safetensors")
        convert(
            tmp_path / "a.safetensors", tmp_path / "out", dtype="float32", change=partial(baked, loras=[(lora, 1.0)])
        )
    found, own = load(tmp_path / "out", **CPU), load(tmp_path / "b", **CPU)
    pairs = list(zip(found.unet.parameters(), own.unet.parameters(), strict=True))
    assert all(p.isfinite().all() for p, _ in pairs) and any((p != q).any() for p, q in pairs)


def test_the_same_lora_twice_is_in_the_recipe_twice(tmp_path):
    sd = tiny_sd()
    save(sd, tmp_path / "a")
    lora = moved(sd, tmp_path / "l.safetensors")
    convert(tmp_path / "a", tmp_path / "b", change=partial(baked, loras=[(lora, 0.5), (lora, 0.3)]))
    assert json.loads((tmp_path / "b" / "model_index.json").read_text())["_plainsd"]["recipe"]["loras"] == [
        "l:0.5",
        "l:0.3",
    ]


# --- extracting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (16, 4, 3, 3), (8, 12, 1, 1), (4, 16, 3, 3)])
@pytest.mark.parametrize("rank", [1, 3, 6, 30])
def test_the_best_change_of_a_rank(shape, rank):
    """By torch's own singular values, and padded with zeros where there are fewer."""
    change = randn(*shape)
    adapter, kept = low_rank(change, rank)
    u, s, v = torch.linalg.svd(change.flatten(1), full_matrices=False)
    right = (u[:, :rank] * s[:rank]) @ v[:rank]
    assert kept == pytest.approx(float((s[:rank] ** 2).sum()), rel=1e-12)
    assert adapter.rank == adapter.alpha == rank and adapter.scale == 1
    torch.testing.assert_close(adapter.product(torch.float64), right.reshape(shape), rtol=1e-5, atol=1e-5)  # float32
    nothing, kept = low_rank(torch.zeros(shape, dtype=torch.float64), rank)
    assert kept == 0 and not nothing.product(torch.float64).any()


@pytest.mark.parametrize("variant", [TINY, TINY_XL], ids=["sd", "xl"])
@pytest.mark.parametrize("naming", ["kohya", "peft", "diffusers"])
def test_what_a_lora_changed_comes_out_again(tmp_path, capsys, variant, naming):
    """A LoRA of rank 3 is baked in, and extracted at rank 4: nothing is lost."""
    sd = tiny_sd(variant)
    save(sd, tmp_path / "base")
    lora = moved(sd, tmp_path / "a.safetensors")
    convert(tmp_path / "base", tmp_path / "tuned", change=lambda contents: baked(contents, [(lora, 1.0)]))
    arguments = [tmp_path / "tuned", tmp_path / "base", "--rank", 4, "--out", tmp_path / "b.safetensors"]
    code, told, _ = run(capsys, "extract-lora", *arguments, "--dtype", "float32", "--naming", naming)
    assert code == 0
    lines = told.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == ["unet", "text_encoder", "text_encoder_2"][: len(lines) - 1]
    assert len(lines) == 2 + len(variant.text) and all(
        ": 100.0% of the difference's norm" in line for line in lines[:-1]
    )
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert "rank 4 of tuned less base" in file.metadata()["ss_training_comment"]
    bare = ours(sd)
    add_lora(sd, tmp_path / "b.safetensors")
    same(ours(sd), ours(load(tmp_path / "tuned", **CPU)), 1e-4)
    differ(ours(sd), bare, 1e-2)


def test_how_much_is_kept(tmp_path, capsys):
    """All weights moved: the share that is printed is that of the norms, by singular values over every layer."""
    sd = tiny_sd()
    save(sd, tmp_path / "base")
    with torch.no_grad():
        for number, parameter in enumerate(sd.unet.parameters()):
            parameter += 0.01 * randn(*parameter.shape, seed=number).float()
    save(sd, tmp_path / "tuned")
    shares = extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "a.safetensors", 4)
    whole = kept = beside = 0.0
    before = tiny_sd().unet.state_dict()
    for name, tensor in sd.unet.state_dict().items():
        change = tensor.double() - before[name].double()
        whole += float(change.square().sum())
        if change.ndim > 1:
            kept += float(torch.linalg.svdvals(change.flatten(1))[:4].square().sum())
        else:
            beside += float(change.square().sum())
    share = shares["unet"]
    assert shares.keys() == {"unet"}  # the text encoder is the same
    assert (share.whole, share.kept, share.beside) == pytest.approx((whole, kept, beside), rel=1e-6)
    assert str(share).startswith(f"{(kept / whole) ** 0.5:.1%} of the difference's norm in ")
    assert f"{(beside / whole) ** 0.5:.1%} in {len(share.others)} norms, biases and embeddings" in str(share)
    tensors = load_file(tmp_path / "a.safetensors")
    assert {t.dtype for name, t in tensors.items() if not name.endswith("alpha")} == {torch.float16}
    assert any(t.ndim == 4 and t.shape[2:] == (3, 3) for t in tensors.values())
    more = extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "b.safetensors", 16)["unet"]
    assert more.kept > share.kept


@pytest.mark.parametrize("name", ["sd", "xl"])
def test_diffusers_reads_what_was_extracted(tmp_path, name):
    xl = name == "xl"
    sd = tiny_sd(TINY_XL if xl else TINY).to(dtype=torch.float64)
    save(sd, tmp_path / "base")
    for network in (sd.unet, *sd.text_encoders):
        for number, (key, parameter) in enumerate(network.named_parameters()):
            if "attn" in key and parameter.ndim > 1:
                parameter.data += 0.05 * randn(*parameter.shape, seed=number)
    save(sd, tmp_path / "tuned")
    extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "a.safetensors", 4, dtype=torch.float32)
    kind, unsafe = (StableDiffusionXLPipeline, {}) if xl else (StableDiffusionPipeline, {"safety_checker": None})
    pipe = kind.from_pretrained(tmp_path / "base", dtype=torch.float64, **unsafe)
    bare = theirs(pipe)
    pipe.load_lora_weights(tmp_path / "a.safetensors")
    mine = load(tmp_path / "base", device="cpu", dtype=torch.float64)
    add_lora(mine, tmp_path / "a.safetensors")
    same(ours(mine), theirs(pipe), 1e-11)
    differ(theirs(pipe), bare)


def test_wrong_extractions(zoo, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, said in (
        ([zoo["a"], zoo["a"], "--rank", 4], "do not differ in any layer"),
        ([zoo["a"], zoo["xl"], "--rank", 4], "does not match the first model"),
        ([zoo["a"], zoo["b"], "--rank", 0], "--rank 0 is out of range"),
        ([zoo["a"], zoo["b"], "--rank", 4, "--out", "x.bin"], "give it that ending"),
        ([zoo["a"], zoo["a"], "--rank", 4, "--out", "x.bin"], "give it that ending"),  # before the models are compared
    ):
        code, _, err = run(capsys, "extract-lora", *arguments)
        assert code == 2 and said in err and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())
    for base in ("a", "v"):  # what they predict does not matter
        assert run(capsys, "extract-lora", zoo["b"], zoo[base], "--rank", 2)[1].endswith("\n1-lora.safetensors\n")
        Path("1-lora.safetensors").unlink()


def test_the_files_of_a_variant(tmp_path, capsys):
    (a, a_alone), (b, b_alone) = with_variant(tmp_path), with_variant(tmp_path, 1)
    of_these = ("--variant-file", "fp16")
    assert run(capsys, "merge", a, b, "--share", 0.25, "--out", tmp_path / "ours", *of_these)[0] == 0
    merge_models([a_alone, b_alone], tmp_path / "wanted", 0.25)
    assert same_tensors(weights(tmp_path / "ours"), weights(tmp_path / "wanted"))
    ours, wanted = tmp_path / "ours.safetensors", tmp_path / "wanted.safetensors"
    assert run(capsys, "extract-lora", b, a, "--rank", 2, "--out", ours, *of_these)[0] == 0
    extract_lora(b_alone, a_alone, wanted, 2)
    assert same_tensors(load_file(ours), load_file(wanted))
