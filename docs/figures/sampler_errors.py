"""Chapter 2: error against calls of the network for every sampler, on the embedded model with its usual guidance.

Samplers without noise: the distance of latents from the end of their exact path, root mean square over the latents of
six pictures. That path is `heun` in 300 steps; CFG++ follows another equation, `euler_cfg_pp` in 400. Samplers with
noise have no such end. Theirs is the energy distance between two sets of pictures, the sampler's and that of the exact
paths from other noise (Szekely and Rizzo 2013), as a share of the exact pictures' mean distance.
"""

import style
import torch
from style import FAINT
from torch import Tensor

import plainsd
from plainsd.diffusion.samplers import SAMPLERS

SLOW = True
PROMPT = "a red apple on a blue background"
EVALUATIONS = (4, 6, 9, 14, 22, 36)  # calls of the network that a run aims at
ALIKE, SET = 6, 20  # pictures whose paths are compared; pictures of a set
PANELS = {
    "one call a step": ("euler", "ddim", "gradient_estimation", "dpmpp_2m", "res_multistep", "deis"),
    "one call, more history": ("euler", "plms", "ipndm", "lms", "unipc", "unipc_bh2"),
    "two and three calls": ("euler", "heun", "dpm2", "heunpp2"),
    "CFG++": ("euler_cfg_pp", "ddim_cfg_pp", "dpmpp_2m_cfg_pp"),
}
NOISY = {
    "with noise": ("ddpm", "euler_a", "sa_solver", "er_sde", "res_multistep_a", "dpmpp_2m_sde", "dpmpp_2m_sde_heun"),
    "with noise, others": (
        *("dpmpp_3m_sde", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "restart", "dpm_fast", "dpm_adaptive"),
        *("euler_a_cfg_pp", "lcm", "tcd"),
    ),
}
CALLS = {"heun": 2, "dpm2": 2, "dpm2_a": 2, "dpmpp_2s_a": 2, "dpmpp_sde": 2, "restart": 2, "heunpp2": 3}
CFG_PP = {"euler_cfg_pp": 1.5, "euler_a_cfg_pp": 1.5, "dpmpp_2m_cfg_pp": 1.5, "ddim_cfg_pp": 1.5 * 12.5}


def drawn(sd: plainsd.StableDiffusion, sampler: str, steps: int, count: int, seed: int = 0) -> tuple[Tensor, int]:
    """Latents (count, L, h, w), and the calls of the network that a picture took."""
    calls = []
    hook = sd.unet.register_forward_hook(lambda *_: calls.append(1))
    choices = {"sampler": sampler, "steps": steps, "count": count, "seed": seed, "guidance": CFG_PP.get(sampler)}
    *_, last = plainsd.text_to_image(sd, PROMPT, **choices)
    hook.remove()
    return last.latents, len(calls) if SAMPLERS[sampler].batched else len(calls) // count


def energy(a: Tensor, b: Tensor) -> float:
    """The energy distance of two sets of latents, as a share of the mean distance within b."""
    a, b = a.flatten(1), b.flatten(1)
    within = torch.pdist(b).mean()
    return ((2 * torch.cdist(a, b).mean() - torch.pdist(a).mean() - within) / within).item()


def curves() -> tuple[dict[str, list[tuple[int, float]]], float]:
    """For each sampler (calls, error), and the energy distance of two exact sets."""
    sd = plainsd.load(device="cpu", dtype="float32")
    exact, exact_cfg_pp = (drawn(sd, *run, ALIKE)[0] for run in (("heun", 300), ("euler_cfg_pp", 400)))
    sets = [drawn(sd, "heun", 40, SET, seed)[0] for seed in (1000, 2000)]
    found: dict[str, list[tuple[int, float]]] = {}
    for name in SAMPLERS:
        noisy = any(name in names for names in NOISY.values())
        for aim in EVALUATIONS if name != "dpm_adaptive" else EVALUATIONS[:1]:
            x, calls = drawn(sd, name, max(1, aim // CALLS.get(name, 1)), SET if noisy else ALIKE)
            end = exact_cfg_pp if name in CFG_PP else exact
            error = energy(x, sets[0]) if noisy else (x - end).square().mean().sqrt().item()
            found.setdefault(name, []).append((calls, error))
    return found, energy(sets[1], sets[0])


def draw() -> str:
    found, floor = curves()
    margins = {"left": 0.07, "right": 0.99, "bottom": 0.05, "top": 0.96, "wspace": 0.16, "hspace": 0.3}
    figure, axes = style.panels(3, 2, 8.4, **margins)
    for one, (title, names) in zip(axes.flat, (PANELS | NOISY).items(), strict=True):
        for number, name in enumerate(names):
            dashes = "-" if number < 8 else "--"
            one.plot(*zip(*found[name], strict=True), "o", linestyle=dashes, markersize=2.5, lw=1.2, label=name)
        one.set(title=title, xscale="log", yscale="log", xlim=(3, 70), xlabel="calls of the network")
        one.set_xticks([4, 8, 16, 32, 64], ["4", "8", "16", "32", "64"])
        one.minorticks_off()
        one.legend(fontsize=6.5)
    for one in axes[:2].flat:
        one.set_ylim(0.002, 1.5)
        one.set_yticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
    for one in axes[2]:
        one.axhline(abs(floor), color=FAINT, linewidth=0.8)
    for one in axes[:, 0]:
        one.set_ylabel("error")
    return style.svg(figure, "Error against calls of the network for every sampler, on the embedded model")


if __name__ == "__main__":
    style.write(__file__, draw())
