"""`plainsd train` from the command line: what each method leaves behind, and how it fails."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_sd
from PIL import Image
from safetensors.torch import load_file
from test_finetune import write_pictures

import plainsd
from plainsd.adapters.embeddings import add_embedding, vectors_of
from plainsd.adapters.lora import add_lora, save_lora
from plainsd.checkpoint import load_vae, save_vae
from plainsd.cli import main
from plainsd.generate import final, text_to_image
from plainsd.train.checkpoints import checkpoints
from plainsd.train.data.examples import Examples
from plainsd.train.data.latents import cache_latents
from plainsd.train.data.pictures import read_folder
from plainsd.train.log import read_log
from plainsd.train.loop import fit
from plainsd.train.methods.lora import lora
from plainsd.train.methods.vae import measure_scaling
from plainsd.train.options import FitOptions, Steps, with_defaults
from plainsd.train.order import Repeated

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
    trained, before = (plainsd.load(path, device="cpu", dtype="float32") for path in (tmp_path / "run" / "model", base))
    for one, other in ((trained.unet, before.unet), (trained.text_encoders[0], before.text_encoders[0])):
        assert 0.5e-3 < farthest(one, other) < 2.2e-3  # two steps of AdamW, each of about the learning rate
    assert torch.equal(trained.vae.quant.weight, before.vae.quant.weight)


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
    add_lora(kohya, tmp_path / "run" / "lora.safetensors")
    add_lora(peft, tmp_path / "run" / "lora-peft.safetensors")
    assert np.array_equal(drawn(kohya), drawn(peft))
    ups = [tensor for name, tensor in load_file(tmp_path / "run" / "lora.safetensors").items() if "lora_up" in name]
    assert 0.5e-2 < max(up.abs().max() for up in ups) < 2.2e-2  # from zero, in two steps of about the learning rate
    assert np.abs(drawn(kohya) - drawn(plainsd.load(base, device="cpu"))).max() >= 2
    assert any(p.name.startswith("events.") for p in (tmp_path / "run" / "tensorboard").iterdir())
    assert len([line for line in read_log(tmp_path / "run" / "log.jsonl") if "validation" in line]) == 2


def test_the_seed_is_that_of_first_weights_order_and_noise(train, base, pictures, tmp_path):
    """At no learning rate to speak of, what is saved is what the run began with, and its losses are those of `fit`."""
    losses = {}
    for seed in (0, 5):
        out, sd = tmp_path / str(seed), plainsd.load(base, device="cpu", dtype="float32")
        options = ["--steps", "2", "--batch", "2", "--accumulate", "1", "--lr", "1e-30", "--seed", str(seed)]
        assert train("lora", *options, out=out)[0] == 0
        data = read_folder(pictures, 64)
        method = lora(sd, Examples(data, cache_latents(sd.vae, data, tmp_path / "cache")), seed=seed)
        fitted = fit(method, Repeated([1] * 4, seed), FitOptions(steps=2, batch=2, lr=1e-30, seed=seed))
        losses[seed] = [report.loss for report in fitted]
        assert [line["loss"] for line in read_log(out / "log.jsonl")] == pytest.approx(losses[seed], rel=1e-4)
        save_lora(sd, tmp_path / f"{seed}.safetensors")
        saved, expected = load_file(out / "lora.safetensors"), load_file(tmp_path / f"{seed}.safetensors")
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


def test_lora_on_half_a_base(train, tmp_path):
    (tmp_path / "prompts.txt").write_text("colour 1\n")
    code, said = train("lora", "--steps", "2", "--half-base")  # --dtype float32, see FAST
    assert code == 2 and "goes with --dtype bfloat16" in said[0]
    code, _ = train(
        "lora", "--steps", "2", "--half-base", "--dtype", "bfloat16", "--prompts", str(tmp_path / "prompts.txt")
    )
    assert code == 0 and (tmp_path / "run" / "lora.safetensors").is_file()
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


def test_dreambooth_makes_its_prior(train, tmp_path):
    code, _ = train(
        "lora", "--steps", "1", "--rank", "1", "--prior-prompt", "a dog", "--prior-count", "3", "--prior-weight", "0.5"
    )
    assert code == 0
    assert sorted(p.name for p in (tmp_path / "run" / "prior").iterdir()) == [
        f"{i:05d}.{ending}" for i in range(3) for ending in ("png", "txt")
    ]
    (line,) = read_log(tmp_path / "run" / "log.jsonl")
    assert line["loss"] == pytest.approx(line["own"] + 0.5 * line["prior"])


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
    assert main(["train", "--method", "vae", "--out", str(tmp_path / "vae"), *shared]) == 0
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
    assert drawn(plainsd.load(tmp_path / "run" / "model", device="cpu")).shape == (16, 16, 3)
    assert (tmp_path / "run" / "model" / "model.json").is_file()
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
    assert both.config.scaling_factor == pytest.approx(measure_scaling(both, read_folder(pictures, 16)), rel=1e-4)
    assert abs(both.config.scaling_factor / before.config.scaling_factor - 1) > 0.01
    code, said = train("vae", "--steps", "2", "--base", str(tmp_path / "both" / "vae"), out=tmp_path / "both")
    assert code == 2 and "holds a run with" in said[0]
    shapes = described(base)
    shapes["vae"] |= {"channels": [8, 8, 16, 32]}
    (tmp_path / "model.json").write_text(json.dumps(shapes))
    code, said = train("vae", "--steps", "2", "--model", str(tmp_path / "model.json"), out=tmp_path / "other")
    assert code == 2 and "has other sizes than" in said[0] and not (tmp_path / "other" / "vae").exists()


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
    after, before = (plainsd.load(path, device="cpu", dtype="float32") for path in (tmp_path / "run" / "model", base))
    for a, b in zip((after.unet, *after.text_encoders), (before.unet, *before.text_encoders), strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-7)
    vae = load_vae(base, device="cpu", dtype="float32")
    torch.nn.init.ones_(vae.quant.bias)
    save_vae(vae, tmp_path / "vae", before.variant)
    code, said = train("scratch", "--steps", "1", "--lr", "1e-9", *more)
    assert code == 2 and "a model with other weights" in said[0]
    shapes["unet"] |= {"channels": [64, 32]}
    (tmp_path / "model.json").write_text(json.dumps(shapes))
    code, said = train("scratch", "--steps", "1", *more, out=tmp_path / "other")
    assert (
        code == 2 and "has other networks than --model describes: conv_in.bias is (32,), and should be (64,)" in said[0]
    )


# ---- going on, and what stands against it


def test_a_run_may_be_made_longer(train, tmp_path, capsys):
    """At a constant rate it is then the run that was longer from the start."""
    more = ["--lr", "1e-2", "--rank", "1"]
    assert train("lora", "--steps", "2", *more) == (0, [])
    assert train("lora", "--steps", "3", *more) == (0, [])
    assert train("lora", "--steps", "3", *more, out=tmp_path / "straight") == (0, [])
    longer, straight = (load_file(tmp_path / run / "lora.safetensors") for run in ("run", "straight"))
    assert longer.keys() == straight.keys() and all(torch.equal(longer[name], straight[name]) for name in longer)
    code, said = train("lora", "--steps", "2", *more)
    assert code == 2 and "holds a run with another --steps (3, now 2)" in said[0]


def test_the_same_command_goes_on(train, tmp_path):
    assert train("lora", "--steps", "1", "--rank", "1")[0] == 0
    written = (tmp_path / "run" / "lora.safetensors").read_bytes()
    assert train("lora", "--steps", "1", "--rank", "1", "--log-every", "7")[0] == 0  # nothing is left to do
    assert (tmp_path / "run" / "lora.safetensors").read_bytes() == written
    code, said = train("lora", "--steps", "1", "--rank", "2")
    assert code == 2 and len(said) == 1 and "holds a run with another --rank (1, now 2)" in said[0]


def test_a_run_of_another_model_is_not_gone_on_with(train, base, tmp_path):
    assert train("lora", "--steps", "1", "--rank", "1", base=base)[0] == 0
    plainsd.save(tiny_sd(seed=5), base)  # another model in the same place
    code, said = train("lora", "--steps", "1", "--rank", "1", base=base)
    plainsd.save(tiny_sd(), base)
    assert code == 2 and len(said) == 1 and "holds a run with a model with other weights" in said[0]


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
        "plainsd: cannot write the state of step 3: No space left on device; the state of step 2 is kept; "
        "make room, and the same command goes on from there"
    ]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] != []
    monkeypatch.undo()
    assert train("lora", "--steps", "5", "--rank", "1", "--save-every", "1")[0] == 0
    assert [line["step"] for line in read_log(tmp_path / "run" / "log.jsonl")] == [1, 2, 3, 4, 5]


def test_a_full_disk_when_the_result_is_written(train, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("plainsd.train.from_model.save", full)
    code, said = train("full", "--steps", "1")
    assert code == 1
    assert said[0].startswith("plainsd: cannot write the model: No space left on device; the state of step 1 is")


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
