"""`plainsd train` from the command line: what each method leaves behind, and how it fails."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import warnings
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, noise_picture, tiny_sd
from diffusers import DiffusionPipeline
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file
from test_finetune import write_pictures
from torch.utils.checkpoint import checkpoint
from tyro.conf import FlagCreatePairsOff
from tyro.extras import get_parser

import plainsd
from plainsd.adapters.embeddings import add_embedding, vectors_of
from plainsd.adapters.lora import add_lora, save_lora
from plainsd.arguments import number_registry
from plainsd.checkpoint import load_vae, save_vae
from plainsd.cli import main
from plainsd.commands.parsing import parsed
from plainsd.commands.train import Train
from plainsd.disk import read_json
from plainsd.generate import final, text_to_image
from plainsd.models.control import ControlConfig, ControlNet
from plainsd.models.vae import VAE
from plainsd.pictures.images import grid, read_settings
from plainsd.server.embeddings import Embeddings
from plainsd.train.checkpoints import checkpoints
from plainsd.train.checks import (
    METHODS_OF,
    OPTION_RANGES,
    check_methods,
    check_together,
    each_option,
    without_effect,
)
from plainsd.train.claim import locked
from plainsd.train.config import config_text, with_config
from plainsd.train.data.examples import Examples
from plainsd.train.data.latents import cache_latents
from plainsd.train.data.pictures import read_pictures
from plainsd.train.from_scratch import size_around
from plainsd.train.log import read_log
from plainsd.train.loop import fit
from plainsd.train.methods.lora import lora
from plainsd.train.methods.vae import measure_scaling
from plainsd.train.objective import Objective
from plainsd.train.options import METHOD_DEFAULTS, FitOptions, Steps, TrainOptions, with_defaults, with_loss_defaults
from plainsd.train.order import Repeated
from plainsd.train.processes import World
from plainsd.train.run import Look
from plainsd.train.trainer import Trainer

FAST = ["--device", "cpu", "--dtype", "float32", "--log-every", "1", "--save-dtype", "float32"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "base"
    plainsd.save(tiny_sd(), folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures", count=4)


@pytest.fixture
def train(base, pictures, tmp_path, capsys):
    """Runs the command with a few usual options; the exit code, and what stands on stderr beside the bars."""

    def run(method, *more, base=base, out=tmp_path / "run"):
        code = main(
            ["train", "--method", method, "--base", str(base), "--data", str(pictures), "--out", str(out), *FAST, *more]
        )
        lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
        return code, [line for line in lines if line.startswith("plainsd:")]

    return run


def drawn(sd, prompt="colour 1"):
    return np.asarray(final(text_to_image(sd, prompt, seed=3, steps=2))[0], dtype=float)


def farthest(one, other) -> float:
    """How far any number of a network is from that of another."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def test_full(train, base, pictures, tmp_path):
    (tmp_path / "prompts.txt").write_text("colour 1\ncolour 2\n")
    code, _ = train(
        "full",
        "--epochs",
        "2",
        "--lr",
        "1e-3",
        "--heldout",
        str(pictures),
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--validate-every",
        "1",
        "--sample-every",
        "1",
        "--flip",
        "--crop",
        "random",
        "--text-encoder",
    )
    assert code == 0
    lines = read_log(tmp_path / "run" / "log.jsonl")
    assert [line["step"] for line in lines if "validation" in line] == [0, 1, 2]  # 2 epochs of 4 pictures, 4 a step
    assert lines[-1]["validation"] < lines[0]["validation"]
    assert [p.name for p in sorted((tmp_path / "run" / "samples").iterdir())] == [f"step-{i:08d}.png" for i in range(3)]
    assert (tmp_path / "run" / "curve.png").is_file()
    trained, before = (plainsd.load(path, device="cpu", dtype="float32") for path in (tmp_path / "run" / "run", base))
    for one, other in ((trained.unet, before.unet), (trained.text_encoders[0], before.text_encoders[0])):
        assert 0.5e-3 < farthest(one, other) < 2.2e-3  # two steps of AdamW, each of about the learning rate
    assert torch.equal(trained.vae.quant.weight, before.vae.quant.weight)


def test_another_autoencoder_than_the_bases_own(train, base, tmp_path):
    """Latents are made by it, and it is the finished model's."""
    other = tiny_sd(seed=1)
    plainsd.save(other, tmp_path / "whole.safetensors")
    code, _ = train("full", "--steps", "1", "--vae", str(tmp_path / "whole.safetensors"))
    assert code == 0
    trained = plainsd.load(tmp_path / "run" / "run", device="cpu", dtype="float32")
    assert all(torch.equal(trained.vae.state_dict()[name], t) for name, t in other.vae.state_dict().items())
    code, errors = train("full", "--steps", "2")
    assert code == 2 and "holds a run with another --vae" in errors[0]
    code, errors = train("full", "--vae", "nowhere", out=tmp_path / "none")
    assert code == 2 and errors == [line for line in errors if "there is no model at 'nowhere'" in line]


def test_diffusers_draws_with_a_trained_model_that_it_is_told_nothing_of(train, tmp_path):
    code, _ = train("full", "--steps", "1", "--save-dtype", "float16")
    assert code == 0
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run" / "run")
    assert pipe("colour 1", num_inference_steps=1, output_type="latent").images.isfinite().all()


def test_lora(train, base, tmp_path):
    code, _ = train(
        "lora",
        "--steps",
        "2",
        "--lr",
        "1e-2",
        "--rank",
        "2",
        "--alpha",
        "4",
        "--checkpointing",
        "--hold-out",
        "0.3",
        "--tensorboard",
        "--buckets",
        "--min-snr",
        "5",
        "--huber",
        "0.5",
    )
    assert code == 0
    kohya, peft = (plainsd.load(base, device="cpu") for _ in range(2))
    add_lora(kohya, tmp_path / "run" / "run.safetensors")
    add_lora(peft, tmp_path / "run" / "run-peft.safetensors")
    assert np.array_equal(drawn(kohya), drawn(peft))
    ups = [tensor for name, tensor in load_file(tmp_path / "run" / "run.safetensors").items() if "lora_up" in name]
    assert 0.5e-2 < max(up.abs().max() for up in ups) < 2.2e-2  # from zero, in two steps of about the learning rate
    assert np.abs(drawn(kohya) - drawn(plainsd.load(base, device="cpu"))).max() >= 2
    assert any(p.name.startswith("events.") for p in (tmp_path / "run" / "tensorboard").iterdir())
    assert len([line for line in read_log(tmp_path / "run" / "log.jsonl") if "validation" in line]) == 2


@pytest.mark.parametrize("method", ["lora", "vae"])
def test_pixels_that_are_no_whole_latents_are_refused(train, tmp_path, method):
    code, lines = train(method, "--steps", "1", "--size", "21")
    assert code == 2 and lines == ["plainsd: --size 21 is no multiple of 8, the pixels of one latent; take 16 or 24"]


@pytest.mark.parametrize("kind", [["loha"], ["lokr", "--factor", "4"]], ids=["loha", "lokr"])
def test_lycoris(train, base, tmp_path, kind):
    """Trained, stopped and resumed as a LoRA is; one file, for diffusers reads no other kind than LoRA."""
    more = ["--kind", *kind, "--rank", "2", "--lr", "1e-2", "--conv", "--text-encoder", "--save-dtype", "float32"]
    assert train("lora", "--steps", "2", *more)[0] == 0
    assert train("lora", "--steps", "3", *more)[0] == 0
    assert train("lora", "--steps", "3", *more, out=tmp_path / "straight")[0] == 0
    longer, straight = (load_file(tmp_path / run / f"{run}.safetensors") for run in ("run", "straight"))
    assert longer.keys() == straight.keys() and all(torch.equal(longer[name], straight[name]) for name in longer)
    assert any(("hada_w1_a" if kind == ["loha"] else "lokr_w1") in name for name in longer)
    assert not (tmp_path / "run" / "run-peft.safetensors").exists()
    sd = plainsd.load(base, device="cpu")
    add_lora(sd, tmp_path / "run" / "run.safetensors")
    assert not np.array_equal(drawn(sd), drawn(plainsd.load(base, device="cpu")))
    code, said = train("lora", "--steps", "3", *more, "--alpha", "1")
    assert code == 2 and "another --alpha" in said[0]
    code, said = train("lora", "--steps", "1", "--factor", "0", out=tmp_path / "wrong")
    assert code == 2 and "factor 0 for a lora" in said[0]


def test_the_seed_is_that_of_first_weights_order_and_noise(train, base, pictures, tmp_path):
    """At no learning rate to speak of, what is saved is what the run began with, and its losses are those of `fit`."""
    losses = {}
    for seed in (0, 5):
        out, sd = tmp_path / str(seed), plainsd.load(base, device="cpu", dtype="float32")
        options = ["--steps", "2", "--batch", "2", "--accumulate", "1", "--lr", "1e-30", "--seed", str(seed)]
        assert train("lora", *options, out=out)[0] == 0
        data = read_pictures(pictures, 64)
        method = lora(sd, Examples(data, cache_latents(sd.vae, data, tmp_path / "cache")), seed=seed)
        fitted = fit(method, Repeated([1] * 4, seed), FitOptions(steps=2, batch=2, lr=1e-30, seed=seed))
        losses[seed] = [report.loss for report in fitted]
        assert [line["loss"] for line in read_log(out / "log.jsonl")] == pytest.approx(losses[seed], rel=1e-4)
        save_lora(sd, tmp_path / f"{seed}.safetensors")
        saved, expected = load_file(out / f"{seed}.safetensors"), load_file(tmp_path / f"{seed}.safetensors")
        assert all(torch.allclose(saved[name], expected[name], rtol=1e-6, atol=1e-12) for name in expected)

        options += ["--token", "colour", "--vectors", "2"]
        assert train("inversion", *options, out=tmp_path / f"word-{seed}")[0] == 0
        noise = torch.randn(2, 32, generator=torch.Generator().manual_seed(seed))
        expected = noise * sd.text_encoders[0].token.weight.std()
        rows = load_file(tmp_path / f"word-{seed}" / "colour.safetensors")["emb_params"]
        torch.testing.assert_close(rows, expected.detach(), rtol=1e-5, atol=1e-7)
    assert abs(losses[0][0] - losses[5][0]) > 1e-2 * losses[0][0]


@pytest.mark.parametrize("drawing", [False, True])
def test_the_autoencoder_is_let_go_where_nothing_is_drawn(train, pictures, tmp_path, monkeypatch, drawing):
    seen = []
    monkeypatch.setattr(
        "plainsd.train.from_model.lora", lambda sd, *rest, **more: seen.append(sd) or lora(sd, *rest, **more)
    )
    (tmp_path / "prompts.txt").write_text("colour 1\n")
    more = ["--prompts", str(tmp_path / "prompts.txt")] if drawing else []
    assert train("lora", "--steps", "1", "--heldout", str(pictures), *more)[0] == 0
    (sd,) = seen
    assert {weight.is_meta for weight in sd.vae.parameters()} == {not drawing}
    assert not any(weight.is_meta for weight in sd.unet.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_lora_on_half_a_base(train, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("plainsd.device.bfloat16_pays", lambda: False)
    (tmp_path / "prompts.txt").write_text("colour 1\n")
    code, said = train("lora", "--steps", "2", "--half-base")  # --dtype float32, see FAST
    assert code == 2 and "goes with --dtype bfloat16" in said[0]
    code, _ = train("lora", "--steps", "2", "--half-base", "--dtype", dtype, "--prompts", str(tmp_path / "prompts.txt"))
    assert code == 0 and (tmp_path / "run" / "run.safetensors").is_file()
    assert (tmp_path / "run" / "samples" / "step-00000002.png").is_file()


def test_inversion(train, base, pictures, tmp_path):
    assert train("inversion", "--steps", "1", "--token", "<cat>")[1][0].startswith(
        "plainsd: 4 of 4 captions do not have the word '<cat>'"
    )
    assert train("inversion", "--steps", "1")[1] == [
        "plainsd: method inversion needs --token, the new word that the captions use, such as '<cat>'"
    ]
    code, _ = train(
        "inversion",
        "--steps",
        "2",
        "--lr",
        "0.1",
        "--token",
        "colour",
        "--vectors",
        "2",
        "--initial",
        "x",
        out=tmp_path / "other",
    )
    assert code == 0
    for name in ("colour.safetensors", "learned_embeds.safetensors"):
        sd = plainsd.load(base, device="cpu")
        assert add_embedding(sd, tmp_path / "other" / name, "colour") == "colour"
        assert sd.text_encoders[0].config.vocab == TINY.text[0].vocab + 2
        first = sd.text_encoders[0].token.weight[sd.tokenizers[0].encode("x")].float()  # where the vectors began
        assert 0.05 < (vectors_of(sd, "colour")[0].float() - first).abs().max() < 0.22  # two steps of 0.1 at most


def test_a_learned_word_is_used_without_being_told(base, tmp_path, capsys):
    """By the command line and by the server, from the file of either dialect."""
    (tmp_path / "pictures").mkdir()
    noise_picture(16, 16).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "a.txt").write_text("a <stri/py> thing")
    shared = ["--base", str(base), "--data", str(tmp_path / "pictures"), "--out", str(tmp_path / "run"), *FAST]
    more = ["--steps", "1", "--lr", "0.5", "--token", "<stri/py>"]
    assert main(["train", "--method", "inversion", *shared, *more]) == 0
    assert "stri-py.safetensors for A1111, which calls it stri-py; learned_embeds" in capsys.readouterr().out
    draw = ["generate", "a <stri/py> cat", "--model", str(base), "--device", "cpu", "--dtype", "float32"]
    pixels = []
    for name in ("stri-py.safetensors", "learned_embeds.safetensors"):
        file = tmp_path / "run" / name
        assert main(["info", str(file)]) == 0
        assert "  the word        <stri/py>\n" in capsys.readouterr().out
        assert main([*draw, "--embedding", str(file), "--out", str(tmp_path / f"{name}.png")]) == 0
        assert read_settings(tmp_path / f"{name}.png").embeddings == ("<stri/py>",)
        pixels.append(np.asarray(Image.open(tmp_path / f"{name}.png"), dtype=int))
        capsys.readouterr()
    assert main([*draw, "--out", str(tmp_path / "plain.png")]) == 0
    plain = np.asarray(Image.open(tmp_path / "plain.png"), dtype=int)
    assert np.array_equal(*pixels) and np.abs(pixels[0] - plain).max() > 5
    (tmp_path / "run" / "learned_embeds.safetensors").unlink()
    assert [(word.text, word.name) for word in Embeddings(tmp_path / "run").known()] == [("<stri/py>", "stri-py")]


def test_dreambooth_makes_its_prior(train, tmp_path):
    code, _ = train(
        "lora", "--steps", "1", "--rank", "1", "--prior-prompt", "a dog", "--prior-count", "3", "--prior-weight", "0.5"
    )
    assert code == 0
    assert sorted(p.name for p in (tmp_path / "run" / "prior").iterdir()) == [
        *(f"{i:05d}.{ending}" for i in range(3) for ending in ("png", "txt")),
        "prior.json",
    ]
    (line,) = read_log(tmp_path / "run" / "log.jsonl")
    assert line["loss"] == pytest.approx(line["own"] + 0.5 * line["prior"])


@pytest.mark.parametrize("own", [False, True], ids=["out", "prior"])
def test_a_prior_set_that_was_cut_short_goes_on_as_the_same_or_not_at_all(train, tmp_path, monkeypatch, own):
    folder = tmp_path / ("dogs" if own else "run/prior")
    flags = ["--steps", "1", "--rank", "1", *(["--prior", str(folder)] if own else []), "--prior-prompt"]

    def cut_short(*_, seed, **__):
        if seed:
            raise KeyboardInterrupt
        return [[Image.new("RGB", (64, 64))] * 4]

    with monkeypatch.context() as patched:
        patched.setattr("plainsd.train.methods.dreambooth.text_to_image", cut_short)
        patched.setattr("plainsd.train.methods.dreambooth.final", lambda events: events[0])
        assert train("lora", *flags, "a dog", "--prior-count", "6")[0] == 130
    assert len(list(folder.glob("*.png"))) == 4
    for more, says in (
        (["a cat", "--prior-count", "6"], "another --prior-prompt ('a dog', now 'a cat'); remove it, or give another"),
        (["a dog", "--prior-count", "5"], "another --prior-count (6, now 5)"),
        (["a dog", "--prior-count", "6", "--size", "32"], "another --size (64, now 32)"),
        (["a dog", "--prior-count", "6", "--half-base", "--dtype", "bfloat16"], "a model with other weights"),
    ):
        code, said = train("lora", *flags, *more)
        assert code == 2 and f"{folder} holds a prior set of {says}" in said[0]
    assert train("lora", *flags, "a dog", "--prior-count", "6") == (0, [])
    assert len(list(folder.glob("*.png"))) == 6
    (folder / "prior.json").write_text("{")
    code, said = train("lora", *flags, "a dog", "--prior-count", "6", out=tmp_path / "run")
    assert code == 2 and "remove the folder, and the pictures are made again" in said[0]


def test_a_given_prior_set_is_whole(train, tmp_path):
    folder = tmp_path / "dogs"
    folder.mkdir()
    (folder / "prior.json").write_text('{"prompt": "a dog", "count": 3, "size": 64}')
    for number in range(3):
        Image.new("RGB", (64, 64)).save(folder / f"{number:05d}.png")
        (folder / f"{number:05d}.txt").write_text("a dog")
    flags = ["--steps", "1", "--rank", "1", "--prior", str(folder)]
    assert train("lora", *flags, out=tmp_path / "whole") == (0, [])
    (folder / "00001.png").write_bytes(b"")
    assert "more than 1% (first: 00001.png" in train("lora", *flags, out=tmp_path / "broken")[1][0]
    assert train("lora", *flags, "--bad-share", "0.5", out=tmp_path / "broken")[0] == 0
    (folder / "00002.txt").unlink()
    code, said = train("lora", *flags)
    assert (
        code == 2 and f"{folder} has 2 of the 3 pictures of 'a dog' that were to be made; give --prior-pro" in said[0]
    )
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize(
    "method, flags, says",
    [
        ("lora", ["--targets", "blocks.9*"], "no module of the model fits the LoRA targets 'blocks.9*'"),
        ("lora", ["--targets", "attentoin"], "unknown LoRA targets 'attentoin'; did you mean 'attention'"),
        ("lora", ["--alpha", "0"], "alpha above 0"),
        ("lora", ["--factor", "8"], "it is for lokr alone"),
        ("inversion", ["--token", "square"], "captions do not have the word 'square'"),
        ("inversion", ["--token", "colo"], "4 of 4 captions do not have the word 'colo'"),  # a part of another word
        ("inversion", ["--token", "o"], "the vocabulary has 'o' already"),
        ("inversion", ["--token", "colour", "--initial", ""], "is empty; give one such as 'cat'"),
        ("inversion", ["--token", "colour", "--vectors", "76"], "has 76 vectors"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, list) else None,
)
def test_what_does_not_fit_is_said_before_a_prior_set_is_made(train, tmp_path, method, flags, says):
    code, said = train(method, "--steps", "1", *flags, "--prior-prompt", "a dog", "--prior-count", "1")
    assert code == 2 and says in said[0] and not (tmp_path / "run" / "prior").exists()


def test_vae_and_scratch(pictures, base, tmp_path, capsys):
    model = {
        "name": "tiny",
        "size": 16,
        "vae": {"channels": [8, 8], "layers": 1, "groups": 2},
        "unet": {"channels": [32, 32], "depth": [0, 1], "heads": [2, 2], "layers": 1, "context": 16},
        "text": [{"width": 16, "layers": 1, "heads": 2, "mlp": 32, "positions": 3}],
    }
    (tmp_path / "model.json").write_text(json.dumps(model))
    shared = [
        "--model",
        str(tmp_path / "model.json"),
        "--data",
        str(pictures),
        "--heldout",
        str(pictures),
        "--steps",
        "2",
        "--batch",
        "2",
        *FAST,
    ]
    assert main(["train", "--method", "vae", "--out", str(tmp_path / "no"), *shared, "--latent-noise", "-1"]) == 2
    assert "--latent-noise -1 is out of range; give 0 or more" in capsys.readouterr().err
    noisy = ["train", "--method", "vae", "--out", str(tmp_path / "noisy"), *shared, "--latent-noise", "0.5"]
    assert main(noisy) == 0
    assert main(["train", "--method", "vae", "--out", str(tmp_path / "vae"), *shared]) == 0
    same = [read_log(tmp_path / run / "log.jsonl")[0]["kl"] for run in ("vae", "noisy")]
    first = [read_log(tmp_path / run / "log.jsonl")[0]["l1"] for run in ("vae", "noisy")]
    assert same[0] == pytest.approx(same[1], rel=1e-3) and first[0] != first[1]  # the decoder reads other latents
    assert (
        main(
            [
                "train",
                "--method",
                "scratch",
                "--out",
                str(tmp_path / "run"),
                "--vae",
                str(tmp_path / "vae" / "vae"),
                "--tokenizer",
                str(base / "tokenizer"),
                "--carry",
                str(tmp_path / "model.json"),
                *shared,
            ]
        )
        == 0
    )
    assert "4 of 4 captions are longer than what is read of them (1 tokens)" in capsys.readouterr().out
    assert drawn(plainsd.load(tmp_path / "run" / "run", device="cpu")).shape == (16, 16, 3)
    assert (tmp_path / "run" / "run" / "model.json").is_file()
    assert read_log(tmp_path / "vae" / "log.jsonl")[-1].keys() >= {"psnr", "step"}


def test_vae_goes_on_from_a_base(train, base, pictures, tmp_path):
    """With --decoder-only its latents are, to the last bit, those that the UNet knows."""
    shared = ["--steps", "2", "--batch", "2", "--lr", "1e-2"]
    assert train("vae", *shared, "--size", "16", "--decoder-only", out=tmp_path / "decoder")[0] == 0
    assert train("vae", *shared, "--size", "16", out=tmp_path / "both")[0] == 0
    before = load_vae(base, device="cpu", dtype="float32")
    decoder, both = (load_vae(tmp_path / name / "vae", device="cpu", dtype="float32") for name in ("decoder", "both"))
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = before.encode(pixels).mean
    assert torch.equal(decoder.encode(pixels).mean, latents) and decoder.config == before.config
    two = 1e-2 * (1 / 200 + 2 / 200)  # steps of AdamW, each of about the learning rate, which warms up
    for part, found in (("decoder", decoder.decoder), ("decoder", both.decoder), ("encoder", both.encoder)):
        assert 0.5 * two < farthest(found, getattr(before, part)) < 1.1 * two
    assert both.config.scaling_factor == pytest.approx(measure_scaling(both, read_pictures(pictures, 16)), rel=1e-4)
    assert abs(both.config.scaling_factor / before.config.scaling_factor - 1) > 0.01
    code, said = train("vae", "--steps", "2", "--base", str(tmp_path / "both" / "vae"), out=tmp_path / "both")
    assert code == 2 and "holds a run with" in said[0]
    shapes = described(base)
    shapes["vae"] |= {"channels": [8, 8, 16, 32]}
    (tmp_path / "model.json").write_text(json.dumps(shapes))
    code, said = train("vae", "--steps", "2", "--model", str(tmp_path / "model.json"), out=tmp_path / "other")
    assert code == 2 and "has other sizes than" in said[0] and not (tmp_path / "other" / "vae").exists()


def test_an_autoencoder_is_trained_at_its_models_size(train, base, tmp_path):
    assert train("vae", "--steps", "1", "--batch", "1") == (0, [])
    assert read_json(tmp_path / "run" / "vae" / "config.json")["sample_size"] == 64
    whole = tmp_path / "whole.safetensors"
    plainsd.save(tiny_sd(), whole)
    assert [size_around(str(path), 8) for path in (base, whole, tmp_path / "run" / "vae")] == [64, 64, 64]
    alone = tmp_path / "vae"
    shutil.copytree(base / "vae", alone)
    config = read_json(alone / "config.json")
    (alone / "config.json").write_text(json.dumps(config | {"sample_size": 96}))
    assert size_around(str(alone), 8) == 96
    (alone / "config.json").write_text(json.dumps({name: config[name] for name in config if name != "sample_size"}))
    for path in (alone, alone / "diffusion_pytorch_model.safetensors"):
        with pytest.raises(plainsd.UserError, match="does not say how large its pictures are; give --size"):
            size_around(str(path), 8)
    code, said = train("vae", "--steps", "1", "--base", str(alone), out=tmp_path / "none")
    assert code == 2 and "give --size" in said[0] and not (tmp_path / "none").exists()


def described(base) -> dict:
    """The model as --model is told it."""
    variant = asdict(plainsd.load(base, device="cpu", dtype="float32").variant)
    return {"name": "tiny"} | {name: variant[name] for name in ("unet", "vae", "text", "size")}


def test_decoder_only_needs_a_base(pictures, tmp_path, capsys):
    assert main(["train", "--method", "vae", "--data", str(pictures), "--out", str(tmp_path), "--decoder-only"]) == 2
    assert "it needs --base" in capsys.readouterr().err


def test_scratch_goes_on_from_a_base(train, base, tmp_path):
    """The first weights are the base's; other sizes, and another autoencoder at the same place, are refused."""
    shapes = described(base)
    (tmp_path / "model.json").write_text(json.dumps(shapes))
    shutil.copytree(base / "vae", tmp_path / "vae")
    more = [
        "--model",
        str(tmp_path / "model.json"),
        "--vae",
        str(tmp_path / "vae"),
        "--tokenizer",
        str(base / "tokenizer"),
        "--batch",
        "2",
    ]
    assert train("scratch", "--steps", "1", "--lr", "1e-9", *more) == (0, [])
    after, before = (plainsd.load(path, device="cpu", dtype="float32") for path in (tmp_path / "run" / "run", base))
    for a, b in zip((after.unet, *after.text_encoders), (before.unet, *before.text_encoders), strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-7)
    vae = load_vae(base, device="cpu", dtype="float32")
    torch.nn.init.ones_(vae.quant.bias)
    save_vae(vae, tmp_path / "vae", before.variant)
    code, said = train("scratch", "--steps", "1", "--lr", "1e-9", *more)
    assert code == 2 and "a model with other weights" in said[0]
    code, said = train("scratch", "--steps", "1", *more, "--carry", "nowhere.json", out=tmp_path / "bare")
    assert code == 2 and "--carry nowhere.json: there is no such file" in said[0] and not (tmp_path / "bare").exists()
    shapes["unet"] |= {"channels": [64, 32]}
    (tmp_path / "model.json").write_text(json.dumps(shapes))
    code, said = train("scratch", "--steps", "1", *more, out=tmp_path / "other")
    assert (
        code == 2 and "has other networks than --model describes: conv_in.bias is (32,), and should be (64,)" in said[0]
    )


def test_a_description_that_was_edited_is_another_model(train, base, tmp_path):
    """A run of an older version, which did not write these down, goes on."""
    shapes, file = described(base), tmp_path / "model.json"
    file.write_text(json.dumps(shapes))
    given = {"--model": file, "--vae": base / "vae", "--tokenizer": base / "tokenizer", "--batch": 2, "--steps": 1}
    more = [str(text) for pair in given.items() for text in pair]
    assert train("scratch", *more) == (0, [])
    for other, what in (
        ({"prediction": "v_prediction"}, "another prediction (epsilon, now v_prediction)"),
        ({"schedule": {"beta_end": 0.02}}, "another noise schedule"),
        ({"size": 128}, "another size (64, now 128)"),
    ):
        file.write_text(json.dumps(shapes | other))
        code, said = train("scratch", *more)
        assert code == 2 and len(said) == 1 and f"holds a run with a model of {what}" in said[0]
    options = tmp_path / "run" / "options.json"
    known = read_json(options)
    for name in ("model_prediction", "model_schedule", "model_size"):
        known.pop(name)
    options.write_text(json.dumps(known))
    file.write_text(json.dumps(shapes))
    assert train("scratch", *more) == (0, []) and "model_schedule" in read_json(options)


def test_an_older_run_may_have_options_that_did_nothing(train, tmp_path):
    assert train("vae", "--steps", "1", "--batch", "2") == (0, [])
    options = tmp_path / "run" / "options.json"
    known = read_json(options)
    assert (known["dropout"], known["huber"], known["prior_count"]) == ("None", "None", "200")
    options.write_text(json.dumps(known | {"dropout": "0.1", "huber": "-3", "patch_after": "99", "places": "9"}))
    assert train("vae", "--steps", "1", "--batch", "2") == (0, [])


def test_what_lies_where_an_autoencoder_is_to_be_written_is_told_at_once(train, tmp_path):
    (tmp_path / "run" / "vae").mkdir(parents=True)
    (tmp_path / "run" / "vae" / "notes.txt").write_text("mine")
    code, said = train("vae", "--steps", "1", "--batch", "2")
    assert code == 2 and "vae is in the way: the result is to be written there" in said[0]
    assert train("vae", "--steps", "1", "--batch", "2", out=tmp_path / "vae") == (0, [])
    assert train("vae", "--steps", "1", "--batch", "2", out=tmp_path / "vae") == (0, [])


@pytest.mark.parametrize("method", ["lora", "scratch"])
def test_prompts_that_cannot_be_drawn_are_refused_before_training(train, base, tmp_path, method):
    (tmp_path / "model.json").write_text(json.dumps(described(base)))
    (tmp_path / "prompts.txt").write_text("a cat\na cat <lora:ink:1>\n")
    given = {"--model": tmp_path / "model.json", "--vae": base / "vae", "--tokenizer": base / "tokenizer"}
    more = [str(text) for pair in given.items() for text in pair] if method == "scratch" else []
    code, said = train(method, "--steps", "1", "--batch", "2", "--prompts", str(tmp_path / "prompts.txt"), *more)
    assert code == 2 and "<lora:ink> in the prompt" in said[0]
    assert not (tmp_path / "run" / "log.jsonl").exists() and not (tmp_path / "run" / "run.toml").exists()


@pytest.fixture
def nothing_long(monkeypatch):
    """A run may encode no pictures and draw no prior set."""
    for name in ("data.run_data.cache_latents", "from_model.make_prior"):
        monkeypatch.setattr(f"plainsd.train.{name}", lambda *_, **__: pytest.fail("it is too late"))


LATE = {
    "prompts": ("lora", ["--prompts", "nosuch.txt"], "cannot read the prompts in 'nosuch.txt'"),
    "control": ("controlnet", ["--control", "nosuch.safetensors"], "there is no model at 'nosuch.safetensors'"),
    "another control": ("controlnet", ["--control", "OTHER"], "the ControlNet to go on from does not fit the model"),
    "tensorboard": ("lora", ["--tensorboard"], "TensorBoard is not installed; pip install"),
    "torchao": ("full", ["--adam8bit"], "8-bit AdamW needs torchao; pip install torchao"),
    "loss": ("lora", ["--huber", "-1"], "huber -1"),
    "teacher": ("full", ["--distill", "4", "--distill-steps", "30"], "distill_steps 30 does not divide the 1000"),
    "prior": ("lora", ["--prior", "nowhere"], "no folder 'nowhere'; give --prior-prompt"),
    "base": (
        "inversion",
        ["--token", "colour", "--base", "INPAINTING"],
        "reads a mask or a picture beside the latents",
    ),
}


@pytest.mark.parametrize("what", LATE)
def test_what_is_wrong_is_said_before_anything_takes_long(train, base, tmp_path, monkeypatch, nothing_long, what):
    method, flags, says = LATE[what]
    if what == "tensorboard":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    if what == "torchao":
        monkeypatch.setattr("plainsd.train.optimizer.check_can_compile", lambda *_: None)
        monkeypatch.setitem(sys.modules, "torchao.optim", None)
    places = {"OTHER": tmp_path / "other", "INPAINTING": tmp_path / "inpainting"}
    if what == "another control":
        narrow = replace(plainsd.load(base, device="cpu").unet.config, channels=(32, 32))
        plainsd.save_control(ControlNet(ControlConfig(narrow, (4, 4, 8, 8))), places["OTHER"])
    if what == "base":
        plainsd.save(tiny_sd(in_channels=9), places["INPAINTING"])
    code, said = train(method, "--steps", "1", *(str(places.get(flag, flag)) for flag in flags))
    assert code == 2 and len(said) == 1 and says in said[0]


@pytest.mark.parametrize("method", ["vae", "scratch"])
def test_so_it_is_from_scratch(train, base, tmp_path, monkeypatch, nothing_long, method):
    (tmp_path / "model.json").write_text(json.dumps(described(base)))
    given = {"--model": tmp_path / "model.json", "--vae": base / "vae", "--tokenizer": base / "tokenizer"}
    more = [str(text) for pair in given.items() for text in pair] if method == "scratch" else []
    if method == "scratch":
        code, said = train(method, "--steps", "1", "--batch", "2", *more, "--prompts", "nosuch.txt")
        assert code == 2 and "cannot read the prompts" in said[0]
        code, said = train(method, "--steps", "1", "--batch", "2", *more, "--huber", "-1")
        assert code == 2 and "huber -1" in said[0]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("plainsd.train.data.run_data.RunData.pictures", lambda *_: pytest.fail("it is too late"))
    code, said = train(method, "--steps", "1", "--batch", "2", *more, "--tensorboard")
    assert code == 2 and "TensorBoard is not installed" in said[0]


def test_prompts_are_drawn_a_few_at_a_time_as_if_together(train, base, tmp_path, monkeypatch):
    """At step 0 a LoRA changes nothing: the pictures are the base's."""
    prompts, asked = [f"colour {i}" for i in range(6)], []
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))

    def noted(sd, prompt, **more):
        asked.append((prompt, more["seed"]))
        return text_to_image(sd, prompt, **more)

    monkeypatch.setattr("plainsd.train.job.text_to_image", noted)
    assert train("lora", "--steps", "1", "--rank", "1", "--prompts", str(tmp_path / "prompts.txt")) == (0, [])
    assert asked == [(prompts[:4], 0), (prompts[4:], 4)] * (len(asked) // 2) and len(asked) >= 4
    sheet = Image.open(tmp_path / "run" / "samples" / "step-00000000.png")
    together = grid(final(text_to_image(plainsd.load(base, device="cpu", dtype="float32"), prompts, seed=0)), 6)
    assert np.abs(np.asarray(sheet, dtype=int) - np.asarray(together, dtype=int)).max() <= 2


def test_an_autoencoder_shows_a_few_pictures_at_a_time(train, tmp_path, monkeypatch):
    encode, seen, sheets = VAE.encode, [], []

    def noted(self, pixels):
        seen.append(len(pixels)) if torch.is_inference_mode_enabled() else None
        return encode(self, pixels)

    monkeypatch.setattr(VAE, "encode", noted)
    for count in (4, 3):
        monkeypatch.setattr("plainsd.train.from_scratch.AT_ONCE", count)
        out = tmp_path / str(count)
        assert train("vae", "--steps", "1", "--batch", "2", "--size", "16", out=out) == (0, [])
        sheets.append(np.asarray(Image.open(out / "samples" / "step-00000001.png"), dtype=int))
    assert seen == [4, 3, 1] and np.abs(sheets[0] - sheets[1]).max() <= 1


def test_scratch_has_checkpointing(train, base, tmp_path, monkeypatch):
    (tmp_path / "model.json").write_text(json.dumps(described(base)))
    given = {"--model": tmp_path / "model.json", "--vae": base / "vae", "--tokenizer": base / "tokenizer"}
    shared = ["--steps", "1", "--batch", "2", *(str(text) for pair in given.items() for text in pair)]
    blocks = []

    def counted(forward, *inputs, **options):
        blocks.append(forward)
        return checkpoint(forward, *inputs, **options)

    monkeypatch.setattr("plainsd.train.gradient_checkpointing.checkpoint", counted)
    losses = []
    for name, more in (("plain", []), ("less", ["--checkpointing"])):
        assert train("scratch", *shared, *more, out=tmp_path / name) == (0, [])
        losses.append([(line["loss"], line["grad_norm"]) for line in read_log(tmp_path / name / "log.jsonl")])
        assert bool(blocks) == bool(more)
    assert losses[0] == losses[1]


# ---- going on, and what stands against it


def test_a_run_may_be_made_longer(train, tmp_path, capsys):
    """At a constant rate it is then the run that was longer from the start."""
    more = ["--lr", "1e-2", "--rank", "1"]
    assert train("lora", "--steps", "2", *more) == (0, [])
    assert train("lora", "--steps", "3", *more) == (0, [])
    assert train("lora", "--steps", "3", *more, out=tmp_path / "straight") == (0, [])
    longer, straight = (load_file(tmp_path / run / f"{run}.safetensors") for run in ("run", "straight"))
    assert longer.keys() == straight.keys() and all(torch.equal(longer[name], straight[name]) for name in longer)
    code, said = train("lora", "--steps", "2", *more)
    assert code == 2 and "holds a run with another --steps (3, now 2)" in said[0]


def test_the_same_command_goes_on(train, tmp_path):
    assert train("lora", "--steps", "1", "--rank", "1")[0] == 0
    written = (tmp_path / "run" / "run.safetensors").read_bytes()
    assert train("lora", "--steps", "1", "--rank", "1", "--log-every", "7")[0] == 0  # nothing is left to do
    assert (tmp_path / "run" / "run.safetensors").read_bytes() == written
    code, said = train("lora", "--steps", "1", "--rank", "2")
    assert code == 2 and len(said) == 1 and "holds a run with another --rank (1, now 2)" in said[0]


def test_a_run_goes_on_with_options_that_change_nothing(base, pictures, tmp_path, monkeypatch, capsys):
    """Paths written otherwise, what is saved in which form, what is drawn on the way, how memory is saved."""
    for name, place in (("pics", pictures), ("held", pictures), ("base", base)):
        shutil.copytree(place, tmp_path / name)
    (tmp_path / "prompts.txt").write_text("colour 1\n")
    monkeypatch.chdir(tmp_path)

    def run(steps, out="run", data="pics", held="held", base="base", more=()):
        paths = ["--base", base, "--data", data, "--heldout", held, "--out", out]
        code = main(
            ["train", "--method", "lora", "--rank", "1", "--lr", "1e-2", "--steps", steps, *FAST, *paths, *more]
        )
        return code, capsys.readouterr()

    more = ["--device", "auto", "--save-dtype", "bfloat16", "--prompts", "prompts.txt", "--bad-share", "0.5"]
    monkeypatch.setattr("plainsd.device.choose_device", lambda _: torch.device("cpu"))  # also where auto is a GPU
    assert run("1")[0] == 0
    code, told = run("2", data="./pics/", held="held/", base=f"{tmp_path}/base", more=[*more, "--checkpointing"])
    assert code == 0 and "so far: 1 new, 0 gone; it goes on with these" in told.out
    assert torch.bfloat16 in {tensor.dtype for tensor in load_file("run/run.safetensors").values()}
    code, told = run("3", data=f"{tmp_path}/pics", held=f"{tmp_path}/pics/../held", base="./base")
    assert code == 0 and "so far: 0 new, 1 gone; it goes on with these" in told.out
    assert run("3", out="straight")[0] == 0
    again, straight = load_file("run/run.safetensors"), load_file("straight/straight.safetensors")
    assert all(torch.equal(again[name], straight[name]) for name in straight)
    for name, other in (("data", {"data": "held"}), ("data", {"data": "pics:2"}), ("heldout", {"held": "pics"})):
        code, told = run("4", **other)
        assert code == 2 and f"holds a run with another --{name}" in told.err


def test_a_run_goes_on_in_its_own_precision(train, tmp_path, monkeypatch):
    """Whichever device, and `auto`, stand for it."""
    more, options = ["--steps", "1", "--rank", "1", "--dtype"], tmp_path / "run" / "options.json"
    assert train("lora", *more, "float32") == (0, [])
    for pays, code in ((False, 0), (True, 2)):
        monkeypatch.setattr("plainsd.device.bfloat16_pays", lambda pays=pays: pays)
        found, said = train("lora", *more, "auto")
        assert found == code and read_json(options)["dtype"] == "float32"
    assert "holds a run with another --dtype (float32, now bfloat16)" in said[0]
    options.write_text(json.dumps(read_json(options) | {"dtype": "auto"}))  # as older versions wrote it
    assert train("lora", *more, "float32") == (0, []) and read_json(options)["dtype"] == "float32"


@pytest.fixture
def trained_on(monkeypatch):
    """The names of the pictures that each run of method lora trains on."""
    seen = []

    def noted(sd, examples, **more):
        seen.append({item.name for item in examples.pictures.items})
        return lora(sd, examples, **more)

    monkeypatch.setattr("plainsd.train.from_model.lora", noted)
    return seen


def test_held_out_pictures_stay_held_out(base, tmp_path, trained_on):
    """Though pictures come and go between a run and its going on."""
    data = write_pictures(tmp_path / "data", count=6)
    flags = ["--base", str(base), "--data", str(data), "--out", str(tmp_path / "run"), "--hold-out", "0.5", *FAST]
    assert main(["train", "--method", "lora", *flags, "--rank", "1", "--steps", "1"]) == 0
    out = {f"{i}.png" for i in range(6)} - trained_on[0]
    for i in range(5):
        Image.new("RGB", (64, 64), (40 * i, 9, 9)).save(data / f"new-{i}.png")
        (data / f"new-{i}.txt").write_text("colour 1")
    gone = min(trained_on[0])
    (data / gone).unlink()
    assert main(["train", "--method", "lora", *flags, "--rank", "1", "--steps", "2"]) == 0
    assert len(out) == 3 and trained_on[1] == trained_on[0] - {gone} | {f"new-{i}.png" for i in range(5)}
    assert len(json.loads((tmp_path / "run" / "heldout.json").read_text())["pictures"]) == 3


@pytest.mark.parametrize("form", ["{}", "{}:1", "kohya:{}"])
def test_folders_inside_the_data_are_not_trained_on(base, tmp_path, capsys, trained_on, form):
    data = write_pictures(tmp_path / "data", count=2)
    write_pictures(data / "held" / "1_dog", count=3), write_pictures(data / "dogs", count=4)
    flags = ["--base", str(base), "--data", str(data), "--out", str(data / "run"), "--caption", "a dog", *FAST]
    flags += [
        "--heldout",
        form.format(data / "held"),
        "--prior",
        str(data / "dogs"),
        "--prior-prompt",
        "a dog",
        "--rank",
        "1",
    ]
    for steps in ("1", "2"):
        assert main(["train", "--method", "lora", *flags, "--steps", steps]) == 0
        Image.new("RGB", (64, 64)).save(data / "run" / "sample.png")
    assert trained_on == [{"0.png", "1.png"}] * 2
    said = capsys.readouterr().out
    assert f"{data / 'held'} lies in {data}, and is not taken for a part of it" in said
    assert said.count("2 pictures, ") == 2


@pytest.mark.parametrize("form", ["{}", "{}:1"])
def test_a_held_out_folder_that_is_trained_on_is_told(base, pictures, tmp_path, capsys, form):
    held = form.format(pictures)
    flags = ["--base", str(base), "--data", str(pictures), "--out", str(tmp_path / "run"), "--heldout", held]
    assert main(["train", "--method", "lora", *FAST, *flags, "--steps", "1", "--rank", "1"]) == 0
    assert "is trained on too: what is measured with it is not validation" in capsys.readouterr().out


def test_a_run_of_another_model_is_not_gone_on_with(train, base, tmp_path):
    assert train("lora", "--steps", "1", "--rank", "1", base=base)[0] == 0
    plainsd.save(tiny_sd(seed=5), base)  # another model in the same place
    code, said = train("lora", "--steps", "1", "--rank", "1", base=base)
    plainsd.save(tiny_sd(), base)
    assert code == 2 and len(said) == 1 and "holds a run with a model with other weights" in said[0]


def test_a_refused_start_claims_nothing(train, base, tmp_path):
    out = tmp_path / "deep" / "run"
    code, said = train("lora", "--steps", "1", base=tmp_path / "none", out=out)
    assert code == 2 and "none" in said[0] and not (tmp_path / "deep").exists()
    code, said = train("inversion", "--steps", "1", "--token", "<cat>", out=out)
    assert code == 2 and "do not have the word" in said[0]
    assert [place.name for place in out.iterdir()] == ["cache"]  # of pictures, which are the same for any run
    code, said = train("lora", "--steps", "1", "--batch", "4", "--tensorboard", "--rank", "0", out=out)
    assert code == 2 and not (out / "options.json").exists()
    assert train("lora", "--steps", "1", "--rank", "1", out=out) == (0, [])
    assert {place.name for place in out.iterdir()} >= {"options.json", "run.toml", "run.safetensors"}


def test_a_refused_start_leaves_a_folder_that_was_there(train, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    assert train("inversion", "--steps", "1", out=out)[0] == 2
    assert list(out.iterdir()) == []


def test_where_a_disk_has_no_locks_the_file_that_stays_is_named(tmp_path, monkeypatch):
    """Such as Lustre without `-o flock`: what a killed run leaves there looks held for ever."""

    def no_locks(descriptor, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with FileLock(tmp_path / ".lock").acquire(timeout=0), pytest.raises(plainsd.UserError) as error:
            with locked(tmp_path, World()):
                pass
    assert f"or, where it has ended, remove {tmp_path / '.lock'}" in str(error.value)


HOLD = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]).acquire(timeout=0):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_trainings_do_not_share_a_folder(train, tmp_path):
    """The lock of one that was killed stands in nobody's way."""
    out, more = tmp_path / "run", ["--steps", "1", "--rank", "1"]
    out.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out / ".lock")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    code, said = train("lora", *more)
    assert code == 2 and [place.name for place in out.iterdir()] == [".lock"]
    assert said == [f"plainsd: another training is at work in {out}; wait until it has ended, or give another --out"]
    holder.kill()
    holder.wait()
    assert train("lora", *more) == (0, []) and (out / "run.safetensors").is_file()


@contextmanager
def signalled(number, step, times=1):
    """Inside, a signal comes at the end of a step, and Ctrl-C is not ignored, as it is in the background."""
    look, before = Look.__call__, signal.signal(signal.SIGINT, signal.default_int_handler)

    def then(self, now):
        look(self, now)
        for _ in range(times if now == step else 0):
            signal.raise_signal(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Look, "__call__", then)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_saves_and_the_run_goes_on_as_if_there_had_been_none(train, tmp_path, number, code):
    more = ["--steps", "3", "--lr", "1e-2", "--rank", "1"]
    with signalled(number, 2):
        assert train("lora", *more) == (code, ["plainsd: interrupted"] if code else [])
    assert [place.name for place in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000002"]
    assert not (tmp_path / "run" / "run.safetensors").exists()
    assert train("lora", *more) == (0, []) and train("lora", *more, out=tmp_path / "straight") == (0, [])
    again, straight = (load_file(tmp_path / run / f"{run}.safetensors") for run in ("run", "straight"))
    assert all(torch.equal(again[name], straight[name]) for name in straight)
    assert [line["step"] for line in read_log(tmp_path / "run" / "log.jsonl")] == [1, 2, 3]


def test_a_second_ctrl_c_ends_at_once(train, tmp_path):
    with signalled(signal.SIGINT, 1, times=2):
        assert train("lora", "--steps", "3", "--rank", "1") == (130, ["plainsd: interrupted"])
    assert checkpoints(tmp_path / "run" / "checkpoints") == []


# ---- results on the way


def test_results_on_the_way_are_those_of_shorter_runs(train, tmp_path):
    """4 pictures, 2 a step: two steps an epoch."""
    more = ["--lr", "1e-2", "--rank", "1", "--batch", "2", "--accumulate", "1"]
    assert train("lora", "--steps", "5", "--save-results-every", "3", "--save-epochs", "1", *more) == (0, [])
    marks = ("epoch000001", "epoch000002", "step00000003")
    names = [f"run-{mark}{end}" for mark in marks for end in ("-peft.safetensors", ".safetensors")]
    assert sorted(place.name for place in (tmp_path / "run" / "results").iterdir()) == sorted(names)
    for steps, mark in ((2, "epoch000001"), (3, "step00000003")):
        assert train("lora", "--steps", str(steps), *more, out=tmp_path / f"short{steps}") == (0, [])
        mine = load_file(tmp_path / "run" / "results" / f"run-{mark}.safetensors")
        short = load_file(tmp_path / f"short{steps}" / f"short{steps}.safetensors")
        assert mine.keys() == short.keys() and all(torch.equal(mine[name], short[name]) for name in mine)


@pytest.mark.parametrize("method", ["full", "vae", "inversion"])
def test_every_method_keeps_results_on_the_way(train, base, tmp_path, method):
    more = {"full": [], "vae": ["--size", "16"], "inversion": ["--token", "colour", "--initial", "x"]}[method]
    more += ["--lr", "1e-2", "--batch", "4", "--accumulate", "1", "--decline", "constant"]
    assert train(method, "--steps", "2", "--save-results-every", "1", *more) == (0, [])
    assert train(method, "--steps", "1", *more, out=tmp_path / "short") == (0, [])
    ends = {
        "full": ("run-step00000001/unet/diffusion_pytorch_model.safetensors",
                 "short/unet/diffusion_pytorch_model.safetensors"),
        "vae": ("run-step00000001/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"),
        "inversion": ("colour-step00000001.safetensors", "colour.safetensors"),
    }  # fmt: skip
    mine, short = ends[method]
    mine, short = load_file(tmp_path / "run" / "results" / mine), load_file(tmp_path / "short" / short)
    assert mine.keys() == short.keys() and all(torch.equal(mine[name], short[name]) for name in mine)


@pytest.mark.parametrize(
    "method, flags, name",
    [
        ("lora", ["--rank", "1"], "run.safetensors"),
        ("lora", ["--rank", "1"], "run-peft.safetensors"),
        ("inversion", ["--token", "<red>", "--caption", "<red>"], "red.safetensors"),
        ("inversion", ["--token", "<red>", "--caption", "<red>"], "learned_embeds.safetensors"),
        ("full", [], "run/model_index.json"),
    ],
)
def test_a_file_of_others_is_not_replaced(train, tmp_path, method, flags, name):
    mine = tmp_path / "run" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    code, said = train(method, *flags, "--steps", "1")
    assert code == 2 and "is in the way: the result is to be written there, and that is not of this run" in said[0]
    assert mine.read_text() == "mine"


def test_a_result_is_called_as_its_run(train, tmp_path, capsys):
    assert train("full", "--steps", "1", out=tmp_path / "drawings") == (0, [])
    draw = ["generate", "x", "--model", str(tmp_path / "drawings" / "drawings"), "--steps", "1", "--device", "cpu"]
    assert main([*draw, "--out", str(tmp_path / "a.png")]) == 0
    assert read_settings(tmp_path / "a.png").model == "drawings"
    code, said = train("full", "--steps", "1", out=tmp_path / "cache")
    assert code == 2 and "'cache' is a part of every run" in said[0] and not (tmp_path / "cache").exists()
    (tmp_path / "taken" / "taken").mkdir(parents=True)
    code, said = train("full", "--steps", "1", out=tmp_path / "taken")
    assert code == 2 and "is in the way: the result is to be written there" in said[0]


# ---- options from a file


def test_a_run_holds_a_file_that_starts_it_again(train, tmp_path, capsys):
    more = [
        "--epochs",
        "2",
        "--lr",
        "1e-2",
        "--rank",
        "2",
        "--dora",
        "--caption",
        'a "b" \\ c\n\x7f',
        "--seed",
        "random",
    ]
    assert train("lora", *more) == (0, [])
    config, result = tmp_path / "run" / "run.toml", tmp_path / "run" / "run.safetensors"
    before = result.read_bytes()
    shutil.copy(config, tmp_path / "kept.toml")
    result.unlink()
    assert main(["train", "--config", str(config)]) == 0  # goes on: there is nothing left to do
    assert result.read_bytes() == before and config.read_text() == (tmp_path / "kept.toml").read_text()
    shutil.rmtree(tmp_path / "run")
    assert main(["train", f"--config={tmp_path / 'kept.toml'}"]) == 0  # from the beginning
    assert result.read_bytes() == before
    assert main(["train", "--config", str(config), "--steps", "1", "--out", str(tmp_path / "other")]) == 0
    text = tomllib.loads((tmp_path / "other" / "run.toml").read_text())
    assert (text["steps"], text["rank"], text["dora"], text["caption"]) == (1, 2, True, 'a "b" \\ c\n\x7f')
    assert "epochs" not in text and text["seed"] == tomllib.loads(config.read_text())["seed"]


@pytest.mark.parametrize("method", METHOD_DEFAULTS)
def test_a_runs_own_file_is_accepted(tmp_path, method):
    options = TrainOptions(method, ("x",), Path("y"))
    filled = replace(options, pace=with_defaults(method, options.pace), loss=with_loss_defaults(options))
    (tmp_path / "run.toml").write_text(config_text(filled, "a run"))
    read = parsed(Train, "train", with_config(["--config", str(tmp_path / "run.toml")], Train))
    check_methods(read)
    check_together(read)
    assert (read.loss, read.pace) == (filled.loss, filled.pace)


def test_no_name_leaves_out_what_a_file_says(tmp_path):
    file, own = tmp_path / "a.toml", ["--config", str(tmp_path / "a.toml")]
    file.write_text(
        'method = "lora"\ndata = ["x"]\nout = "y"\nflip = true\ntext-encoder = true\ndora = true\n'
        "min-snr = 5\nrank = 8\nepochs = 2\nbuckets = false\n"
    )
    read = parsed(Train, "train", with_config(own, Train))
    assert read.reading.flip and read.lora.text_encoder and read.lora.dora and read.loss.min_snr == 5
    off = ["--no-flip", "--no-text_encoder", "--no-min-snr", "--no-epochs", "--no-buckets", "--no-checkpointing"]
    read = parsed(Train, "train", with_config([*own, *off, "--caption", "flip"], Train))
    assert not (read.reading.flip or read.lora.text_encoder or read.reading.buckets or read.pace.checkpointing)
    assert (read.loss.min_snr, read.pace.epochs, read.reading.caption) == (None, None, "flip")
    assert read.lora.dora and read.lora.rank == 8
    with pytest.raises(plainsd.UserError, match="--flip and --no-flip contradict each other; leave one of them out"):
        with_config([*own, "--flip", "--no-flip"], Train)
    with pytest.raises(plainsd.UserError, match="--no-flp"):
        parsed(Train, "train", with_config([*own, "--no-flp"], Train))


def test_a_list_may_be_given_in_several_flags(tmp_path):
    """A command line's list goes before a file's."""
    (tmp_path / "a.toml").write_text('method = "lora"\ndata = ["x"]\ncarry = ["z"]\nout = "y"\n')
    own = ["--data", "a", "b:2", "--carry=c", "--rank", "4", "--data", "d", "--data=e", "--carry", "f"]
    read = parsed(Train, "train", with_config([*own, "--config", str(tmp_path / "a.toml")], Train))
    assert read.data == ("a", "b:2", "d", "e") and read.from_scratch.carry == (Path("c"), Path("f"))
    read = parsed(Train, "train", with_config([*own, "--method", "lora", "--out", "y"], Train))
    assert read.data == ("a", "b:2", "d", "e") and read.lora.rank == 4
    read = parsed(Train, "train", with_config(["--config", str(tmp_path / "a.toml"), "--data", "q"], Train))
    assert read.data == ("q",) and read.from_scratch.carry == (Path("z"),)


CONFIGS = {
    "rnk = 8": "unknown option 'rnk'; did you mean 'rank'?",
    "config = 'x'": "unknown option 'config'",
    "rank = true": "rank = True cannot be read; give a number, a text, or a list of texts",
    "dora = 'yes'": "dora = 'yes' cannot be read; give true or false",
    "[lora]\nrank = 8": "unknown option 'lora'",
    "rank = 2026-01-01": "cannot be read",
    "rank = 'many'": "--rank: 'many' is not a whole number",
    "rank 8": "is not a TOML file: ",
    "rank = 8\nrank = 9": "is not a TOML file: ",
    "": "missing: --method, --data, --out",
}


@pytest.mark.parametrize("text", CONFIGS)
def test_a_wrong_file_of_options_is_one_line(tmp_path, capsys, text):
    (tmp_path / "a.toml").write_text(text)
    given = ["--method", "lora", "--data", "x", "--out", str(tmp_path / "run")] if text else []
    assert main(["train", "--config", str(tmp_path / "a.toml"), *given]) == 2
    err = capsys.readouterr().err
    assert err.startswith("plainsd: ") and err.count("\n") == 1 and CONFIGS[text] in err
    assert [place.name for place in tmp_path.iterdir()] == ["a.toml"]


def test_a_file_of_options_that_is_not_there(tmp_path, capsys):
    assert main(["train", "--config", str(tmp_path / "none.toml")]) == 2
    assert "none.toml: No such file or directory; give --config a TOML file" in capsys.readouterr().err
    (tmp_path / "a.toml").write_bytes(b"caption = '\xff'")
    assert main(["train", "--config", str(tmp_path / "a.toml")]) == 2
    assert "is not a TOML file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("data = " + "[" * 2000 + "]" * 2000, "has lists too deep inside each other; write lines such as rank = 8"),
        ("a" + ".a" * 2**15 + " = 1", "has more than 65536 bytes; give --config a TOML file"),
        ("seed = " + "9" * 5000, "is not a TOML file"),
        ("rank = 8\nrank = 9", "is not a TOML file"),
    ],
    ids=["deep", "long", "digits", "twice"],
)
def test_a_config_that_asks_for_too_much_is_one_line(tmp_path, capsys, text, why):
    (tmp_path / "run.toml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "run.toml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "run.toml" in line and why in line and len(line) < 330


def test_random_and_wrong_seeds(train, tmp_path, capsys):
    more = ["--steps", "1", "--rank", "1"]
    assert train("lora", "--seed", "random", *more) == (0, [])
    drawn = read_json(tmp_path / "run" / "options.json")["seed"]
    assert train("lora", "--seed", "-1", *more) == (0, [])  # goes on with the same
    assert read_json(tmp_path / "run" / "options.json")["seed"] == drawn and 0 <= int(drawn) < 2**32
    assert train("lora", "--seed", "-1", *more, out=tmp_path / "other") == (0, [])
    assert read_json(tmp_path / "other" / "options.json")["seed"] != drawn
    for seed, says in (("1.5", "seed '1.5' is not a whole number"), ("-2", "seed -2 is out of range"),
                       (str(2**64), "is out of range")):  # fmt: skip
        code, said = train("lora", "--seed", seed, *more, out=tmp_path / "wrong")
        assert code == 2 and len(said) == 1 and says in said[0] and not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("name", ["save-every", "keep", "log-every", "validate-every", "sample-every", "save-epochs"])
def test_nothing_happens_every_0_steps(train, tmp_path, name):
    code, said = train("lora", f"--{name}", "0")
    assert code == 2 and said == [f"plainsd: --{name} 0 is out of range; give 1 or more"]
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_the_last_good_state(train, tmp_path, monkeypatch):
    saved, left = torch.save, [2]

    def full(state, file):
        left[0] -= 1
        saved(state, file)
        if left[0] < 0:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    code, said = train("lora", "--steps", "5", "--rank", "1", "--save-every", "1")
    assert code == 1
    assert said == [
        "plainsd: cannot write the state of step 3: No space left on device; the checkpoint of step 2 is intact; "
        "free disk space and run the same command again to resume"
    ]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] != []
    monkeypatch.undo()
    assert train("lora", "--steps", "5", "--rank", "1", "--save-every", "1")[0] == 0
    assert [line["step"] for line in read_log(tmp_path / "run" / "log.jsonl")] == [1, 2, 3, 4, 5]


def test_out_of_memory_is_one_line(train, tmp_path, monkeypatch):
    update = Trainer.update

    def full(self, picks):
        if self.step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return update(self, picks)

    monkeypatch.setattr(Trainer, "update", full)
    code, said = train("lora", "--steps", "5", "--rank", "1", "--save-every", "1")
    assert code == 2 and said == [
        "plainsd: out of memory; try --checkpointing, or --batch 1, --half-base or --adam8bit with another --out; the "
        f"last state is {tmp_path / 'run' / 'checkpoints' / 'step-00000002'}"
    ]
    code, said = train("vae", "--steps", "5", "--batch", "2", "--save-every", "9", out=tmp_path / "vae")
    assert said == ["plainsd: out of memory; try --batch 1 or --adam8bit with another --out; there is no checkpoint"]


def test_a_full_disk_when_the_result_is_written(train, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("plainsd.train.from_model.save", full)
    code, said = train("full", "--steps", "1")
    assert code == 1
    assert said[0].startswith("plainsd: cannot write the model: No space left on device; the checkpoint of step 1 is")


def test_a_learning_rate_that_is_too_high(train, tmp_path):
    code, said = train("full", "--steps", "60", "--lr", "1e30", "--clip", "1e30", "--save-every", "1")
    assert code == 2 and len(said) == 1
    assert "not finite 20 steps in a row" in said[0] and "lower the learning rate (now 1e+30)" in said[0]
    (kept,) = checkpoints(tmp_path / "run" / "checkpoints")
    assert torch.load(kept / "state.pt", weights_only=True)["step"] == 1


@pytest.mark.parametrize(
    "kind, message",
    [
        ("empty", "no pictures; put metadata.jsonl there"),
        ("bare", "2 of 2 pictures cannot be used, more than 1% (first: 0.png: no caption)"),
        ("small", "1 of 2 pictures cannot be used, more than 1% (first: 0.png: only 7x64 pixels)"),
    ],
)
def test_pictures_that_cannot_be_used(base, tmp_path, capsys, kind, message):
    place = write_pictures(tmp_path / kind, 0 if kind == "empty" else 2)
    if kind == "bare":
        for text in place.glob("*.txt"):
            text.unlink()
    if kind == "small":
        Image.new("RGB", (7, 64)).save(place / "0.png")
    assert (
        main(
            [
                "train",
                "--method",
                "full",
                "--base",
                str(base),
                "--data",
                str(place),
                "--out",
                str(tmp_path / "run"),
                *FAST,
            ]
        )
        == 2
    )
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("plainsd:")]
    assert message in line


@pytest.mark.parametrize(
    "steps, message",
    [
        (Steps(steps=5, epochs=2), "both say how long"),
        (Steps(batch=0), "--batch 0 is out of range"),
        (Steps(lr=-1.0), "--lr -1 is out of range"),
    ],
)
def test_numbers_that_cannot_be(steps, message):
    with pytest.raises(plainsd.UserError, match=message):
        with_defaults("full", steps)


@pytest.mark.parametrize(
    "flags, wanted",
    [
        (["--clip", "0"], "a number above 0; with inf nothing is clipped"),
        (["--clip", "-1"], "a number above 0; with inf nothing is clipped"),
        (["--clip", "nan"], "a number above 0; with inf nothing is clipped"),
        (["--prior-weight", "-1"], "0 or more"),
        (["--prior-count", "0"], "1 or more"),
        (["--ema", "-1"], "0 or more, and below 1"),
        (["--ema", "1"], "0 or more, and below 1"),
        (["--weight-decay", "-1"], "0 or more"),
        (["--weight-decay", "inf"], "0 or more"),
        (["--warmup", "-1"], "0 or more"),
        (["--beta2", "1"], "0 or more, and below 1"),
        (["--dropout", "1.5"], "0 to 1"),
        (["--dropout", "-0.1"], "0 to 1"),
        (["--dropout", "nan"], "0 to 1"),
        (["--shuffle-tags", "-1"], "0 or more"),
        (["--limit", "0"], "1 or more"),
        (["--limit", "-1"], "1 or more"),
        (["--size", "0"], "1 or more"),
        (["--size", "-64"], "1 or more"),
        (["--timestep-power", "0"], "a number above 0"),
        (["--timestep-power", "-1"], "a number above 0"),
        (["--workers", "-1"], "0 or more"),
        (["--hold-out", "1"], "0 or more, and below 1"),
        (["--hold-out", "-0.1"], "0 or more, and below 1"),
        (["--bad-share", "2"], "0 to 1"),
        (["--rank", "0"], "1 or more"),
    ],
    ids=" ".join,
)
def test_numbers_out_of_range_are_one_line(train, tmp_path, flags, wanted):
    code, said = train("lora", "--steps", "1", *flags)
    assert code == 2 and said == [f"plainsd: {' '.join(flags)} is out of range; give {wanted}"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "method, flags, methods",
    [
        ("full", ["--rank", "8"], "method lora"),
        ("full", ["--dora"], "method lora"),
        ("full", ["--kind", "loha"], "method lora"),
        ("full", ["--targets", "all"], "method lora"),
        ("full", ["--half-base"], "methods lora, inversion and controlnet"),
        ("lora", ["--token", "<cat>"], "method inversion"),
        ("lora", ["--kl-weight", "1"], "method vae"),
        ("lora", ["--control", "x"], "method controlnet"),
        ("inversion", ["--text-encoder"], "methods full and lora"),
        ("vae", ["--vae", "x"], "methods scratch, full, lora, inversion and controlnet"),
        ("vae", ["--checkpointing"], "methods scratch, full, lora, inversion and controlnet"),
        ("vae", ["--prior-prompt", "a dog"], "methods full, lora and inversion"),
        ("scratch", ["--prior-prompt", "a dog"], "methods full, lora and inversion"),
        ("scratch", ["--rank", "8"], "method lora"),
        ("lora", ["--carry", "x"], "method scratch"),
        ("full", ["--model", "x"], "methods vae and scratch"),
        ("lora", ["--optimizer", "muon"], "methods vae, scratch and full"),
        ("vae", ["--dropout", "0.2"], "methods scratch, full, lora, inversion and controlnet"),
        ("vae", ["--huber", "-3"], "methods scratch, full, lora, inversion and controlnet"),
        ("vae", ["--save-dtype", "bfloat16"], "methods scratch, full, lora and controlnet"),
        ("inversion", ["--save-dtype", "bfloat16"], "methods scratch, full, lora and controlnet"),
    ],
    ids=str,
)
def test_options_of_other_methods_are_refused(train, tmp_path, method, flags, methods):
    code, said = train(method, "--steps", "1", *flags)
    line = f"plainsd: {flags[0]} is for {methods}, and method {method} does not use it; leave it out"
    assert code == 2 and said == [line] and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "method, flags, says",
    [
        ("lora", ["--places", "8"], "without --crop random; give that too, or leave it out"),
        ("lora", ["--prior-weight", "0.5"], "without --prior or --prior-prompt; give that too, or leave it out"),
        ("lora", ["--prior-count", "9"], "without --prior-prompt; give that too, or leave it out"),
        ("lora", ["--prior-count", "9", "--prior", "x"], "without --prior-prompt; give that too, or leave it out"),
        ("full", ["--distill-steps", "25"], "without --distill; give that too, or leave it out"),
        ("vae", ["--patch-after", "9"], "without --patch-weight; give that too, or leave it out"),
        ("vae", ["--kl-weight", "9", "--decoder-only"], "with --decoder-only; leave one of them out"),
        ("lora", ["--hold-out", "0.2", "--heldout", "x"], "with --heldout; leave one of them out"),
    ],
    ids=str,
)
def test_options_that_have_no_effect_are_refused(train, tmp_path, method, flags, says):
    code, said = train(method, "--steps", "1", *flags)
    assert code == 2 and said == [f"plainsd: {flags[0]} has no effect {says}"] and not (tmp_path / "run").exists()


def test_options_that_have_one_are_not():
    options = TrainOptions("vae", ("x",), Path("y"))
    reading, own = replace(options.reading, crop="random", places=8), options.from_scratch
    check_together(replace(options, reading=reading, from_scratch=replace(own, patch_weight=0.1, patch_after=9)))
    check_together(replace(options, method="lora", prior=replace(options.prior, prior=Path("x"), prior_weight=0.5)))
    check_together(replace(options, from_scratch=replace(own, decoder_only=True)))
    assert without_effect(options) == {"places", "patch_after"} | {
        name for name, methods in METHODS_OF.items() if "vae" not in methods
    }


@pytest.mark.parametrize(
    "flags",
    [
        ["--stream", "--limit", "2"],
        ["--split", "test"],
        ["--picture-column", "photo"],
        ["--text-column", "words"],
    ],
    ids=" ".join,
)
def test_options_of_tables_want_one(train, tmp_path, flags):
    code, said = train("lora", "--steps", "1", *flags)
    assert code == 2 and said[0].startswith(f"plainsd: {flags[0]} is for parquet files, tar shards and datasets on the")
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_the_optimizer_is_the_one_that_is_asked_for(train, tmp_path):
    flags = ["--steps", "2", "--lr", "1e-3", "--seed", "1"]
    models = []
    for name, more in (("usual", []), ("adamw", ["--optimizer", "adamw"]), ("muon", ["--optimizer", "muon"])):
        assert train("full", *flags, *more, out=tmp_path / name) == (0, [])
        models.append(plainsd.load(tmp_path / name / name, device="cpu", dtype="float32"))
    usual, adamw, muon = (model.unet for model in models)
    assert farthest(usual, adamw) == 0 and farthest(usual, muon) > 1e-4


def test_the_numbers_of_loss_and_pace_reach_the_run(train, monkeypatch):
    runs = []
    monkeypatch.setattr("plainsd.train.job.run_training", lambda *args, **_: runs.append(args))
    loss = "--min-snr 5 --offset-noise 0.1 --perturbation 0.2 --huber 0.5 --dropout 0.3 --timestep-power 0.7".split()
    pace = "--warmup 7 --beta2 0.95 --weight-decay 0.3 --clip 0.25 --ema 0.5".split()
    train("lora", "--steps", "1", *loss, *pace)
    ((method, _, options, *_),) = runs
    assert method.objective == Objective(5.0, 0.1, 0.2, 0.5)
    assert (method.examples.dropout, method.examples.timestep_power) == (0.3, 0.7)
    assert (options.warmup, options.betas, options.weight_decay) == (7, (0.9, 0.95), 0.3)
    assert (options.clip, options.ema) == (0.25, 0.5)


def test_data_as_kohyas_trainer_wants_it(train, tmp_path):
    folder = tmp_path / "dogs" / "3_sks dog"
    folder.mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    code = main(["train", "--method", "lora", "--data", f"kohya:{tmp_path / 'dogs'}", "--out", str(tmp_path / "run"),
                 *FAST, "--steps", "1", "--rank", "1", "--prior-prompt", "dog", "--prior-count", "1"])  # fmt: skip
    assert code == 0 and (tmp_path / "run" / "run.safetensors").is_file()


@pytest.mark.parametrize("other", ["--adam8bit", "--shard"])
def test_muon_goes_alone(train, tmp_path, other):
    code, said = train("full", "--steps", "1", "--optimizer", "muon", other)
    assert code == 2 and said == [f"plainsd: --optimizer muon does not go with {other}; leave one of them out"]
    assert not (tmp_path / "run").exists()


def test_every_method_of_an_option_is_one():
    options = TrainOptions("lora", ("x",), Path("y"))
    assert set(METHODS_OF) <= {entry.name for entry, _ in each_option(options)}
    assert {method for methods in METHODS_OF.values() for method in methods} == set(METHOD_DEFAULTS)
    for method in METHOD_DEFAULTS:
        check_methods(replace(options, method=method))


def test_help_names_the_methods_of_an_option():
    """Where it names any: `full, lora: ...`."""
    one = "|".join(METHOD_DEFAULTS)
    parser = get_parser(Train, config=(FlagCreatePairsOff,), registry=number_registry())
    named = {}
    for action in parser._actions:
        lists = re.findall(rf"(?:^|\. )((?:{one})(?:, (?:{one}))*): ", " ".join((action.help or "").split()))
        named[action.dest] = {method for words in lists for method in words.split(", ")}
    named = {
        name.split(".")[-1].replace("-", "_"): methods
        for name, methods in named.items()
        if methods and name != "method"
    }
    assert named == {name: set(METHODS_OF[name]) for name in named}
    assert {"vae", "half_base", "optimizer", "text_encoder", "kl_weight", "live_latents"} <= named.keys()


@pytest.mark.parametrize("flags", [["--dora"], ["--dora", "--kind", "loha"], []], ids=str)
def test_who_reads_a_dora_is_said(train, monkeypatch, flags):
    said = []
    monkeypatch.setattr(World, "say", lambda self, text: said.append(text))
    assert train("lora", "--steps", "1", "--rank", "1", *flags) == (0, [])
    line = "A1111, ComfyUI and Forge reckon with dora_scale otherwise, and draw other pictures"
    wanted = {1: [f"{line}; diffusers/PEFT read it as it is"], 3: [line], 0: []}[len(flags)]
    assert [text for text in said if "dora_scale" in text] == wanted


def test_float16_is_no_precision_to_train_in(train, tmp_path):
    code, said = train("lora", "--steps", "1", "--dtype", "float16")
    assert code == 2 and "give bfloat16, float32, or auto" in said[0] and not (tmp_path / "run").exists()


def test_a_word_to_begin_from_has_no_more_tokens_than_the_new_one(train, tmp_path):
    flags = ["--steps", "1", "--token", "colour", "--initial", "x y"]
    code, said = train("inversion", *flags)
    assert code == 2 and "the word 'x y' to begin from is 2 tokens, and the new word 1; give --vectors 2" in said[0]
    assert train("inversion", *flags, "--vectors", "2") == (0, [])


def test_every_number_of_a_range_is_an_option():
    options = TrainOptions("lora", ("x",), Path("y"))
    assert set(OPTION_RANGES) <= {entry.name for entry, _ in each_option(options)}


@pytest.mark.parametrize("method", ["full", "vae"])
def test_a_source_that_comes_no_times_is_refused(base, pictures, tmp_path, capsys, method):
    flags = ["--method", method, "--base", str(base), "--size", "64", "--steps", "1", "--out", str(tmp_path / "run")]
    assert main(["train", *flags, "--data", f"{pictures}:0", *FAST]) == 2
    assert "repeats its pictures 0 times; give 1 or more, or leave it out" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_original_recipe_is_the_default():
    steps = with_defaults("full", Steps())
    assert (steps.lr, steps.batch, steps.accumulate, steps.epochs, steps.weight_decay, steps.clip, steps.beta2) == (
        1e-5,
        1,
        4,
        400,
        0.01,
        1.0,
        0.999,
    )
    assert steps.decline == "constant" and steps.warmup == 0 and steps.steps is None
    assert with_defaults("full", replace(Steps(), steps=7)).epochs is None


def test_help_needs_no_torch():
    code = "import sys; from plainsd.commands.train import Train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
