#!/usr/bin/env bash
# Expected: a LoRA file of kohya's trainer for the text encoder is loaded layer by layer, whichever
# layers it holds.
# What happens: diffusers recognises the attention layers by out_proj. A file with q_proj, k_proj or
# v_proj but no out_proj raises a ValueError that names no layer, and where it also holds layers of
# the feed-forward part only those are loaded and the others left out with a warning.
# Who meets it: whoever trained, or kept, only part of the attention of the text encoder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet diffusers==0.42.1 transformers==5.23.0 peft==0.21.2
"$folder/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "peft")), sep=", ")
import logging

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft.tuners.lora import LoraLayer
from transformers import CLIPTextConfig, CLIPTextModel

logging.disable(logging.CRITICAL)


def loaded(*names):
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    network, file = CLIPTextModel(CLIPTextConfig(vocab_size=4, **shape)), {}
    for name in names:
        key = "lora_te_text_model_encoder_layers_0_" + name.replace(".", "_")
        file[f"{key}.lora_down.weight"] = torch.ones(4, 16)
        file[f"{key}.lora_up.weight"] = torch.ones(16, 4)
        file[f"{key}.alpha"] = torch.tensor(4.0)
    weights, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(file)
    try:
        StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(
            weights, alphas, network, prefix="text_encoder", adapter_name="lora"
        )
    except ValueError as error:
        return f"ValueError: {error}"
    return " ".join(sorted(n.split("layers.0.")[1] for n, m in network.named_modules() if isinstance(m, LoraLayer)))


q, k, out, feed_forward = "self_attn.q_proj", "self_attn.k_proj", "self_attn.out_proj", "mlp.fc1"
seen = {}
for names in ((q, k, out), (q, k), (q, k, feed_forward), (q, k, out, feed_forward)):
    seen[names] = loaded(*names)
    print(f"in the file {', '.join(names)}; loaded: {seen[names]}")
error = "ValueError: Could not automatically infer state dict type"
assert list(seen.values()) == [f"{k} {out} {q}", error, feed_forward, f"{feed_forward} {k} {out} {q}"], seen
EOF
