"""The names of samplers and spacings as A1111 writes them, which is also what drop-downs show."""

# How A1111 writes our names, which is also what drop-downs show. A name that is not here is written as it is.
SAMPLER_LABELS = {
    "ddpm": "DDPM", "ddim": "DDIM", "plms": "PLMS", "euler": "Euler", "euler_a": "Euler a", "heun": "Heun",
    "dpm2": "DPM2", "dpm2_a": "DPM2 a", "dpmpp_2m": "DPM++ 2M", "dpmpp_2s_a": "DPM++ 2S a", "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_3m_sde": "DPM++ 3M SDE", "lms": "LMS", "unipc": "UniPC", "lcm": "LCM",
    "dpmpp_2m_sde_heun": "DPM++ 2M SDE Heun", "restart": "Restart", "dpm_fast": "DPM fast",
    "dpm_adaptive": "DPM adaptive", "ddim_cfg_pp": "DDIM CFG++", "tcd": "TCD", "deis": "DEIS", "ipndm": "IPNDM",
}  # fmt: skip
SPACING_LABELS = {  # only what A1111 means by them, level for level
    "karras": "Karras", "exponential": "Exponential", "polyexponential": "Polyexponential", "uniform": "Uniform",
    "sgm_uniform": "SGM Uniform", "simple": "Simple", "ddim_uniform": "DDIM", "beta_a1111": "Beta",
    "kl_optimal_a1111": "KL Optimal",
    "align_your_steps": "Align Your Steps",        # of an SDXL model align_your_steps_xl: `defaults.resolved`
}  # fmt: skip
NEAREST_LABELS = {  # A1111's nearest, of those that it has not
    "linspace": "Uniform", "trailing": "Simple", "leading": "DDIM", "beta": "Beta", "kl_optimal": "KL Optimal",
    "align_your_steps_xl": "Align Your Steps", "distilled": "Automatic",
}  # fmt: skip
SPARED = (
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "unipc",
)  # their linspace leaves out the last, as SGM Uniform does
SUFFIXES = ("karras", "exponential")  # written behind the sampler's name; the others as "Schedule type"


def sampler_label(name: str) -> str:
    return SAMPLER_LABELS.get(name, name)


def spacing_label(name: str) -> str:
    return SPACING_LABELS.get(name, name)


def nearest_label(sampler: str | None, spacing: str) -> str:
    """A1111's "Schedule type" whose levels are, or are nearest to, those of a spacing with this sampler."""
    if spacing == "linspace" and sampler in SPARED:
        return SPACING_LABELS["sgm_uniform"]
    return (SPACING_LABELS | NEAREST_LABELS).get(spacing, "Automatic")
