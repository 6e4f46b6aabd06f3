"""The spacings of k-diffusion, A1111 and ComfyUI against their published numbers and formulas."""

import math

import numpy as np
import pytest
from scipy import stats

from plainsd.diffusion import spacings
from plainsd.diffusion.samplers import sampler_levels
from plainsd.diffusion.schedule import EDMSchedule, NoiseSchedule
from plainsd.errors import UserError

SD = NoiseSchedule.scaled_linear()
TABLE = SD.sigmas.numpy()
LOG = np.log(TABLE)
STEPS = (1, 2, 3, 7, 10, 20, 28, 50, 333)

# Ten steps on Stable Diffusion's table, as those programs give them, in float32
TEN = {
    "uniform": ((14.61464, 7.83988, 4.60917), (0.62498, 0.36866, 0.02917)),
    "simple": ((14.61464, 8.30280, 5.08776), (0.82986, 0.56928, 0.34167)),
    "sgm_uniform": ((14.61464, 8.30717, 5.09241), (0.83188, 0.57119, 0.34370)),
    "ddim_uniform": ((8.39069, 5.13443, 3.34776), (0.57405, 0.34619, 0.04131)),
    "beta": ((14.61464, 11.54277, 7.37184), (0.65489, 0.39551, 0.19906)),
    "kl_optimal": ((14.61463, 4.23235, 2.39372), (0.37248, 0.19529, 0.02917)),
    "karras": ((14.61464, 9.10293, 5.47839), (0.20140, 0.08191, 0.02917)),
}


def levels(name, steps, schedule=SD, sampler="euler"):
    return np.array(sampler_levels(schedule, sampler, steps, name).sigmas)


@pytest.mark.parametrize("name", TEN)
def test_ten_steps(name):
    first, last = TEN[name]
    found = levels(name, 10)
    np.testing.assert_allclose(found, [*first, *found[3:-4], *last, 0], atol=1e-5)
    assert len(found) == 11


def test_ddim_uniform_may_have_one_level_more():
    found = levels("ddim_uniform", 28)
    assert len(found) == 30 and found[[0, -2]] == pytest.approx(TABLE[[981, 1]])
    assert sampler_levels(SD, "euler", 28, "ddim_uniform").timesteps == [float(t) for t in range(981, 0, -35)]


def formula(name, steps):
    """Level by level, each by its index."""
    low, high = TABLE[0], TABLE[-1]
    share = [i / (steps - 1) if steps > 1 else 0.0 for i in range(steps)]
    match name:
        case "uniform":
            return [math.exp(np.interp(999 * (1 - s), range(1000), LOG)) for s in share] + [0]
        case "sgm_uniform":
            return [math.exp(np.interp(999 * (1 - i / steps), range(1000), LOG)) for i in range(steps)] + [0]
        case "simple":
            return [TABLE[-(1 + int(i * 1000 / steps))] for i in range(steps)] + [0]
        case "karras":
            return [(high ** (1 / 7) + s * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for s in share] + [0]
        case "exponential" | "polyexponential":
            return [high * (low / high) ** s for s in share] + [0]
        case "kl_optimal":
            return [math.tan(s * math.atan(low) + (1 - s) * math.atan(high)) for s in share] + [0]
        case "kl_optimal_a1111":
            return [math.tan(i / steps * math.atan(low) + (1 - i / steps) * math.atan(high)) for i in range(steps + 1)]
        case "beta_a1111":
            return [low + stats.beta.ppf(1 - s, 0.6, 0.6) * (high - low) for s in share] + [0]
        case "beta":
            places = [round(stats.beta.ppf(1 - i / steps, 0.6, 0.6) * 999) for i in range(steps)]
            return [TABLE[t] for t in sorted(set(places), reverse=True)] + [0]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", [*sorted(TEN.keys() - {"ddim_uniform"}), "exponential", "polyexponential",
                                  "kl_optimal_a1111", "beta_a1111"])  # fmt: skip
def test_formulas(name, steps):
    np.testing.assert_allclose(levels(name, steps), formula(name, steps), rtol=1e-9, atol=1e-12)


def test_k_diffusions_polyexponential_bends_with_rho():
    found = spacings.polyexponential(0.1, 10.0, 5, rho=2.0)
    np.testing.assert_allclose(np.log10(found), [1 - 2 * (1 - (1 - i / 4) ** 2) for i in range(5)], atol=1e-12)


def test_align_your_steps_is_its_table_at_eleven_points():
    for name, known in (("align_your_steps", spacings.ALIGNED_SD1), ("align_your_steps_xl", spacings.ALIGNED_XL)):
        np.testing.assert_allclose(levels(name, 11)[:-1], known, rtol=1e-12)
        between = [math.sqrt(a * b) for a, b in zip(known, known[1:], strict=False)]
        np.testing.assert_allclose(levels(name, 21)[1:-1:2], between, rtol=1e-12)
    np.testing.assert_allclose(levels("align_your_steps", 10)[1:3], [6.11351, 3.56511], atol=1e-5)


def test_kl_optimal_of_a1111_ends_at_the_lowest_level():
    for sampler in ("euler", "ddim"):
        found = levels("kl_optimal_a1111", 10, sampler=sampler)
        assert len(found) == 11 and found[-1] == pytest.approx(SD.sigma_min, rel=1e-12)


def test_samplers_that_end_at_the_lowest_level_visit_it_once():
    for name in ("uniform", "kl_optimal", "beta_a1111", "karras", "polyexponential", "align_your_steps"):
        found = levels(name, 10, sampler="ddim")
        assert len(found) == 11 and found[-1] == SD.sigma_min < 0.95 * found[-2]


@pytest.mark.parametrize("a,b", [(0.6, 0.6), (0.5, 2.5), (3.0, 1.0), (1.0, 1.0)])
def test_quantiles_of_the_beta_distribution(a, b):
    shares = np.linspace(0, 1, 401)
    np.testing.assert_allclose(spacings.beta_quantiles(shares, a, b), stats.beta.ppf(shares, a, b), atol=1e-12)
    np.testing.assert_allclose(spacings.beta_share(shares, a, b), stats.beta.cdf(shares, a, b), atol=1e-13)


def test_other_tables():
    bent = SD.zero_terminal_snr()
    for name in ("uniform", "simple", "sgm_uniform", "beta", "karras"):
        assert levels(name, 10, bent)[0] == pytest.approx(bent.sigma_max)
    for name in ("karras", "exponential", "polyexponential", "kl_optimal", "kl_optimal_a1111", "beta_a1111"):
        found = levels(name, 10, EDMSchedule())
        assert (
            len(found) == 11
            and found[0] == pytest.approx(80)
            and found[-1] == pytest.approx(0.002 if name == "kl_optimal_a1111" else 0)
        )


def test_what_has_no_meaning_for_a_model():
    with pytest.raises(UserError, match="spacing 'simple' chooses among trained timesteps, .*; choose karras or expo"):
        levels("simple", 10, EDMSchedule())
    low = NoiseSchedule.scaled_linear(count=200)  # its highest level is 1.39
    with pytest.raises(UserError, match="levels 0.029 to 14.615, and this model's are 0.0292 to 1.39; choose another"):
        levels("align_your_steps", 10, low)
