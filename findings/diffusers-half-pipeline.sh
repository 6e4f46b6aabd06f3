#!/usr/bin/env bash
# Expected: a Stable Diffusion pipeline saved in float16 and opened with from_pretrained, no dtype
# named, runs.
# What happens: transformers gives the text encoder the precision of its file (float16), diffusers
# gives the UNet and the VAE float32, and drawing raises a RuntimeError about the two.
# Who meets it: whoever saves a pipeline in half precision and opens the folder without torch_dtype.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet diffusers==0.42.1 transformers==5.23.0
"$folder/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers")), sep=", ")
import json
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def precisions_and_outcome(folder, **options):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    parts = {name: str(getattr(pipeline, name).dtype) for name in ("text_encoder", "unet", "vae")}
    try:
        return parts, f"{len(pipeline('a', num_inference_steps=1, height=8, width=8).images)} picture"
    except RuntimeError as error:
        return parts, f"RuntimeError: {error}"


with tempfile.TemporaryDirectory() as folder:
    words, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
    words.write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}))
    merges.write_text("#version: 0.2\n")
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32,), layers_per_block=1, norm_num_groups=8, cross_attention_dim=16,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    )
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=3, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    ))
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(32,), norm_num_groups=8), text_encoder=text_encoder,
        tokenizer=CLIPTokenizer(str(words), str(merges), model_max_length=16), unet=unet, scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(Path(folder, "half"))
    plain = precisions_and_outcome(Path(folder, "half"))
    named = precisions_and_outcome(Path(folder, "half"), torch_dtype=torch.float32)
print("no dtype named:", *plain)
print("torch_dtype=torch.float32:", *named)
assert plain[0] == {"text_encoder": "torch.float16", "unet": "torch.float32", "vae": "torch.float32"}
assert "Half" in plain[1] and "Float" in plain[1].title()
assert set(named[0].values()) == {"torch.float32"} and named[1] == "1 picture"
EOF
