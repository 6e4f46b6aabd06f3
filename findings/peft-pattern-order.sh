#!/usr/bin/env bash
# Expected: a LoRA adapter saved with save_pretrained and loaded again gives the same output.
# What happens: the first key of alpha_pattern that matches a layer's name (or the end of it) wins,
# and save_pretrained writes the configuration with its keys sorted. {"up.proj": 8, "proj": 4} gives
# the layer up.proj alpha 8 before saving and 4 after loading, without a word.
# Who meets it: whoever puts a special case before a general one in alpha_pattern.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet peft==0.21.2 transformers==5.23.0
"$folder/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "peft", "transformers")), sep=", ")
import tempfile
from collections import OrderedDict

import torch
from peft import LoraConfig, PeftModel, get_peft_model


def network():
    torch.manual_seed(0)
    block = [torch.nn.Sequential(OrderedDict(proj=torch.nn.Linear(4, 4))) for _ in range(2)]
    return torch.nn.Sequential(OrderedDict(down=block[0], up=block[1]))


def alphas(model):
    layers = {"down": model.base_model.model.down.proj, "up": model.base_model.model.up.proj}
    return {name: layer.scaling["default"] * layer.r["default"] for name, layer in layers.items()}


pattern = {"up.proj": 8, "proj": 4}
config = LoraConfig(r=2, lora_alpha=2, target_modules=["proj"], alpha_pattern=pattern, init_lora_weights=False)
model = get_peft_model(network(), config)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(network(), folder)
x = torch.ones(1, 4)
difference = (model(x) - loaded(x)).abs().max().item()
print(f"alphas before saving: {alphas(model)}")
print(f"alphas after loading: {alphas(loaded)}")
print(f"the output differs: {difference > 1e-3}")
assert alphas(model) == {"down": 4, "up": 8} and alphas(loaded) == {"down": 4, "up": 4} and difference > 1e-3
EOF
