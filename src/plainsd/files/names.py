"""The name of each weight: ours, diffusers' and the original single file's, side by side.

The tables are read in both directions. A row has three names of one module; `{i}` is a level, `{j}` a position in the
level, `{n}` our flat index of blocks and `{m}` = n + 1, `{k}` a repeated block; `.weight` and `.bias` are appended. A
mark after `:` says how the file's tensor differs from ours:

    conv        (o, i, 1, 1) where ours is (o, i): a 1x1 convolution that we compute as a linear layer
    maybe-conv  conv or not, by the variant (SD 1.x has convolutions, SD 2.x and SDXL have not)
    bare        the whole name: no `.weight` follows
    transposed  bare, and the transpose of ours
    third       one tensor, `_weight` or `_bias`, holds q, k and v of three rows, stacked
    half        one tensor holds k and v of two rows, stacked
"""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from plainsd.models.clip import TextEncoder
from plainsd.models.control import ControlNet
from plainsd.models.image_prompt import ImageAdapter
from plainsd.models.t2i_adapter import T2IAdapter
from plainsd.models.tiny_vae import TinyBlock, TinyVAE
from plainsd.models.unet import UNet, WayDown
from plainsd.models.vae import VAE
from plainsd.models.vision import VisionTower

NameRow = tuple[str, ...]  # three names

# fmt: off
# --- the UNet: ours, diffusers, original -----------------------------------------------------------------------------

UNET: tuple[NameRow, ...] = (
    ("time.0",     "time_embedding.linear_1",   "time_embed.0"),
    ("time.2",     "time_embedding.linear_2",   "time_embed.2"),
    ("guidance",   "time_embedding.cond_proj",  "time_embed.cond_proj"),
    ("vector.0",   "add_embedding.linear_1",    "label_emb.0.0"),
    ("vector.2",   "add_embedding.linear_2",    "label_emb.0.2"),
    ("conv_in",    "conv_in",                   "input_blocks.0.0"),
    ("norm_out",   "conv_norm_out",             "out.0"),
    ("conv_out",   "conv_out",                  "out.2"),
)
UNET_DOWN: tuple[NameRow, ...] = (
    ("down.{n}.res",            "down_blocks.{i}.resnets.{j}",          "input_blocks.{m}.0"),
    ("down.{n}.attn",           "down_blocks.{i}.attentions.{j}",       "input_blocks.{m}.1"),
    ("down.{n}.resample.conv",  "down_blocks.{i}.downsamplers.0.conv",  "input_blocks.{m}.0.op"),
)
UNET_MID: tuple[NameRow, ...] = (
    ("mid.res1",  "mid_block.resnets.0",     "middle_block.0"),
    ("mid.attn",  "mid_block.attentions.0",  "middle_block.1"),
    ("mid.res2",  "mid_block.resnets.1",     "middle_block.2"),
)
UNET_UP: tuple[NameRow, ...] = (
    ("up.{n}.res",            "up_blocks.{i}.resnets.{j}",        "output_blocks.{n}.0"),
    ("up.{n}.attn",           "up_blocks.{i}.attentions.{j}",     "output_blocks.{n}.1"),
    ("up.{n}.resample.conv",  "up_blocks.{i}.upsamplers.0.conv",  "output_blocks.{n}.{last}.conv"),
)
UNET_RES: tuple[NameRow, ...] = (
    ("norm1",  "norm1",          "in_layers.0"),
    ("conv1",  "conv1",          "in_layers.2"),
    ("emb",    "time_emb_proj",  "emb_layers.1"),
    ("norm2",  "norm2",          "out_layers.0"),
    ("conv2",  "conv2",          "out_layers.3"),
    ("skip",   "conv_shortcut",  "skip_connection"),
)
TRANSFORMER: tuple[NameRow, ...] = (
    ("norm",      "norm",                 "norm"),
    ("proj_in",   "proj_in:maybe-conv",   "proj_in:maybe-conv"),
    ("proj_out",  "proj_out:maybe-conv",  "proj_out:maybe-conv"),
)
TRANSFORMER_BLOCK = tuple((f"blocks.{{k}}.{ours}", *[f"transformer_blocks.{{k}}.{theirs}"] * 2) for ours, theirs in (
    ("norm1",           "norm1"),
    ("self_attn.q",     "attn1.to_q"),
    ("self_attn.k",     "attn1.to_k"),
    ("self_attn.v",     "attn1.to_v"),
    ("self_attn.out",   "attn1.to_out.0"),
    ("norm2",           "norm2"),
    ("cross_attn.q",    "attn2.to_q"),
    ("cross_attn.k",    "attn2.to_k"),
    ("cross_attn.v",    "attn2.to_v"),
    ("cross_attn.out",  "attn2.to_out.0"),
    ("norm3",           "norm3"),
    ("ff.up",           "ff.net.0.proj"),
    ("ff.down",         "ff.net.2"),
))

# --- a ControlNet, beside its way down: ours, diffusers, original ----------------------------------------------------

CONTROL_HINT: tuple[NameRow, ...] = (  # {k} in our list; diffusers names the first and the last apart
    ("hint.{k}",  "controlnet_cond_embedding.blocks.{before}",  "input_hint_block.{twice}"),
)
CONTROL_ZERO: tuple[NameRow, ...] = (("zero.{n}", "controlnet_down_blocks.{n}", "zero_convs.{n}.0"),)
CONTROL_MID: tuple[NameRow, ...] = (("zero.{n}", "controlnet_mid_block", "middle_block_out.0"),)
UNION = tuple((f"union.{ours}", *[theirs] * 2) for ours, theirs in (
    ("kind",      "task_embedding:bare"),
    ("norm1",     "transformer_layes.0.ln_1"),
    ("attn.q",    "transformer_layes.0.attn.in_proj:third"),
    ("attn.k",    "transformer_layes.0.attn.in_proj:third"),
    ("attn.v",    "transformer_layes.0.attn.in_proj:third"),
    ("attn.out",  "transformer_layes.0.attn.out_proj"),
    ("norm2",     "transformer_layes.0.ln_2"),
    ("fc1",       "transformer_layes.0.mlp.c_fc"),
    ("fc2",       "transformer_layes.0.mlp.c_proj"),
    ("shift",     "spatial_ch_projs"),
    ("time.0",    "control_add_embedding.linear_1"),
    ("time.2",    "control_add_embedding.linear_2"),
))

# --- a T2I-Adapter: ours, diffusers, original ------------------------------------------------------------------------

T2I_TOP: tuple[NameRow, ...] = (("conv_in", "adapter.conv_in", "conv_in"),)
T2I_LEVEL: tuple[NameRow, ...] = (  # {n}: the original counts full adapters' blocks through all levels
    ("levels.{i}.proj_in",   "adapter.body.{i}.in_conv",   "body.{n}.in_conv"),
    ("levels.{i}.proj_out",  "adapter.body.{i}.out_conv",  "body.{i}.out_conv"),
)
T2I_BLOCK: tuple[NameRow, ...] = (
    ("levels.{i}.blocks.{j}.conv1",  "adapter.body.{i}.resnets.{j}.block1",  "{place}.block1"),
    ("levels.{i}.blocks.{j}.conv2",  "adapter.body.{i}.resnets.{j}.block2",  "{place}.block2"),
)

# --- the VAE: ours, diffusers, original ------------------------------------------------------------------------------

VAE_TOP: tuple[NameRow, ...] = (
    ("encoder.conv_in",   "encoder.conv_in",        "encoder.conv_in"),
    ("encoder.norm",      "encoder.conv_norm_out",  "encoder.norm_out"),
    ("encoder.conv_out",  "encoder.conv_out",       "encoder.conv_out"),
    ("quant",             "quant_conv",             "quant_conv"),
    ("post_quant",        "post_quant_conv",        "post_quant_conv"),
    ("decoder.conv_in",   "decoder.conv_in",        "decoder.conv_in"),
    ("decoder.norm",      "decoder.conv_norm_out",  "decoder.norm_out"),
    ("decoder.conv_out",  "decoder.conv_out",       "decoder.conv_out"),
)
VAE_LEVEL: tuple[NameRow, ...] = (        # {r}: the original counts the decoder's levels from the shallowest
    ("encoder.levels.{i}.res.{j}", "encoder.down_blocks.{i}.resnets.{j}", "encoder.down.{i}.block.{j}"),
    ("decoder.levels.{i}.res.{j}", "decoder.up_blocks.{i}.resnets.{j}", "decoder.up.{r}.block.{j}"),
    ("encoder.levels.{i}.resample.conv",
     "encoder.down_blocks.{i}.downsamplers.0.conv", "encoder.down.{i}.downsample.conv"),
    ("decoder.levels.{i}.resample.conv",
     "decoder.up_blocks.{i}.upsamplers.0.conv", "decoder.up.{r}.upsample.conv"),
)
VAE_MID: tuple[NameRow, ...] = tuple((f"{side}.{ours}", f"{side}.{diffusers}", f"{side}.{original}")
                                 for side in ("encoder", "decoder")
                for ours, diffusers, original in (
    ("mid.res1",  "mid_block.resnets.0",     "mid.block_1"),
    ("mid.attn",  "mid_block.attentions.0",  "mid.attn_1"),
    ("mid.res2",  "mid_block.resnets.1",     "mid.block_2"),
))
VAE_RES: tuple[NameRow, ...] = (
    ("norm1",  "norm1",          "norm1"),
    ("conv1",  "conv1",          "conv1"),
    ("norm2",  "norm2",          "norm2"),
    ("conv2",  "conv2",          "conv2"),
    ("skip",   "conv_shortcut",  "nin_shortcut"),
)
VAE_ATTENTION: tuple[NameRow, ...] = (
    ("norm",      "group_norm",  "norm"),
    ("attn.q",    "to_q",        "q:conv"),
    ("attn.k",    "to_k",        "k:conv"),
    ("attn.v",    "to_v",        "v:conv"),
    ("attn.out",  "to_out.0",    "proj_out:conv"),
)

# --- the text encoder: ours, transformers (SD 1.x also in single files), OpenCLIP (SD 2.x and SDXL in single files) --

TEXT: tuple[NameRow, ...] = (
    ("token",       "text_model.embeddings.token_embedding",     "token_embedding"),
    ("position",    "text_model.embeddings.position_embedding",  "positional_embedding:bare"),
    ("norm",        "text_model.final_layer_norm",               "ln_final"),
    ("projection",  "text_projection",                           "text_projection:transposed"),
)
TEXT_BLOCK = tuple((f"blocks.{{k}}.{ours}", f"text_model.encoder.layers.{{k}}.{hugging}",
                    f"transformer.resblocks.{{k}}.{openclip}") for ours, hugging, openclip in (
    ("norm1",     "layer_norm1",         "ln_1"),
    ("attn.q",    "self_attn.q_proj",    "attn.in_proj:third"),
    ("attn.k",    "self_attn.k_proj",    "attn.in_proj:third"),
    ("attn.v",    "self_attn.v_proj",    "attn.in_proj:third"),
    ("attn.out",  "self_attn.out_proj",  "attn.out_proj"),
    ("norm2",     "layer_norm2",         "ln_2"),
    ("fc1",       "mlp.fc1",             "mlp.c_fc"),
    ("fc2",       "mlp.fc2",             "mlp.c_proj"),
))

# --- the image encoder, likewise -------------------------------------------------------------------------------------

VISION: tuple[NameRow, ...] = (
    ("class_token",  "vision_model.embeddings.class_embedding:bare",  "visual.class_embedding:bare"),
    ("patches",      "vision_model.embeddings.patch_embedding",       "visual.conv1"),
    ("position",     "vision_model.embeddings.position_embedding",    "visual.positional_embedding:bare"),
    ("norm_in",      "vision_model.pre_layrnorm",                     "visual.ln_pre"),
    ("norm_out",     "vision_model.post_layernorm",                   "visual.ln_post"),
    ("projection",   "visual_projection",                             "visual.proj:transposed"),
)
VISION_BLOCK = tuple((ours, hugging.replace("text_model", "vision_model"), f"visual.{openclip}")
                     for ours, hugging, openclip in TEXT_BLOCK)

# --- an image prompt's adapter, beside the vectors it multiplies; its file has one naming ----------------------------

IMAGE_READERS: dict[str, tuple[tuple[str, str], ...]] = {
    "base": (("proj", "proj"), ("norm", "norm")),
    "full": (("fc1", "proj.0"), ("fc2", "proj.2"), ("norm", "proj.3")),
    "plus": (("queries", "latents:bare"), *((name, name) for name in ("proj_in", "proj_out", "norm_out"))),
}
RESAMPLER_BLOCK: tuple[tuple[str, str], ...] = (
    ("norm_states",   "0.norm1"),
    ("norm_queries",  "0.norm2"),
    ("attn.q",        "0.to_q"),
    ("attn.k",        "0.to_kv:half"),
    ("attn.v",        "0.to_kv:half"),
    ("attn.out",      "0.to_out"),
    ("norm_ff",       "1.0"),
    ("fc1",           "1.1"),
    ("fc2",           "1.3"),
)

# --- other spellings of the same names -------------------------------------------------------------------------------

SPELLINGS = (                         # as the tables have it, as some diffusers folders have it
    ("text_model.",  ""),             # transformers 5.6 and later write text encoders without the prefix
    ("vision_model.",  ""),
    (".to_q.",       ".query."),      # and VAE folders of 2022 have the old names of attention
    (".to_k.",       ".key."),
    (".to_v.",       ".value."),
    (".to_out.0.",   ".proj_attn."),
    ("cond_stage_model.", "conditioner.embedders.0."),  # SD-Turbo's own single file names its text encoder as SDXL's do
    (".model.text_projection",  ".model.text_projection.weight"),  # diffusers' old script for SDXL; not transposed
)
# fmt: on

COLUMN = {"diffusers": 1, "original": 2, "transformers": 1, "openclip": 2}


def under(row: NameRow, table: Sequence[NameRow]) -> list[NameRow]:
    """The rows of `table` for the block that `row` names."""
    return [tuple(f"{block}.{leaf}" for block, leaf in zip(row, leaves, strict=True)) for leaves in table]


def filled_rows(table: tuple[NameRow, ...], **numbers: int) -> list[NameRow]:
    return [tuple(name.format(**numbers) for name in row) for row in table]


def unet_rows(unet: WayDown) -> Iterator[NameRow]:
    """Every module with weights that a UNet of this size can have; some exist only at some levels."""
    config = unet.config
    depth, layers, levels = config.depth, config.layers, len(config.channels)
    deepest = max(*depth, config.mid_depth or 0, *(most for i in range(levels) for most in config.going_up(i)))
    transformer = list(TRANSFORMER) + [row for k in range(deepest) for row in filled_rows(TRANSFORMER_BLOCK, k=k)]
    yield from UNET
    blocks = list(UNET_MID)
    for i, j in product(range(levels), range(layers + 1)):
        n, last = i * (layers + 1) + j, 2 if depth[levels - 1 - i] else 1
        blocks += filled_rows(UNET_DOWN, i=i, j=j, n=n, m=n + 1) + filled_rows(UNET_UP, i=i, j=j, n=n, last=last)
    for row in blocks:
        kind = row[0].rpartition(".")[2]
        table = transformer if kind == "attn" else UNET_RES if kind.startswith("res") else ()
        yield from under(row, table) if table else [row]


def control_rows(net: ControlNet) -> Iterator[NameRow]:
    yield from unet_rows(net)
    yield from UNION
    for k in range(len(net.hint)):
        (row,) = filled_rows(CONTROL_HINT, k=k, before=k - 1, twice=2 * k)
        ends = {0: "conv_in", len(net.hint) - 1: "conv_out"}
        yield (row[0], f"controlnet_cond_embedding.{ends[k]}" if k in ends else row[1], row[2])
    for n in range(len(net.zero)):
        yield from filled_rows(CONTROL_MID if n == len(net.zero) - 1 else CONTROL_ZERO, n=n)


def t2i_rows(adapter: T2IAdapter) -> Iterator[NameRow]:
    config, light = adapter.config, adapter.config.kind == "light"
    yield from T2I_TOP
    for i in range(len(config.channels)):
        first = i if light else i * config.layers
        yield from filled_rows(T2I_LEVEL, i=i, n=first)
        for j in range(config.layers):
            place = f"body.{i}.body.{j}" if light else f"body.{first + j}"
            yield from (tuple(name.format(i=i, j=j, place=place) for name in row) for row in T2I_BLOCK)


def vae_rows(vae: VAE) -> Iterator[NameRow]:
    levels = len(vae.config.channels)
    yield from VAE_TOP
    for row in VAE_MID:
        yield from under(row, VAE_ATTENTION if row[0].endswith("attn") else VAE_RES)
    for i, j in product(range(levels), range(vae.config.layers + 1)):
        for row in filled_rows(VAE_LEVEL, i=i, j=j, r=levels - 1 - i):
            yield from under(row, VAE_RES) if ".res." in row[0] else [row]


def tiny_vae_rows(vae: TinyVAE) -> Iterator[NameRow]:
    """TAESD is two flat lists of layers; in the published files the decoder's starts with a clamp, which is counted."""
    for side, shift in (("encoder", 0), ("decoder", 1)):
        layers = vae.get_submodule(f"{side}.layers") if getattr(vae, side) is not None else ()
        for n, layer in enumerate(layers):
            for leaf in (".conv.0", ".conv.2", ".conv.4") if isinstance(layer, TinyBlock) else ("",):
                ours = f"{side}.layers.{n}{leaf}"
                yield ours, ours, f"{side}.{n + shift}{leaf}"


def vision_rows(tower: VisionTower) -> Iterator[NameRow]:
    yield from VISION
    for k in range(tower.config.layers):
        yield from filled_rows(VISION_BLOCK, k=k)


def image_adapter_rows(adapter: ImageAdapter) -> Iterator[NameRow]:
    """In files the projections are numbered 1, 3, 5, ...: with the self-attentions between them, which have none."""
    config, prefix = adapter.config, "image_proj."
    pairs = [(f"reader.{ours}", prefix + theirs) for ours, theirs in IMAGE_READERS[config.kind]]
    for k in range(config.layers if config.kind == "plus" else 0):
        pairs += [(f"reader.blocks.{k}.{ours}", f"{prefix}layers.{k}.{theirs}") for ours, theirs in RESAMPLER_BLOCK]
    for n in range(len(config.widths)):
        pairs += [(f"{side}.{n}", f"ip_adapter.{2 * n + 1}.to_{side}_ip") for side in ("k", "v")]
    yield from ((ours, theirs, theirs) for ours, theirs in pairs)


def text_rows(encoder: TextEncoder) -> Iterator[NameRow]:
    yield from TEXT
    for k in range(encoder.config.layers):
        yield from filled_rows(TEXT_BLOCK, k=k)


NAME_ROWS = {
    UNet: unet_rows,
    ControlNet: control_rows,
    T2IAdapter: t2i_rows,
    VAE: vae_rows,
    TinyVAE: tiny_vae_rows,
    TextEncoder: text_rows,
    VisionTower: vision_rows,
    ImageAdapter: image_adapter_rows,
}


@dataclass(frozen=True)
class TensorPlace:
    """One tensor of a file: its name there, which of our tensors it holds, and how it differs from them."""

    name: str
    ours: tuple[str, ...]
    mark: str = ""

    def to_ours(self, tensor: Tensor) -> list[Tensor]:
        if self.mark == "third":
            return list(tensor.chunk(3))
        if self.mark == "half":
            return list(tensor.chunk(2))
        if self.mark == "transposed":
            return [tensor.T]
        if self.mark.endswith("conv") and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
            return [tensor[:, :, 0, 0]]
        return [tensor]

    def to_theirs(self, tensors: list[Tensor]) -> Tensor:
        if self.mark in ("third", "half"):
            return torch.cat(tensors)
        (tensor,) = tensors
        if self.mark == "transposed":
            return tensor.T
        return tensor[:, :, None, None] if self.mark == "conv" and tensor.ndim == 2 else tensor

    def called(self, name: str) -> "TensorPlace":
        """The same place under another spelling: a linear layer's `.weight` is not transposed."""
        plain = self.mark == "transposed" and name.endswith(".weight")
        return TensorPlace(name, self.ours, "" if plain else self.mark)


def places(network: nn.Module, layout: str, *, conv: bool = True) -> list[TensorPlace]:
    """All tensors of a network as a file in `layout` stores them, in our order; `conv` decides `maybe-conv`."""
    names = {row[0]: row[COLUMN[layout]] for row in NAME_ROWS[type(network)](network)}
    found: dict[str, TensorPlace] = {}
    for ours in network.state_dict():
        module, _, leaf = ours.rpartition(".")
        theirs, _, mark = names[ours if ours in names else module].partition(":")
        if mark == "maybe-conv":
            mark = "conv" if conv else "maybe-conv"
        name = theirs if mark in ("bare", "transposed") else theirs + ("_" if mark == "third" else ".") + leaf
        before = found[name].ours if name in found else ()
        found[name] = TensorPlace(name, (*before, ours), mark)
    return list(found.values())


def spelled(name: str, names: Container[str]) -> str:
    """A tensor's name in the spelling of a file that holds `names`; the table's where the file lacks it."""
    others = (name.replace(ours, theirs, 1) for ours, theirs in SPELLINGS if ours in name)
    return name if name in names else next((other for other in others if other in names), name)
