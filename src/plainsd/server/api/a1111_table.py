"""A1111's fields and options: each is supported, has no effect on the picture, or is refused.

Those that act are the fields that a1111_fields.py declares. Of the rest this file has one row each, from the web UI's
version 1.10 (modules/api/models.py, processing.py, shared_options.py) and Forge's additions. What would change the
picture and is not supported is refused with 422, unless its value changes nothing there either. Names that stand
nowhere are refused too: a misspelt field would otherwise be passed over.
"""

from collections.abc import Callable, Iterable
from typing import Any

from plainsd.errors import unknown
from plainsd.server.errors import APIError, json_value

RequestFields = dict[str, Any]  # all fields of the request
Predicate = Callable[[Any, RequestFields], bool]  # whether a value, in such a request, would change the picture
EMPTY_VALUES: tuple[Any, ...] = (None, "", [], {})  # of any field

USE_S_CHURN = (None, "euler", "heun", "dpm2")  # the samplers that read s_churn there, where none is Euler ...
USE_S_NOISE = ("dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpm_fast")  # ... and s_noise


def unless(*neutral: Any) -> Predicate:
    return lambda value, asked: value not in neutral


def with_hires(*neutral: Any) -> Predicate:
    """Only with a hires pass."""
    return lambda value, asked: bool(asked.get("enable_hr")) and value not in neutral


def with_mask(*neutral: Any) -> Predicate:
    return lambda value, asked: bool(asked.get("mask")) and value not in neutral


REFUSED: dict[str, Predicate] = {
    "restore_faces": unless(False), "script_name": unless("None", "none"),
    "s_min_uncond": unless(0),
    "s_churn": lambda value, asked: value != 0 and asked["sampler"] in USE_S_CHURN,
    "s_noise": lambda value, asked: value != 1 and asked["sampler"] in USE_S_NOISE,
    "token_merging_ratio": unless(0), "token_merging_ratio_hr": with_hires(0),
    "firstphase_width": unless(0), "firstphase_height": unless(0),  # they are the size there, hires or not
    "firstpass_image": with_hires(), "hr_checkpoint_name": with_hires("Use same checkpoint"),
    "hr_additional_modules": with_hires(["Use same choices"]),
    "initial_noise_multiplier": unless(1), "latent_mask": unless(), "mask_round": with_mask(True),
}  # fmt: skip
WITHOUT_EFFECT = {
    "save_images", "do_not_save_samples", "do_not_save_grid",    # what it writes, the server keeps anyway
    "force_task_id", "comments",                                 # nothing is drawn by them
    "script_args",                                               # without script_name
    "s_tmin", "s_tmax",                                          # without s_churn
    "distilled_cfg_scale", "hr_distilled_cfg",                   # of models of other kinds
    # not taken there either: API_NOT_ALLOWED
    "sd_model", "outpath_samples", "outpath_grids", "extra_generation_params", "overlay_images",
    "do_not_reload_embeddings", "seed_enable_extras", "prompt_for_display", "sampler_noise_scheduler_override",
    "ddim_discretize",
}  # fmt: skip


def reject_unsupported(extras: RequestFields, asked: RequestFields, known: Iterable[str]) -> None:
    """APIError for the first of the `extras` that would change the picture."""
    for name, value in extras.items():
        if value in EMPTY_VALUES or name in WITHOUT_EFFECT:
            continue
        if name not in REFUSED:
            names = (*known, *WITHOUT_EFFECT, *REFUSED)
            raise APIError(422, f"{unknown('field', name, names).what}; see /docs for what it takes", name, value)
        if REFUSED[name](value, asked):
            raise APIError(422, f"{name} {json_value(value)!r} is not supported; leave it out", name, value)


# --- scripts ---------------------------------------------------------------------------------------------------------


BUILT_IN = ("sampler", "seed", "refiner")  # sections of the web UI's own page, which its API passes over


def check_scripts(scripts: dict[str, Any]) -> None:
    """APIError for a script that is active and not supported; units that are switched off would not."""
    for name, script in scripts.items():
        if name.lower() not in ("controlnet", *BUILT_IN) and is_active(script):
            raise APIError(422, f"script {name!r} is not supported; leave it out", "alwayson_scripts", name)


def is_active(script: Any) -> bool:
    """Whether a script is switched on: not without arguments, with a leading False, or with all units disabled."""
    args = script.get("args") if isinstance(script, dict) else script
    if not isinstance(args, list):
        return args not in EMPTY_VALUES
    units = [one for one in args if isinstance(one, dict) and one]
    if any("enabled" in unit for unit in units):
        return any(unit.get("enabled", True) not in (False, 0) for unit in units)
    if args and args[0] is False:
        return False
    return any(one not in (False, *EMPTY_VALUES) for one in args)


# --- options ---------------------------------------------------------------------------------------------------------

OPTIONS = (  # those that act
    "sd_model_checkpoint", "CLIP_stop_at_last_layers", "tiling", "randn_source", "eta_noise_seed_delta",
    "enable_prompt_comments",
)  # fmt: skip
FIXED: dict[str, tuple[Any, ...]] = {  # options that would change the picture, and their values that are as here
    "sd_vae": ("Automatic", "None"), "sd_unet": ("Automatic", "None"), "sd_hypernetwork": ("None",),
    "sd_lora": ("None",), "extra_networks_default_multiplier": (1,), "lora_functional": (False,),
    "enable_emphasis": (True,), "emphasis": ("Original",), "use_old_emphasis_implementation": (False,),
    "comma_padding_backtrack": (20,), "use_old_scheduling": (False,),
    "dont_fix_second_order_samplers_schedule": (False,), "pad_cond_uncond": (False,), "pad_cond_uncond_v0": (False,),
    "s_min_uncond": (0,), "s_min_uncond_all": (False,), "skip_early_cond": (0,),
    "enable_batch_seeds": (True,),
    "no_dpmpp_sde_batch_determinism": (False,), "fp8_storage": ("Disable",),
    "token_merging_ratio": (0,), "token_merging_ratio_img2img": (0,), "token_merging_ratio_hr": (0,),
    "eta_ddim": (0,), "eta_ancestral": (1,), "ddim_discretize": ("uniform",), "s_churn": (0,), "s_tmin": (0,),
    "s_tmax": (0,), "s_noise": (1,), "k_sched_type": ("Automatic",), "sigma_min": (0,), "sigma_max": (0,), "rho": (0,),
    "always_discard_next_to_last_sigma": (False,), "use_old_karras_scheduler_sigmas": (False,),
    "use_downcasted_alpha_bar": (False,), "sgm_noise_multiplier": (False,), "sd_noise_schedule": ("Default",),
    "beta_dist_alpha": (0.6,), "beta_dist_beta": (0.6,), "enable_quantization": (False,),
    "uni_pc_variant": ("bh1",), "uni_pc_skip_type": ("time_uniform",), "uni_pc_order": (3,),
    "uni_pc_lower_order_final": (True,),
    "sd_vae_encode_method": ("Full",), "sd_vae_decode_method": ("Full",),
    "inpainting_mask_weight": (1,), "initial_noise_multiplier": (1,), "img2img_extra_noise": (0,),
    "img2img_color_correction": (False,), "img2img_fix_steps": (False,), "img2img_background_color": ("#ffffff",),
    "upscaler_for_img2img": ("None",), "overlay_inpaint": (True,),
    "hires_fix_use_firstpass_conds": (False,), "use_old_hires_fix_width_height": (False,),
    "refiner_switch_by_sample_steps": (False,), "face_restoration": (False,),
    "sdxl_crop_top": (0,), "sdxl_crop_left": (0,), "sdxl_refiner_low_aesthetic_score": (2.5,),
    "sdxl_refiner_high_aesthetic_score": (6,), "postprocessing_enable_in_main_ui": (),
}  # fmt: skip
OF_FILES_AND_PAGES = (  # how options begin that are about files, memory, training and the page of the web UI
    "save", "samples", "grid", "n_rows", "font", "enable_pnginfo", "jpeg_quality", "webp_lossless", "export_for",
    "img_downscale", "target_side", "img_max_size", "use_original_name", "use_upscaler_name", "temp_dir",
    "clean_temp_dir", "outdir", "use_save_to_dirs", "directories", "notification", "ESRGAN", "DAT", "SWIN",
    "realesrgan", "set_scale_by", "face_restoration_", "code_former", "auto_launch", "enable_console", "show",
    "memmon", "multiple_tqdm", "print_hypernet", "list_hidden", "disable_mmap", "hide", "dump_stacks", "enable_upscale",
    "profiling", "api_", "unload_models", "pin_memory", "training", "dataset_filename", "sd_checkpoint",
    "sd_vae_checkpoint_cache", "sd_vae_overrides", "auto_vae_precision", "upcast_attn", "cross_attention",
    "persistent_cond", "batch_cond", "cache_fp16", "interrogate", "deepbooru", "extra_networks_", "textual_inversion",
    "lora_show", "lora_preferred", "lora_add", "lora_hide", "lora_not_found", "lora_in_memory", "ui_", "localization",
    "quicksettings", "gradio", "gallery", "return", "do_not", "send_seed", "send_size", "js_", "sd_webui_modal",
    "samplers_in", "dimensions_and", "compact_prompt", "keyedit", "disable_token", "include_styles", "open_dir",
    "hidden_tabs", "tabs_without", "hires_fix_show", "add_", "disable_weights", "infotext", "write_", "live_preview",
    "prevent_screen", "postprocessing_", "upscaling", "disabled_extensions", "disable_all_extensions",
    "restore_config", "settings_in_ui", "extra_options", "canvas", "img2img_editor", "img2img_sketch",
    "img2img_inpaint", "img2img_batch", "txt2img_",
)  # fmt: skip


def known_options(given: dict[str, Any], field: str = "override_settings") -> dict[str, Any]:
    """The supported ones of A1111's options. APIError for one that would change the picture and is not supported."""
    for name, value in given.items():
        if name in FIXED:
            if value not in (*FIXED[name], *EMPTY_VALUES):
                what = f"option {name} {json_value(value)!r} is not supported"
                leave = f" {FIXED[name][0]!r}, or" if FIXED[name] else ""
                raise APIError(
                    422, f"{what}; set it to{leave} leave it out" if leave else f"{what}; leave it out", field, name
                )
        elif name == "enable_prompt_comments" and value not in (True, False, None):
            raise APIError(422, f"option {name} {json_value(value)!r}; set it to true or false", field, name)
        elif name not in OPTIONS and not name.startswith(OF_FILES_AND_PAGES) and value not in EMPTY_VALUES:
            raise APIError(422, str(unknown("option", name, (*OPTIONS, *FIXED)))[:300], field, name)
    return {name: value for name, value in given.items() if name in OPTIONS and value is not None}
