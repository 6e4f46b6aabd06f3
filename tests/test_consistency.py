"""Latent consistency distillation: the loss by the paper's equations, the teacher, resuming, the command."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import TINY, tiny_sd
from diffusers import DiffusionPipeline, LCMScheduler
from safetensors import safe_open
from test_finetune import OPTIONS, examples, folder, weights  # noqa: F401
from test_train_cli import base, pictures, train  # noqa: F401
from torch import nn

import plainsd
from plainsd.adapters.lora import attached, bases, inject
from plainsd.diffusion.consistency import boundary_scalings
from plainsd.diffusion.denoiser import PREDICTIONS
from plainsd.diffusion.schedule import NoiseSchedule, distilled
from plainsd.diffusion.solvers.one_call import euler
from plainsd.disk import read_json
from plainsd.errors import UserError
from plainsd.files.distilled import distillation_named
from plainsd.models.variants import ScheduleConfig
from plainsd.train.consistency import Distill, consistency_errors
from plainsd.train.log import read_log
from plainsd.train.loop import fit
from plainsd.train.methods.full import full
from plainsd.train.methods.lora import lora
from plainsd.train.objective import Objective
from plainsd.train.order import Pick, random

SD = NoiseSchedule.scaled_linear()
PICKS = (0, 1, 2)


def picks():
    return [Pick(i, i, random(0, 2, i)) for i in PICKS]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def text(number, count):
    return torch.full((count, 1, 1), float(number), dtype=torch.float64), None


# ---- the loss


def test_scalings_and_timesteps_are_those_of_diffusers():
    scheduler = LCMScheduler(original_inference_steps=50)
    scheduler.set_timesteps(50)
    visited = scheduler.timesteps.tolist()
    assert visited == distilled(1000, 50) == [(number + 1) * 20 - 1 for number in reversed(range(50))]
    for timestep in (0, *visited):
        theirs = scheduler.get_scalings_for_boundary_condition_discrete(timestep)
        assert [x.item() for x in boundary_scalings(torch.tensor(timestep).double())] == pytest.approx(
            theirs, rel=1e-12
        )


def network(shift):
    """Something that depends on all its inputs."""
    return lambda z, timesteps, context, vector: (
        torch.tanh(z + shift) * torch.cos(timesteps.double() / 300).view(-1, 1, 1, 1) + 0.3 * context.view(-1, 1, 1, 1)
    )


def by_the_paper(student, teacher, alpha_bar, prediction, x0, noise, number, w, k, c):
    """Algorithm 1 for one picture, in the paper's coordinates: z = alpha x0 + sigma noise."""

    def estimate(z, output, a, s):
        return {
            "epsilon": lambda: ((z - s * output) / a, output),
            "v_prediction": lambda: (a * z - s * output, s * z + a * output),
            "sample": lambda: (output, (z - a * output) / s),
        }[prediction]()

    def f(net, z, t, a, s):
        c_skip, c_out = 0.25 / ((t / 0.1) ** 2 + 0.25), (t / 0.1) / math.sqrt((t / 0.1) ** 2 + 0.25)
        if t == 0:
            return z
        return c_skip * z + c_out * estimate(z, net(z, torch.tensor([t]), *text(1, 1)), a, s)[0]

    above, below = (number + 1) * k - 1, number * k - 1
    a, s = math.sqrt(alpha_bar[above]), math.sqrt(1 - alpha_bar[above])
    a_below, s_below = (math.sqrt(alpha_bar[below]), math.sqrt(1 - alpha_bar[below])) if number else (1.0, 0.0)
    z = a * x0 + s * noise
    cond, uncond = (estimate(z, teacher(z, torch.tensor([above]), *text(i, 1)), a, s) for i in (1, 0))
    x0_w, noise_w = ((1 + w) * one - w * other for one, other in zip(cond, uncond, strict=True))
    target = f(student, a_below * x0_w + s_below * noise_w, below if number else 0, a_below, s_below)
    return ((f(student, z, above, a, s) - target) ** 2 + c**2).sqrt() - c


@pytest.mark.parametrize("schedule", [SD, SD.zero_terminal_snr()], ids=["sd", "zero snr"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_the_papers(prediction, schedule):
    numbers = torch.tensor([0, 1, 24, 48 if prediction == "epsilon" else 49])  # epsilon says nothing at zero SNR
    x0, noise = normal(4, 2, 3, 3), normal(4, 2, 3, 3, seed=1)
    mask = torch.ones(4, 1, 3, 3, dtype=torch.float64)
    mask[2, :, 0] = 0
    nets = network(0.1), network(-0.2)
    found = consistency_errors(
        *nets, schedule, prediction, x0, noise, numbers, text(1, 4), text(0, 4), distill=Distill(4.0), mask=mask
    )
    for i, number in enumerate(numbers.tolist()):
        alone = (x0[i : i + 1], noise[i : i + 1])
        each = by_the_paper(*nets, schedule.alphas_cumprod.tolist(), prediction, *alone, number, 3.0, 20, 0.001)
        expected = (each * mask[i]).mean()
        assert found[i].item() == pytest.approx(expected.item(), rel=1e-8)


def test_without_guidance_the_teacher_is_asked_once():
    asked = []

    def teacher(z, timesteps, context, vector):
        asked.append(context.flatten().tolist())
        return z

    inputs = (SD, "v_prediction", normal(1, 2, 3, 3), normal(1, 2, 3, 3, seed=1), torch.tensor([9]), text(1, 1))
    plain = consistency_errors(network(0), teacher, *inputs, text(0, 1), distill=Distill(1.0))
    assert asked == [[1.0]] and plain > 0


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_consistent_teacher_is_not_corrected(prediction):
    x0, noise = normal(50, 2, 3, 3), normal(50, 2, 3, 3, seed=1)

    def exact(z, timesteps, context, vector):
        a = SD.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return {"epsilon": noise, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x0, "sample": x0}[prediction]

    found = consistency_errors(
        exact, exact, SD, prediction, x0, noise, torch.arange(50), text(1, 50), text(0, 50), distill=Distill(7.5)
    )
    assert found.max() < 1e-6  # c_skip leaves 7e-6 of z at the lowest timestep


# ---- methods


def test_a_lora_that_comes_while_another_is_off_stays():
    sd = tiny_sd()
    first = inject(sd.unet, 2, generator=torch.Generator().manual_seed(0))
    with first.switched_off():
        second = inject(sd.unet, 2, generator=torch.Generator().manual_seed(1))
        assert [one.name for one in attached(sd)] == [second.name]
    assert {one.name for one in attached(sd)} == {first.name, second.name}
    with first.switched_off():
        second.remove()
    assert [one.name for one in attached(sd)] == [first.name]


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_teacher_is_the_model_without_the_lora(examples, dora):  # noqa: F811
    sd = tiny_sd()
    inject(sd, 2, name="earlier").set_strength(0.5)
    for p in attached(sd)[0].parameters():
        nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(3))
    inputs = (normal(2, 4, 8, 8).float(), torch.tensor([19, 999]), normal(2, 5, 32).float(), None)
    with torch.no_grad():
        before = sd.unet(*inputs)
        method = lora(sd, examples, rank=2, targets="all-linear", dora=dora, distill=Distill(4.0))
        for p in method.modules.parameters():
            p += 0.1 * normal(*p.shape).float()
        changed, names = sd.unet(*inputs), [list(module.adapters) for module in bases(sd).values()]
        assert (changed - before).abs().max() > 0.05
        assert torch.allclose(method.teacher(*inputs), before, atol=1e-4)  # MKL rounds as memory happens to lie
        assert torch.allclose(sd.unet(*inputs), changed, atol=1e-4)
    assert [list(module.adapters) for module in bases(sd).values()] == names


def test_the_lora_is_back_after_an_error(examples):  # noqa: F811
    sd = tiny_sd()
    method = lora(sd, examples, rank=2, distill=Distill(4.0))
    with pytest.raises(AttributeError):
        method.teacher("not", "what", "it", "reads")
    assert [one.name for one in attached(sd)] == ["lora_trained"]


def test_gradients_reach_the_lora_alone(examples):  # noqa: F811
    sd = tiny_sd()
    method = lora(sd, examples, rank=2, distill=Distill(4.0))
    method.loss(picks())[0].backward()
    own = {id(p) for p in method.modules.parameters()}
    assert all(p.grad is None for p in sd.unet.parameters() if id(p) not in own)
    assert all(adapter.up.grad.abs().max() > 0 for adapter in method.modules["lora"])


def test_the_student_moves_and_its_teacher_stays(examples):  # noqa: F811
    sd = tiny_sd()
    before = weights(sd.unet)
    method = full(sd, replace(examples, dropout=0.0), distill=Distill(4.0))
    start = method.validate(examples)
    assert start == method.validate(examples)
    list(fit(method, 6, replace(OPTIONS, steps=20, lr=1e-3)))
    assert torch.equal(weights(method.teacher), before) and not torch.equal(weights(sd.unet), before)
    assert method.validate(examples)["validation"] < start["validation"]


def test_bfloat16_keeps_the_gradients(examples):  # noqa: F811
    """Passes with gradients and without take turns in one autocast, which keeps the weights that it has cast."""
    found = []
    for enabled in (False, True):
        method = full(tiny_sd(), examples, distill=Distill(4.0, huber=1.0))  # smooth, so that roundings stay small
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            method.loss(picks())[0].backward()
        found.append(torch.cat([p.grad.flatten() for p in method.modules.parameters()]))
    assert torch.cosine_similarity(*found, dim=0) > 0.9


@pytest.mark.parametrize("method", [lora, full])
def test_resumed_distillation_is_the_same_bit_for_bit(examples, tmp_path, method):  # noqa: F811
    options = replace(OPTIONS, steps=4, save_every=2, ema=0.9)
    whole, cut, second = (method(tiny_sd(), examples, distill=Distill(4.0)) for _ in range(3))
    losses = [report.loss for report in fit(whole, 6, options)]
    for report in fit(cut, 6, options, tmp_path):
        if report.step == 3:
            break
    assert [report.loss for report in fit(second, 6, options, tmp_path)] == losses[2:]
    assert torch.equal(weights(whole.modules), weights(second.modules))


def test_the_student_is_drawn_in_four_steps(examples):  # noqa: F811
    sd = tiny_sd(replace(TINY, spacing="trailing"))
    lora(sd, examples, rank=2, distill=Distill(4.0))
    own = plainsd.text_to_image(sd, "x").settings[0]
    assert (own.sampler, own.steps, own.guidance, own.spacing) == ("lcm", 4, 1.0, "distilled")


ZERO_SNR = ScheduleConfig(zero_terminal_snr=True)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda e: lora(tiny_sd(), e, distill=Distill(4.0, steps=30)), "distill_steps 30 does not divide the 1000"),
        (lambda e: lora(tiny_sd(), e, distill=Distill(4.0), objective=Objective(min_snr=5)), "a loss of its own"),
        (lambda e: full(tiny_sd(), e, distill=Distill(4.0), text_encoder=True), "a loss of its own"),
        (lambda e: full(tiny_sd(guidance_dim=8), e, distill=Distill(4.0)), "distill the model it was made of"),
        (lambda e: full(tiny_sd(replace(TINY, schedule=ZERO_SNR)), e, distill=Distill(4.0)), "ends at zero SNR"),
        (lambda e: Distill(0.5), "distill 0.5 is out of range"),
        (lambda e: Distill(math.inf), "distill inf is out of range"),
        (lambda e: Distill(2.0, huber=0.0), "huber 0.0 is out of range"),
    ],
)
def test_what_cannot_be_distilled(examples, make, message):  # noqa: F811
    with pytest.raises(UserError, match=message):
        make(examples)


# ---- a distribution whose trajectories are known


CENTRES = torch.tensor([[2.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)


class Teacher(nn.Module):
    """v of points in the plane: normal ones around either of two centres."""

    def forward(self, z, timesteps, context, vector):
        a, spread = SD.alphas_cumprod[timesteps].view(-1, 1, 1, 1), 0.3
        variance = a * spread**2 + 1 - a
        means = CENTRES.view(2, 1, 2, 1, 1)
        chances = (-((z - a.sqrt() * means) ** 2).sum(2, keepdim=True) / (2 * variance)).softmax(0)
        x0 = (chances * (means + a.sqrt() * spread**2 / variance * (z - a.sqrt() * means))).sum(0)
        return (a.sqrt() * z - x0) / (1 - a).sqrt()


class Student(nn.Module):
    """The teacher, and a small network that starts at zero."""

    def __init__(self):
        super().__init__()
        self.teacher = Teacher()
        self.net = nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)).double()
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, z, timesteps, context, vector):
        time = timesteps.double() / 1000
        more = self.net(torch.stack([z[:, 0, 0, 0], z[:, 1, 0, 0], time, time**2], dim=1))
        return self.teacher(z, timesteps, context, vector) + more[..., None, None]


def test_a_distilled_student_needs_one_step():
    torch.manual_seed(0)
    student, teacher, count = Student(), Teacher(), 256
    x = SD.sigma_max * normal(count, 2, 1, 1, seed=7)

    def denoise(net, x, sigma):
        timestep, size = torch.full((count,), round(SD.timestep(sigma))), math.sqrt(1 + sigma**2)
        return x / size**2 - net(x / size, timestep, None, None) * sigma / size

    levels = [SD.sigma(timestep) for timestep in distilled(1000, 50)] + [0.0]
    with torch.no_grad():
        slow = [step.x for step in euler(partial(denoise, teacher), x, levels, None)][-1]

    def distance():
        with torch.no_grad():
            return (denoise(student, x, levels[0]) - slow).square().mean().item()

    def loss(seed):
        generator = torch.Generator().manual_seed(seed)
        x0 = CENTRES[torch.randint(2, (count,), generator=generator)][..., None, None]
        x0 = x0 + 0.3 * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        numbers, words = torch.randint(50, (count,), generator=generator), text(1, count)
        options = Distill(1.0, huber=0.1)
        return consistency_errors(
            student, teacher, SD, "v_prediction", x0, noise, numbers, words, words, distill=options
        ).mean()

    first, apart = loss(0).item(), distance()
    optimizer = torch.optim.Adam(student.net.parameters(), lr=3e-3)
    for step in range(1, 401):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 401)
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
    assert loss(0).item() < 0.8 * first
    assert distance() < 0.4 * apart


# ---- the command


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_an_lcm_lora_from_the_command_line(train, pictures, tmp_path):  # noqa: F811
    (tmp_path / "prompts.txt").write_text("colour 1\n")
    run = tmp_path / "run"
    more = ("--heldout", str(pictures), "--prompts", str(tmp_path / "prompts.txt"), "--lr", "1e-3")
    assert train("lora", "--distill", "4", "--steps", "2", *more)[0] == 0
    options = read_json(run / "options.json")
    assert (options["distill"], options["dropout"], options["huber"]) == ("4.0", "0.0", "0.001")
    validated = [line for line in read_log(run / "log.jsonl") if line.get("validation", 0) > 0]
    assert [line["step"] for line in validated] == [0, 2]
    assert (run / "samples" / "step-00000002.png").is_file()
    notes = metadata(run / "run.safetensors")
    assert notes["modelspec.usage_hint"] == "--sampler lcm --steps 4 --guidance 1"
    assert distillation_named(notes["modelspec.title"]) == "LCM"
    assert "modelspec.title" in metadata(run / "run-peft.safetensors")
    code, errors = train("lora", "--distill", "5", "--steps", "3", *more)
    assert code == 2 and "holds a run with another --distill" in errors[0]
    code, _ = train("lora", "--steps", "1", out=tmp_path / "plain")
    assert code == 0 and read_json(tmp_path / "plain" / "options.json")["dropout"] == "0.1"
    assert "modelspec.usage_hint" not in metadata(tmp_path / "plain" / "plain.safetensors")


def test_a_distilled_model_from_the_command_line(train, tmp_path):  # noqa: F811
    assert train("full", "--distill", "4", "--steps", "2", "--lr", "1e-3")[0] == 0
    place = tmp_path / "run" / "run"
    sd = plainsd.load(place, device="cpu", dtype="float32")
    own = plainsd.text_to_image(sd, "x").settings[0]
    assert (own.sampler, own.steps, own.guidance, own.spacing) == ("lcm", 4, 1.0, "distilled")
    pipe = DiffusionPipeline.from_pretrained(place)
    assert type(pipe.scheduler) is LCMScheduler and pipe.scheduler.config.original_inference_steps == 50
    assert json.loads((place / "model_index.json").read_text())["scheduler"] == ["diffusers", "LCMScheduler"]
    images = pipe("colour 1", num_inference_steps=4, guidance_scale=1, output_type="latent", generator=None).images
    assert images.isfinite().all()


def test_half_the_base_is_distilled_in_bfloat16(train, pictures):  # noqa: F811
    more = ("--dtype", "bfloat16", "--half-base", "--heldout", str(pictures))
    assert train("lora", "--distill", "4", "--steps", "2", *more)[0] == 0


@pytest.mark.parametrize(
    "method,flags,message",
    [
        ("inversion", ["--token", "x"], "--distill is for methods full and lora; method inversion"),
        ("lora", ["--min-snr", "5"], "has no --min-snr"),
        ("lora", ["--offset-noise", "0.1"], "has no --offset-noise"),
        ("full", ["--perturbation", "0.1"], "has no --perturbation"),
        ("full", ["--text-encoder"], "has no --text-encoder"),
        ("lora", ["--prior-prompt", "a dog"], "has no --prior"),
        ("lora", ["--shard"], "has no --shard"),
        ("lora", ["--distill", "0.5"], "distill 0.5 is out of range"),
        ("lora", ["--distill-steps", "0"], "distill_steps 0 does not divide"),
    ],
)
def test_options_that_do_not_go_together(train, tmp_path, method, flags, message):  # noqa: F811
    code, errors = train(method, "--distill", "4", *flags)
    assert code == 2 and len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "run" / "options.json").exists()
