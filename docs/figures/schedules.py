"""Noise levels along the schedules, and the levels that the spacings visit in ten steps."""

import numpy as np
import style
from style import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, RED, TEAL

from plainsd.diffusion.samplers import sampler_levels
from plainsd.diffusion.schedule import NoiseSchedule

STEPS = 10
SPACINGS = ("leading", "trailing", "linspace", "karras", "exponential", "beta", "kl_optimal", "align_your_steps")


def draw() -> str:
    ours = NoiseSchedule.scaled_linear()
    tables = {
        "scaled linear (Stable Diffusion)": (ours, BLUE),
        "the same with zero terminal SNR": (ours.zero_terminal_snr(), ORANGE),
        "linear (Ho et al. 2020)": (NoiseSchedule.linear(), GREEN),
        "cosine (Nichol and Dhariwal 2021)": (NoiseSchedule.cosine(), PURPLE),
    }
    figure, axes = style.panels(2, 2, 5.4, left=0.14, wspace=0.28, hspace=0.42, top=0.95, bottom=0.09)
    signal, level, steps, gap = axes.flat
    for name, (table, colour) in tables.items():
        t = np.unique(np.r_[0 : len(table) : 20, len(table) - 1])
        signal.plot(t, table.alphas_cumprod.sqrt()[t], color=colour)
        level.plot(t, table.sigmas[t], color=colour, label=name)
    signal.plot(t, (1 - ours.alphas_cumprod).sqrt()[t], color=BLUE, linestyle=":")
    signal.set(xlabel="timestep t", title="√ᾱ, the share of the picture; dotted √(1 − ᾱ)")
    level.legend(fontsize=6.5, loc="upper left")
    level.set(xlabel="timestep t", title="noise level σ (logarithmic)", yscale="log", ylim=(0.008, 8000))
    level.set_yticks([0.01, 0.1, 1, 10, 100, 1000], ["0.01", "0.1", "1", "10", "100", "1000"])
    level.minorticks_off()

    for row, name in enumerate(SPACINGS):
        sigmas = sampler_levels(ours, "euler", STEPS, name).sigmas[:-1]
        steps.plot(sigmas, [-row] * STEPS, "|", color=TEAL, markersize=9, markeredgewidth=1.6)
    steps.set(xscale="log", xlim=(20, 0.02), xlabel="noise level σ", title=f"where {STEPS} steps begin")
    steps.set_yticks([-row for row in range(len(SPACINGS))], SPACINGS, fontsize=7)
    steps.set_xticks([10, 1, 0.1], ["10", "1", "0.1"])
    steps.minorticks_off()

    for name, colour in (("trailing", FAINT), ("karras", RED), ("exponential", INK)):
        sigmas = [float(sigma) for sigma in sampler_levels(ours, "euler", STEPS, name).sigmas]
        gap.plot(range(STEPS), sigmas[:-1], "o-", color=colour, markersize=3, label=name)
    gap.set(xlabel="step", title="σ at each step", yscale="log", ylim=(0.02, 20))
    gap.set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
    gap.minorticks_off()
    gap.legend(fontsize=7)
    return style.svg(figure, "Noise levels along four schedules, and the levels that eight spacings visit in ten steps")


if __name__ == "__main__":
    style.write(__file__, draw())
