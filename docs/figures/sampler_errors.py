"""Chapter 2: error against calls of the network for the samplers, on the embedded model with its usual guidance.

Samplers without noise: the distance of latents from the end of their exact path, root mean square over six pictures;
the exact path is `heun` in 300 steps. Samplers with noise have no such end. Theirs is the energy distance between two
sets of pictures, the sampler's and that of `heun` in 40 steps from other noise (Szekely and Rizzo 2013), as a share of
the mean distance within the latter. The CFG++ samplers are left out: the more steps they take, the more they guide, so
there is nothing that they approach.
"""

import style
import torch
from style import FAINT
from torch import Tensor

import plainsd
from plainsd.diffusion.samplers import SAMPLERS

SLOW = True  # ten minutes on one core
PROMPT = "a red apple on a blue background"
EVALUATIONS = (4, 6, 9, 14, 22, 36)  # calls of the network that a run aims at
ALIKE, SET = 6, 20  # pictures whose paths are compared; pictures of a set
PANELS = {
    "one call a step": ("euler", "ddim", "gradient_estimation", "dpmpp_2m", "res_multistep", "deis"),
    "one call, more history": ("euler", "plms", "ipndm", "lms", "unipc", "unipc_bh2"),
    "two and three calls": ("euler", "heun", "dpm2", "heunpp2"),
    "with noise, two calls": ("euler_a", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "restart", "dpm_fast", "dpm_adaptive"),
}
NOISY = {
    "with noise": ("euler_a", "ddpm", "sa_solver", "er_sde", "lcm", "tcd"),
    "with noise, multistep": (*("euler_a", "res_multistep_a", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde"),),
}
LOWEST = 0.005  # of the energy distance, which may be slightly negative
CALLS = {"heun": 2, "dpm2": 2, "dpm2_a": 2, "dpmpp_2s_a": 2, "dpmpp_sde": 2, "restart": 2, "heunpp2": 3}


def drawn(sd: plainsd.StableDiffusion, sampler: str, steps: int, count: int, seed: int = 0) -> tuple[Tensor, int]:
    """Latents (count, L, h, w), and the calls of the network that a picture took."""
    calls = []
    hook = sd.unet.register_forward_hook(lambda *_: calls.append(1))
    *_, last = plainsd.text_to_image(sd, PROMPT, sampler=sampler, steps=steps, count=count, seed=seed)
    hook.remove()
    return last.latents, len(calls) if SAMPLERS[sampler].batched else len(calls) // count


def energy(a: Tensor, b: Tensor) -> float:
    """The energy distance of two sets of latents, as a share of the mean distance within b."""
    a, b = a.flatten(1), b.flatten(1)
    within = torch.pdist(b).mean()
    return ((2 * torch.cdist(a, b).mean() - torch.pdist(a).mean() - within) / within).item()


def with_noise() -> set[str]:
    """The samplers that are compared by sets."""
    return {name for title, names in (PANELS | NOISY).items() if "with noise" in title for name in names}


def curves() -> tuple[dict[str, list[tuple[int, float]]], float]:
    """For each sampler (calls, error), and the energy distance of two sets of `heun`."""
    sd = plainsd.load(device="cpu", dtype="float32")
    exact = drawn(sd, "heun", 300, ALIKE)[0]
    sets = [drawn(sd, "heun", 40, SET, seed)[0] for seed in (1000, 2000)]
    found: dict[str, list[tuple[int, float]]] = {}
    for name in dict.fromkeys(name for names in (PANELS | NOISY).values() for name in names):
        noisy = name in with_noise()
        for aim in EVALUATIONS if name != "dpm_adaptive" else EVALUATIONS[:1]:
            x, calls = drawn(sd, name, max(1, aim // CALLS.get(name, 1)), SET if noisy else ALIKE)
            error = energy(x, sets[0]) if noisy else (x - exact).square().mean().sqrt().item()
            found.setdefault(name, []).append((calls, error))
    return found, energy(sets[1], sets[0])


def draw() -> str:
    found, floor = curves()
    margins = {"left": 0.08, "right": 0.99, "bottom": 0.05, "top": 0.96, "wspace": 0.16, "hspace": 0.3}
    figure, axes = style.panels(3, 2, 8.4, **margins)
    for one, (title, names) in zip(axes.flat, (PANELS | NOISY).items(), strict=True):
        for name in names:
            calls, errors = zip(*found[name], strict=True)
            errors = [max(error, LOWEST) for error in errors]
            one.plot(calls, errors, "o-", markersize=2.5, linewidth=1.2, label=name)
        if "with noise" in title:
            one.axhline(floor, color=FAINT, linewidth=0.8)
        one.set(title=title, xscale="log", yscale="log", xlim=(2.7, 150), ylim=(LOWEST, 5))
        one.set_yticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
        one.set_xticks([4, 8, 16, 32, 128], ["4", "8", "16", "32", "128"])
        one.minorticks_off()
        one.legend(fontsize=6.5, loc="upper right")
    for one in axes[2]:
        one.set_xlabel("calls of the network")
    for one in axes[:, 0]:
        one.set_ylabel("error")
    return style.svg(figure, "Error against calls of the network for thirty samplers, on the embedded model")


if __name__ == "__main__":
    style.write(__file__, draw())
