"""Fine-tuning: objectives, text states, methods, resuming after a kill, the command; what its recipe refuses."""

import importlib.util
import json
import multiprocessing
import os
import signal
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_REFINER, TINY_XL, tiny_sd
from PIL import Image
from torch import nn

from plainsd.adapters.lora import attached
from plainsd.diffusion.denoiser import min_snr_weight, network_input
from plainsd.diffusion.schedule import NoiseSchedule
from plainsd.errors import DiskError, UserError
from plainsd.pictures.conditioning import chunked, encode_chunks, encode_prompts
from plainsd.pictures.plan import encode_prompt
from plainsd.speed.training import autocast
from plainsd.text.prompts import Weighted
from plainsd.train.checkpoints import SaveError, checkpoints
from plainsd.train.data.captions import Reader, cut_captions
from plainsd.train.data.examples import Examples
from plainsd.train.data.latents import cache_latents
from plainsd.train.data.pictures import read_pictures
from plainsd.train.log import Log, read_log
from plainsd.train.loop import fit
from plainsd.train.methods.dreambooth import make_prior
from plainsd.train.methods.full import full
from plainsd.train.methods.inversion import inversion, settle
from plainsd.train.methods.lora import lora
from plainsd.train.objective import NoisyLatents, Objective, draw_noise, draw_timesteps, errors
from plainsd.train.optimizer import make_optimizer
from plainsd.train.options import FitOptions
from plainsd.train.order import Pick, random
from plainsd.train.processes import World
from plainsd.train.run import Look, Rhythm, run_training
from plainsd.train.trainer import Trainer

SIZES = torch.tensor([[64.0, 64, 0, 0, 64, 64]])


def write_pictures(place, count=6, side=64):
    place.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.new("RGB", (side, side), tuple(rng.integers(0, 256, 3).tolist())).save(place / f"{i}.png")
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


# ---- what decays


def test_weights_of_one_row_decay_too(examples):
    """Of rank 1, or of a word of one vector; norms, biases and a DoRA's lengths do not."""
    for method in (
        lora(tiny_sd(), examples, rank=1, targets="all", conv=True, dora=True),
        inversion(tiny_sd(), examples, "<cat>"),
        full(tiny_sd(), examples, text_encoder=True),
    ):
        norms = [m for m in method.modules.modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)]
        bare = {id(p) for norm in norms for p in norm.parameters()}
        bare |= {id(p) for n, p in method.modules.named_parameters() if n.endswith((".bias", ".magnitude"))}
        groups = make_optimizer(method.modules, FitOptions(steps=1, weight_decay=0.5)).param_groups
        found = [{id(p) for p in group["params"]} for group in groups]
        assert [group["weight_decay"] for group in groups] == [0.5, 0.0] and found[1] == bare
        assert found[0] == {id(p) for p in method.modules.parameters() if p.requires_grad} - bare


def as_before(optimizer, parameters, matrices=None):
    """The state of an optimizer in the groups of older versions, which went by shape."""
    kinds = [(p.ndim == 0 or p.numel() == max(p.shape), matrices is not None and id(p) in matrices) for p in parameters]
    order = sorted(range(len(parameters)), key=lambda i: kinds[i])
    groups = [(bare, matrix) for bare in (False, True) for matrix in ((False,) if matrices is None else (False, True))]
    same = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    return {
        "state": {
            place: optimizer.state[parameters[i]] for place, i in enumerate(order) if parameters[i] in optimizer.state
        },
        "param_groups": [
            same
            | {"params": [place for place, i in enumerate(order) if kinds[i] == kind], "weight_decay": 0.0}
            | ({} if matrices is None else {"matrix": kind[1]})
            for kind in groups
        ],
    }


@pytest.mark.parametrize("dora", [False, True])
def test_older_states_are_sorted_into_the_groups_of_now(examples, dora):
    options = FitOptions(steps=2, batch=2, lr=1e-3, warmup=0, cosine=False, weight_decay=0.1)
    trainer, again = (Trainer(lora(tiny_sd(), examples, rank=1, dora=dora), options) for _ in range(2))
    list(fit(trainer.method, 6, options, trainer=trainer))
    state = trainer.state() | {"optimizer": as_before(trainer.optimizer, trainer.parameters)}
    again.load_state(deepcopy(state))
    assert [group["weight_decay"] for group in again.optimizer.param_groups] == [0.1, 0.0]
    for p, q in zip(trainer.parameters, again.parameters, strict=True):
        kept = trainer.optimizer.state[p]
        assert kept and all(torch.equal(kept[name], again.optimizer.state[q][name]) for name in kept)
    for one in (trainer, again):
        one.update([Pick(i, i, random(0, 2, i)) for i in range(2)])
    assert torch.equal(weights(trainer.method.modules), weights(again.method.modules))


# ---- objectives


class Echo(nn.Module):
    """Instead of a UNet: answers with its input times a number."""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, x, timesteps, context, vector):
        return x * self.factor


def measured(objective=Objective(), *, mask=None, prediction="epsilon", scale=1.0, timesteps=(50, 900)):
    """The errors of a network that always answers 0; and the noise, the x0 and alpha_bar they come from."""
    picks = [Pick(i, i, random(0, 0, i)) for i in range(2)]
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = draw_noise(picks, (4, 8, 8), objective)
    noise = NoisyLatents(noise.target * scale, noise.shown * scale)
    schedule, timesteps = NoiseSchedule.scaled_linear(), torch.tensor(timesteps)
    found = errors(
        Echo(0.0), schedule, prediction, x0, noise, timesteps, torch.zeros(2, 1, 1), objective=objective, mask=mask
    )
    return found, noise, x0, schedule.alphas_cumprod[timesteps]


def test_the_plain_objective_is_the_mean_squared_error():
    found, noise, _, _ = measured()
    torch.testing.assert_close(found, noise.target.square().mean(dim=(1, 2, 3)))
    assert torch.equal(noise.shown, noise.target)


def test_min_snr_weighs_each_picture():
    plain, weighed = measured()[0], measured(Objective(min_snr=5.0))[0]
    alpha_bar = measured()[3]
    expected = (5 * (1 - alpha_bar) / alpha_bar).clamp(max=1)
    assert expected[0] < 0.4 and expected[1] == 1
    torch.testing.assert_close(weighed, plain * expected.float())
    velocity = measured(Objective(min_snr=5.0), prediction="v_prediction")[0] / measured(prediction="v_prediction")[0]
    torch.testing.assert_close(velocity, min_snr_weight("v_prediction", alpha_bar, 5.0).float())


def test_huber_is_plain_for_small_errors_and_linear_for_large_ones():
    small = Objective(huber=100.0)
    torch.testing.assert_close(measured(small)[0], measured()[0])
    large = Objective(huber=1e-3)
    torch.testing.assert_close(measured(large, scale=20.0)[0], 10 * measured(large, scale=2.0)[0], rtol=1e-2, atol=0)


def test_every_timestep_is_drawn_as_often():
    found = draw_timesteps([Pick(i, i, random(0, 1, i)) for i in range(2000)], 4)
    assert torch.bincount(found, minlength=4).tolist() == pytest.approx([500] * 4, abs=80)
    noisy = draw_timesteps([Pick(i, i, random(0, 1, i)) for i in range(2000)], 4, power=0.5)
    assert torch.bincount(noisy, minlength=4).tolist() == pytest.approx([125, 375, 625, 875], abs=80)


def test_offset_noise_shifts_whole_channels():
    picks = [Pick(i, i, random(0, 1, i)) for i in range(400)]
    noise = draw_noise(picks, (4, 8, 8), Objective(offset_noise=0.5))
    again = [Pick(i, i, random(0, 1, i)) for i in range(400)]
    shift = noise.target - draw_noise(again, (4, 8, 8)).target
    assert shift.flatten(2).std(dim=2).max() < 1e-6  # the same all over a channel
    assert shift[..., 0, 0].std() == pytest.approx(0.5, rel=0.1)
    channels = torch.corrcoef(shift[..., 0, 0].T)  # (4, 4)
    assert (channels - torch.eye(4)).abs().max() < 0.2  # each by a number of its own
    assert noise.shown is noise.target  # and to be found


def test_input_perturbation_is_not_to_be_found():
    objective = Objective(perturbation=0.1)
    picks = [Pick(i, i, random(0, 1, i)) for i in range(50)]
    noise = draw_noise(picks, (4, 8, 8), objective)
    surplus = noise.shown - noise.target
    assert surplus.std() == pytest.approx(0.1, rel=0.05)
    assert abs((surplus * noise.target).mean()) < 0.01
    plain = draw_noise([Pick(i, i, random(0, 1, i)) for i in range(50)], (4, 8, 8))
    assert torch.equal(noise.target, plain.target)  # the surplus is in what is shown alone
    schedule, timesteps, x0 = NoiseSchedule.scaled_linear(), torch.arange(10, 1000, 20), plain.target.roll(1, 0)
    found = errors(Echo(1.0), schedule, "epsilon", x0, noise, timesteps, torch.zeros(50, 1, 1)).detach()
    shown = network_input(x0, noise.shown, schedule.alphas_cumprod[timesteps].float())
    torch.testing.assert_close(found, (shown - noise.target).square().mean((1, 2, 3)))


def test_what_is_drawn_is_as_the_objective_wants_it(examples, monkeypatch):
    def picks():
        return [Pick(i, i, random(0, 2, i)) for i in range(6)]

    shifted = Objective(offset_noise=0.5)
    shift = examples.draw(picks(), 1000, shifted).noise.target - examples.draw(picks(), 1000).noise.target
    assert shift.flatten(2).std(dim=2).max() < 1e-6 and shift.abs().max() > 0.1
    assert replace(examples, timestep_power=0.01).draw(picks(), 1000).timesteps.min() > 900
    wanted, draw = [], Examples.draw
    monkeypatch.setattr(Examples, "draw", lambda *args: wanted.append(args[3:]) or draw(*args))
    lora(tiny_sd(), examples, prior=examples, objective=shifted).loss(picks())
    assert wanted == [(shifted,), (shifted,)]  # of its own pictures and the prior's


def test_what_is_masked_does_not_count():
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :2] = 1
    found, noise, _, _ = measured(mask=mask)
    torch.testing.assert_close(found, noise.target[..., :2].square().mean(dim=(1, 2, 3)) / 4)


@pytest.mark.parametrize(
    "wrong", [{"min_snr": 0.0}, {"huber": -1.0}, {"offset_noise": 2.0}, {"perturbation": float("nan")}]
)
def test_objectives_out_of_range(wrong):
    with pytest.raises(UserError, match="out of range"):
        Objective(**wrong)


# ---- text states


def test_states_are_those_of_the_prompt_and_made_once(monkeypatch):
    sd = tiny_sd()
    reader, asked = Reader(sd), []
    forward = sd.text_encoders[0].forward
    monkeypatch.setattr(sd.text_encoders[0], "forward", lambda ids: asked.append(len(ids)) or forward(ids))
    context, vector = reader(["a (red) cat", "", "a (red) cat"], SIZES.expand(3, 6))
    assert asked == [1, 1] and vector is None  # each caption once, and alone
    reader(["a (red) cat"], SIZES)
    assert asked == [1, 1]
    with autocast("cpu", False):  # attention as in a step
        expected = encode_prompts(sd, [[Weighted("a (red) cat")]]).context
    assert torch.equal(context[:1], expected) and torch.equal(context[2:], expected)
    noted = encode_prompts(sd, ["a (red) cat"]).context
    assert (expected - noted).abs().max() > 0.1  # notation has no meaning here


def test_remembered_states_do_not_depend_on_autocast():
    sd = tiny_sd()
    with torch.autocast("cpu", torch.bfloat16):
        early = Reader(sd)(["x"], SIZES)[0]
    assert torch.equal(early, Reader(sd)(["x"], SIZES)[0])
    with autocast("cpu", False):  # as in a step, which has its own form of attention
        early = Reader(sd)(["x"], SIZES)[0]
    assert torch.equal(early, Reader(sd)(["x"], SIZES)[0])


def test_captions_have_a_fixed_length():
    sd, long = tiny_sd(), "word, " * 60
    one, two = Reader(sd), Reader(sd, chunks=2)
    assert one([long], SIZES)[0].shape[1] == one(["x"], SIZES)[0].shape[1] == 77
    assert two([long], SIZES)[0].shape[1] == two(["x"], SIZES)[0].shape[1] == 154
    beside = encode_prompts(sd, [[Weighted("x")], [Weighted(long)]]).context[:1, :154]
    torch.testing.assert_close(two(["x"], SIZES)[0], beside)
    assert cut_captions(sd, ["x", long], 1) == 1 and cut_captions(sd, ["x", long], 9) == 0


@pytest.mark.parametrize("variant", [TINY, TINY_XL], ids=["SD", "SDXL"])
@pytest.mark.parametrize("chunks", [1, 2])
@torch.no_grad()
def test_all_tokens_that_fit_are_read(variant, chunks):
    """A comma near the end of the last chunk that is read moves nothing into one that is not."""
    sd, caption = tiny_sd(variant), "words, " * 60
    keys = sd.tokenizers[0].encode(caption)
    first = len(chunked(sd.tokenizers[0], [Weighted(caption)])[0])
    assert first < 75 and len(keys) > 150
    read = [keys[:75]] if chunks == 1 else [keys[:first], keys[first : first + 75]]
    parts = [[[[(key, 1.0) for key in chunk] for chunk in read]]] * len(sd.text_encoders)
    context, vector = Reader(sd, chunks=chunks)([caption], SIZES)
    with autocast("cpu", False):  # attention as in a step
        expected, pooled = encode_chunks(sd, parts, clip_skip=1)
    assert torch.equal(context, expected) and context.shape[1] == 77 * chunks
    assert vector is None or torch.equal(vector[:, : pooled.shape[1]], pooled)


def test_what_is_remembered_has_a_limit():
    reader = Reader(tiny_sd(), room=3 * 77 * 32 * 4)
    for word in "abcd":
        reader([word], SIZES)
    assert list(reader._known) == ["b", "c", "d"] and reader._bytes == reader.room
    assert torch.equal(reader(["a"], SIZES)[0], Reader(tiny_sd())(["a"], SIZES)[0])


@pytest.mark.parametrize("variant", [TINY_XL, TINY_REFINER], ids=["base", "refiner"])
@torch.no_grad()
def test_sdxl_is_told_the_sizes(variant):
    sd = tiny_sd(variant)
    sizes = torch.tensor([[80.0, 96, 8, 16, 64, 64]])
    context, vector = Reader(sd)(["a cat"], sizes)
    with autocast("cpu", False):  # attention as in a step
        expected = encode_prompts(sd, [[Weighted("a cat")]], size=(64, 64), original=(96, 80), crop=(16, 8))
    assert torch.equal(context, expected.context) and torch.equal(vector, expected.vector)


def test_an_empty_caption_is_zeros_to_sdxl():
    context, vector = Reader(tiny_sd(TINY_XL))(["", "x"], SIZES.expand(2, 6))
    assert context[0].abs().max() == 0 == vector[0, :16].abs().max() and context[1].abs().max() > 0


@pytest.mark.parametrize("zeros", [True, False])
@torch.no_grad()
def test_an_empty_caption_is_what_an_empty_negative_prompt_is(zeros):
    """In training and in drawing, by `force_zeros_for_empty_prompt` of the model's own model_index.json."""
    sd = tiny_sd(replace(TINY_XL, force_zeros=zeros))
    context, vector = Reader(sd)([""], SIZES)
    with autocast("cpu", False):  # attention as in a step
        drawn = encode_prompt(sd, "x", "", 4, size=(64, 64)).negative(0)
    torch.testing.assert_close((context, vector), (drawn.context, drawn.vector))
    assert bool(context.any()) is not zeros


# ---- methods


OPTIONS = FitOptions(steps=8, batch=3, lr=3e-3, warmup=0, cosine=False, ema=0)


@pytest.mark.parametrize("method", ["full", "lora", "text lora", "inversion"])
def test_a_method_learns_and_moves_nothing_else(examples, method):
    sd = tiny_sd()
    before = [weights(network) for network in (sd.unet, *sd.text_encoders, sd.vae)]
    made = {
        "full": lambda: full(sd, examples),
        "lora": lambda: lora(sd, examples, rank=4, targets="all-linear"),
        "text lora": lambda: lora(sd, examples, rank=4, text_encoder=True),
        "inversion": lambda: inversion(sd, examples, "colour", vectors=2, initial="x"),
    }[method]()
    start = made.validate(examples)["validation"]
    list(fit(made, 6, replace(OPTIONS, lr=0.3 if method == "inversion" else 3e-3)))
    assert made.validate(examples)["validation"] < start
    if method != "full":
        for adapter in attached(sd):
            adapter.remove()
        settle(sd)
        sd.text_encoders[0].token.weight = nn.Parameter(sd.text_encoders[0].token.weight[: TINY.text[0].vocab])
        assert torch.equal(weights(sd.unet), before[0])
    assert torch.equal(weights(sd.text_encoders[0]), before[1]) and torch.equal(weights(sd.vae), before[2])


def test_full_moves_the_text_encoder_if_asked(examples):
    """AdamW's first step goes down the gradient, by the learning rate in every number."""
    sd, options = tiny_sd(), replace(OPTIONS, steps=1, weight_decay=0.0)
    method, weight = full(sd, examples, text_encoder=True), sd.text_encoders[0].blocks[0].fc1.weight
    picks = [Pick(i, i, random(0, 2, i)) for i in range(3)]
    method.loss(picks)[0].backward()
    before, gradient = weight.detach().clone(), weight.grad.clone()
    method.modules.zero_grad()
    Trainer(method, options).update([Pick(i, i, random(0, 2, i)) for i in range(3)])
    expected = -options.lr * gradient.sign()
    right = ((weight.detach() - before - expected).abs() < 0.01 * options.lr).double().mean()
    assert right > 0.99  # but where the gradient is next to nothing


def test_accumulated_micro_batches_equal_the_big_batch(examples):
    gradients = []
    for options in (replace(OPTIONS, steps=1, batch=4), replace(OPTIONS, steps=1, batch=1, accumulate=4)):
        method = full(tiny_sd(), examples)
        trainer = Trainer(method, options)
        trainer.optimizer.step = lambda: None
        trainer.optimizer.zero_grad = lambda set_to_none: None
        list(fit(method, 6, options, trainer=trainer))
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.parameters]))
    assert gradients[0].norm() > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_resumed_training_is_the_same_bit_for_bit(examples, tmp_path):
    options = replace(OPTIONS, steps=6, save_every=3, ema=0.9)
    whole = lora(tiny_sd(), examples, rank=2, text_encoder=True)
    losses = [report.loss for report in fit(whole, 6, options)]
    for report in fit(lora(tiny_sd(), examples, rank=2, text_encoder=True), 6, options, tmp_path):
        if report.step == 4:
            break
    second = lora(tiny_sd(), examples, rank=2, text_encoder=True, seed=9)
    assert [report.loss for report in fit(second, 6, options, tmp_path)] == losses[3:]
    assert torch.equal(weights(whole.modules), weights(second.modules))


def test_half_the_base_in_bfloat16(examples):
    sd = tiny_sd()
    method = lora(sd, examples, rank=2)
    sd.unet.to(torch.bfloat16)
    for adapter in method.modules["lora"]:
        adapter.float()
    reports = list(fit(method, 6, replace(OPTIONS, bf16=True)))
    assert all(np.isfinite(report.loss) for report in reports)
    assert {p.dtype for p in method.modules.parameters()} == {torch.float32}


def test_the_prior_counts_with_its_weight(examples):
    def loss(prior, weight=1.0):
        method = full(tiny_sd(), examples, prior=prior, prior_weight=weight)
        with torch.no_grad():
            return method.loss([Pick(i, i, random(0, 2, i)) for i in range(2)])

    alone, both, double = loss(None)[0], loss(examples), loss(examples, 2.0)
    assert both[1]["own"] == pytest.approx(alone.item()) and both[1]["prior"] > 0
    assert double[0].item() == pytest.approx(alone.item() + 2 * both[1]["prior"].item())


def test_a_prior_set_is_made_once(tmp_path, monkeypatch):
    sd = tiny_sd()
    make_prior(sd, tmp_path, "a dog", 6, say=lambda _: None)
    assert len(read_pictures(tmp_path, 64)) == 6
    content = (tmp_path / "00005.png").read_bytes()
    (tmp_path / "00005.txt").unlink()  # as a kill would leave it
    make_prior(sd, tmp_path, "a dog", 6, say=lambda _: None)
    assert (tmp_path / "00005.png").read_bytes() == content
    make_prior(sd, tmp_path, "a dog", 7, say=lambda _: None)
    assert len(read_pictures(tmp_path, 64)) == 7
    monkeypatch.setattr("plainsd.train.methods.dreambooth.text_to_image", None)
    make_prior(sd, tmp_path, "a dog", 7)
    (tmp_path / "prior.json").unlink()  # as older versions left it
    with pytest.raises(UserError, match="another --prior-prompt"):
        make_prior(sd, tmp_path, "a cat", 7)
    make_prior(sd, tmp_path, "a dog", 7)


def test_an_inpainting_model_is_refused(examples):
    with pytest.raises(UserError, match="reads a mask or a picture beside the latents"):
        full(tiny_sd(in_channels=9), examples)


# ---- killed at any moment


class Line:
    """A method small enough to be trained in no time."""

    def __init__(self):
        torch.manual_seed(0)
        self.modules = nn.ModuleDict({"line": nn.Linear(3, 1)})

    def loss(self, picks):
        x = torch.stack([torch.randn(3, generator=p.generator) for p in picks])
        return self.modules["line"](x).square().mean(), {}


LINE = FitOptions(steps=9, batch=2, lr=0.05, warmup=0, save_every=2, ema=0.9, keep=2)


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def trained_until_killed(place, moment):
    """In a process of its own: trains, and dies the third time that it comes to the moment."""
    import shutil

    left, replaced, removed, saved = [3], os.replace, shutil.rmtree, torch.save

    def third(then):
        left[0] -= 1
        if left[0] == 0:
            then()

    def half(state, file):
        def cut():
            saved(state, file)
            file.flush()
            os.truncate(file.name, 200)
            die()

        third(cut)
        saved(state, file)

    def rename(old, new):
        if "step-" in str(new) and moment == "before the name" and ".removing" not in str(new):
            third(die)
        replaced(old, new)
        if moment == "after the name" and ".removing" not in str(new) and "step-" in str(new):
            third(die)

    def remove(path, **more):
        if moment == "amid removing" and ".removing" in str(path):
            left[0] = 0
            os.truncate(Path(path) / "state.pt", 10)
            die()
        removed(path, **more)

    if moment == "amid writing":
        torch.save = half
    os.replace, shutil.rmtree = rename, remove
    method = Line()
    if moment == "amid a step":
        loss = method.loss
        method.loss = lambda picks: die() if picks[0].position == 10 else loss(picks)
    if moment == "amid the log":
        write = Log.write

        def cut(self, line):
            if line["step"] == 5:
                with open(self.path, "a") as file:
                    file.write('{"step": 5, "lo')
                die()
            write(self, line)

        Log.write = cut
    run_training(method, 4, LINE, Path(place), rhythm=RHYTHM)


RHYTHM = Rhythm(log=1, validate=100, sample=100)
MOMENTS = ["amid writing", "before the name", "after the name", "amid removing", "amid a step", "amid the log", "never"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, moment):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["plainsd.train.run", "test_finetune"])
    process = context.Process(target=trained_until_killed, args=(str(tmp_path / "run"), moment))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == (0 if moment == "never" else -signal.SIGKILL)
    states = checkpoints(tmp_path / "run" / "checkpoints")
    assert all(torch.load(state / "state.pt", weights_only=True)["step"] == int(state.name[5:]) for state in states)
    assert states
    resumed = run_training(Line(), 4, LINE, tmp_path / "run", rhythm=RHYTHM)
    whole = run_training(Line(), 4, LINE, tmp_path / "whole", rhythm=RHYTHM)
    assert torch.equal(weights(resumed.method.modules), weights(whole.method.modules))
    assert all(torch.equal(a, b) for a, b in zip(resumed.ema.values, whole.ema.values, strict=True))
    kept = [sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir()) for name in ("run", "whole")]
    assert kept[0] == kept[1] == ["step-00000008", "step-00000009"]
    logs = [
        [(line["step"], line["loss"]) for line in read_log(tmp_path / name / "log.jsonl")] for name in ("run", "whole")
    ]
    assert logs[0] == logs[1]


# ---- looking at a run on its way


def test_a_step_is_saved_before_it_is_looked_at(tmp_path):
    """To look takes memory of its own; and a result on the way is there before its state, or no resume would write
    it."""
    seen = []

    def noted(what):
        seen.append((what, [int(state.name[5:]) for state in checkpoints(tmp_path / "checkpoints")]))
        return {"validation": 1.0}

    options, rhythm = replace(LINE, steps=2, save_every=1), Rhythm(log=1, validate=1, sample=1, results=1)
    looks = {"validate": lambda: noted("validation"), "sample": lambda path: noted(path.stem), "save": noted}
    run_training(Line(), 4, options, tmp_path, rhythm, **looks, before=True)
    assert seen == [
        ("validation", []),
        ("step-00000000", []),
        ("step00000001", []),
        ("validation", [1]),
        ("step-00000001", [1]),
        ("validation", [1, 2]),
        ("step-00000002", [1, 2]),
    ]


@pytest.mark.parametrize(
    "error, why",
    [
        (UserError("the numbers are not finite; try another guidance"), "the numbers are not finite"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), "out of memory"),
    ],
    ids=["not finite", "memory"],
)
def test_a_sample_that_fails_is_reported_and_the_run_goes_on(tmp_path, capsys, error, why):
    def failing(path):
        if path.stem == "step-00000001":
            raise error
        path.touch()

    rhythm = Rhythm(log=1, validate=100, sample=1)
    trained = run_training(Line(), 4, replace(LINE, steps=2), tmp_path / "run", rhythm, sample=failing)
    assert f"no samples of step 1: {why}; the training goes on\n" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run" / "samples").iterdir()] == ["step-00000002.png"]
    plain = run_training(Line(), 4, replace(LINE, steps=2), tmp_path / "plain", RHYTHM)
    assert torch.equal(weights(trained.method.modules), weights(plain.method.modules))
    assert all(torch.equal(a, b) for a, b in zip(trained.ema.values, plain.ema.values, strict=True))


def test_what_a_sample_must_not_hide(tmp_path):
    """A full disk; and of several processes with parts of the weights one that the others would wait for."""

    def raising(error):
        def sample(path):
            raise error

        return sample

    with pytest.raises(SaveError, match="cannot write a sample grid: No space left"):
        run_training(Line(), 4, LINE, tmp_path / "a", Rhythm(sample=1), sample=raising(OSError(28, "No space left")))
    with pytest.raises(SaveError, match="cannot write a sample grid: no space"):
        run_training(Line(), 4, LINE, tmp_path / "b", Rhythm(sample=1), sample=raising(DiskError(tmp_path, "no space")))
    look = Look(SimpleNamespace(world=World(0, 2, sharded=True)), tmp_path, Rhythm(), None, None, None)
    with pytest.raises(torch.OutOfMemoryError):
        look._draw(raising(torch.OutOfMemoryError("full")), 1)
    look._draw(raising(UserError("not finite; it is the same in all of them")), 1)


# ---- the recipe: what it refuses, and what a second run leaves


def recipe(name):
    path = Path(__file__).parents[1] / "recipes" / "finetune" / f"{name}.py"
    found = importlib.util.spec_from_file_location(f"line_{name}", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """recipes/finetune/data.py for a model that knows four things."""
    data = recipe("data")
    if not data.FONT.is_file():
        pytest.skip("needs Debian's fonts-symbola")
    things = {"octopus": "\U0001f419", "red apple": "\U0001f34e", "cat": "\U0001f408", "key": "\U0001f511"}
    rows = [{"name": name, "character": character} for name, character in things.items()]
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/concepts.json").write_text(json.dumps({"concepts": rows}))
    return lambda *flags: data.main(["out", "--model", "model", "--heldout-share", "0", "--views", "2", *flags])


def test_drawings_made_again_are_the_same_and_none_is_left_of_others(draw):
    def files():
        return {str(path.relative_to("out")): path.read_bytes() for path in Path("out").rglob("*.*")}

    assert draw() == 0
    once = files()
    assert len(once) == 2 * (3 * 2 + 1) + 1 and draw() == 0 and files() == once
    Path("out/drawings/own.png").write_text("mine")
    assert draw("--views", "1", "--heldout-share", "0.5") == 0
    names = {Path(name).stem for name in files()}
    held = {path.stem for path in Path("out/heldout").glob("*.png")}
    assert names == {"octopus-0", "red-apple-0", "cat-0", "key-0", "own", "written"} and len(held) in (2, 3)
    assert not held & {path.stem for path in Path("out/drawings").glob("*.png")}


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--font", "words.txt"], "words.txt is not a font of outlines (unknown file format); apt-get install"),
        (["--heldout-share", "2"], "--heldout-share 2 is out of range; give a share from 0 up to below 1"),
        (["--heldout-share", "nan"], "--heldout-share nan is out of range"),
        (["--heldout-share", "0.9"], "--heldout-share 0.9 leaves nothing to train on; give a smaller one"),
        (["--views", "0"], "--views 0 is out of range; give 1 or more"),
    ],
)
def test_drawings_that_cannot_be_made_are_one_line(draw, capsys, flags, said):
    Path("words.txt").write_text("no font")
    assert draw(*flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error and not Path("out").exists()


def test_a_font_of_bitmaps_is_one_line(draw, capsys):
    noto = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    if not noto.is_file():
        pytest.skip("needs Debian's fonts-noto-color-emoji")
    assert draw("--font", str(noto)) == 2
    assert "NotoColorEmoji.ttf is not a font of outlines" in capsys.readouterr().err and not Path("out").exists()


@pytest.fixture
def picture(tmp_path, monkeypatch):
    """recipes/finetune/picture.py without models."""
    module = recipe("picture")
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("colour 1\n")
    monkeypatch.setattr(module.plainsd, "load", lambda *_, **__: None)
    monkeypatch.setattr(module, "trained", lambda *_: None)
    monkeypatch.setattr(module, "drawn", lambda sd, prompts, guidance: [Image.new("RGB", (8, 8)) for _ in prompts])
    return lambda *runs: module.main(["out.png", *runs, "--prompts", "prompts.txt"])


def test_a_run_without_validation_has_a_row_and_no_loss(picture, capsys):
    for name, line in (("with", {"step": 0, "validation": 0.5}), ("without", {"step": 3, "loss": 1})):
        Path(name).mkdir()
        Path(name, "log.jsonl").write_text(json.dumps(line) + "\n")
    assert picture("with", "without") == 0 and Path("out.png").is_file()
    assert capsys.readouterr().out == "with: validation loss 0.5000 at step 0, 0.5000 at step 0\n"


@pytest.mark.parametrize("runs", [("a/full", "b/full"), ("a/before",)])
def test_two_rows_of_one_name_are_refused(picture, capsys, runs):
    assert picture(*runs) == 2 and not Path("out.png").exists()
    name = Path(runs[0]).name
    assert f"two rows would have the name {name!r}; rename {runs[-1]}, and the result in it" in capsys.readouterr().err
