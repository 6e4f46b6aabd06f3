"""The training loop and the two methods that begin from nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, tiny_sd
from PIL import Image
from test_finetune import as_before
from torch import nn

import plainsd
from plainsd.device import check_can_compile
from plainsd.errors import UserError
from plainsd.models.clip import TextConfig
from plainsd.models.layers import Attention
from plainsd.models.unet import UNetConfig
from plainsd.models.vae import VAE, VAEConfig
from plainsd.models.variants import ScheduleConfig, Variant
from plainsd.speed.training import autocast
from plainsd.text.tokenizer import END, Tokenizer
from plainsd.train.checkpoints import checkpoints, save_checkpoint
from plainsd.train.data.examples import Examples
from plainsd.train.data.latents import cache_latents
from plainsd.train.data.pictures import read_pictures
from plainsd.train.log import Log, read_log
from plainsd.train.loop import fit
from plainsd.train.methods.full import full
from plainsd.train.methods.scratch import from_scratch
from plainsd.train.methods.vae import VaeMethod, disturbed, init_vae, measure_scaling, psnr, validate
from plainsd.train.optimizer import hidden_matrices, make_optimizer, orthogonal
from plainsd.train.options import FitOptions
from plainsd.train.order import Order, Pick, random
from plainsd.train.run import Diary, Rhythm, run_training
from plainsd.train.trainer import Report, Trainer, learning_rate

TINY_VAE = VAEConfig(channels=(8, 8), layers=1, latent_channels=4, groups=2)
TINY_UNET = UNetConfig(channels=(16, 16), depth=(0, 1), heads=(2, 2), mid_depth=1, layers=1, context=16, groups=4)
TINY_TEXT = TextConfig(width=16, layers=2, heads=2, mlp=32, positions=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve captioned pictures of 16x16 pixels: one colour each."""
    place = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(12):
        Image.new("RGB", (20, 16), tuple(rng.integers(0, 256, 3).tolist())).save(place / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": [f"colour {i}", f"number {i}"]})
    (place / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def make_scratch(folder, tmp_path, seed=0):
    pictures = read_pictures(folder, 16)
    torch.manual_seed(0)
    vae = VAE(TINY_VAE)
    torch.manual_seed(seed)
    variant = Variant("tiny", TINY_UNET, TINY_VAE, (TINY_TEXT,), ScheduleConfig(zero_terminal_snr=True), "v_prediction")
    sd = from_scratch(variant, vae, Tokenizer({word: i for i, word in enumerate(VOCABULARY)}, []))
    return full(sd, Examples(pictures, cache_latents(vae, pictures, tmp_path / "cache")), text_encoder=True)


def weights(method):
    return torch.cat([p.detach().flatten() for p in method.modules.parameters()])


def untrained(end):
    """A model for a vocabulary whose end token has this id."""
    words = [word for word in VOCABULARY if word != END]
    words.insert(end, END)
    variant = Variant("tiny", TINY_UNET, TINY_VAE, (TINY_TEXT,))
    return from_scratch(variant, VAE(TINY_VAE), Tokenizer({word: i for i, word in enumerate(words)}, []))


@pytest.mark.parametrize("end", [0, 1, 3])
def test_an_end_token_of_any_id_survives_saving(tmp_path, end):
    sd = untrained(end)
    plainsd.save(sd, tmp_path / "model")
    again = plainsd.load(tmp_path / "model", dtype="float32")
    assert again.text_encoders[0].config.eos == again.tokenizers[0].end == end
    ids = torch.tensor([[5, 6, end, 7]])
    assert torch.equal(again.text_encoders[0](ids).pooled, sd.text_encoders[0](ids).pooled)


def test_an_end_token_that_config_json_cannot_say_is_refused_before_training():
    with pytest.raises(UserError, match="id 2, which CLIP's config.json reads as the largest id of all"):
        untrained(2)


# ---- data


def test_every_epoch_shows_every_picture_once_in_another_order():
    order = Order(10, seed=3)
    epochs = [[order(p) for p in range(e * 10, e * 10 + 10)] for e in range(3)]
    assert all(sorted(e) == list(range(10)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert Order(10, seed=3)(25) == epochs[2][5]  # a function of the position alone
    assert [Order(10, seed=4)(p) for p in range(10)] != epochs[0]


def test_random_numbers_belong_to_seed_purpose_and_position():
    def draw(*key):
        return torch.randn(4, generator=random(*key)).tolist()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({tuple(draw(s, p, i)) for s in range(4) for p in range(4) for i in range(40)}) == 640
    first = torch.tensor([draw(0, 2, i)[0] for i in range(2000)])
    assert abs(first.mean()) < 0.1 and abs(first.std() - 1) < 0.1
    assert abs((first[1:] * first[:-1]).mean()) < 0.1  # neighbouring positions are unrelated


def test_pictures_are_resized_and_cut_to_a_square(folder):
    pixels = read_pictures(folder, 16).pixels([0, 5])
    assert pixels.shape == (2, 3, 16, 16)
    assert pixels.std(dim=(2, 3)).max() < 1e-6  # one colour each, still


def test_pairs_of_picture_and_text(folder, tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"caption of {name}\n")
    items = read_pictures(tmp_path, 16).items
    assert [(i.path.name, i.texts) for i in items] == [("a.png", ("caption of a",)), ("b.png", ("caption of b",))]


def test_broken_pictures_and_empty_captions_are_listed_and_left_out(folder, tmp_path):
    for i in range(8):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a caption" if i else " \n")
    (tmp_path / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    said = []
    assert len(read_pictures(tmp_path, 16, bad_share=0.5, say=said.append)) == 6
    assert "left out 2 of 8" in said[0] and "0.png: no caption" in said[0] and "1.png" in said[0]
    with pytest.raises(UserError, match="2 of 8 pictures cannot be used"):
        read_pictures(tmp_path, 16, say=said.append)


def test_no_bad_pictures_are_no_more_than_any_share(folder, tmp_path):
    assert len(read_pictures(folder, 16, bad_share=0)) == 12
    for i in range(4):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a caption" if i else "")
    assert len(read_pictures(tmp_path, 16, bad_share=0.25, say=lambda _: None)) == 3  # just as many as are allowed
    for share in (0, 0.24):
        with pytest.raises(UserError, match=f"1 of 4 pictures cannot be used, more than {share:.0%}"):
            read_pictures(tmp_path, 16, bad_share=share, say=lambda _: None)


def test_a_folder_that_is_not_there_or_empty(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        read_pictures(tmp_path / "nowhere", 16)
    with pytest.raises(UserError, match="no pictures"):
        read_pictures(tmp_path, 16)


# ---- the loop


def test_twenty_steps_equal_ten_and_ten_bit_for_bit(folder, tmp_path):
    options = FitOptions(steps=20, batch=4, lr=1e-2, warmup=3, save_every=5)
    whole = make_scratch(folder, tmp_path)
    losses = [r.loss for r in fit(whole, 12, options)]

    first, states = make_scratch(folder, tmp_path), tmp_path / "states"
    for report in fit(first, 12, options, states):
        if report.step == 13:  # killed; there are states of steps 5 and 10
            break
    second = make_scratch(folder, tmp_path, seed=99)  # other weights, all to be replaced
    trainer = Trainer(second, options)
    rest = [r.loss for r in fit(second, 12, options, states, trainer)]
    assert len(rest) == 10 and rest == losses[10:]
    assert torch.equal(weights(whole), weights(second))
    assert len(checkpoints(states)) == 2


def test_accumulated_micro_batches_equal_the_big_batch(folder, tmp_path):
    a, b = make_scratch(folder, tmp_path), make_scratch(folder, tmp_path)
    gradients = []
    for method, options in ((a, FitOptions(steps=1, batch=12)), (b, FitOptions(steps=1, batch=3, accumulate=4))):
        trainer = Trainer(method, options)
        trainer.optimizer.step = lambda: None
        trainer.optimizer.zero_grad = lambda set_to_none: None
        for _ in fit(method, 12, options, trainer=trainer):
            gradients.append(torch.cat([p.grad.flatten() for p in trainer.parameters]))
    assert gradients[0].norm() > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


def test_learning_rate_warms_up_and_follows_a_cosine():
    options = FitOptions(steps=110, lr=1.0, warmup=10)
    rates = [learning_rate(options, s) for s in range(110)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[60] == pytest.approx(0.505)
    assert rates[109] == pytest.approx(0.01, abs=1e-3)
    assert learning_rate(replace(options, cosine=False), 100) == 1.0


class Fragile:
    """A method whose loss is not finite on the picture with index `bad`."""

    def __init__(self, bad=None):
        self.modules, self.bad = nn.ModuleDict({"line": nn.Linear(2, 1)}), bad
        nn.init.ones_(self.modules["line"].weight)

    def loss(self, picks):
        x = torch.tensor([[1.0, float(p.index)] for p in picks])
        loss = self.modules["line"](x).square().mean()
        return (loss * float("nan") if self.bad in [p.index for p in picks] else loss), {}


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    method = Fragile(bad=3)
    options = FitOptions(steps=12, batch=1, lr=0.01, max_skipped=3)  # in a row: these are not
    reports = list(fit(method, 4, options))
    assert reports[-1].skipped == 3 and torch.isfinite(weights(method)).all()
    assert sum(r.loss != r.loss for r in reports) == 3


@pytest.mark.parametrize(("loss", "gradient"), [(float("inf"), 1.0), (1.0, float("inf"))])
def test_the_loss_and_the_gradient_must_both_be_finite(loss, gradient):
    """An error that overflowed in a part without parameters, and a gradient that did under a loss that did not."""
    method = Fragile()
    weight = method.modules["line"].weight

    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum() * 0 + loss

        @staticmethod
        def backward(ctx, upward):
            return torch.full_like(weight, gradient)

    method.loss = lambda picks: (Both.apply(weight), {})
    (report,) = fit(method, 4, FitOptions(steps=1, batch=1, lr=0.01))
    assert report.skipped == 1 and torch.equal(weight, torch.ones(1, 2))


def test_the_weight_decay_pulls_matrices_and_no_rows_of_numbers():
    """With no gradient, a step takes lr * weight_decay of each number of a matrix, and nothing of a bias."""
    method = Fragile()
    line = method.modules["line"]
    torch.nn.init.ones_(line.bias)
    line.weight = nn.Parameter(torch.ones(3, 2))
    method.loss = lambda picks: (0 * (line.weight.sum() + line.bias.sum()), {})
    list(fit(method, 4, FitOptions(steps=1, batch=1, lr=0.1, warmup=0, cosine=False, weight_decay=0.5)))
    torch.testing.assert_close(line.weight.detach(), torch.full((3, 2), 0.95))
    assert torch.equal(line.bias.detach(), torch.ones(1))


def test_a_run_that_is_never_finite_stops_with_advice(tmp_path):
    method = Fragile(bad=0)
    before = weights(method).clone()
    with pytest.raises(UserError, match="not finite 5 steps in a row.*lower the learning rate"):
        list(fit(method, 1, FitOptions(steps=50, batch=1, max_skipped=5, save_every=1), tmp_path))
    assert torch.equal(weights(method), before) and not checkpoints(tmp_path)


def test_the_average_follows_the_weights_and_steps_aside():
    """After step n it is the mean of itself and the weights, by min(decay, (1 + n) / (10 + n)) of itself."""
    method, options = Fragile(), FitOptions(steps=30, batch=2, lr=0.1, warmup=0, ema=0.6)
    trainer, average = Trainer(method, options), weights(method).double()
    for report in fit(method, 4, options, trainer=trainer):
        decay = min(0.6, report.step / (9 + report.step))  # steps are counted from 0 there
        average = decay * average + (1 - decay) * weights(method).double()
        assert (torch.cat([value.flatten() for value in trainer.ema.values]) - average).abs().max() < 1e-6
    now = weights(method).clone()
    with trainer.ema:
        averaged = weights(method).clone()
    assert (averaged.double() - average).abs().max() < 1e-6 and (now.double() - average).abs().max() > 1e-3
    assert torch.equal(weights(method), now)


def test_micro_batches_of_unlike_size_count_by_their_pictures():
    """Five pictures, three and two at a time: the mean loss and the gradient of all five."""
    found = []
    for batch in (5, 3):
        torch.manual_seed(0)
        method = Fragile()
        trainer = Trainer(method, FitOptions(steps=1, batch=batch, clip=1e9, ema=0))
        trainer.optimizer.step = lambda: None
        trainer.optimizer.zero_grad = lambda set_to_none: None
        total, _, norm = trainer.update([Pick(i, i, random(0, 2, i)) for i in (0, 1, 2, 5, 9)])
        found.append(torch.stack([torch.tensor([total, norm]), trainer.parameters[0].grad[0]]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)


class Seen:
    """A method that keeps what it was shown: pictures, and the first number of each one's generator."""

    def __init__(self):
        self.modules, self.picks = nn.ModuleDict({"line": nn.Linear(2, 1)}), []

    def loss(self, picks):
        self.picks += [(p.index, torch.rand((), generator=p.generator).item()) for p in picks]
        return self.modules["line"].weight.square().sum(), {}


def test_a_seed_is_that_of_the_order_and_of_every_picks_numbers():
    shown = {}
    for seed in (0, 1):
        method = Seen()
        list(fit(method, 50, FitOptions(steps=5, batch=10, seed=seed)))
        order = Order(50, seed)
        expected = [(order(p), torch.rand((), generator=random(seed, 2, p)).item()) for p in range(50)]
        assert method.picks == expected
        shown[seed] = expected
    assert sum(a[0] == b[0] for a, b in zip(*shown.values(), strict=True)) < 8  # 1 of 50 on average
    assert not {number for _, number in shown[0]} & {number for _, number in shown[1]}


def test_a_checkpoint_of_another_model_is_refused(folder, tmp_path):
    options = FitOptions(steps=1, batch=1)
    list(fit(Fragile(), 4, options, tmp_path / "s"))
    with pytest.raises(UserError, match="another model"):
        list(fit(make_scratch(folder, tmp_path), 12, FitOptions(steps=2, batch=1), tmp_path / "s"))


def test_checkpoints_are_whole_or_absent_and_the_newest_are_kept(tmp_path, monkeypatch):
    trainer = Trainer(Fragile(), FitOptions(steps=1, keep=2))
    for trainer.step in (1, 2, 3):
        save_checkpoint(trainer, tmp_path)
    assert [c.name for c in checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    trainer.step = 4
    with pytest.raises(OSError):
        save_checkpoint(trainer, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


class Wide:
    """A method with a matrix large enough for 8-bit moments, and a bias that is too small."""

    def __init__(self):
        torch.manual_seed(0)
        self.modules = nn.ModuleDict({"line": nn.Linear(64, 64)})

    def loss(self, picks):
        x = torch.stack([torch.randn(64, generator=p.generator) for p in picks])
        return (self.modules["line"](x) - x.flip(1)).square().mean(), {}


def test_moments_in_8_bits(tmp_path):
    pytest.importorskip("torchao")
    if os.environ.get("ATEN_CPU_CAPABILITY") == "default":
        pytest.skip(
            "PyTorch 2.13 writes C++ for this processor's vectors under this setting, and has no headers for it"
        )
    try:
        check_can_compile(torch.device("cpu"), "--adam8bit")
    except UserError:
        pytest.skip("its step is compiled, and this machine has no compiler")
    options = FitOptions(steps=60, batch=8, lr=0.02, warmup=0, cosine=False, adam8bit=True, save_every=30)
    whole, parts, plain = Wide(), Wide(), Wide()
    trainer = Trainer(whole, options)
    losses = [report.loss for report in fit(whole, 8, options, trainer=trainer)]
    assert losses[-1] < 0.6 * losses[0]
    moments = trainer.optimizer.state[whole.modules["line"].weight]
    assert moments["exp_avg"].codes.dtype == torch.uint8
    list(fit(parts, 8, replace(options, steps=30), tmp_path))
    list(fit(parts, 8, options, tmp_path))
    assert torch.equal(weights(whole), weights(parts))  # after a resume too, bit for bit
    list(fit(plain, 8, replace(options, adam8bit=False)))
    off = (weights(whole) - weights(plain)).norm() / (weights(plain) - weights(Wide())).norm()
    assert 0 < off < 0.1


# ---- Muon


def test_orthogonalized_matrices_keep_their_directions():
    """U V^T of U S V^T, with singular values near 1; also where matrices are wide or tall, or have no full rank."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 24, 24), (3, 12, 40), (1, 40, 12)):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        found = orthogonal(x)
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        sizes = (u.mT @ found @ v.mT).diagonal(dim1=1, dim2=2)
        assert found.shape == x.shape and 0.6 < sizes.min() and sizes.max() < 1.3
        assert (u.mT @ found @ v.mT - torch.diag_embed(sizes)).abs().max() < 1e-6  # the same singular vectors
    assert orthogonal(torch.zeros(1, 4, 4)).abs().max() == 0


def test_a_linear_layers_steps_are_those_of_pytorchs_muon():
    ours, theirs = nn.Linear(40, 24), nn.Linear(40, 24)
    theirs.load_state_dict(ours.state_dict())
    start = ours.weight.detach().clone()
    numbers = {"lr": 0.01, "weight_decay": 0.1}
    mine = make_optimizer(ours, FitOptions(steps=1, muon=True, bf16=True, **numbers))
    pytorchs = torch.optim.Muon([theirs.weight], **numbers, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for seed in range(3):
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(seed))
        for layer, optimizer in ((ours, mine), (theirs, pytorchs)):
            (layer(x) ** 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            layer.zero_grad()
            nn.init.zeros_(layer.bias)
    moved = (theirs.weight - start).norm()
    assert moved > 0.1 and (ours.weight - theirs.weight).norm() < 0.02 * moved  # both in bfloat16


def test_a_convolution_is_the_matrix_of_its_outputs():
    """Whatever the layout of its memory."""
    layers = [nn.Conv2d(6, 8, 3), nn.Conv2d(6, 8, 3).to(memory_format=torch.channels_last), nn.Linear(54, 8)]
    generator = torch.Generator().manual_seed(0)
    first, gradient = (torch.randn(8, 54, generator=generator) for _ in range(2))
    for layer in layers:
        layer.weight.data.copy_(first.view(layer.weight.shape))
        layer.weight.grad = torch.empty_like(layer.weight).copy_(gradient.view(layer.weight.shape))
        make_optimizer(layer, FitOptions(steps=1, muon=True, lr=0.1)).step()
    found = [layer.weight.detach().reshape(8, 54) for layer in layers]
    assert torch.equal(found[0], found[1]) and torch.allclose(found[0], found[2], atol=1e-6)
    assert not torch.equal(found[0], first)


def test_the_matrices_of_hidden_layers():
    sd = tiny_sd()
    modules = nn.ModuleDict({"unet": sd.unet, "text": sd.text_encoders[0]})
    found = {id(p) for p in hidden_matrices(modules)}
    names = {name for name, p in modules.named_parameters() if id(p) in found}
    rest = {name for name, p in modules.named_parameters() if id(p) not in found and p.ndim > 1}
    assert "unet.mid.attn.blocks.0.cross_attn.k.weight" in names and "unet.mid.res1.conv1.weight" in names
    assert rest == {"unet.conv_in.weight", "unet.conv_out.weight", "text.token.weight", "text.position.weight"}
    sd.unet.requires_grad_(False)
    assert {name.partition(".")[0] for name, p in modules.named_parameters() if p.requires_grad} == {"text"}
    assert all(p.requires_grad for p in hidden_matrices(modules))


def test_a_discriminator_lies_where_the_autoencoder_does(folder):
    judge = VaeMethod(VAE(TINY_VAE).to("meta"), read_pictures(folder, 16), patch_weight=1.0).modules["discriminator"]
    assert {p.device.type for p in judge.parameters()} == {"meta"}


def test_a_discriminators_first_and_last_layers_are_adamws(folder):
    """Older versions took them for hidden ones: such a state goes on, and they begin anew."""
    options = FitOptions(steps=2, batch=2, lr=1e-3, muon=True)
    older = Trainer(VaeMethod(VAE(TINY_VAE), read_pictures(folder, 16), patch_weight=1.0), options)
    names = {id(p): name for name, p in older.method.modules.named_parameters()}
    matrices = {id(p) for p in hidden_matrices(older.method.modules)}
    judges = {names[number] for number in matrices if names[number].startswith("discriminator")}
    assert judges == {"discriminator.convs.1.weight", "discriminator.convs.2.weight"}
    list(fit(older.method, 12, options, trainer=older))
    outer = [
        p for p in older.parameters if names[id(p)] in ("discriminator.convs.0.weight", "discriminator.out.weight")
    ]
    for p in outer:
        older.optimizer.state[p] = {"step": torch.tensor(2.0), "momentum": torch.ones_like(p)}
    before = as_before(older.optimizer, older.parameters, matrices | {id(p) for p in outer})
    again = Trainer(VaeMethod(VAE(TINY_VAE), read_pictures(folder, 16), patch_weight=1.0), options)
    again.load_state(older.state() | {"optimizer": before})
    for p, q in zip(older.parameters, again.parameters, strict=True):
        found = again.optimizer.state.get(q, {})
        kept = {} if any(p is one for one in outer) else older.optimizer.state[p]
        assert found.keys() == kept.keys() and all(torch.equal(kept[name], found[name]) for name in kept)
    assert again.update([Pick(i, i, random(0, 2, i)) for i in range(2)])


def test_a_run_with_muon_goes_on_bit_for_bit(tmp_path):
    options = FitOptions(steps=60, batch=8, lr=0.02, warmup=0, cosine=False, muon=True, save_every=30)
    whole, parts, plain = Wide(), Wide(), Wide()
    losses = [report.loss for report in fit(whole, 8, options)]
    assert losses[-1] < 0.6 * losses[0]
    list(fit(parts, 8, replace(options, steps=30), tmp_path))
    list(fit(parts, 8, options, tmp_path))
    assert torch.equal(weights(whole), weights(parts))
    list(fit(plain, 8, replace(options, muon=False)))
    assert not torch.allclose(weights(whole), weights(plain))


# ---- a run in a folder


def test_the_log_drops_lines_that_are_done_again(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    for step in (1, 2, 3):
        log.write({"step": step})
    with open(log.path, "a") as file:
        file.write('{"step": 4, "lo')  # cut short by a crash
    log.rewind(2)
    assert read_log(log.path) == [{"step": 1}, {"step": 2}]


def test_a_run_logs_validates_samples_and_draws(folder, tmp_path):
    method, drawn = make_scratch(folder, tmp_path), []
    run_training(
        method,
        12,
        FitOptions(steps=4, batch=4),
        tmp_path / "run",
        Rhythm(2, 2, 2),
        lambda: method.validate(method.examples),
        drawn.append,
    )
    lines = read_log(tmp_path / "run" / "log.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [2, 4]
    assert [line["samples"] for line in lines if "loss" in line] == [8, 16]
    assert [line["step"] for line in lines if "validation" in line] == [2, 4]
    assert [path.name for path in drawn] == ["step-00000002.png", "step-00000004.png"]
    assert Image.open(tmp_path / "run" / "curve.png").size[0] > 300


def test_after_a_resume_the_bar_tells_this_runs_speed(tmp_path):
    diary = Diary(tmp_path, Rhythm(log=2), steps=1000, tensorboard=False, device=torch.device("cpu"))
    for step in (901, 902):
        if step == 902:
            time.sleep(0.3)
        diary.note(Report(step, 1.0, {}, 1e-3, 1.0, 0, 4 * step, 0.3))
    told = diary.bar.format_dict
    diary.close()
    assert told["initial"] == 900 and told["n"] == 902 and told["total"] == 1000
    left = (told["total"] - told["n"]) / told["rate"]
    assert told["elapsed"] >= 0.6 and 28 < left < 45  # 98 steps of 0.3 seconds, and not of 0.3 / 902
    assert read_log(tmp_path / "log.jsonl")[-1]["samples_per_s"] == pytest.approx(4 / 0.3)


SLOW_RUN = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_train import Fragile
from plainsd.train.loop import FitOptions
from plainsd.train.run import run_training
method = Fragile()
loss = method.loss
def slow(picks):
    time.sleep(0.02)
    return loss(picks)
method.loss = slow
sys.exit(0 if run_training(method, 4, FitOptions(steps=5000, batch=1, save_every=5000), Path({out!r})) is None else 3)
"""


def test_sigterm_saves_and_leaves_with_0(tmp_path):
    code = SLOW_RUN.format(tests=os.path.dirname(__file__), out=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while len(read_log(tmp_path / "log.jsonl")) < 2 and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    (state,) = checkpoints(tmp_path / "checkpoints")
    assert 0 < torch.load(state / "state.pt", weights_only=True)["step"] < 5000


# ---- the methods


def test_one_timestep_and_one_caption_for_each_sample(folder, tmp_path, monkeypatch):
    method, seen = make_scratch(folder, tmp_path), []
    monkeypatch.setattr(method, "errors", lambda batch, _: seen.append(batch) or torch.zeros(12, requires_grad=True))
    list(fit(method, 12, FitOptions(steps=40, batch=12)))
    captions = [caption for batch in seen for caption in batch.captions]
    timesteps = torch.cat([batch.timesteps for batch in seen])
    assert all(len(set(batch.timesteps.tolist())) > 6 for batch in seen)
    assert timesteps.min() < 30 and timesteps.max() > 970
    assert 0.05 < captions.count("") / len(captions) < 0.16  # a tenth is dropped
    assert {c.split()[0] for c in captions if c} == {"colour", "number"}


def test_scratch_learns(folder, tmp_path):
    method = make_scratch(folder, tmp_path)
    before = method.validate(method.examples)["validation"]
    list(fit(method, 12, FitOptions(steps=60, batch=12, lr=5e-3, warmup=5)))
    assert method.validate(method.examples)["validation"] < 0.8 * before


def test_latents_are_cached_once_and_anew_for_another_autoencoder(folder, tmp_path, monkeypatch):
    pictures, vae = read_pictures(folder, 16), VAE(TINY_VAE)
    first = cache_latents(vae, pictures, tmp_path)
    monkeypatch.setattr(VAE, "encode", None)  # a second encoding would fail
    assert torch.equal(first.data, cache_latents(vae, pictures, tmp_path).data)
    monkeypatch.undo()
    with torch.no_grad():
        vae.encoder.conv_in.weight.add_(1)
        mean = vae.encode(pictures.pixels([4])).mean
    again = cache_latents(vae, pictures, tmp_path)
    torch.testing.assert_close(again.moments(4)[:4].float(), mean[0], rtol=2e-3, atol=2e-3)
    assert (again.moments(4)[:4].float() - first.moments(4)[:4].float()).abs().max() > 0.01
    assert len(list(tmp_path.glob("*.f16"))) == 2


def test_cached_latents_are_the_autoencoders(folder, tmp_path):
    pictures, vae = read_pictures(folder, 16), VAE(TINY_VAE)
    q = vae.encode(pictures.pixels([4]))
    mean, std = cache_latents(vae, pictures, tmp_path).moments(4)[None].float().chunk(2, dim=1)
    torch.testing.assert_close(mean, q.mean, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(std, (0.5 * q.logvar).exp(), rtol=2e-3, atol=2e-3)
    vae.config = replace(vae.config, scaling_factor=0.3)
    found = cache_latents(vae, pictures, tmp_path).draw([Pick(4, 0, random(0, 2, 0))])
    noise = torch.randn(mean.shape[1:], generator=random(0, 2, 0))
    torch.testing.assert_close(found, 0.3 * (mean + std * noise), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("patch_weight", [0.0, 0.002])
def test_the_autoencoder_learns(folder, patch_weight):
    torch.manual_seed(0)
    pictures = read_pictures(folder, 16)
    vae = VAE(TINY_VAE)
    init_vae(vae)
    before = validate(vae, pictures)["psnr"]
    method = VaeMethod(vae, pictures, patch_weight=patch_weight, patch_after=120)
    reports = list(fit(method, 12, FitOptions(steps=60, batch=12, lr=1e-2, warmup=5)))
    assert validate(vae, pictures)["psnr"] > before + 3
    assert ("catch" in reports[-1].metrics) == bool(patch_weight)


def test_edges_and_kl_count_by_their_weights(folder):
    torch.manual_seed(0)
    vae, pictures = VAE(TINY_VAE), read_pictures(folder, 16)
    (plain, numbers), (weighed, _) = (
        VaeMethod(vae, pictures, *weights).loss([Pick(0, 0, random(0, 2, 0))]) for weights in ((0.0, 0.0), (3.0, 2.0))
    )
    expected = 3 * numbers["edge"].item() + 2 * numbers["kl"].item()
    assert (weighed - plain).item() == pytest.approx(expected, rel=1e-4)


def test_latents_are_disturbed_by_each_pictures_own_strength(folder):
    latents, picks = 3 * torch.randn(400, 4, 8, 8), [Pick(i, i, random(0, 2, i)) for i in range(400)]
    again = [Pick(i, i, random(0, 2, i)) for i in range(7, 9)]
    found = disturbed(latents, picks, 0.2)
    torch.testing.assert_close(found[7:9], disturbed(latents[7:9], again, 0.2))  # whatever the batch
    shares = ((found - latents).std((1, 2, 3)) / latents.std((1, 2, 3))).double()
    assert shares.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.1)  # strengths are |N(0, 0.2^2)|
    assert shares.min() < 0.01 and shares.max() > 0.4
    assert disturbed(latents, picks, 0.0) is latents
    torch.manual_seed(0)
    vae, pictures = VAE(TINY_VAE), read_pictures(folder, 16)
    losses = [
        VaeMethod(vae, pictures, latent_noise=share).loss([Pick(i, i, random(0, 2, i)) for i in range(4)])[1]
        for share in (0.0, 1.0)
    ]
    assert losses[0]["kl"] == losses[1]["kl"] and losses[0]["l1"] != losses[1]["l1"]


def test_the_discriminator_is_fooled_and_taught_by_one_sum(folder):
    method = VaeMethod(VAE(TINY_VAE), read_pictures(folder, 16), patch_weight=0.25)
    judge = method.modules["discriminator"]
    real, fake = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16, requires_grad=True)
    method._adversarial(real, fake, {}, joined=True).backward()
    torch.testing.assert_close(fake.grad, 0.25 * torch.autograd.grad(-judge(fake).mean(), fake)[0])
    alone = torch.relu(1 - judge(real)).mean() + torch.relu(1 + judge(fake.detach())).mean()
    expected = torch.autograd.grad(alone, list(judge.parameters()))
    for p, g in zip(judge.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g)  # the part that fools leaves the judge's weights alone


def test_a_discriminator_rests_until_it_starts(folder):
    """Its loss counts nothing and it stays as it is, by weight decay too; it is measured all the same."""
    losses = []
    for after, weight in ((8, 1.0), (0, 0.0)):
        torch.manual_seed(0)
        method = VaeMethod(VAE(TINY_VAE), read_pictures(folder, 16), patch_weight=weight, patch_after=after)
        judge = method.modules["discriminator"] if weight else None
        first = [p.detach().clone() for p in judge.parameters()] if judge else []
        for report in fit(method, 12, FitOptions(steps=3, batch=4, lr=1e-2, warmup=0, ema=0)):
            losses.append(report.loss)
            if judge:
                rests = all(map(torch.equal, judge.parameters(), first))
                assert rests == (report.step < 3) and report.metrics["catch"] > 0
    assert losses[:2] == losses[3:5] and losses[2] > losses[5]


def test_scaling_makes_latents_unit_sized(folder):
    vae, pictures = VAE(TINY_VAE), read_pictures(folder, 16)
    q = vae.encode(pictures.pixels(range(12)))
    drawn = q.sample(torch.randn(q.mean.shape))
    assert measure_scaling(vae, pictures) * drawn.std().item() == pytest.approx(1, rel=0.05)


def test_psnr():
    a = torch.zeros(1, 3, 4, 4)
    assert psnr(a, a + 0.2).item() == pytest.approx(20)  # a tenth of the range is 20 dB


@pytest.mark.parametrize("causal", [False, True])
def test_written_out_attention_is_attention(causal, monkeypatch):
    """Values and gradients; and the form that is meant to be used is used."""
    torch.manual_seed(0)
    layer = Attention(24, 3, 16).double()
    x = torch.randn(2, 10, 24, dtype=torch.float64, requires_grad=True)
    context = torch.randn(2, 10, 16, dtype=torch.float64)
    softmax, calls = torch.softmax, []
    monkeypatch.setattr(torch, "softmax", lambda *a, **k: calls.append(a) or softmax(*a, **k))
    outputs = []
    for long in (True, False):
        with autocast("cpu", False, long_attention=long):
            out = layer(x, context, causal=causal)
        outputs.append([out, *torch.autograd.grad(out.square().sum(), [x, layer.k.weight])])
    for plain, written in zip(*outputs, strict=True):
        torch.testing.assert_close(written, plain, rtol=1e-12, atol=1e-12)
    assert len(calls) == (not causal)
