"""Reads a scheduler_config.json: the noise schedule and the prediction type. Which sampler it names matters only where
that means other mathematics, which is refused."""

from typing import Any

from plainsd.diffusion.denoiser import PREDICTIONS
from plainsd.diffusion.schedule import EDMSchedule
from plainsd.errors import UserError
from plainsd.files.config_values import Config, check_fixed, one_of, real_number, whole_number
from plainsd.models.variants import ScheduleConfig

CURVES = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}
OF_TIMESTEPS = ("leading", "trailing", "linspace")  # diffusers' names for spacings
OF_LEVELS = ("karras", "exponential")
SCHEDULERS = (  # diffusers' classes that differ only in the sampler, not in the noise schedule
    *("DDIMScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler"),
    *("PNDMScheduler", "LCMScheduler", "TCDScheduler", "RePaintScheduler"),
)
SIGMA_SCHEDULERS = (  # likewise; these also have karras and exponential spacing
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "SASolverScheduler"),
    "DPMSolverMultistepInverseScheduler",
)
EDM_SCHEDULERS = {"EDMDPMSolverMultistepScheduler": "dpmpp_2m", "EDMEulerScheduler": "euler"}  # and the sampler in each
SCHEDULE_FIXED = {  # other settings that would change noise or estimates; the rest belong to samplers
    "trained_betas": None,
    "thresholding": False,
    "use_flow_sigmas": False,
    "snr_shift_scale": 1.0,
}
LEARNED = ("learned", "learned_range")  # of variance_type: half of the network's output would be a variance


def read_schedule(config: Config, where: str, kind: str = "DDIMScheduler") -> dict[str, Any]:
    """Noise schedule, prediction type, and the spacing if the file has one, as fields of a Variant. `kind` is the
    scheduler's class where the file does not name it."""
    kind = str(config.get("_class_name") or kind).removeprefix("Flax")
    continuous = config.get("timestep_type") == "continuous"
    if kind in EDM_SCHEDULERS or continuous and kind in SIGMA_SCHEDULERS:
        return read_edm(config, where, kind)
    if kind not in (*SCHEDULERS, *SIGMA_SCHEDULERS):
        raise UserError(
            f"{where}: the scheduler {kind!r} means another kind of noise or network than Stable Diffusion's, and is "
            f"not supported; choose a model made with {SCHEDULERS[0]}, {', '.join(EDM_SCHEDULERS)} or their like"
        )
    check_fixed(config, SCHEDULE_FIXED, where)
    if config.get("variance_type") in LEARNED:
        raise UserError(
            f"{where}: variance_type is {config['variance_type']!r}, and learned variances are not supported"
        )
    schedule = ScheduleConfig(
        curve=CURVES[one_of(config, "beta_schedule", where, "linear", CURVES)],
        beta_start=real_number(config, "beta_start", where, 0.0001, 0.999),
        beta_end=real_number(config, "beta_end", where, 0.02, 0.999),
        count=whole_number(config, "num_train_timesteps", where, 1000, 100_000),
        zero_terminal_snr=config.get("rescale_betas_zero_snr") is True,
    )
    timesteps = one_of(config, "timestep_spacing", where, "leading", dict.fromkeys(OF_TIMESTEPS))
    spacing = "trailing" if timesteps == "trailing" else None  # the others belong to samplers, not to models
    if kind in SIGMA_SCHEDULERS and (levels := spacing_of_levels(config)):
        check_fixed(config, {"sigma_min": None, "sigma_max": None}, where)
        spacing = levels
    prediction = one_of(config, "prediction_type", where, "epsilon", dict.fromkeys(PREDICTIONS))
    return {"schedule": schedule, "prediction": prediction, "spacing": spacing}


def spacing_of_levels(config: Config) -> str | None:
    return next((name for name in OF_LEVELS if config.get(f"use_{name}_sigmas") is True), None)


def read_edm(config: Config, where: str, kind: str) -> dict[str, Any]:
    """Karras et al. 2022 (EDM). The Euler scheduler has it too, as v-prediction with continuous timesteps."""
    check_fixed(config, SCHEDULE_FIXED, where)
    own = kind in EDM_SCHEDULERS
    spacing: str | None
    if own:
        known = {"epsilon": "edm", "v_prediction": "v_prediction"}
        prediction = known[one_of(config, "prediction_type", where, "epsilon", known)]
        spacing = one_of(config, "sigma_schedule", where, "karras", dict.fromkeys(OF_LEVELS))
    else:
        prediction, spacing = config.get("prediction_type", "epsilon"), spacing_of_levels(config)
        if prediction != "v_prediction" or spacing is None:
            raise UserError(
                f"{where}: timestep_type is 'continuous', which is supported with prediction_type 'v_prediction' and "
                "use_karras_sigmas or use_exponential_sigmas only; choose a model with such settings"
            )
    schedule = EDMSchedule(
        sigma_min=real_number(config, "sigma_min", where, 0.002 if own else None),
        sigma_max=real_number(config, "sigma_max", where, 80.0 if own else None, 1e6),
        sigma_data=real_number(config, "sigma_data", where, 0.5) if own else 1.0,
        rho=real_number(config, "rho", where, 7.0),
        count=whole_number(config, "num_train_timesteps", where, 1000, 100_000),
    )
    if schedule.sigma_min >= schedule.sigma_max:
        raise UserError(
            f"{where}: sigma_min {schedule.sigma_min} must be below sigma_max {schedule.sigma_max}; correct it"
        )
    fields = {"schedule": schedule, "prediction": prediction, "spacing": spacing}
    return fields | {"sampler": EDM_SCHEDULERS.get(kind, "euler")}
