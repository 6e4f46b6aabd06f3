"""Parity: each network against diffusers' or transformers', the same random weights moved over by the rule tables."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from plainsd.files.config_vae import read_vae
from plainsd.files.configs import read_text, read_unet
from plainsd.files.configs_out import write_unet
from plainsd.files.folder import read_network
from plainsd.files.tensorfile import TensorFile, stored
from plainsd.models.clip import TextConfig, TextEncoder
from plainsd.models.layers import timestep_embedding
from plainsd.models.unet import UNet, UNetConfig
from plainsd.models.vae import VAE, Gaussian, VAEConfig
from plainsd.models.variants import Variant

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float32", "float64"])


def strong(network: nn.Module, sharp: float = 1.5) -> nn.Module:
    """Random weights with which everything matters: sharp attention, norms away from 1 and 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if "norm" in name:
                parameter.copy_(0.3 * noise + (1.0 if name.endswith("weight") else 0.0))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                scale = sharp if any(part in name for part in ("to_q", "to_k", "q_proj", "k_proj")) else 1.0
                parameter.copy_(scale * noise / parameter[0].numel() ** 0.5)
    return network.eval()


def ours(kind: type[nn.Module], config: object, reference: nn.Module, *, conv: bool = True) -> nn.Module:
    """Our network of that config with the reference's weights."""
    tensors = {name: stored(tensor) for name, tensor in reference.state_dict().items()}
    dtype = next(reference.parameters()).dtype
    return read_network(TensorFile("reference", tensors, {}), kind, config, conv=conv).build(torch.device("cpu"), dtype)


def error(mine: Tensor, reference: Tensor) -> float:
    """Largest difference relative to the largest value."""
    assert mine.shape == reference.shape and mine.dtype == reference.dtype
    assert reference.std() > 1e-3
    return ((mine - reference).abs().max() / reference.abs().max()).item()


# --- UNet ------------------------------------------------------------------------------------------------------------

ATTN, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UNETS = {
    "sd1": dict(block_out_channels=(32, 64, 64, 64), attention_head_dim=2, cross_attention_dim=24),
    "sd2": dict(
        block_out_channels=(32, 64),
        down_block_types=(ATTN, PLAIN),
        attention_head_dim=(1, 4),
        use_linear_projection=True,
        cross_attention_dim=40,
        norm_num_groups=16,
        layers_per_block=1,
    ),
    "emoji": dict(
        block_out_channels=(24, 32, 48),
        down_block_types=(PLAIN, ATTN, ATTN),
        attention_head_dim=(3, 2, 4),
        cross_attention_dim=20,
        norm_num_groups=8,
        in_channels=16,
        out_channels=16,
    ),
    "sdxl": dict(
        block_out_channels=(32, 64, 64),
        down_block_types=(PLAIN, ATTN, ATTN),
        attention_head_dim=(1, 2, 4),
        transformer_layers_per_block=(1, 1, 2),
        layers_per_block=1,
        use_linear_projection=True,
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        norm_num_groups=8,
        projection_class_embeddings_input_dim=6 * 256 + 40,
    ),
    "refiner": dict(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=(PLAIN, ATTN, ATTN, PLAIN),
        attention_head_dim=(1, 2, 4, 4),
        transformer_layers_per_block=2,
        use_linear_projection=True,
        cross_attention_dim=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=5 * 256 + 24,
    ),
    "inpainting": dict(
        block_out_channels=(32, 64),
        down_block_types=(ATTN, ATTN),
        attention_head_dim=4,
        in_channels=9,
        cross_attention_dim=48,
        layers_per_block=3,
    ),
    "lcm": dict(
        block_out_channels=(32, 64),
        down_block_types=(ATTN, PLAIN),
        attention_head_dim=8,
        time_cond_proj_dim=256,
        cross_attention_dim=24,
    ),
    "one level": dict(block_out_channels=(32,), down_block_types=(ATTN,), attention_head_dim=1, cross_attention_dim=8),
    "no middle": dict(  # BK-SDM's small and tiny
        block_out_channels=(32, 64, 64),
        down_block_types=(ATTN, ATTN, PLAIN),
        attention_head_dim=2,
        cross_attention_dim=24,
        layers_per_block=1,
        mid_block_type=None,
    ),
    "one ResBlock in the middle": dict(  # SSD-1B
        block_out_channels=(32, 64, 64),
        down_block_types=(PLAIN, ATTN, ATTN),
        attention_head_dim=(1, 2, 4),
        transformer_layers_per_block=(1, 2, 3),
        reverse_transformer_layers_per_block=((3, 1, 4), (2, 1, 1), 1),
        use_linear_projection=True,
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + 40,
        mid_block_type="UNetMidBlock2D",
    ),
}
SIZES = {
    "sd1": (9, 15),
    "sd2": (8, 8),
    "emoji": (13, 16),
    "sdxl": (8, 11),
    "refiner": (9, 7),
    "inpainting": (5, 12),
    "lcm": (6, 10),
    "one level": (7, 3),
    "no middle": (9, 6),
    "one ResBlock in the middle": (7, 10),
}


def unet_reference(name: str, dtype: torch.dtype) -> UNet2DConditionModel:
    options = UNETS[name]
    kinds = options.get("down_block_types", (ATTN, ATTN, ATTN, PLAIN))
    up = tuple(kind.replace("Down", "Up") for kind in reversed(kinds))
    return strong(UNet2DConditionModel(**options | {"down_block_types": kinds, "up_block_types": up})).to(dtype)


def unet_inputs(config: UNetConfig, size: tuple[int, int], dtype: torch.dtype) -> tuple[dict, dict]:
    """The same inputs as ours and as diffusers takes them: a batch of 3 with timesteps of their own, one fractional."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    x, context = draw(3, config.in_channels, *size), draw(3, 11, config.context)
    timestep = torch.tensor([0.0, 421.375, 999.0])
    mine, theirs = {}, {}
    if config.vector:
        numbers = 6 if config.vector == 6 * 256 + 40 else 5
        ids, pooled = torch.randint(0, 2048, (3, numbers), generator=generator), draw(3, config.vector - 256 * numbers)
        embedded = timestep_embedding(ids.flatten(), 256).reshape(3, -1).to(dtype)
        mine["vector"] = torch.cat([pooled, embedded], dim=1)
        theirs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
    if config.guidance_dim:
        mine["guidance"] = theirs["timestep_cond"] = draw(3, config.guidance_dim)
    mine |= {"x": x, "timestep": timestep, "context": context}
    theirs |= {"sample": x, "timestep": timestep, "encoder_hidden_states": context}
    return mine, theirs


@DTYPES
@pytest.mark.parametrize("name", UNETS)
@torch.no_grad()
def test_unet_equals_diffusers(name, dtype):
    reference = unet_reference(name, dtype)
    config, conv = read_unet(dict(reference.config), name)
    mine, theirs = unet_inputs(config, SIZES[name], dtype)
    unet = ours(UNet, config, reference, conv=conv)
    assert error(unet(**mine), reference(**theirs).sample) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", UNETS)
def test_unet_settings_there_and_back(name):
    """What is written for diffusers describes the same network to diffusers and to us."""
    reference = unet_reference(name, torch.float32)
    config, conv = read_unet(dict(reference.config), name)
    written = write_unet(Variant(name, config, VAEConfig(), (TextConfig(),), conv_projections=conv))
    assert read_unet(written, name) == (config, conv)
    again = UNet2DConditionModel.from_config(written).state_dict()
    assert {key: t.shape for key, t in again.items()} == {key: t.shape for key, t in reference.state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize("dim", [27, 28])
def test_the_sinusoids_of_any_width(dim):
    timesteps = torch.tensor([0.0, 1.0, 500.5])
    theirs = get_timestep_embedding(timesteps, dim, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.allclose(timestep_embedding(timesteps, dim), theirs, atol=1e-6)


def test_unet_one_timestep_for_all():
    """A number for the timestep is the same as that number for each picture."""
    reference = unet_reference("sd2", torch.float64)
    config, conv = read_unet(dict(reference.config), "sd2")
    mine, theirs = unet_inputs(config, (8, 8), torch.float64)
    theirs["timestep"] = mine["timestep"] = 37
    assert error(ours(UNet, config, reference, conv=conv)(**mine), reference(**theirs).sample) < 1e-12


# --- VAE -------------------------------------------------------------------------------------------------------------

VAES = {
    "sd": dict(block_out_channels=(32, 64, 64, 64), layers_per_block=2),
    "three levels": dict(block_out_channels=(16, 32, 48), layers_per_block=2, norm_num_groups=8, latent_channels=16),
    "one layer": dict(block_out_channels=(32, 64), layers_per_block=1, latent_channels=8, norm_num_groups=8),
    "three layers": dict(block_out_channels=(16, 32), layers_per_block=3, norm_num_groups=16),
    "same widths": dict(block_out_channels=(32, 32, 32), layers_per_block=1, norm_num_groups=4),
    "one level": dict(block_out_channels=(24,), layers_per_block=2, norm_num_groups=8, latent_channels=5),
}
PIXELS = ((8, 8), (16, 40), (40, 24))


def vae_reference(name: str, dtype: torch.dtype) -> AutoencoderKL:
    levels = len(VAES[name]["block_out_channels"])
    types = dict(down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels)
    return strong(AutoencoderKL(**VAES[name], **types)).to(dtype)


@DTYPES
@pytest.mark.parametrize("name", VAES)
@torch.no_grad()
def test_vae_equals_diffusers(name, dtype):
    reference = vae_reference(name, dtype)
    vae = ours(VAE, read_vae(dict(reference.config), name), reference)
    generator = torch.Generator().manual_seed(2)
    for size in PIXELS:
        pixels = (2 * torch.rand((2, 3, *size), generator=generator) - 1).to(dtype)
        mine, theirs = vae.encode(pixels), reference.encode(pixels).latent_dist
        noise = torch.randn(mine.mean.shape, generator=generator).to(dtype)
        assert error(mine.mean, theirs.mean) < TOLERANCE[dtype]
        assert error(mine.logvar, theirs.logvar) < TOLERANCE[dtype]
        assert error(mine.sample(noise), theirs.mean + theirs.std * noise) < TOLERANCE[dtype]
        assert error(mine.kl(), theirs.kl()) < TOLERANCE[dtype]
        latents = torch.randn(mine.mean.shape, generator=generator).to(dtype)
        assert error(vae.decode(latents), reference.decode(latents).sample) < TOLERANCE[dtype]


def test_gaussians_are_diffusers():
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    mean, logvar, noise = torch.randn(3, 2, 4, 5, 3, generator=torch.Generator().manual_seed(0))
    ours, theirs = Gaussian(mean, logvar), DiagonalGaussianDistribution(torch.cat([mean, logvar], dim=1))
    torch.testing.assert_close(ours.kl(), theirs.kl())
    torch.testing.assert_close(ours.sample(noise), theirs.mean + theirs.std * noise)


@torch.no_grad()
def test_log_variance_is_clamped():
    vae = VAE(VAEConfig(channels=(8,), layers=1, groups=4))
    vae.quant.weight.zero_()
    vae.quant.bias.copy_(torch.tensor([0.0] * 4 + [-100.0, 100.0, 5.0, -30.5]))
    assert vae.encode(torch.zeros(1, 3, 2, 2)).logvar[0, :, 0, 0].tolist() == [-30.0, 20.0, 5.0, -30.0]


# --- text encoder ----------------------------------------------------------------------------------------------------

TEXTS = {
    "one head": dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=1),
    "quick": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4),
    "gelu": dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8, hidden_act="gelu"),
    "projected": dict(
        hidden_size=24, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, projection_dim=24
    ),
    "projected gelu": dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        hidden_act="gelu",
        projection_dim=20,
    ),
    "one layer": dict(hidden_size=64, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4),
    "other eps": dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=5,
        num_attention_heads=2,
        layer_norm_eps=1e-3,
        max_position_embeddings=20,
    ),
    "legacy end": dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, eos_token_id=2
    ),
}


@DTYPES
@pytest.mark.parametrize("name", TEXTS)
@torch.no_grad()
def test_text_encoder_equals_transformers(name, dtype):
    projected = "projection_dim" in TEXTS[name]
    vocabulary = 60 if name == "legacy end" else 64  # there the end is the largest number of all
    settings = CLIPTextConfig(
        **{"vocab_size": vocabulary, "eos_token_id": 59, "max_position_embeddings": 77} | TEXTS[name]
    )
    reference = strong((CLIPTextModelWithProjection if projected else CLIPTextModel)(settings)).to(dtype)
    kind = {"architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"]}
    encoder = ours(TextEncoder, read_text(settings.to_dict() | kind, name), reference)
    ids = torch.randint(3, 59, (3, settings.max_position_embeddings), generator=torch.Generator().manual_seed(3))
    ids[0, 4:] = ids[1, 9] = ids[1, 12] = ids[2, -1] = 59  # padded with ends; two ends; an end at the very end
    if vocabulary > 60:
        ids[1, 4] = 62  # a learned word: its number is above the end's
    mine, theirs = encoder(ids), reference(ids, output_hidden_states=True)
    assert len(mine.hidden) == len(theirs.hidden_states) == settings.num_hidden_layers + 1
    for state, expected in zip(mine.hidden, theirs.hidden_states, strict=True):
        assert error(state, expected) < TOLERANCE[dtype]
    assert error(mine.final, theirs.last_hidden_state) < TOLERANCE[dtype]
    assert error(mine.pooled, theirs.text_embeds if projected else theirs.pooler_output) < TOLERANCE[dtype]
    assert error(encoder(ids[:, :7]).final, reference(ids[:, :7]).last_hidden_state) < TOLERANCE[dtype]


# --- could these tests fail? -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_weight_matters():
    """With the weights of these tests, any one tensor halved moves the output by far more than the tolerance."""
    reference = unet_reference("sdxl", torch.float64)
    unet = ours(UNet, read_unet(dict(reference.config), "sdxl")[0], reference, conv=False)
    inputs = {name: value[1:2] for name, value in unet_inputs(unet.config, (8, 8), torch.float64)[0].items()}
    reference = vae_reference("one layer", torch.float64)
    vae = ours(VAE, read_vae(dict(reference.config), "one layer"), reference)
    pixels = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(4)).double()
    settings = CLIPTextConfig(vocab_size=60, eos_token_id=59, **TEXTS["projected gelu"])
    reference = strong(CLIPTextModelWithProjection(settings)).double()
    kind = {"architectures": ["CLIPTextModelWithProjection"]}
    text = ours(TextEncoder, read_text(settings.to_dict() | kind, "projected gelu"), reference)
    ids = torch.arange(3, 60)[None]
    for network, run in (
        (unet, lambda: unet(**inputs)),
        (vae, lambda: vae.decode(vae.encode(pixels).mean)),
        (text, lambda: text(ids).pooled),
    ):
        before = run()
        for name, parameter in network.named_parameters():
            if name.endswith("attn.k.bias"):  # shifts all of a query's scores alike, and so does nothing
                continue
            kept = parameter.clone()
            parameter.mul_(0.5)
            moved = (run() - before).abs().max() / before.abs().max()
            parameter.copy_(kept)
            assert moved > 1e-4, name


# --- full size -------------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("dtype,size", [(torch.float32, 64), (torch.float64, 24)], ids=["float32", "float64"])
@torch.no_grad()
def test_sd15_at_full_size(dtype, size):
    """The public configuration of SD 1.5: sizes and parity of all three networks."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    reference = strong(UNet2DConditionModel(cross_attention_dim=768).to(dtype), sharp=1.0)
    unet = ours(UNet, UNetConfig(), reference)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    x, context, timestep = draw(2, 4, size, size), draw(2, 77, 768), torch.tensor([1, 801])
    theirs = reference(x, timestep, encoder_hidden_states=context).sample
    assert error(unet(x, timestep, context), theirs) < TOLERANCE[dtype]
    del unet, reference
    types = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    channels = (128, 256, 512, 512)
    reference = strong(AutoencoderKL(block_out_channels=channels, layers_per_block=2, **types).to(dtype), sharp=1.0)
    vae = ours(VAE, VAEConfig(), reference)
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    pixels, latents = draw(1, 3, 8 * size // 2, 128).clamp(-1, 1), draw(1, 4, size // 2, 16)
    assert error(vae.encode(pixels).mean, reference.encode(pixels).latent_dist.mean) < TOLERANCE[dtype]
    assert error(vae.decode(latents), reference.decode(latents).sample) < TOLERANCE[dtype]
    del vae, reference
    settings = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    reference = strong(CLIPTextModel(settings).to(dtype), sharp=1.0)
    encoder = ours(TextEncoder, TextConfig(), reference)
    assert sum(p.numel() for p in encoder.parameters()) == 123_060_480
    ids = torch.randint(0, 49_408, (2, 77), generator=generator)
    assert error(encoder(ids).final, reference(ids).last_hidden_state) < TOLERANCE[dtype]
