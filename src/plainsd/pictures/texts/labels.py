"""Names of samplers, spacings and upscalers: how A1111 writes them, which is also what drop-downs show, and every name
that other programs have for them."""

import re

# How A1111 writes our names, which is also what drop-downs show. A name that is not here is written as it is.
SAMPLER_LABELS = {
    "ddpm": "DDPM", "ddim": "DDIM", "plms": "PLMS", "euler": "Euler", "euler_a": "Euler a", "heun": "Heun",
    "dpm2": "DPM2", "dpm2_a": "DPM2 a", "dpmpp_2m": "DPM++ 2M", "dpmpp_2s_a": "DPM++ 2S a", "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_3m_sde": "DPM++ 3M SDE", "lms": "LMS", "unipc": "UniPC", "lcm": "LCM",
    "restart": "Restart", "dpmpp_2m_sde_heun": "DPM++ 2M SDE Heun", "dpm_fast": "DPM fast",
    "dpm_adaptive": "DPM adaptive", "ddim_cfg_pp": "DDIM CFG++", "euler_cfg_pp": "Euler CFG++",
    "euler_a_cfg_pp": "Euler a CFG++", "dpmpp_2m_cfg_pp": "DPM++ 2M CFG++", "tcd": "TCD", "heunpp2": "HeunPP2",
    "ipndm": "IPNDM", "deis": "DEIS", "res_multistep": "Res Multistep", "res_multistep_a": "Res Multistep a",
    "gradient_estimation": "Gradient Estimation", "er_sde": "ER SDE", "sa_solver": "SA Solver",
    "unipc_bh2": "UniPC bh2",
}  # fmt: skip
SPACING_LABELS = {  # only what A1111 means by them, level for level
    "karras": "Karras", "exponential": "Exponential", "polyexponential": "Polyexponential", "uniform": "Uniform",
    "sgm_uniform": "SGM Uniform", "simple": "Simple", "ddim_uniform": "DDIM", "beta_a1111": "Beta",
    "kl_optimal_a1111": "KL Optimal",
    "align_your_steps": "Align Your Steps",        # of an SDXL model align_your_steps_xl: `defaults.resolved`
}  # fmt: skip
NEAREST_LABELS = {  # A1111's nearest, of those that it has not; our own name stands beside it, as "Spacing"
    "linspace": "Uniform", "trailing": "Simple", "leading": "DDIM", "beta": "Beta", "kl_optimal": "KL Optimal",
    "align_your_steps_xl": "Align Your Steps", "distilled": "Automatic",
}  # fmt: skip
# their linspace leaves out the last level, as SGM Uniform does
SPARED = ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "unipc", "unipc_bh2")
SUFFIXES = ("karras", "exponential")  # written behind the sampler's name; the others as "Schedule type"
BEFORE_0_2 = {"Uniform": "linspace", "SGM Uniform": "trailing", "DDIM": "leading", "Distilled": "distilled"}
UPSCALER_LABELS = {
    "latent": "Latent", "latent-antialiased": "Latent (antialiased)", "latent-bicubic": "Latent (bicubic)",
    "latent-bicubic-antialiased": "Latent (bicubic antialiased)", "latent-nearest": "Latent (nearest)",
    "latent-nearest-exact": "Latent (nearest-exact)", "lanczos": "Lanczos",
}  # fmt: skip


def folded(text: str) -> str:
    """What two spellings of a name have in common: "DPM++ 2M", "dpm++2m" and "dpmpp_2m" are one."""
    return re.sub(r"[\s_\-]", "", text.lower().replace("++", "pp"))


SAMPLER_NAMES = {folded(word): name for name, label in SAMPLER_LABELS.items() for word in (name, label)} | {
    # aliases of A1111, k-diffusion and ComfyUI, stable-diffusion.cpp, Forge and SD.Next
    "eulerancestral": "euler_a", "eulerancestralcfgpp": "euler_a_cfg_pp", "eulerge": "gradient_estimation",
    "dpm2ancestral": "dpm2_a", "dpmad": "dpm_adaptive", "dpmpp2sancestral": "dpmpp_2s_a", "dpmppsdegpu": "dpmpp_sde",
    "dpmpp2msdegpu": "dpmpp_2m_sde", "dpmpp3msdegpu": "dpmpp_3m_sde", "dpmpp2msdebt": "dpmpp_2m_sde",
    "dpmpp2msdeheungpu": "dpmpp_2m_sde_heun", "ddimcfgpp": "ddim_cfg_pp", "ddimtrailing": "ddim",
    "resmultistepancestral": "res_multistep_a",
}  # fmt: skip
SPACING_NAMES = {folded(word): name for name, label in SPACING_LABELS.items() for word in (name, label)} | {
    "normal": "uniform", "discrete": "uniform", "ddim": "ddim_uniform", "ays": "align_your_steps",
    "ka": "karras", "exp": "exponential",
}  # fmt: skip
SPACING_NAMES |= {folded(name): name for name in NEAREST_LABELS if folded(name) not in SPACING_NAMES}
UPSCALER_NAMES = {folded(word): name for name, label in UPSCALER_LABELS.items() for word in (name, label)}
UPSCALER_NAMES["none"] = "lanczos"  # A1111: no model, only the resizing that follows


def sampler_label(name: str) -> str:
    return SAMPLER_LABELS.get(name, name)


def spacing_label(name: str) -> str:
    return SPACING_LABELS.get(name, name)


def upscaler_label(name: str) -> str:
    return UPSCALER_LABELS.get(name, name)


def nearest_label(sampler: str | None, spacing: str) -> str:
    """A1111's "Schedule type" whose levels are, or are nearest to, those of a spacing with this sampler."""
    if spacing == "linspace" and sampler in SPARED:
        return SPACING_LABELS["sgm_uniform"]
    return (SPACING_LABELS | NEAREST_LABELS).get(spacing, "Automatic")


def sampler_named(text: str) -> str | None:
    """Our name of a sampler that any program wrote, or None."""
    return SAMPLER_NAMES.get(folded(text)) or SAMPLER_NAMES.get(folded(text).removeprefix("k"))


def spacing_named(text: str) -> str | None:
    """Our name of a schedule; where names mean different levels in different programs, A1111's."""
    return SPACING_NAMES.get(folded(text))


def upscaler_named(text: str) -> str:
    """Our name of an upscaler; a stranger's stays: it may be that of a network's file."""
    return UPSCALER_NAMES.get(folded(text), text)


def both_named(text: str) -> tuple[str, str | None]:
    """ "DPM++ 2M SDE Karras", "k_dpmpp_2m_ka", "euler_a discrete" -> sampler and spacing. A stranger's name stays."""
    if whole := sampler_named(text):
        return whole, None
    parts = [(text[: match.start()], text[match.end() :]) for match in re.finditer(r"[ _]", text[:100])]
    pairs = [(head, spacing) for head, tail in parts if (spacing := spacing_named(tail))]
    known = [(sampler, spacing) for head, spacing in pairs if (sampler := sampler_named(head))]
    return next(iter(known or pairs), (text, None))
