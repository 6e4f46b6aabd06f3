"""Samplers that diffusers lacks, against numbers which their own programs gave: k-diffusion 0.1.1 (dpm_fast,
dpm_adaptive, dpmpp_2m_sde, dpmpp_3m_sde), ComfyUI of June 2026, and AUTOMATIC1111's web UI 1.10 (restart).

Each ran, in float64, on the model, the levels and the noise below, which are formulas; here are the latents it ended
with.
"""

import math
from itertools import count, islice

import pytest
import torch
from conftest import tiny_sd
from torch import Tensor

from plainsd.diffusion.conventions import planned_levels
from plainsd.diffusion.samplers import SAMPLERS
from plainsd.diffusion.schedule import NoiseSchedule
from plainsd.diffusion.solvers.stochastic import restarted
from plainsd.generate import text_to_image
from plainsd.pictures.guidance import COND, PERTURBED, UNCOND, guided_denoise, guided_pair
from plainsd.pictures.sampling import second_pass
from plainsd.pictures.settings import Resolved, Settings, notes

START = torch.tensor([3.0, -9.0, 0.5], dtype=torch.float64)
LOW, HIGH = 0.03, 14.6


def karras(steps: int) -> list[float]:
    """So many levels, and 0."""
    root = [HIGH ** (1 / 7) + i / (steps - 1) * (LOW ** (1 / 7) - HIGH ** (1 / 7)) for i in range(steps)]
    return [value**7 for value in root] + [0.0]


def to_lowest(steps: int) -> list[float]:
    return [HIGH * (LOW / HIGH) ** (i / steps) for i in range(steps)] + [LOW]


class Model:
    """Bent, and with less of it where there is no prompt; counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        self.calls += 1
        return torch.sin(x) / (1 + sigma)

    def pair(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        guided = self(x, sigma)
        return guided, guided - 0.1 * torch.cos(x)


def waves():
    """A noise that is not random: cos k, cos 2k, cos 3k at the k-th draw."""
    numbers = count(1)
    return lambda: torch.cos(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) * next(numbers))


PUBLISHED = [  # sampler, options, levels, steps, calls, latents
    ("heunpp2", {}, karras, 8, 21, (0.170210035997, -0.358508536207, 0.031913104046)),
    ("er_sde", {}, karras, 8, 8, (-0.171592710984, -0.353396485974, -0.138163935091)),
    ("dpmpp_2m_sde", {"eta": 0.3}, karras, 8, 8, (-0.273003095167, -0.28023481623, -0.091211487547)),
    ("dpmpp_2m_sde_heun", {"eta": 0.3}, karras, 8, 8, (-0.284429705284, -0.310963951688, -0.095629448643)),
    ("dpmpp_3m_sde", {"eta": 0.3}, karras, 8, 8, (-0.066426760749, -0.239851621755, -0.008231051289)),
    ("dpmpp_2m_sde", {}, karras, 8, 8, (-0.176629093358, -0.098583116576, -0.020951174469)),
    ("dpmpp_2m_sde_heun", {}, karras, 8, 8, (-0.163678821927, -0.168024848664, -0.014797400122)),
    ("dpmpp_3m_sde", {}, karras, 8, 8, (0.214426230506, -0.402563365945, 0.178675686337)),
    ("heunpp2", {}, karras, 21, 60, (0.172407365448, -0.368557166931, 0.031931839903)),
    ("ipndm", {}, karras, 21, 21, (0.172399385111, -0.371841429182, 0.031930527862)),
    ("euler_cfg_pp", {}, karras, 21, 21, (0.595249107274, 0.056987045815, 0.569075820604)),
    ("euler_a_cfg_pp", {}, karras, 21, 21, (0.311007579983, 0.282416102224, 0.308092895821)),
    ("dpmpp_2m_cfg_pp", {}, karras, 21, 21, (0.685576345196, 0.226115012484, 0.673653039192)),
    ("res_multistep", {}, karras, 21, 21, (0.173163391196, -0.37424437894, 0.031936590883)),
    ("res_multistep_a", {}, karras, 21, 21, (0.011718689205, -0.03031660322, -0.017016484456)),
    ("gradient_estimation", {}, karras, 21, 21, (0.174302545237, -0.377380991961, 0.031945934542)),
    ("er_sde", {}, karras, 21, 21, (0.009956833908, -0.331252574231, -0.086052408473)),
    ("restart", {}, karras, 21, 41, (0.3476741191, -0.354087726349, -0.449338891689)),
    ("restart", {}, karras, 40, 79, (-0.140414358964, -0.42812865723, 0.375113905989)),
    ("dpm_fast", {"eta": 0.0}, to_lowest, 5, 5, (0.033823939113, -0.762178737355, 0.031861663648)),
    ("dpm_fast", {}, to_lowest, 5, 5, (-0.306263206767, 3.842715449651, -0.354247946113)),
    ("dpm_fast", {"eta": 0.0}, to_lowest, 6, 6, (0.157325513862, -0.591190756114, 0.03271233923)),
    ("dpm_fast", {}, to_lowest, 6, 6, (0.137328069981, -0.556593902287, -0.499993786985)),
    ("dpm_fast", {"eta": 0.0}, to_lowest, 7, 7, (0.155381521359, -0.459160203833, 0.032695694276)),
    ("dpm_fast", {}, to_lowest, 7, 7, (0.114946494882, -0.387152116384, -0.040394904325)),
    ("dpm_fast", {"eta": 0.0}, to_lowest, 24, 24, (0.17857488564, -0.392485922524, 0.032894169167)),
    ("dpm_fast", {}, to_lowest, 24, 24, (-0.114764442061, -0.055583400452, -0.029954985338)),
    ("dpm_adaptive", {"eta": 0.0}, to_lowest, 9, 21, (0.177609550057, -0.382081680284, 0.03288986157)),
    ("dpm_adaptive", {}, to_lowest, 9, 36, (0.277319621346, -0.080832936168, -0.052652109401)),
]


@pytest.mark.parametrize(("name", "options", "levels", "steps", "calls", "latents"), PUBLISHED)
def test_ends_where_the_published_code_ends(name, options, levels, steps, calls, latents):
    model = Model()
    if "pair" in SAMPLERS[name].takes:
        options = {**options, "pair": model.pair}
    *_, last = SAMPLERS[name].run(model, START, levels(steps), waves(), **options)
    assert last.index == steps - 1 and last.sigma == 0
    assert model.calls == calls
    torch.testing.assert_close(last.x, torch.tensor(latents, dtype=torch.float64), rtol=0, atol=2e-12)


def test_of_the_row_only_the_ends_count_for_the_adaptive_sampler():
    """Each of its steps comes once, as soon as the path is past its level."""
    ends, calls = [], []
    for row in (to_lowest(4), to_lowest(30), karras(9)[:-1]):
        model = Model()
        steps = list(SAMPLERS["dpm_adaptive"].run(model, START, row, waves()))
        assert [step.index for step in steps] == list(range(len(row) - 1))
        assert all(step.sigma <= level for step, level in zip(steps, row[1:], strict=True))
        ends.append(steps[-1].x)
        calls.append(model.calls)
    assert calls == [36, 36, 36]
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(ends[0], ends[2], rtol=0, atol=1e-12)


def test_the_adaptive_sampler_ends_where_numbers_are_not_finite():
    steps = list(islice(SAMPLERS["dpm_adaptive"].run(lambda x, sigma: x * math.nan, START, to_lowest(5), waves()), 9))
    assert len(steps) == 5 and steps[-1].x.isnan().all()


@pytest.mark.parametrize(("steps", "again"), [(1, []), (19, []), (20, [9]), (35, [9]), (36, [9, 9]), (100, [25, 25])])
def test_restart_takes_as_many_steps_as_are_asked_for(steps, again):
    walked = restarted(karras(max(steps, 2))[-steps - 1 :])
    assert len(walked) == steps
    starts = [i for i in range(1, steps) if walked[i][0] > walked[i - 1][1]]
    assert len(starts) == len(again)
    for start, length in zip(starts, again, strict=True):
        assert walked[start - 1][1] == pytest.approx(0.1, abs=0.05) and walked[start][0] == pytest.approx(2, abs=0.7)
        assert walked[start + length - 1][1] == pytest.approx(walked[start - 1][1], rel=1e-12)
    assert restarted([0.09, 0.05, *([0.03] * 30)]) == list(
        zip([0.09, 0.05] + [0.03] * 29, [0.05] + [0.03] * 30, strict=False)
    )


def test_restart_ends_without_noise_where_the_row_stops_above_it():
    """As A1111's does with KL Optimal, from 20 steps on; before a refiner it stops where it is told."""
    table = NoiseSchedule.scaled_linear()
    row = planned_levels(table, "restart", 24, "kl_optimal_a1111", "a1111").sigmas
    assert row[-1] == pytest.approx(table.sigma_min) and restarted(row)[-1][1] == 0
    assert restarted(row[: 20 + 1])[-1][1] == row[20] > 0
    few = planned_levels(table, "restart", 7, "kl_optimal_a1111", "a1111").sigmas
    assert restarted(few)[-1][1] == few[-1] > 0


def test_without_a_pair_cfg_pp_is_the_sampler_of_the_same_name():
    twins = {"euler_cfg_pp": "euler", "euler_a_cfg_pp": "euler_a", "dpmpp_2m_cfg_pp": "dpmpp_2m", "ddim_cfg_pp": "ddim"}
    for name, twin in twins.items():
        *_, found = SAMPLERS[name].run(Model(), START, karras(9), waves())
        *_, expected = SAMPLERS[twin].run(Model(), START, karras(9), waves())
        torch.testing.assert_close(found.x, expected.x, rtol=0, atol=1e-12)


# In pictures.


def estimate(x: Tensor, sigma: float, *kinds: int) -> list[Tensor]:
    ASKED.append(kinds)
    answers = {COND: torch.sin(x), UNCOND: torch.cos(x), PERTURBED: x / 2}
    return [answers[kind] for kind in kinds]


ASKED: list[tuple[int, ...]] = []


@pytest.mark.parametrize(
    "choices", [{}, {"guidance": 1.0}, {"rescale": 0.7}, {"threshold": 0.9}, {"apg": 1.5}, {"perturbed": 3.0},
                {"perturbed": 3.0, "guidance": 1.0}, {"interval": (0.5, 1.0)}], ids=str,
)  # fmt: skip
def test_the_pair_is_one_pass_and_the_estimate_that_guidance_gives(choices):
    made = {"size": (8, 8), "steps": 1, "guidance": 3.0, "sampler": "euler_cfg_pp", "spacing": "karras"} | choices
    each, x = [Resolved(**made)], START.view(1, 1, 1, 3)
    wrappers = {"composed": False, "distilled": False, "device": torch.device("cpu")}
    expected = guided_denoise(estimate, each, "epsilon", **wrappers)(x, 2.0)
    ASKED.clear()
    guided, plain = guided_pair(estimate, each, "epsilon", **wrappers)(x, 2.0)
    assert len(ASKED) == 1
    torch.testing.assert_close(guided, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(plain, guided if "interval" in choices else torch.cos(x))


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_cfg_pp_without_guidance_is_the_sampler_of_the_same_name(name):
    """At 0 and outside the interval, in the second pass too; 1 is guidance like any other."""
    sd, ends = tiny_sd(), []
    for sampler, negative, choices in (
        (name, "", {"guidance": 1.0}),
        (f"{name}_cfg_pp", "y", {"guidance": 0.0}),
        (f"{name}_cfg_pp", "y", {"guidance": 7.0, "interval": (1000, 2000)}),
        (f"{name}_cfg_pp", "y", {"guidance": 1.0}),
    ):
        *_, last = text_to_image(sd, "x", negative, size=32, steps=3, sampler=sampler, spacing="karras", **choices)
        ends.append(last.latents)
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2]) and not torch.allclose(ends[0], ends[3])
    either = [f"{name}_cfg_pp", name]
    for first, second in (either, either[::-1]):
        choices = {"sampler": first, "hires_sampler": second, "hires": 1.5, "guidance": 0.0, "size": 32, "steps": 3}
        a, b = (text_to_image(sd, "x", negative, **choices) for negative in ("", "y"))
        (*_, a), (*_, b) = a, b
        assert torch.equal(a.latents, b.latents)
        again = second_pass(a.settings[0])
        assert (a.settings[0].guidance, again.guidance) == ((0, 1) if first == either[0] else (1, 0))
    assert notes(Settings(guidance=0, sampler=f"{name}_cfg_pp"))[0].startswith("guidance 0 is off: ")


def test_the_network_is_asked_once_a_step_and_the_scale_of_ddim_is_a_twelfth():
    sd, rows = tiny_sd(), []
    sd.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    ends = []
    for sampler, guidance in (("ddim_cfg_pp", 12.5), ("ddim_cfg_pp", 7.0), ("ddim", 1.0)):
        *_, last = text_to_image(sd, "a red apple", size=32, sampler=sampler, guidance=guidance, steps=3)
        ends.append(last.latents)
    assert rows == [2] * 6 + [1] * 3
    assert not torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])  # the noise is the unguided one's


@pytest.mark.parametrize("choices", [{}, {"hires": 2.0}, {"eta": 0.0}], ids=str)
def test_adaptive_pictures_are_the_same_alone_and_in_a_batch(choices):
    sd, options = tiny_sd(), {"sampler": "dpm_adaptive", "steps": 4, "size": 16} | choices
    events = text_to_image(sd, "a red apple", count=3, seed=5, **options)
    *steps, together = events
    assert [step.index for step in steps] == [*range(4), *range(len(steps) - 4)] and len(steps) == events.steps
    assert all(step.x.shape[0] == step.denoised.shape[0] == 3 for step in steps)
    for i in range(3):
        *_, alone = text_to_image(sd, "a red apple", seed=5 + i, **options)
        torch.testing.assert_close(together.latents[i : i + 1], alone.latents, rtol=0, atol=1e-6)
