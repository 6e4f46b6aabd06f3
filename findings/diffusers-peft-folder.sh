#!/usr/bin/env bash
# Expected: a LoRA that PEFT has saved, adapter_model.safetensors beside adapter_config.json, is loaded
# into the same UNet by diffusers' load_lora_adapter as PEFT applies it.
# What happens: without a prefix argument nothing is loaded, and a log line says that this is safe to
# ignore. With prefix="base_model.model" all weights are found, but adapter_config.json is not read:
# the file holds no alpha, so diffusers takes the rank for it. With r=4 and lora_alpha=16 the LoRA acts
# with a quarter of its strength, without a word.
# Who meets it: whoever trains a UNet with get_peft_model and save_pretrained, and draws with diffusers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet diffusers==0.42.1 transformers==5.23.0 peft==0.21.2
"$folder/bin/python" -W ignore - "$folder" <<'EOF'
import sys
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path

print(*(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "peft")), sep=", ")
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging
from peft import LoraConfig, get_peft_model

logging.set_verbosity_error()
torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
).eval()
inputs = torch.randn(1, 4, 8, 8), 10, torch.randn(1, 5, 32)
config = LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "to_v"], init_lora_weights=False)
trained = get_peft_model(deepcopy(unet), config).eval()
trained.save_pretrained(sys.argv[1] + "/lora")
print("files:", *sorted(path.name for path in Path(sys.argv[1], "lora").iterdir()))


@torch.no_grad()
def change(network):
    return network(*inputs).sample - unet(*inputs).sample


def loaded(**options):
    network = deepcopy(unet)
    network.load_lora_adapter(sys.argv[1] + "/lora", weight_name="adapter_model.safetensors", **options)
    return network


bare, named = loaded(), loaded(prefix="base_model.model")
scale = next(m.scaling for m in named.modules() if hasattr(m, "scaling"))
wanted = next(m.scaling for m in trained.modules() if hasattr(m, "scaling"))
print("without a prefix: change of the output", change(bare).norm().item())
print("PEFT's scaling:", wanted["default"], "diffusers':", *scale.values())
for module in named.modules():  # at PEFT's scaling it is the same LoRA
    if hasattr(module, "scaling"):
        module.scaling = dict.fromkeys(module.scaling, wanted["default"])
same = torch.allclose(change(named), change(trained), atol=1e-5)
print("at PEFT's scaling the outputs are equal:", same)
assert change(bare).norm() == 0 and wanted["default"] == 4.0 and [*scale.values()] == [4.0 / 4] and same
EOF
