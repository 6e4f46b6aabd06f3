"""The names of samplers and spacings as A1111 writes them, which is also what drop-downs show."""

# A name that is not here is written as it is.
SAMPLER_LABELS = {
    "ddpm": "DDPM", "ddim": "DDIM", "plms": "PLMS", "euler": "Euler", "euler_a": "Euler a", "heun": "Heun",
    "dpm2": "DPM2", "dpm2_a": "DPM2 a", "dpmpp_2m": "DPM++ 2M", "dpmpp_2s_a": "DPM++ 2S a", "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_3m_sde": "DPM++ 3M SDE", "lms": "LMS", "unipc": "UniPC", "lcm": "LCM",
}  # fmt: skip
SPACING_LABELS = {
    "karras": "Karras", "exponential": "Exponential", "linspace": "Uniform", "trailing": "SGM Uniform",
    "leading": "DDIM",
    "distilled": "Distilled",                      # lcm's own
}  # fmt: skip
SUFFIXES = ("karras", "exponential")  # written behind the sampler's name; the others as "Schedule type"


def sampler_label(name: str) -> str:
    return SAMPLER_LABELS.get(name, name)


def spacing_label(name: str) -> str:
    return SPACING_LABELS.get(name, name)
