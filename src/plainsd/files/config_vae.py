"""Reads an autoencoder's config.json: AutoencoderKL, or TAESD's AutoencoderTiny."""

from plainsd.errors import UserError
from plainsd.files.checked import MOST
from plainsd.files.config_values import Config, check_fixed, divides, real_number, whole_number, wholes
from plainsd.models.tiny_vae import AnyVAEConfig, TinyVAEConfig
from plainsd.models.vae import VAEConfig

VAE_FIXED = {
    "act_fn": "silu",
    "shift_factor": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
TINY, VAE_CLASS = "AutoencoderTiny", "AutoencoderKL"  # diffusers' classes
TINY_FIXED = {"act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2, "scaling_factor": 1.0}
TINY_FIXED |= {"shift_factor": 0.0}
TINY_LEVELS = (
    *("encoder_block_out_channels", "decoder_block_out_channels"),
    *("num_encoder_blocks", "num_decoder_blocks"),
)


def read_tiny_vae(config: Config, where: str) -> TinyVAEConfig:
    check_fixed(config, TINY_FIXED, where)
    tables = {name: wholes(config, name, where) for name in TINY_LEVELS if name in config}
    widths = {
        width for name in ("encoder_block_out_channels", "decoder_block_out_channels") for width in tables.get(name, ())
    }
    if len(widths) > 1:
        raise UserError(f"{where}: block_out_channels are {sorted(widths)}, and only one width for all is supported")
    plain = TinyVAEConfig()
    return TinyVAEConfig(
        width=widths.pop() if widths else plain.width,
        encoder_blocks=tables.get("num_encoder_blocks", plain.encoder_blocks),
        decoder_blocks=tables.get("num_decoder_blocks", plain.decoder_blocks),
        latent_channels=whole_number(config, "latent_channels", where, 4),
        pixel_channels=whole_number(config, "in_channels", where, 3),
    )


def read_vae(config: Config, where: str) -> AnyVAEConfig:
    if config.get("_class_name") == TINY:
        return read_tiny_vae(config, where)
    if (kind := config.get("_class_name", VAE_CLASS)) != VAE_CLASS:
        raise UserError(f"{where}: {kind!r} is not supported; choose an autoencoder of class {VAE_CLASS} or {TINY}")
    check_fixed(config, VAE_FIXED, where)
    vae = VAEConfig(
        channels=wholes(config, "block_out_channels", where),
        layers=whole_number(config, "layers_per_block", where, 1, MOST),
        latent_channels=whole_number(config, "latent_channels", where, 4),
        groups=whole_number(config, "norm_num_groups", where, 32),
        scaling_factor=real_number(config, "scaling_factor", where, 0.18215),
        pixel_channels=whole_number(config, "in_channels", where, 3),
        latents_mean=channelwise(config, "latents_mean", where),
        latents_std=channelwise(config, "latents_std", where),
    )
    if (vae.latents_mean is None) != (vae.latents_std is None):
        raise UserError(f"{where}: latents_mean and latents_std belong together; give both or neither")
    divides(vae.groups, vae.channels, "groups of the norms", where)
    return vae


def channelwise(config: Config, name: str, where: str) -> tuple[float, ...] | None:
    """One number a latent channel, standard deviations above 0; None where there are none."""
    values = config.get(name)
    if values is None:
        return None
    channels, low = whole_number(config, "latent_channels", where, 4), 0 if name == "latents_std" else -1e6
    good = isinstance(values, (list, tuple)) and len(values) == channels
    if not good or not all(type(value) in (int, float) and low < value <= 1e6 for value in values):
        raise UserError(f"{where}: {name} is {values!r}, and must be {channels} numbers, one a latent channel")
    return tuple(map(float, values))
